"""A decoder of transformers with PEER in its middle block, trained by transformers' Trainer, saved and loaded again.

python examples/huggingface_trainer.py

It reads a few modules of the standard library byte by byte, so that it needs no tokenizer and no download.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tinyexperts import PEER
from tinyexperts.hub import load_replaced, replace_feed_forward
from tinyexperts.optim import build_optimizers

CONTEXT = 128


def rows_of_bytes() -> list[dict[str, torch.Tensor]]:
    """Cut the sources of some modules into rows of so many bytes."""
    text = b"".join(inspect.getsource(module).encode() for module in (argparse, ast, json, inspect))
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    rows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return [{"input_ids": row, "labels": row} for row in rows]


def main(folder: Path, steps: int = 200) -> list[float]:
    """Train, save, load and generate; return the losses."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=CONTEXT))
    replace_feed_forward(model, [2], lambda width: PEER(width, 64**2, num_heads=4, experts_per_head=8, query_dim=32))
    # The table takes a higher learning rate than the matrices. Without this the Trainer makes an AdamW of one rate.
    (optimizer,) = build_optimizers(
        model, sparse_tables=False, matrix_lr=3e-3, embedding_lr=1e-2, head_lr=3e-3, vector_lr=3e-3, table_lr=1e-2
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        warmup_steps=10,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows_of_bytes(), optimizers=(optimizer, None))
    trainer.train()
    trainer.save_model(str(folder))
    again = load_replaced(folder)
    prompt = torch.tensor([list(b"def ")])
    written = again.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False)
    print(bytes(written[0].tolist()).decode(errors="replace"))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
