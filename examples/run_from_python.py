"""A run from Python: files become a data set, a model is trained on it, measured, and continues a text.

python examples/run_from_python.py runs/example docs
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from tinyexperts.data import PrepareConfig, prepare
from tinyexperts.layers import PEERConfig
from tinyexperts.training import evaluate_run, generate_text, recipes, train
from tinyexperts.training.config import with_settings


def main(folder: Path, texts: Path, num_steps: int = 50, vocab_size: int = 1024) -> str:
    """Train on the files of a folder; return what the model writes after "The "."""
    prepare(PrepareConfig(output=folder / "data", files=(texts,), vocab_size=vocab_size))
    recipe = recipes.peer()
    layer = PEERConfig(num_experts=64**2, num_heads=4, query_dim=32)
    model = replace(recipe.model, vocab_size=vocab_size, context_length=128, expert_layer=layer)
    config = replace(recipe, run=folder / "run", data=folder / "data", model=model)
    settings = {"num_steps": num_steps, "training_flops": None, "optimizer.table_learning_rate": 5e-3}
    train(with_settings(config, settings))
    measured = evaluate_run(folder / "run").evaluation.summary()
    print(f"perplexity {measured['perplexity']:.1f} on {measured['num_tokens']:,} held-out tokens")
    return generate_text(folder / "run", "The ", max_new_tokens=32)


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), Path(sys.argv[2])))
