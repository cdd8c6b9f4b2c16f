"""Would a table take up new facts better if the router found the experts that no old text retrieves, or new ones?

Three ways to make room before teaching, each against the table as it is: sub-keys that no old query reaches are drawn
again, with a margin or at the new queries, and sub-keys are added with a margin. The margin: a key is as close to the
new queries as it can be while no old query of the sample would retrieve an expert of it (a linear program a key). The
new experts' v is zero. Run:

python benchmarks/room_for_new_facts.py --run runs/demo/peer-seed0 --new runs/demo/new-airports --output runs/room
(`make demo` trains the run, `make teach` makes the data)
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.cluster.vq import kmeans2
from scipy.optimize import linprog
from torch import Tensor

from tinyexperts.data import TokenDataset, TokenLoader, TokenSplit
from tinyexperts.files import write_atomically
from tinyexperts.layers import PEER, PEERConfig
from tinyexperts.layers.product_key_router import Routing
from tinyexperts.model import Transformer
from tinyexperts.training import Taught, TeachConfig, load_model, teach_run
from tinyexperts.training.checkpoint import save_checkpoint
from tinyexperts.training.config import Remember
from tinyexperts.training.config_file import to_json
from tinyexperts.training.run_folder import read_config

MAX_TOKENS = 60_000
SLACK = 1e-3
# Keys are chosen among so many times as many, and none is longer than this in a dimension.
CANDIDATES, LONGEST = 4, 20.0


@dataclass(frozen=True)
class Queries:
    """The queries of a sample of texts, and how far each is from retrieving another expert."""

    halves: np.ndarray
    """The halves of the queries (fp64 [M, H, 2, Q/2])."""
    thresholds: np.ndarray
    """For each half, the score from which a sub-key's expert is retrieved with the best partner (fp64 [M, H, 2])."""
    retrievals: np.ndarray
    """The retrievals of each expert (int64 [N])."""


def layer_of(model: Transformer) -> PEER:
    """Return the only layer of experts of a model."""
    (layer,) = (module for module in model.modules() if isinstance(module, PEER))
    return layer


def windows(split: TokenSplit, context: int) -> Iterator[Tensor]:
    """Yield the token ids (int64 [4, T]) of windows, up to MAX_TOKENS."""
    loader = TokenLoader(split, batch_size=4, context_length=context, seed=0)
    for number in range(min(MAX_TOKENS // (4 * context), -(-loader.num_windows // 4))):
        yield loader.batch(number).inputs


@torch.no_grad()
def queries_of(model: Transformer, split: TokenSplit) -> Queries:
    """Return the queries of a sample of texts, with what they retrieve."""
    layer = layer_of(model)
    router = layer.router
    found: list[tuple[Tensor, Routing]] = []
    handle = router.register_forward_hook(lambda _, inputs, routing: found.append((router.queries(inputs[0]), routing)))
    for inputs in windows(split, model.config.context_length):
        model(inputs)
    handle.remove()
    queries = torch.cat([query for query, _ in found])
    halves = queries.view(*queries.shape[:2], 2, -1)
    best = torch.einsum("mhpq,psq->mhps", halves, router.sub_keys).amax(-1)
    last = torch.cat([routing.scores.flatten(0, -3)[..., -1] for _, routing in found])  # of the K-th expert
    ids = torch.cat([routing.ids.flatten() for _, routing in found])
    return Queries(
        halves=halves.double().numpy(),
        thresholds=(last[..., None] - best.flip(-1)).double().numpy(),
        retrievals=ids.bincount(minlength=len(layer.experts)).numpy(),
    )


def margin_keys(old: Queries, new: Queries, half: int, number: int) -> Tensor:
    """Return sub-keys [number, Q/2] that no old query reaches, and that many new ones do."""
    width = old.halves.shape[-1]
    ours, ours_from = old.halves[:, :, half].reshape(-1, width), old.thresholds[:, :, half].ravel() - SLACK
    theirs, theirs_from = new.halves[:, :, half].reshape(-1, width), new.thresholds[:, :, half].ravel()
    _, labels = kmeans2(theirs, CANDIDATES * number, seed=0, minit="++")
    start = np.random.default_rng(0).choice(len(ours), min(3000, len(ours)), replace=False)
    keys = []
    for label in np.unique(labels):
        centre, active = theirs[labels == label].mean(0), start
        while True:  # only constraints that are broken are added
            bounds = [(-LONGEST, LONGEST)] * width
            key = linprog(-centre, A_ub=ours[active], b_ub=ours_from[active], bounds=bounds, method="highs").x
            broken = np.flatnonzero(ours @ key > ours_from + SLACK / 2)
            if not len(broken):
                break
            active = np.concatenate([active, broken[np.argsort(-(ours @ key - ours_from)[broken])[:500]]])
        keys.append(key)
    reached = theirs @ np.array(keys).T > theirs_from[:, None]
    chosen: list[int] = []
    for _ in range(number):  # the key that reaches most queries that no other does
        gains = (reached & ~reached[:, chosen].any(1, keepdims=True)).sum(0)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
    print(f"  half {half}: {number} keys reach {reached[:, chosen].any(1).mean():.1%} of the new queries")
    return torch.tensor(np.array(keys)[chosen], dtype=torch.float32)


def keys_at(new: Queries, half: int, number: int, length: float) -> Tensor:
    """Return sub-keys [number, Q/2] of a length at the centers of the new queries."""
    centers, _ = kmeans2(new.halves[:, :, half].reshape(-1, new.halves.shape[-1]), number, seed=0, minit="++")
    return length * torch.nn.functional.normalize(torch.tensor(centers, dtype=torch.float32), dim=-1)


@torch.no_grad()
def redrawn(model: Transformer, old: Queries, new: Queries, *, with_margin: bool) -> Transformer:
    """Return the model with other sub-keys where no old query reaches any expert of one."""
    other = Transformer(model.config)
    other.load_state_dict(model.state_dict())
    layer = layer_of(other)
    side = layer.router.num_sub_keys
    grid, is_free = old.retrievals.reshape(side, side), np.zeros((side, side), dtype=bool)
    for half in (0, 1):
        unused = np.flatnonzero(grid.sum(1 - half) == 0)
        if not len(unused):
            continue
        length = layer.router.sub_keys[half].norm(dim=-1).mean().item()
        keys = margin_keys(old, new, half, len(unused)) if with_margin else keys_at(new, half, len(unused), length)
        layer.router.sub_keys[half, unused] = keys
        is_free[unused if half == 0 else slice(None), unused if half else slice(None)] = True
    _draw_rows(layer, torch.from_numpy(np.flatnonzero(is_free)))
    return other.eval()


@torch.no_grad()
def grown(model: Transformer, old: Queries, new: Queries, more: int) -> Transformer:
    """Return the model with more sub-keys in each half."""
    side = layer_of(model).router.num_sub_keys
    config = model.config.expert_layer
    assert isinstance(config, PEERConfig)
    other = Transformer(replace(model.config, expert_layer=replace(config, num_experts=(side + more) ** 2)))
    mine, theirs = dict(other.state_dict()), model.state_dict()
    other.load_state_dict(
        {name: theirs[name] if theirs[name].shape == mine[name].shape else mine[name] for name in mine}
    )
    before, layer = layer_of(model), layer_of(other)
    for half in (0, 1):
        layer.router.sub_keys[half, :side] = before.router.sub_keys[half]
        layer.router.sub_keys[half, side:] = margin_keys(old, new, half, more)
    ids = torch.arange((side + more) ** 2).view(side + more, -1)
    layer.experts[ids[:side, :side].flatten()] = before.experts
    _draw_rows(layer, torch.cat([ids[side:].flatten(), ids[:side, side:].flatten()]))
    return other.eval()


def _draw_rows(layer: PEER, rows: Tensor) -> None:
    """Give experts a u like those of others, and a v of zero."""
    deviation = layer.experts[:, :-1].std().item()
    layer.experts[rows, :-1] = torch.empty(len(rows), *layer.experts[0, :-1].shape).normal_(std=deviation)
    layer.experts[rows, -1] = 0


@torch.no_grad()
def changed_tokens(model: Transformer, other: Transformer, split: TokenSplit) -> float:
    """Return the share of held-out old tokens whose logits are others."""
    differ = [
        (model(inputs) != other(inputs)).any(-1).float().mean()
        for inputs in windows(split, model.config.context_length)
    ]
    return torch.stack(differ).mean().item()


def saved(model: Transformer, run: Path, folder: Path) -> Path:
    """Write a model as a run on the data of another."""
    folder.mkdir(parents=True)
    config = replace(read_config(run), run=folder, model=model.config)
    write_atomically(folder / "config.json", to_json(config))
    (folder / "tokenizer.json").write_bytes((run / "tokenizer.json").read_bytes())
    save_checkpoint(folder, 0, model, [], {}, keep=1)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run of PEER with one layer of experts")
    parser.add_argument("--new", type=Path, required=True, help="data set of new facts")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs, which must not exist")
    parser.add_argument("--more-sub-keys", type=int, default=48)
    parser.add_argument("--remember", nargs="+", choices=get_args(Remember), default=["nothing", "data"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = load_model(arguments.run)
    old_data = TokenDataset.open(read_config(arguments.run).data)
    old, new = (queries_of(model, data.split("train")) for data in (old_data, TokenDataset.open(arguments.new)))
    is_free = old.retrievals == 0
    print(f"experts that no old query retrieves: {is_free.mean():.1%}")
    print(f"retrievals of new queries that go to them: {new.retrievals[is_free].sum() / new.retrievals.sum():.2%}")
    variants = {
        "as it is": model,
        "unused sub-keys drawn again, with a margin": redrawn(model, old, new, with_margin=True),
        "unused sub-keys at the new queries": redrawn(model, old, new, with_margin=False),
        f"{arguments.more_sub_keys} sub-keys more a half, with a margin": grown(
            model, old, new, arguments.more_sub_keys
        ),
    }
    table = Table("room", "remembered by", "old tokens that change at once", "old", "new")
    for number, (name, other) in enumerate(variants.items()):
        base = saved(other, arguments.run, arguments.output / f"base-{number}")
        changed = changed_tokens(model, other, old_data.split("validation"))
        for remember in arguments.remember:
            taught = taught_by(base, arguments.new, remember)
            table.add_row(name, remember, f"{changed:.1%}", *(_recall(taught, what) for what in ("old", "new")))
    Console(width=130).print(table)


def taught_by(base: Path, new: Path, remember: Remember) -> Taught:
    """Teach a run the new facts, and return what it knows."""
    output = base.with_name(f"{base.name}-{remember}")
    return teach_run(base, TeachConfig(data=new, output=output, remember=remember, threads=1), progress=False)


def _recall(taught: Taught, what: str) -> str:
    known = [each[what] for each in (taught.before, taught.after)]
    recalls = " -> ".join(f"{100 * (each.recall or 0):.1f}" for each in known)
    return f"{recalls} %, " + " -> ".join(f"{each.nats_per_fact:.2f}" for each in known) + " nats"


if __name__ == "__main__":
    main()
