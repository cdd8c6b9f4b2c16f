"""Several ranks train what one process trains, and each number of ranks goes on from the checkpoints of any other."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import free_port, on_ranks, run_ranks, train_on_ranks
from training_on_ranks import TABLE, read_by_rows, save_again

from tinyexperts.data import TokenDataset
from tinyexperts.layers import ProductKeyLayer
from tinyexperts.training import checkpoint_files, load_model, train
from tinyexperts.training.checkpoint import checkpoints
from tinyexperts.training.config import with_settings

D = 256


@pytest.fixture
def make(make_config, tmp_path):
    """Runs of one recipe, wide enough for four ranks."""

    def make(name: str, kind: str = "peer", **changes):
        options = {"num_steps": 50, "log_every": 1, "validation_every": 25, "checkpoint.every": 1000, "batch_size": 4}
        # Gentle: at the recipe's rates a rounding has grown to 1e-4 of the loss after 15 steps.
        rates = {f"optimizer.{part}_learning_rate": 1e-3 for part in ("matrix", "embedding", "head", "table")}
        return make_config(kind, run=tmp_path / name, model={"d_model": D}, **(options | rates | changes))

    return make


def metrics(config, split="train", after=0):
    rows = [json.loads(line) for line in (config.run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split and row["step"] > after]


def assert_same_course(config, reference, after=0):
    """Losses and gradient norms of every step, and at the end the loss of held-out tokens and their experts."""
    ours, theirs = metrics(config, after=after), metrics(reference, after=after)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], abs=1e-5)
    norms = [[row["gradient_norm"] for row in rows] for rows in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    validations = [[row["loss"] for row in metrics(each, "validation")] for each in (config, reference)]
    assert validations[0] == pytest.approx(validations[1], abs=1e-5)
    for (name, (ids, scores)), (expected, their_scores) in zip(
        routes(config).items(), routes(reference).values(), strict=True
    ):
        assert (scores - their_scores).abs().max() < 1e-4 * their_scores.abs().max(), name
        # Two experts whose scores are equal but for a rounding may change places.
        assert (ids != expected).sum() <= 0.005 * ids.numel(), name


def routes(config):
    """The experts that held-out tokens retrieve, best first, and their scores."""
    model, found = load_model(config.run), {}
    for name, module in model.named_modules():
        if isinstance(module, ProductKeyLayer):
            module.router.register_forward_hook(
                lambda _module, _inputs, routing, name=name: found.update({name: (routing.ids, routing.scores)})
            )
    tokens = TokenDataset.open(config.data).split("validation").tokens[: 16 * 20]
    with torch.inference_mode():
        model(torch.from_numpy(tokens).view(20, 16))
    return found


@pytest.mark.parametrize(
    ("num_ranks", "mesh", "only"),
    [
        (2, (1, 2), {"sparse", "moe"}),
        pytest.param(2, (2, 1), {"short"}, marks=pytest.mark.slow),
        (4, (2, 2), {"short", "dense gradients"}),
        pytest.param(4, (2, 2), None, marks=pytest.mark.slow),
    ],
)
def test_ranks_train_what_one_process_trains(make, num_ranks, mesh, only):
    kinds = {
        "sparse": {"kind": "peer"},
        "short": {"kind": "peer", "num_steps": 10},
        "dense gradients": {
            "kind": "peer",
            "optimizer.table_gradients": "dense",
            "gradient_accumulation": 2,
            "num_steps": 10,
        },
        "memory": {"kind": "pkm", "num_steps": 10},
        "moe": {"kind": "moe", "num_steps": 10},
        "dense": {"kind": "dense", "num_steps": 10},
    }
    kinds = {name: options for name, options in kinds.items() if name in (only or kinds.keys() - {"short"})}
    alone = {name: make(f"{name} alone", **options) for name, options in kinds.items()}
    shared = {name: make(name, **options, distributed={"mesh": mesh}) for name, options in kinds.items()}
    for config in alone.values():
        train(config, progress=False)
    train_on_ranks(list(shared.values()), num_ranks)
    for name, config in shared.items():
        assert_same_course(config, alone[name])
        described = [json.loads((each.run / "run.json").read_text()) for each in (config, alone[name])]
        assert described[0]["num_parameters"] == described[1]["num_parameters"]
        assert described[0]["num_ranks"] == num_ranks


def tensors(folder):
    """All tensors of a checkpoint, whole."""
    entries = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    whole = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    with checkpoint_files.one_process_is_meant():
        dcp.load(whole, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    return whole


def cut_back(config, name, step, *, mesh):
    """A copy of a run as it was at the checkpoint of a step."""
    copy = with_settings(config, {"run": config.run.with_name(name), "distributed.mesh": mesh})
    shutil.copytree(config.run, copy.run)
    for folder in checkpoints(copy.run):
        if folder.name != f"step-{step:08d}":
            shutil.rmtree(folder)
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("gradients", ["sparse", "dense"])
def test_any_number_of_ranks_goes_on_from_the_checkpoint_of_any_other(make, gradients):
    options = {"num_steps": 10, "checkpoint.every": 5, "checkpoint.keep": 5, "optimizer.table_gradients": gradients}
    meshes = {1: (1, 1), 2: (1, 2), 4: (2, 2)}
    begun = {
        num_ranks: make(f"begun on {num_ranks}", **options, distributed={"mesh": mesh})
        for num_ranks, mesh in meshes.items()
    }
    for num_ranks, config in begun.items():
        train_on_ranks([config], num_ranks)
        assert_same_course(config, begun[1])
        for others in meshes.keys() - {num_ranks}:
            copy = cut_back(config, f"{num_ranks} to {others}", 5, mesh=meshes[others])
            train_on_ranks([copy], others, resume=True)
            assert_same_course(copy, begun[1], after=5)


@pytest.mark.parametrize(("gradients", "file_bytes"), [("sparse", checkpoint_files.FILE_BYTES), ("dense", 5_000)])
def test_a_checkpoint_of_two_ranks_is_that_of_any_number_to_the_bit(make, tmp_path, gradients, file_bytes):
    config = make("run", num_steps=3, optimizer={"table_gradients": gradients}, distributed={"mesh": (1, 2)})
    train_on_ranks([config], 2)
    expected = tensors(checkpoints(config.run)[-1])
    assert f"optimizer.{TABLE.removeprefix('model.')}.exp_avg" in expected
    for mesh in ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1)):
        output, num_ranks = tmp_path / f"again on {mesh}", math.prod(mesh)
        again = with_settings(config, {"distributed.mesh": mesh})
        on_ranks(save_again, num_ranks, num_ranks, free_port(), again, output, file_bytes)
        found = tensors(checkpoints(output)[-1])
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), name
        files = {path.name for path in checkpoints(output)[-1].glob(f"{TABLE}*.safetensors")}
        assert bool(files) == (file_bytes == 5_000)


def test_checkpoints_written_beside_the_training_are_those_that_are_waited_for(make):
    options = {"num_steps": 6, "checkpoint.every": 2, "checkpoint.keep": 5}
    waiting, beside = make("waiting", **options), make("beside", **options, checkpoint={"asynchronous": True})
    train_on_ranks([waiting, beside], 2)
    assert len(checkpoints(waiting.run)) == 3
    for ours, theirs in zip(checkpoints(beside.run), checkpoints(waiting.run), strict=True):
        assert ours.name == theirs.name
        found, expected = tensors(ours), tensors(theirs)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_table_written_by_columns_is_read_by_rows_and_whole(make):
    config = make("columns", num_steps=2)
    train_on_ranks([config], 2)
    table = load_model(config.run).blocks[1].feed_forward.experts.detach()
    run_ranks(read_by_rows, 2, str(checkpoints(config.run)[-1]), table)
