"""The studies: their grids, what they cost, and how they are run, skipped, resumed, refused and reported."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import submitit
import torch
from filelock import FileLock
from forkserver import CONTEXT
from rich.console import Console
from study_folder import finish_and_keep_stderr

from tinyexperts.comparison.methods import METHODS, look_of
from tinyexperts.data import PrepareConfig, TokenDataset, prepare
from tinyexperts.errors import InputError
from tinyexperts.model import Transformer
from tinyexperts.planning.model_costs import account
from tinyexperts.study import grid
from tinyexperts.study import run_study as study_runner
from tinyexperts.study.all_studies import STUDIES
from tinyexperts.study.run_study import StudyConfig, run_study
from tinyexperts.study.runner import slurm
from tinyexperts.study.runner.display import display_of
from tinyexperts.study.runner.planned_run import finish_run
from tinyexperts.study.runner.status import print_status
from tinyexperts.study.runner.study_folder import StudyFolder
from tinyexperts.study.scales import scale_named
from tinyexperts.study.studies.isoflop import ISOFLOP
from tinyexperts.study.studies.num_experts import NUM_EXPERTS
from tinyexperts.study.studies.query_norm import USAGE
from tinyexperts.training import Interrupted
from tinyexperts.training.checkpoint import checkpoints
from tinyexperts.training.config import with_settings
from tinyexperts.training.last_metrics import last_metrics
from tinyexperts.training.recipes import RECIPES

NAMES = [method.name for method in METHODS]
SCALES = ("minute", "laptop", "gpu", "paper")


def scale(name="minute", data=Path("data/none"), vocab_size=300):
    return scale_named(name, data=data, vocab_size=vocab_size)


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_every_study_can_be_planned_at_every_scale(study, name):
    assert study.question.endswith("?")
    runs = [run for stage in study.stages(scale(name, vocab_size=4096)) for run in stage({})]
    assert len({run.name for run in runs}) == len(runs)
    # Untuned, a method's default is a point of the grid, too.
    assert len({repr(run.config) for run in runs}) >= len(runs) - len(METHODS)
    grid.check_grid(runs, num_train_tokens=10**15)
    for run in runs:
        assert run.config.seed == run.axes["seed"]
        assert run.config.training_flops == run.axes["budget"]
        assert run.config.model.d_model == run.axes["width"]


def test_every_recipe_is_the_method_of_one_row():
    assert sorted(method.recipe_name for method in METHODS) == sorted(set(RECIPES) - {"gpu"})
    for method in METHODS:
        assert type(scale().layers[method.name]) is type(method.recipe().model.expert_layer)
        assert look_of(method.name) == look_of(method.recipe_name) == method
    assert (look_of("other").label, look_of("other").color) == ("other", "#5b5f66")


def test_the_papers_own_settings():
    runs = ISOFLOP.stages(scale("paper", vocab_size=32000))[2]({})
    assert {run.config.training_flops for run in runs} == {6e18, 2e19}
    assert {run.config.model.num_layers for run in runs} == {12}
    assert {run.config.model.blocks_with_experts for run in runs} == {(6,)}
    assert {run.config.tokens_per_step for run in runs} == {128 * 2048}
    layers = {run.method: run.config.model.expert_layer for run in runs}
    assert layers["moe"].num_experts == 128
    assert layers["moe"].hidden_dim is None, "each the size of the dense MLP"
    assert (layers["pkm"].num_experts, layers["pkm"].num_heads, layers["pkm"].experts_per_head) == (1024**2, 8, 32)
    assert (layers["peer"].num_experts, layers["peer"].num_heads, layers["peer"].experts_per_head) == (1024**2, 8, 16)


@pytest.mark.parametrize("method", NAMES)
def test_the_account_of_a_run_is_that_of_its_model(method):
    config = ISOFLOP.stages(scale("laptop", vocab_size=512))[2]({})[0].config
    layer = scale("laptop").layers[method]
    config = replace(config, model=replace(config.model, d_model=64, num_heads=4, expert_layer=layer))
    cost, model = account(config), Transformer(config.model)
    forward = model.flops_per_token(config.model.context_length)
    assert cost.forward_flops.total == forward
    assert cost.forward_flops.router == model.router_flops_per_token()
    assert cost.num_steps == int(config.training_flops // (3 * forward * config.tokens_per_step))
    assert (cost.parameters_total, cost.parameters_active) == (
        model.num_parameters().total,
        model.num_parameters().active,
    )
    sparse = model.blocks[2].feed_forward
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    num_matmul = sum(module.weight.numel() for module in linear)
    if method in ("pkm", "peer"):
        router, vectors = sparse.router, {"pkm": 1, "peer": 2}[method]
        assert cost.forward_flops.sub_key_scores == 2 * 4 * 256 * 32
        assert cost.forward_flops.query_network == 2 * router.query.weight.numel()
        num_matmul += router.sub_keys.numel()
        rows = {"pkm": 4 * 32, "peer": 4 * 16}[method] * vectors * 64 * 4
    else:
        assert cost.forward_flops.sub_key_scores == 0
        rows = 0
        num_matmul += sum(p.numel() for p in sparse.parameters() if p.dim() == 3)  # a mixture's experts
    assert cost.parameters_matmul == num_matmul
    assert cost.forward_bytes == rows + 4 * 64 + 4 * num_matmul / config.tokens_per_step


def test_tuning_decides_the_settings_of_the_main_runs():
    stages = ISOFLOP.stages(scale())
    losses = {run.name: 5.0 for run in stages[0]({})}
    losses["tune-peer-table-x2-seed0"] = 4.9
    losses["tune-peer-table-x0.5-seed0"] = 4.95
    losses["tune-peer-batch-x0.5-seed0"] = 4.99
    losses["tune-dense-head-x0.5-seed0"] = 4.8
    losses["tune-moe-head-x2-seed0"] = float("nan")
    base = scale().base
    # Each winner is tried once more, twice as far; a batch of one sequence can't be halved again.
    further = {run.name: run.config for run in stages[1](losses)}
    assert set(further) == {"tune-peer-table-x4-seed0", "tune-dense-head-x0.25-seed0"}
    assert further["tune-peer-table-x4-seed0"].optimizer.table_learning_rate == 4 * base.optimizer.table_learning_rate
    farther = losses | {"tune-peer-table-x4-seed0": 4.95, "tune-dense-head-x0.25-seed0": 4.7}
    dense = next(run.config for run in stages[2](farther) if run.method == "dense")
    assert dense.optimizer.head_learning_rate == base.optimizer.head_learning_rate / 4
    by_method = {run.method: run.config for run in stages[2](losses)}
    assert by_method["peer"].optimizer.table_learning_rate == 2 * base.optimizer.table_learning_rate
    assert by_method["peer"].batch_size == base.batch_size // 2
    assert by_method["peer"].optimizer.head_learning_rate == base.optimizer.head_learning_rate
    assert by_method["dense"].optimizer.head_learning_rate == base.optimizer.head_learning_rate / 2
    assert by_method["moe"].optimizer.head_learning_rate == base.optimizer.head_learning_rate
    assert not [run for run in stages[0]({}) if run.method in ("dense", "moe") and "table" in run.name]


def test_the_last_budget_is_spent_on_each_methods_best_width():
    small = scale()
    stages = ISOFLOP.stages(small)
    tuning, _, main, extend = stages
    assert extend({}) == []
    ahead = grid.expected_runs(stages)
    assert [run.name for run in ahead[:88]] == [run.name for run in [*tuning({}), *main({})]]
    # The smallest width takes the most tokens.
    assert {(run.config.training_flops, run.axes["width"]) for run in ahead[88:]} == {(3e8, 8)}
    losses = {run.name: 5.0 for run in tuning({})}
    losses["tune-peer-table-x2-seed0"] = 4.9
    best = {method.name: 16 for method in METHODS} | {"dense": 8, "pkm": 24}
    for run in main(losses):
        losses[run.name] = 4.0 if run.axes["width"] == best[run.method] else 4.5
    del losses["moe-d16-c2e08-seed1"]  # a seed that is missing decides nothing
    losses["moe-d8-c2e08-seed0"] = 4.4
    runs = extend(losses)
    assert {run.method: run.axes["width"] for run in runs} == best | {"moe": 8}
    assert [run.axes["seed"] for run in runs] == [0] * len(METHODS) + [1] * len(METHODS)
    assert {run.config.training_flops for run in runs} == {small.last_budget}
    rates = {run.method: run.config.optimizer.table_learning_rate for run in runs}
    assert rates["peer"] == 2 * small.base.optimizer.table_learning_rate
    assert ISOFLOP.stages(scale("paper", vocab_size=4096))[3](losses) == []


def test_a_budget_without_a_step_and_a_small_corpus_are_refused():
    run = NUM_EXPERTS.stages(scale())[0]({})[0]
    poor = replace(run, config=replace(run.config, training_flops=10.0))
    with pytest.raises(InputError, match=rf"the budget of {run.name}, 10 FLOPs, affords no step: one costs "):
        grid.check_grid([poor], 10**9)
    tokens = account(run.config).num_tokens
    with pytest.raises(InputError, match=rf"{run.name} trains on {tokens:,} tokens, and data/none holds 10: they"):
        grid.check_grid([run], 10)
    grid.check_grid([run], tokens // grid.MAX_EPOCHS + 1)


class Children:
    """Runs happen in this process; `fail` names those that fail, `stop_after` how many are run before time is up."""

    fail = ()
    stop_after = 10**9
    started = ()
    num_parallel = ()
    """The runs side by side, of each call."""

    def run_jobs(self, jobs, failed, *, num_parallel, **options):
        self.num_parallel = (*self.num_parallel, num_parallel)
        for job in jobs:
            if len(self.started) >= self.stop_after:
                break
            *_, verb, folder, name = job.commands[0].arguments
            assert verb == "run"
            self.started = (*self.started, name)
            try:
                if name in self.fail:
                    raise InputError(f"running of {name} failed")
                finish_run(Path(folder), name)
            except InputError as error:
                failed(name, str(error))


@pytest.fixture
def children(monkeypatch):
    stand_in = Children()
    monkeypatch.setattr(study_runner, "run_jobs", stand_in.run_jobs)
    return stand_in


def runs_of(scale, seeds=(0, 1), experts=(16**2, 32**2)):
    """The runs of an ablation at one small budget."""
    (stage,) = NUM_EXPERTS.stages(replace(scale, widths={5e7: (16,)}, seeds=seeds, experts=experts))
    return stage({})


# Four runs.
SMALL = replace(NUM_EXPERTS, stages=lambda scale: (lambda losses: runs_of(scale),))


def best_with_other_seeds(scale):
    """The stages: three numbers of experts; then the best of them with another seed, and with one more."""
    first = runs_of(scale, (0,), (16**2, 24**2, 32**2))

    def best(seed, losses):
        return runs_of(scale, (seed,), (min(first, key=lambda run: losses.get(run.name, 99)).axes["num_experts"],))

    return (lambda losses: first), partial(best, 1), partial(best, 2)


IN_STAGES = replace(NUM_EXPERTS, stages=best_with_other_seeds)


@pytest.fixture(scope="module")
def poems(tmp_path_factory):
    corpus = tmp_path_factory.mktemp("texts") / "poems"
    corpus.mkdir()
    (corpus / "a.txt").write_text("the red cat sees a blue dog " * 20)
    return corpus


@pytest.fixture
def config(tiny_data, poems, tmp_path):
    return StudyConfig(scale="minute", data=tiny_data, output=tmp_path / "study", evaluation_corpora=(poems,))


@pytest.fixture(scope="module")
def finished_study(tiny_data, poems, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "study"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_runner, "run_jobs", Children().run_jobs)
        run_study(SMALL, StudyConfig(scale="minute", data=tiny_data, output=output, evaluation_corpora=(poems,)))
    return output


@pytest.fixture
def folder(finished_study, config):
    """The study SMALL, of which each run is done, in the folder that `config` names."""
    shutil.copytree(finished_study, config.output)
    return StudyFolder(config.output)


def test_a_study_runs_every_point_and_again_nothing(config, children, poems, tmp_path, capsys):
    texts = shutil.copytree(poems, tmp_path / "poems")
    config = replace(config, evaluation_corpora=(texts,))
    run_study(SMALL, config)
    assert len(children.started) == 4
    folder = StudyFolder(config.output)
    for run in folder.planned_runs():
        assert folder.status_of(run.name).state == "done"
        path = folder.run_path(run.name)
        for name in ("evaluation.json", "evaluation-poems.json"):
            assert json.loads((path / name).read_text())["loss"] > 0
        assert (
            json.loads((path / "config.json").read_text())["model"]["expert_layer"]["num_experts"]
            == (run.axes["num_experts"])
        )
        assert not (path / "checkpoints").exists()
    assert "4 runs planned so far, 4 done, 0 running, 0 begun, 0 waiting, 0 failed" in capsys.readouterr().out
    run_study(SMALL, config)
    assert len(children.started) == 4
    # Results on a text that has changed since must not be shown with those of the old one.
    (texts / "a.txt").write_text("the red cat sees a blue cat " * 20)
    with pytest.raises(InputError, match=r"evaluation_sha256 was .*poems.*, is .*choose another --output"):
        run_study(SMALL, config)
    # A folder of an older version does not say what its text was.
    path = config.output / "study.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "evaluation_sha256"}))
    run_study(SMALL, config)
    assert len(children.started) == 4


@pytest.mark.parametrize(
    ("methods", "changes"),
    [
        (("dense", "peer"), {"widths": {5e7: (8, 16)}, "last_budget": 3e8}),
        pytest.param(NAMES, {}, marks=pytest.mark.slow),
    ],
)
def test_the_main_study_from_start_to_report(config, children, methods, changes):
    def stages(scale):
        base = replace(scale.base, batch_size=8)  # as many FLOPs in fewer steps
        layers = {method: scale.layers[method] for method in methods}
        return ISOFLOP.stages(replace(scale, layers=layers, base=base, **changes))

    study = replace(ISOFLOP, stages=stages)
    run_study(study, replace(config, evaluation_tokens=64))
    folder = StudyFolder(config.output)
    planned = [run.axes["stage"] for run in folder.planned_runs()]
    num_main = 2 * sum(len(widths) for widths in changes.get("widths", scale().widths).values()) + 2
    assert planned.count("main") == num_main * len(methods)
    assert planned.count("tuning") > 10 * len(methods), "no setting of any method was better than the default"
    assert all(folder.status_of(run.name).state == "done" for run in folder.planned_runs())
    run = next(run for run in folder.planned_runs() if run.name.startswith("peer-d16"))
    for text in ("evaluation", "evaluation-poems"):
        result = json.loads((folder.run_path(run.name) / f"{text}.json").read_text())
        assert 0 < result["num_tokens"] <= 64
    page = (config.output / "report.html").read_text()
    assert page.count("At 3e+08 FLOPs PEER reaches a lower loss than") == 3
    assert len(list((config.output / "tables").glob("*.csv"))) == 11
    with pytest.raises(InputError, match="evaluation_tokens was 64, is None"):
        run_study(study, config)


@pytest.mark.slow
def test_a_study_that_is_killed_again_and_again_ends_in_the_same_tables(config, tmp_path):
    """With its processes: they are killed without a warning, and the study is started again by the same command."""

    def command(output):
        options = ["--scale", "minute", "--data", config.data, "--output", output, "--num-parallel", 1]
        return [sys.executable, "-m", "tinyexperts", "study", "num-experts", *map(str, options)]

    whole = tmp_path / "whole"
    subprocess.run(command(whole), check=True, capture_output=True)
    killed, draw = tmp_path / "killed", random.Random(0)
    unfinished = 0
    for number in range(4):
        process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(8, 20))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        # With its children, and without: then they are at work still when the next process comes.
        for pid in [process.pid, *(map(int, children) if number % 2 else ())]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
        unfinished += not (killed / "report.html").exists()
    assert unfinished, "no kill met unfinished work"
    subprocess.run(command(killed), check=True, capture_output=True)
    for table in (whole / "tables").glob("*.csv"):
        first, second = (
            path.joinpath("tables", table.name).read_text().replace(str(path), "FOLDER") for path in (whole, killed)
        )
        if table.name == "runs.csv":  # how fast a run was is another thing each time
            seconds = re.compile(r"^([^,]+),[^,]+,[^,]+,", re.MULTILINE)
            first, second = (seconds.sub(r"\1,", text) for text in (first, second))
        assert first == second


@pytest.mark.slow
def test_the_main_study_by_its_command_though_its_process_is_killed(config, tmp_path):
    """One of the children still works; the same command waits for it and continues."""
    output = tmp_path / "by command"
    options = ["--scale", "minute", "--data", config.data, "--output", output, "--evaluation-tokens", 64]
    command = [sys.executable, "-m", "tinyexperts", "study", "isoflop", *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(output.glob("runs/*/config.json")) and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    before = [StudyFolder(output).status_of(run.name).state for run in StudyFolder(output).planned_runs()]
    assert "running" in before, "no child works any more"
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    folder = StudyFolder(output)
    assert len(folder.stages()) == 4
    assert {folder.status_of(run.name).state for run in folder.planned_runs()} == {"done"}
    page = (output / "report.html").read_text()
    assert page.count("PEER reaches a lower loss than") == 9
    assert "unfinished" not in page


def test_what_is_cut_off_is_resumed_and_only_that(config, children, folder):
    names = [run.name for run in folder.planned_runs()]
    (folder.run_path(names[1]) / "evaluation-poems.json").unlink()  # cut off before: its checkpoint is there again
    shutil.rmtree(folder.run_path(names[3]))
    folder.run_path(names[1]).joinpath("evaluation.json").unlink()
    run_study(SMALL, config)
    assert sorted(children.started) == [names[1], names[3]]
    assert all(folder.status_of(run.name).state == "done" for run in folder.planned_runs())


def test_a_failed_run_stops_no_other_and_is_reported_and_tried_again(config, children, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    name = runs_of(scale())[2].name
    children.fail = (name,)
    with pytest.raises(InputError, match=f"1 runs failed, {name} among them; the same command tries them again"):
        run_study(SMALL, config)
    folder = StudyFolder(config.output)
    states = {run.name: folder.status_of(run.name) for run in folder.planned_runs()}
    assert states[name].state == "failed"
    assert states[name].reason == f"running of {name} failed"
    assert sum(status.state == "done" for status in states.values()) == 3
    printed = " ".join(capsys.readouterr().out.split())
    assert "3 done, 0 running, 0 begun, 0 waiting, 1 failed" in printed
    assert f"running of {name} failed" in printed
    children.fail, children.started = (), ()
    run_study(SMALL, config)
    assert children.started == (name,)
    assert folder.status_of(name).state == "done"


def test_a_stage_waits_for_failed_runs_to_be_tried_again_and_stays_as_it_was_planned(config, children, capsys):
    name = runs_of(scale(), (0,))[1].name
    children.fail = (name,)
    message = (
        rf"1 of \d runs of stage 1 failed \({name}: running of {name} failed\), and what comes next depends on them"
    )
    with pytest.raises(InputError, match=message):
        run_study(IN_STAGES, config)
    folder = StudyFolder(config.output)
    assert {run.axes["seed"] for run in folder.planned_runs()} == {0}
    assert len(folder.losses()) == len(folder.planned_runs()) - 1
    children.started = ()
    with pytest.raises(InputError, match=f"1 runs failed, {name} among them"):  # again; the others continue without it
        run_study(IN_STAGES, config)
    assert children.started[0] == name
    assert [stage.without for stage in folder.stages()] == [[], [name], [name]]
    planned = {run.name: run.config for run in folder.planned_runs()}
    losses = folder.losses()
    assert len(losses) == len(planned) - 1
    children.fail, children.started = (), ()
    run_study(IN_STAGES, config)  # now it succeeds, and were it the best by far: what was planned was planned
    path = folder.run_path(name) / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"loss": 0.1}))
    run_study(IN_STAGES, config)
    assert children.started == (name,)
    assert {run.name: run.config for run in folder.planned_runs()} == planned
    assert folder.losses() == losses | {name: 0.1}
    page = (config.output / "report.html").read_text()
    assert f"stage 2 was planned when {name} had failed" in page


def test_no_stage_is_planned_where_most_runs_of_the_one_before_failed(config, children):
    """As on a full disk: that a run failed twice says nothing of its settings then."""
    children.fail = tuple(run.name for run in best_with_other_seeds(scale())[0]({}))
    for _ in range(3):
        with pytest.raises(InputError, match=r"3 of 3 runs of stage 1 failed .* if they are less than half"):
            run_study(IN_STAGES, config)
    folder = StudyFolder(config.output)
    assert len(folder.stages()) == 1
    children.fail = ()
    run_study(IN_STAGES, config)
    assert len(folder.losses()) == len(folder.planned_runs()) == 5


def test_a_failure_after_progress_is_a_first_one(config, children):
    children.stop_after = 0
    run_study_of_nothing(config)
    folder = StudyFolder(config.output)
    run = folder.planned_runs()[0]
    where = folder.run_path(run.name)
    where.mkdir(parents=True)
    (where / "run.json").write_text('{"num_steps": 100}')
    for step, settled in ((10, False), (20, False), (20, True), (30, False), (30, True)):
        (where / "metrics.jsonl").write_text(json.dumps({"split": "train", "step": step}) + "\n")
        folder.note_failure(run.name, "its hours were over")
        assert folder.status_of(run.name).is_settled == settled


def run_study_of_nothing(config):
    """Planned, and no run of it started."""
    with pytest.raises(InputError, match="4 runs failed"):
        run_study(SMALL, config)


def test_a_study_that_was_moved_continues_in_its_new_place(config, children):
    children.stop_after = 1
    with pytest.raises(InputError, match="3 runs failed"):
        run_study(SMALL, config)
    moved = config.output.with_name("moved")
    config.output.rename(moved)
    children.stop_after, children.started = 10**9, ()
    run_study(SMALL, replace(config, output=moved))
    assert len(children.started) == 3
    assert not config.output.exists()
    assert len(StudyFolder(moved).losses()) == 4


@pytest.mark.usefixtures("folder")
def test_another_grid_and_other_data_are_refused(config, tmp_path):
    def slower(scale):
        base = with_settings(scale.base, {"optimizer.table_learning_rate": 1e-4})
        return (lambda losses: runs_of(replace(scale, base=base)),)

    def fewer(scale):
        return (lambda losses: runs_of(scale, experts=(16**2,)),)

    with pytest.raises(InputError, match="was planned with other settings: choose another --output"):
        run_study(replace(NUM_EXPERTS, stages=slower), config)
    with pytest.raises(InputError, match="was planned with another grid: choose another --output"):
        run_study(replace(NUM_EXPERTS, stages=fewer), config)
    texts, other = tmp_path / "texts", tmp_path / "other"
    texts.mkdir()
    for number in range(20):
        words = (f"the {n} red cats see {n * number} blue dogs" for n in range(100))
        texts.joinpath(f"{number}.txt").write_text("\n".join(words))
    vocab_size = TokenDataset.open(config.data).index.vocab_size
    prepare(PrepareConfig(files=(texts,), output=other, vocab_size=vocab_size, validation_fraction=0.1))
    before = config.data.with_name("before")
    config.data.rename(before)
    try:
        other.rename(config.data)
        with pytest.raises(InputError, match=r"data_sha256 was .*, is .*choose another --output"):
            run_study(SMALL, config)
    finally:
        config.data.rename(other)
        before.rename(config.data)


def test_a_death_while_a_stage_is_planned_leaves_nothing_behind(folder):
    """Its files are there, and stages.json is not yet; meanwhile other results have come, and the plan is another."""
    first, second = folder.planned_runs()[:2]
    planned = replace(first, name="half-planned")
    folder.write_planned([planned, replace(second, name="half-planned-too")])
    assert "half-planned" not in {run.name for run in folder.planned_runs()}
    changed = replace(planned, config=with_settings(planned.config, {"optimizer.table_learning_rate": 0.5}))
    folder.write_planned([changed])
    assert folder.planned_run("half-planned").config.optimizer.table_learning_rate == 0.5


def test_a_run_that_diverged_is_reported_and_not_tried_again(config, children):
    def stages(scale):
        first, *others = runs_of(scale)
        spoiled = replace(first, config=with_settings(first.config, {"optimizer.matrix_learning_rate": 1e30}))
        return lambda losses: [spoiled, *others], lambda losses: []

    study = replace(NUM_EXPERTS, stages=stages)

    run_study(study, config)
    folder = StudyFolder(config.output)
    first, *others = [folder.status_of(name) for name in folder.stages()[0].runs]
    assert first.state == "failed"
    assert "gave a loss of nan" in first.reason
    assert {status.state for status in others} == {"done"}
    children.started = ()
    run_study(study, config)
    assert children.started == ()


@pytest.mark.slow
def test_a_run_at_which_another_process_is_at_work_is_waited_for(config, children, tmp_path):
    children.stop_after = 0
    run_study_of_nothing(config)
    folder = StudyFolder(config.output)
    run = folder.planned_runs()[0]
    folder.note_failure(run.name, "another thing")
    said = tmp_path / "said"
    waiting = CONTEXT.Process(target=finish_and_keep_stderr, args=(config.output, run.name, said))
    with folder.run_lock(run.name):
        waiting.start()
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (said.exists() and said.read_text().endswith("\n")):
            time.sleep(0.01)
        assert said.read_text() == f"another process is at work on {run.name}: waiting for it\n"
        status = folder.status_of(run.name)
        assert (status.state, status.reason) == ("running", None)
    waiting.join(60)
    assert folder.status_of(run.name).state == "done"


def test_the_minutes_end_a_slice_and_the_next_continues(config, children, monkeypatch, capsys):
    children.stop_after = 1
    clock = iter([0.0, 1.0, 1.0, 1000.0])
    monkeypatch.setattr(study_runner.time, "monotonic", lambda: next(clock))
    with pytest.raises(Interrupted, match="the minutes are over"):
        run_study(SMALL, replace(config, minutes=8.0))
    assert "1 done, 0 running, 0 begun, 3 waiting" in capsys.readouterr().out
    monkeypatch.undo()
    done = children.started
    children.stop_after, children.started = 10**9, ()
    monkeypatch.setattr(study_runner, "run_jobs", children.run_jobs)
    run_study(SMALL, config)
    assert len(children.started) == 3
    assert not set(children.started) & set(done)


def test_a_run_that_is_to_be_timed_has_no_other_beside_it(config, children):
    def stages(scale):
        first, *others = runs_of(scale)
        return (lambda losses: [replace(first, is_alone=True), *others],)

    run_study(replace(NUM_EXPERTS, stages=stages), config)
    assert children.num_parallel == (config.num_parallel, 1) == (2, 1)
    planned = {run.name: run.is_alone for run in StudyFolder(config.output).planned_runs()}
    assert sum(planned.values()) == 1
    assert planned[children.started[-1]]


def test_what_a_later_stage_lacks_is_reported_before_the_first(config, children, monkeypatch):
    monkeypatch.setattr(grid, "MAX_EPOCHS", 1e-3)
    with pytest.raises(InputError, match="they would be repeated"):
        run_study(NUM_EXPERTS, config)
    monkeypatch.undo()
    for name, content, message in (("a.pdf", b"%PDF\0", "a.pdf is binary"), ("b.txt", b" \n", "b.txt has no text")):
        path = config.output.with_name(name)
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            run_study(NUM_EXPERTS, replace(config, evaluation_corpora=(path,)))
    assert (children.started, config.output.exists()) == ((), False)


def test_a_second_process_on_a_study_is_refused(config):
    config.output.mkdir()
    with FileLock(config.output / "lock"), pytest.raises(InputError, match="another process runs the study in"):
        run_study(NUM_EXPERTS, config)


def test_another_study_in_the_same_folder_is_refused(config, children):
    children.stop_after = 0
    run_study_of_nothing(config)
    with pytest.raises(InputError, match=r"study was 'num-experts', is 'usage'.*choose another --output"):
        run_study(USAGE, config)
    (config.output / "study.json").unlink()
    with pytest.raises(InputError, match="exists and is not the folder of a study"):
        run_study(NUM_EXPERTS, config)
    with pytest.raises(InputError, match=r"it has no study\.json"):
        print_status(StudyFolder(config.output))


@pytest.mark.usefixtures("children")
def test_a_half_deleted_run_is_reported(config, folder):
    run = folder.planned_runs()[0]
    (folder.run_path(run.name) / "config.json").unlink()
    status = folder.status_of(run.name)
    assert status.state == "failed"
    assert "has results but no config.json: delete it, and it is run again" in status.reason
    (folder.run_path(run.name) / "evaluation.json").unlink()
    (folder.run_path(run.name) / "checkpoints").mkdir()
    status = folder.status_of(run.name)
    assert status.state == "failed"
    assert "has checkpoints but no config.json: delete it, and it is run again" in status.reason
    shutil.rmtree(folder.run_path(run.name))
    other = folder.planned_runs()[1]
    (folder.run_path(other.name) / "evaluation-poems.json").write_text("{")
    status = folder.status_of(other.name)
    assert status.state == "failed"
    assert re.search(r"evaluation-poems.json can't be read: delete .*, and it is run again", status.reason)
    assert other.name not in folder.losses()
    shutil.rmtree(folder.run_path(other.name))
    before = folder.losses()
    run_study(SMALL, config)
    assert folder.losses().keys() - before.keys() == {run.name, other.name}


def test_a_result_that_was_deleted_is_measured_again_with_all_others(config, children, folder):
    """The weights are gone by then, and are made again."""
    path = folder.run_path(folder.planned_runs()[0].name)
    kept = json.loads((path / "evaluation.json").read_text())
    (path / "evaluation.json").write_text(json.dumps(kept | {"loss": 99.0}))
    (path / "evaluation-poems.json").unlink()
    run_study(SMALL, config)
    assert children.started == (path.name,)
    assert json.loads((path / "evaluation.json").read_text())["loss"] == pytest.approx(kept["loss"])


def test_a_dry_run_needs_no_data_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    output = tmp_path / "study"

    def stages(scale):
        return ISOFLOP.stages(replace(scale, layers={"peer": scale.layers["peer"]}, widths={2e19: (1536,)}))

    run_study(
        replace(ISOFLOP, stages=stages), StudyConfig(scale="paper", data=tmp_path / "none", output=output, dry_run=True)
    )
    printed = capsys.readouterr().out
    assert not output.exists()
    assert "tune-peer-default-seed0" in printed
    assert "hours on one H100 SXM at 40% of its 989 TFLOP/s, " in printed
    # Two tables of 2^20 experts at D = 1536 have values, gradients and moments of 12 GiB each, or 49 in all.
    (largest,) = re.findall(r"peer-d1536-c2e19-seed2 .* ([\d.]+) GiB( !)?", printed)
    assert float(largest[0]) > 49
    assert (largest[1] == " !") == (float(largest[0]) > 0.9 * 80e9 / 2**30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_parallel": 0}, "num_parallel must be at least 1, got 0"),
        ({"minutes": 0.0}, "minutes must be positive, got 0.0"),
        ({"minutes": 8.0, "executor": "slurm"}, "minutes are for runs on this machine, got 8.0 with slurm"),
        ({"slurm_gpus": 2}, "slurm_gpus must be 0 or 1: a run of a study takes one device, got 2"),
        ({"slurm_hours": -1.0, "executor": "slurm"}, "slurm_hours must be positive, got -1.0"),
        ({"slurm_hours": 2.0}, "slurm_hours is for the executor slurm, got 2.0 with local"),
        ({"slurm_partition": "large"}, "slurm_partition is for the executor slurm, got large with local"),
        ({"slurm_gpus": 1}, "slurm_gpus is for the executor slurm, got 1 with local"),
        ({"evaluation_tokens": 0}, "evaluation_tokens must be at least 1, got 0"),
        ({"evaluation_corpora": (Path("no/such"),)}, "there is no evaluation corpus no/such"),
        ({"evaluation_corpora": (Path("a/x.txt"), Path("b/x.md"))}, "must have different names, got x, x"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(changes, message):
    with pytest.raises(InputError, match=message):
        StudyConfig(**changes)


def test_an_unknown_run_is_refused_by_its_name(config, children):
    children.stop_after = 0
    run_study_of_nothing(config)
    with pytest.raises(InputError, match="plans no run nonsense"):
        finish_run(config.output, "nonsense")


@pytest.mark.slow
def test_submitit_runs_the_remaining_runs_and_reports_failures(config, children, monkeypatch):
    children.stop_after = 2
    with pytest.raises(InputError, match="2 runs failed"):
        run_study(SMALL, config)
    folder = StudyFolder(config.output)
    waiting = [run for run in folder.planned_runs() if folder.status_of(run.name).state == "waiting"]
    planned = config.output / "planned" / f"{waiting[1].name}.json"
    planned.write_text("{}")
    monkeypatch.setattr(slurm, "_POLL_SECONDS", 0.2)
    seen = Console(file=io.StringIO(), force_terminal=True, width=160)
    slurm.run_array(
        folder,
        waiting,
        num_parallel=2,
        console=seen,
        title="stage 1 of 1: ",
        num_done=2,
        cluster="local",
        timeout_min=5,
    )
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.file.getvalue())
    last = shown.splitlines()[-len(waiting) :]
    assert any(line.startswith(waiting[0].name) and " done " in line and "100%" in line for line in last)
    assert any(line.startswith(waiting[1].name) and " failed " in line for line in last)
    failed = json.loads((config.output / "runs" / f"{waiting[1].name}.failed.json").read_text())
    assert "does not hold a planned run" in failed["reason"]
    assert folder.status_of(waiting[0].name).state == "done"


@pytest.fixture
def interruptible():
    """SIGINT ends what is started here; the jobs that a shell runs in the background inherit that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")  # by which submitit cancels local jobs
def test_an_interruption_cancels_the_jobs_that_were_submitted(config, children, monkeypatch):
    children.stop_after = 0
    run_study_of_nothing(config)
    folder = StudyFolder(config.output)
    submitted = []
    monkeypatch.setattr(submitit.AutoExecutor, "submit", noted(submitit.AutoExecutor.submit, submitted))

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(slurm, "time", SimpleNamespace(sleep=interrupt))
    with pytest.raises(KeyboardInterrupt):
        slurm.run_array(
            folder,
            folder.planned_runs()[:2],
            num_parallel=2,
            console=Console(quiet=True),
            cluster="local",
            timeout_min=5,
        )
    monkeypatch.undo()
    assert len(submitted) == 2
    deadline = time.monotonic() + 60
    while not all(job.done(force_check=True) for job in submitted) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not folder.losses()


@pytest.mark.slow
def test_a_job_whose_time_is_over_is_saved_and_queued_again(config, children, monkeypatch):
    children.stop_after = 0
    run_study_of_nothing(config)
    folder = StudyFolder(config.output)
    name = folder.planned_runs()[0].name
    planned = config.output / "planned" / f"{name}.json"
    content = json.loads(planned.read_text())
    content["config"] |= {"training_flops": 20 * content["config"]["training_flops"]}
    content["config"]["checkpoint"]["every"] = 10**6
    planned.write_text(json.dumps(content))
    where, submitted, warned, saved = folder.run_path(name), [], [], set()
    monkeypatch.setattr(submitit.AutoExecutor, "submit", noted(submitit.AutoExecutor.submit, submitted))

    def warn_once(seconds):
        time.sleep(0.02)
        if not warned and last_metrics(where / "metrics.jsonl").get("train", {}).get("step", 0) > 2:
            controller = submitted[0].job_id
            warned.extend(map(int, Path(f"/proc/{controller}/task/{controller}/children").read_text().split()))
            os.kill(warned[0], signal.SIGUSR2)
        saved.update(path.name for path in checkpoints(where))

    monkeypatch.setattr(slurm, "time", SimpleNamespace(sleep=warn_once))
    slurm.run_array(
        folder, [folder.planned_run(name)], num_parallel=1, console=Console(quiet=True), cluster="local", timeout_min=5
    )
    assert warned
    num_steps = json.loads((where / "run.json").read_text())["num_steps"]
    assert any(2 < int(re.sub(r"\D", "", step)) < num_steps for step in saved), "it was not saved when it was warned"
    assert folder.status_of(name).state == "done"
    ended = (where / "evaluation.json").read_text()
    shutil.rmtree(where)
    finish_run(config.output, name)
    assert (where / "evaluation.json").read_text() == ended


def test_a_job_without_a_result_is_reported_with_its_state():
    message = "Job 7_1 (task: 0) with path x.pkl\nhas not produced any output (state: OUT_OF_MEMORY)\nIOError: gone"
    found = slurm._raised(submitit.core.utils.UncompletedJobError(message))
    assert found == "its job ended without a result, in the state OUT_OF_MEMORY"


def test_a_few_runs_that_are_left_of_many_have_the_bar_of_all(tmp_path):
    def shown(num_done):
        console = Console(file=io.StringIO(), force_terminal=True, width=120)
        with display_of(
            [tmp_path / "a", tmp_path / "b"], console=console, title="stage 1: ", num_done=num_done
        ) as bars:
            bars.begin(tmp_path / "a", "running")
            bars.end(tmp_path / "a", is_failed=True)
        return console.file.getvalue()

    assert re.search("stage 1: 92 runs.* 99%.*1 failed", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(90)))
    assert "2 runs" not in shown(0), "two bars say all"


def noted(method, results):
    def call(*arguments, **options):
        results.append(method(*arguments, **options))
        return results[-1]

    return call


def test_slurm_is_refused_where_there_is_none(config, children, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="wants a machine of a Slurm cluster"):
        run_study(NUM_EXPERTS, replace(config, executor="slurm"))
