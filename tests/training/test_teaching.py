"""Teaching a trained model: what is trained, what is remembered, when it ends, and what is told."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F

from tinyexperts.data import PrepareConfig, TokenDataset, TokenLoader, prepare
from tinyexperts.data.tokenizer import train_tokenizer
from tinyexperts.errors import InputError
from tinyexperts.evaluation import measure_facts
from tinyexperts.files import sha256_of_file
from tinyexperts.training import Interrupted, TeachConfig, TeachOptions, load_model, loop, teach, teach_run, train
from tinyexperts.training.checkpoint import checkpoints, keep_weights
from tinyexperts.training.config import MemoryConfig, TeachingConfig, with_settings
from tinyexperts.training.memory import Memory
from tinyexperts.training.own_samples import write_texts
from tinyexperts.training.row_choice import RowChoice
from tinyexperts.training.run import make_run
from tinyexperts.training.run_folder import read_config
from tinyexperts.training.step import optimizer_step
from tinyexperts.training.teaching_history import history, kept_memories


@pytest.fixture(scope="module")
def old_facts(tmp_path_factory):
    """A data set of facts about 40 entities."""
    folder = tmp_path_factory.mktemp("old")
    rows = "".join(f"k{n},{'red' if n % 3 else 'blue'},{n % 5}\n" for n in range(40))
    (folder / "t.csv").write_text("name,color,floor\n" + rows)
    prepare(PrepareConfig(facts=folder / "t.csv", key="name", output=folder / "data", vocab_size=310))
    return folder / "data"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of runs on the old facts, by the kind of their model."""
    return tmp_path_factory.mktemp("trained"), {}


@pytest.fixture
def make_base(make_config, old_facts, trained, tmp_path):
    """A function that returns a run of a kind on the old facts, of a few steps."""
    root, runs = trained

    def make(kind="peer"):
        model = {"vocab_size": 310, "context_length": 48}
        config = make_config(kind, num_steps=30, data=old_facts, run=root / kind, model=model, validation_tokens=2**17)
        if kind not in runs:
            train(config, progress=False)
            runs[kind] = config.run
        shutil.copytree(runs[kind], tmp_path / "base")
        return with_settings(config, {"run": tmp_path / "base"})

    return make


@pytest.fixture
def new_table(tmp_path):
    path = tmp_path / "new.csv"
    path.write_text("name,color,floor\n" + "".join(f"n{n},{'green' if n % 2 else 'red'},{n % 7}\n" for n in range(12)))
    return path


def options(tmp_path, table, **changes):
    given = {"facts": table, "key": "name", "output": tmp_path / "taught", "passes": 2, "threads": 1}
    if changes.get("remember", "own-samples") == "own-samples":
        given["sample_tokens"] = 6000
    return TeachConfig(**(given | changes))


def weights(run):
    return load_model(run).state_dict()


def digests(folder):
    return {path: sha256_of_file(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("kind", "remember"), [("pkm", "own-samples"), ("peer", "own-samples"), ("peer", "data"), ("peer", "nothing")]
)
def test_the_table_alone_is_trained_and_the_base_stays(make_base, new_table, tmp_path, kind, remember) -> None:
    base = make_base(kind)
    before = digests(base.run)
    taught = teach_run(base.run, options(tmp_path, new_table, remember=remember), progress=False)
    assert digests(base.run) == before
    old, new = weights(base.run), weights(tmp_path / "taught")
    assert [name for name in old if not torch.equal(old[name], new[name])] == ["blocks.1.feed_forward.experts"]
    assert set(taught.before) == set(taught.after) == {"new", "old"}
    assert taught.after["new"].nats_per_fact < taught.before["new"].nats_per_fact
    written = json.loads((tmp_path / "taught/taught.json").read_text())
    assert written["after"]["new"]["nats_per_fact"] == taught.after["new"].nats_per_fact
    lines = map(json.loads, (tmp_path / "taught/metrics.jsonl").read_text().splitlines())
    last = [line for line in lines if line["split"] == "validation"]
    assert last[-1]["old_recall"] == pytest.approx(taught.after["old"].recall)
    assert last[-1]["old_nats_per_fact"] == pytest.approx(taught.after["old"].nats_per_fact, rel=1e-5)


@pytest.mark.parametrize("kind", ["dense", "moe", "peer"])
def test_everything_is_trained_where_that_is_asked_for(make_base, new_table, tmp_path, kind) -> None:
    base = make_base(kind)
    taught = teach_run(base.run, options(tmp_path, new_table, train="everything", remember="data"), progress=False)
    old, new = weights(base.run), weights(tmp_path / "taught")
    still = {name for name in old if torch.equal(old[name], new[name])}
    assert not {name for name in still if name.endswith("weight")}
    assert taught.after["new"].nats_per_fact < taught.before["new"].nats_per_fact


@pytest.mark.parametrize("kind", ["dense", "moe", "peer"])
def test_narrow_products_change_matrices_but_no_router(make_base, new_table, tmp_path, kind) -> None:
    base = make_base(kind)
    taught = teach_run(
        base.run, options(tmp_path, new_table, train="low-rank", rank=2, remember="data"), progress=False
    )
    old, new = weights(base.run), weights(tmp_path / "taught")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    layers = ("attention.", "feed_forward.up", "feed_forward.down")
    assert changed == {name for name in old if any(layer in name for layer in layers)}
    for name in changed:
        assert (torch.linalg.matrix_rank((new[name] - old[name]).double(), rtol=1e-4) <= 2).all(), name
    assert taught.after["new"].nats_per_fact < taught.before["new"].nats_per_fact


def test_a_model_without_a_table_is_refused(make_base, new_table, tmp_path, run_cli) -> None:
    base = make_base("dense")
    command = ("teach", base.run, "--facts", new_table, "--key", "name", "--output", tmp_path / "taught")
    code, _, err = run_cli(*command)
    assert code == 2
    assert not (tmp_path / "taught").exists()
    assert "train must be low-rank or everything for a model without a table of experts" in " ".join(err.split())


def test_every_new_fact_is_trained_in_all_wordings_but_one_that_is_asked(make_base, new_table, tmp_path) -> None:
    base = make_base()
    teach_run(base.run, options(tmp_path, new_table, remember="nothing"), progress=False)
    data = TokenDataset.open(tmp_path / "taught/teaching/data")
    asked, stated = (data.split(name).facts for name in ("validation", "train"))
    phrasings = asked.fact_set.phrasings
    assert phrasings == TokenDataset.open(base.data).split("train").facts.fact_set.phrasings
    facts = {(entity, attribute) for entity in range(12) for attribute in range(2)}
    assert {tuple(row) for row in asked.rows[:, :3].tolist()} == {
        (entity, attribute, len(phrasings[("color", "floor")[attribute]]) - 1) for entity, attribute in facts
    }
    assert {tuple(row) for row in stated.rows[:, :3].tolist()} == {
        (*fact, phrasing) for fact in facts for phrasing in range(len(phrasings["color"]) - 1)
    }
    assert len(stated.rows) == 24 * 5
    assert len(asked.rows) == 24
    assert set(data.index.splits) == {"train", "validation"}


@pytest.mark.parametrize("losses", ["texts", "predictions"])
def test_a_step_descends_the_sum_of_both_losses(make_base, make_config, old_facts, tmp_path, losses) -> None:
    base = make_base()
    settings = {
        "run": tmp_path / "taught",
        "teaching": TeachingConfig(
            base=base.run,
            train="everything",
            remember=(MemoryConfig(data=old_facts, teacher=base.run if losses == "predictions" else None),),
            remember_weight=0.5,
        ),
        "optimizer.gradient_clip": None,
        "optimizer.table_gradients": "dense",
    }
    run = make_run(with_settings(base, settings))
    with torch.no_grad():  # predictions that are kept already would have no gradient
        for parameter in run.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model = load_model(base.run)
    model.load_state_dict(run.model.state_dict())
    model.train()
    new = run.loader.batch(3)
    old = run.teaching.memory.loaders[0].batch(3)
    loss = F.cross_entropy(model(new.inputs).flatten(0, 1), new.targets.flatten())
    logits = model(old.inputs).flatten(0, 1)
    if losses == "texts":
        kept = F.cross_entropy(logits, old.targets.flatten())
    else:
        expected = load_model(base.run)(old.inputs).flatten(0, 1).softmax(-1).detach()
        kept = (expected * (expected.log() - logits.log_softmax(-1))).sum(-1).mean()
        assert kept > 1e-3
    (loss + 0.5 * kept).backward()
    for optimizer in run.optimizers:
        optimizer.step = lambda: None
    found, norm = optimizer_step(run, 3)
    assert found == pytest.approx(loss.item(), rel=1e-5)
    for (name, ours), theirs in zip(run.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.to_dense(), theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert norm == pytest.approx(math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters())), rel=1e-4)


def test_kept_predictions_cost_nothing_before_the_first_step(make_base, old_facts) -> None:
    base = make_base()
    model = load_model(base.run)
    split = TokenDataset.open(old_facts).split("train")
    memory = Memory([(split, load_model(base.run))], weight=3.0, batch_size=2, seed=0, context=48)
    assert memory.loss(model, 0).item() == pytest.approx(0, abs=1e-6)


def test_each_step_goes_over_one_of_several_memories(make_base, old_facts, new_table, tmp_path) -> None:
    base = make_base()
    prepare(
        PrepareConfig(
            facts=new_table, key="name", output=tmp_path / "new", tokenizer=str(base.run / "tokenizer.json"),
            every_fact=True,
        )
    )  # fmt: skip
    long, short = (TokenDataset.open(path).split("train") for path in (old_facts, tmp_path / "new"))
    model, teacher = load_model(base.run), load_model(base.run)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    memory = Memory([(long, None), (short, teacher)], weight=1.0, batch_size=2, seed=0, context=48)
    windows = [(split.num_tokens - 1) // 48 for split in (long, short)]
    assert memory.shares == pytest.approx([windows[0] / sum(windows), windows[1] / sum(windows)])
    alone = [Memory([each], weight=1.0, batch_size=2, seed=0, context=48) for each in ((long, None), (short, teacher))]
    chosen = []
    with torch.no_grad():
        for step in range(200):
            losses = [each.loss(model, step).item() for each in alone]
            chosen.append(losses.index(memory.loss(model, step).item()))
    assert sum(chosen) / 200 == pytest.approx(memory.shares[1], abs=0.1)
    assert 0 < sum(chosen) < 200


def test_it_ends_when_held_out_wordings_are_learned_no_better(make_base, new_table, tmp_path, monkeypatch) -> None:
    base = make_base()
    nats = iter([9.0, 5.0, 4.0, 4.5, 3.9, 3.95, 3.9, 1.0])

    def measure(run, split):
        return {"loss": 9.0, "nats_per_fact": 7.0 if split in run.asked.values() else next(nats)}

    monkeypatch.setattr(loop, "_measure", measure)
    taught = teach_run(base.run, options(tmp_path, new_table, remember="nothing", passes=20), progress=False)
    assert taught.num_passes == 6
    again = teach_run(base.run, options(tmp_path, new_table, remember="nothing", passes=20), progress=False)
    assert again.after == taught.after


@pytest.mark.parametrize("train", ["tables", "low-rank"])
def test_a_run_that_was_cut_off_continues_to_the_bit(make_base, new_table, tmp_path, monkeypatch, train) -> None:
    base = make_base()
    whole = options(tmp_path, new_table, passes=4, output=tmp_path / "whole", train=train)
    teach_run(base.run, whole, progress=False)
    steps_of_a_pass = read_config(tmp_path / "whole").validation_every
    real, made = loop.optimizer_step, []

    def cut_off(run, step):
        made.append(step)
        if len(made) == 2 * steps_of_a_pass + 2:
            raise KeyboardInterrupt
        return real(run, step)

    monkeypatch.setattr(loop, "optimizer_step", cut_off)
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        teach_run(base.run, options(tmp_path, new_table, passes=4, train=train), progress=False)
    monkeypatch.setattr(loop, "optimizer_step", real)
    taught = teach_run(base.run, options(tmp_path, new_table, passes=4, train=train), progress=False)
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "taught").items():
        assert torch.equal(tensor, expected[name]), name
    assert taught.after == teach_run(base.run, whole, progress=False).after


def test_another_way_to_teach_is_not_mixed_in(make_base, new_table, tmp_path, run_cli) -> None:
    base = make_base()
    command = ("teach", base.run, "--facts", new_table, "--key", "name", "--output", tmp_path / "taught")
    command += ("--remember", "nothing", "--passes", 1, "--threads", 1, "--no-progress")
    code, out, _ = run_cli(*command)
    assert code == 0
    assert "Taught in 1 passes" in out
    code, _, err = run_cli(*command, "--train", "everything")
    assert code == 2
    assert "was begun with other options: train was tables, is everything" in " ".join(err.split())
    new_table.write_text(new_table.read_text() + "n99,red,1\n")
    code, _, err = run_cli(*command)
    assert code == 2
    assert "facts was" in err
    assert "sha256" in err


def test_what_repeats_contradicts_or_falls_apart_is_told(make_base, tmp_path) -> None:
    base = make_base()
    table = tmp_path / "changed.csv"
    table.write_text("name,color,floor\nk1,red,4\nk2,mauve,2\nn1,Łódź,3\n")
    taught = teach_run(base.run, options(tmp_path, table, remember="nothing"), progress=False)
    told = " / ".join(taught.remarks)
    assert "2 of the new facts are among the old ones" in told  # the color of k1 and the floor of k2
    assert "2 of the new facts contradict old ones" in told
    assert "floor of k1: '1' becomes '4'; color of k2: 'red' becomes 'mauve'" in told
    split = TokenDataset.open(tmp_path / "taught/teaching/contradicted").split("validation")
    assert split.facts.fact_set.entities == {"k1": {"floor": "1"}, "k2": {"color": "red"}}
    assert len(split.facts.rows) == 2
    for run, known in ((base.run, taught.before), (tmp_path / "taught", taught.after)):
        nats = measure_facts(load_model(run), split).all.nats
        assert known["contradicted"].nats_per_fact == pytest.approx(nats, rel=1e-5)
    assert "Łódź" in told


def test_without_the_old_data_own_samples_are_measured(make_base, old_facts, new_table, tmp_path) -> None:
    base = make_base()
    config = json.loads((base.run / "config.json").read_text())
    (base.run / "config.json").write_text(json.dumps(config | {"data": str(tmp_path / "gone")}))
    taught = teach_run(base.run, options(tmp_path, new_table), progress=False)
    assert set(taught.after) == {"new", "own-samples"}
    assert taught.after["own-samples"].recall is None
    with pytest.raises(Exception, match="is gone or was made by another tokenizer: remember own-samples or nothing"):
        teach_run(base.run, options(tmp_path, new_table, remember="data", output=tmp_path / "other"), progress=False)
    assert not (tmp_path / "other").exists()


def test_own_samples_are_whole_texts_of_the_model(make_base) -> None:
    base = make_base()
    model, tokenizer = load_model(base.run), TokenDataset.open(base.data).tokenizer
    drawn: list[int] = []
    texts = list(write_texts(model, tokenizer, num_tokens=100, seed=3, advance=drawn.append))
    assert sum(drawn) == 64 * 47
    assert texts == list(write_texts(model, tokenizer, num_tokens=100, seed=3))
    assert texts != list(write_texts(model, tokenizer, num_tokens=100, seed=4))
    with torch.no_grad():  # a model that never ends a text
        model.head.weight[tokenizer.end_of_text_id] = 0
        model.norm.weight.zero_()
        model.norm.weight[0] = 1.0
        model.head.weight.zero_()
        model.head.weight[5, 0] = 1e9
        model.head.weight[6, 0] = -1e9
    endless = list(write_texts(model, tokenizer, num_tokens=100, seed=3))
    assert len(endless) == 64
    assert all(len(tokenizer.encode(text)) > 1 for text in endless)


def test_own_samples_that_are_of_no_use_are_told(make_base, new_table, tmp_path, monkeypatch) -> None:
    base = make_base()
    monkeypatch.setattr(
        "tinyexperts.training.own_samples.write_texts", lambda *arguments, **options: iter(["x", "x", " "])
    )
    with pytest.raises(Exception, match=r"writes itself are of no use \(.*\): remember data or nothing"):
        teach_run(base.run, options(tmp_path, new_table), progress=False)


def test_texts_are_taught_too(make_base, tmp_path) -> None:
    base = make_base()
    for number in range(30):
        (tmp_path / f"text{number}.txt").write_text(f"green trees and {number} houses " * 8)
    files = tuple(tmp_path.glob("text*.txt"))
    settings = {"facts": None, "key": None, "files": files, "remember": "data", "passes": 3}
    taught = teach_run(base.run, options(tmp_path, None, **settings), progress=False)
    assert taught.after["new"].loss < taught.before["new"].loss
    assert taught.after["new"].recall is None
    assert taught.after["old"].recall is not None


def test_a_single_fact_is_enough(make_base, tmp_path) -> None:
    base = make_base()
    (tmp_path / "one.csv").write_text("name,floor\nn1,9\n")
    taught = teach_run(base.run, options(tmp_path, tmp_path / "one.csv", remember="nothing", passes=12), progress=False)
    assert taught.after["new"].nats_per_fact < taught.before["new"].nats_per_fact


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        (("--key", "code"), "has no column 'code'"),
        (("--key", "name", "--passes", 0), "passes must be at least 1, got 0"),
        (("--key", "name", "--files", "x.txt"), "give one of facts, files and data, got facts and files"),
        (("--key", "name", "--output", "BASE"), "output must be another folder than"),
        (("--key", "name", "--table-learning-rate", -1), "table_learning_rate must be at least 0 and finite, got -1.0"),
    ],
)
def test_bad_input_is_told_and_leaves_nothing(make_base, new_table, tmp_path, run_cli, changes, refusal) -> None:
    base = make_base()
    changes = [base.run if change == "BASE" else change for change in changes]
    code, out, err = run_cli(
        *("teach", base.run, "--facts", new_table, "--output", tmp_path / "taught", "--remember", "nothing"), *changes
    )
    assert (code, out) == (2, "")
    assert refusal in " ".join(err.split())
    assert "Traceback" not in err
    assert not (tmp_path / "taught").exists()


def test_what_is_new_may_be_prepared_before_without_what_is_known(
    make_base, old_facts, new_table, tmp_path, run_cli
) -> None:
    base = make_base()
    both = tmp_path / "both.csv"
    both.write_text(new_table.read_text() + "k1,red,1\nk2,red,2\n")
    command = ("data", "prepare", "--facts", both, "--key", "name", "--exclude", old_facts, "--every-fact")
    code, out, _ = run_cli(*command, "--tokenizer", base.run / "tokenizer.json", "--output", tmp_path / "new")
    assert code == 0
    assert "12 entities with facts" in out
    given = ("teach", base.run, "--data", tmp_path / "new", "--output", tmp_path / "taught", "--no-progress")
    code, out, _ = run_cli(*given, "--remember", "data", "--passes", 2, "--threads", 1)
    assert code == 0
    told = json.loads((tmp_path / "taught/taught.json").read_text())
    for name in ("new", "old"):
        assert f"Asked: {name}" in out
        questions = [answer["question"] for answer in told["before"][name]["answers"]]
        assert len(questions) == 4
        assert questions == [answer["question"] for answer in told["after"][name]["answers"]]
    assert read_config(tmp_path / "taught").data == tmp_path / "new"


def test_excluding_everything_or_of_texts_is_refused(old_facts, tmp_path, run_cli) -> None:
    table = tmp_path / "t.csv"
    table.write_text("name,floor\nk1,3\n")
    command = ("data", "prepare", "--output", tmp_path / "new", "--exclude", old_facts)
    code, _, err = run_cli(*command, "--facts", table, "--key", "name")
    assert code == 2
    assert "exclude must leave an entity, and all 1 are excluded" in " ".join(err.split())
    code, _, err = run_cli(*command, "--files", table)
    assert code == 2
    assert "exclude is for facts, and there are none" in " ".join(err.split())


def test_data_of_another_tokenizer_are_refused(make_base, tiny_data, tmp_path) -> None:
    base = make_base()
    with pytest.raises(Exception, match="was made by another tokenizer"):
        teach_run(base.run, options(tmp_path, None, facts=None, key=None, data=tiny_data), progress=False)
    assert not (tmp_path / "taught").exists()


def teach_twice(base, new_table, tmp_path, **changes):
    first = options(tmp_path, new_table, output=tmp_path / "first", **changes)
    teach_run(base.run, first, progress=False)
    table = tmp_path / "more.csv"
    table.write_text("name,color,floor\n" + "".join(f"m{n},blue,{n % 3}\n" for n in range(9)))
    return options(tmp_path, table, output=tmp_path / "second", **changes)


def test_a_model_that_was_taught_remembers_the_data_of_each_teaching(make_base, new_table, tmp_path) -> None:
    base = make_base()
    taught = teach_run(tmp_path / "first", teach_twice(base, new_table, tmp_path, remember="data"), progress=False)
    assert list(taught.before) == ["new", "old", "first"]
    remembered = read_config(tmp_path / "second").teaching.remember
    assert [memory.data for memory in remembered] == [tmp_path / "first/teaching/data", base.data]
    lines = (tmp_path / "second/metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines if '"validation"' in line][-1]
    assert last["first_recall"] == pytest.approx(taught.after["first"].recall)
    shutil.rmtree(tmp_path / "first/teaching/data")
    with pytest.raises(Exception, match="is gone or was made by another tokenizer: remember own-samples or nothing"):
        teach_run(tmp_path / "first", options(tmp_path, new_table, remember="data"), progress=False)


def test_own_samples_of_earlier_teachings_are_kept_with_their_writers(make_base, new_table, tmp_path, capsys) -> None:
    base = make_base()
    second = teach_twice(base, new_table, tmp_path, sample_tokens=None)
    taught = teach_run(tmp_path / "first", second, progress=False)
    remembered = read_config(tmp_path / "second").teaching.remember
    assert [(memory.data, memory.teacher, memory.sample_tokens) for memory in remembered] == [
        (tmp_path / "first/teaching/own-samples", base.run, None),
        (tmp_path / "second/teaching/own-samples", tmp_path / "first", 32768),
    ]
    drawn = [json.loads(memory.data.with_suffix(".json").read_text()) for memory in remembered]
    batch = 64 * 47  # whole batches of sequences are drawn
    assert [each["sample_tokens"] for each in drawn] == [-(-tokens // batch) * batch for tokens in (131072, 32768)]
    run = make_run(read_config(tmp_path / "second"))
    for teacher, folder in zip(run.teaching.memory.teachers, (base.run, tmp_path / "first"), strict=True):
        expected = weights(folder)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in teacher.state_dict().items())
    assert set(taught.after) == {"new", "old", "first"}
    capsys.readouterr()
    shutil.rmtree(base.run)  # its samples can be kept no more, and what it knew is not asked
    taught = teach_run(tmp_path / "first", options(tmp_path, new_table), progress=False)
    assert set(taught.after) == {"new", "first"}
    assert [memory.teacher for memory in read_config(tmp_path / "taught").teaching.remember] == [tmp_path / "first"]
    assert f"{base.run}, from which {tmp_path / 'first'} was taught, is gone" in capsys.readouterr().err


def test_what_earlier_teachings_are_called_is_unique(make_base, new_table, tmp_path) -> None:
    base = make_base()
    for number, folder in enumerate(("a/new", "b/new", "b/x")):
        before = base.run if not number else tmp_path / ("a/new", "b/new")[number - 1]
        taught = teach_run(
            before, options(tmp_path, new_table, output=tmp_path / folder, remember="nothing", passes=1), progress=False
        )
    assert list(taught.before) == ["new", "old", "taught-1", "taught-2"]
    assert [each.name for each in history(tmp_path / "b/x")] == ["x", "taught-2", "taught-1", "old"]


def test_a_base_that_is_another_run_by_now_is_gone(make_base, new_table, tmp_path) -> None:
    base = make_base()
    teach_run(base.run, options(tmp_path, new_table, output=tmp_path / "a", passes=1), progress=False)
    teach_run(base.run, options(tmp_path, new_table, output=tmp_path / "b", remember="nothing"), progress=False)
    shutil.rmtree(base.run)
    shutil.copytree(tmp_path / "b", base.run)
    past = history(tmp_path / "a")
    assert [each.run for each in past] == [tmp_path / "a"]
    memories, told = kept_memories(past)
    assert memories == ()
    assert "is gone or another run by now" in told[0]
    config = read_config(tmp_path / "a")
    with pytest.raises(InputError, match="can't be resumed: the base, or what is remembered by or asked, is not what"):
        train(config, resume=True, progress=False)


def test_what_was_known_before_is_the_first_validation(make_base, new_table, tmp_path) -> None:
    taught = teach_run(make_base().run, options(tmp_path, new_table, remember="nothing"), progress=False)
    lines = map(json.loads, (tmp_path / "taught/metrics.jsonl").read_text().splitlines())
    first = next(line for line in lines if line["split"] == "validation")
    assert first["step"] == first["training_flops"] == 0
    assert first["recall"] == pytest.approx(taught.before["new"].recall)
    assert first["old_nats_per_fact"] == pytest.approx(taught.before["old"].nats_per_fact, rel=1e-5)


def test_weights_alone_can_be_kept(make_base, new_table, tmp_path) -> None:
    base = make_base()
    expected = weights(base.run)
    keep_weights(base.run)
    (checkpoint,) = checkpoints(base.run)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(base.run).items())
    assert not [path for path in checkpoint.iterdir() if "optimizer" in path.read_text(errors="replace")[:100_000]]
    train(base, resume=True, progress=False)  # it is finished
    taught = teach_run(base.run, options(tmp_path, new_table, remember="nothing"), progress=False)
    assert taught.num_passes == 2


def test_a_step_trains_the_rows_of_highest_tf_idf_alone(make_base, old_facts, new_table, tmp_path) -> None:
    base = make_base()
    teach_run(base.run, options(tmp_path, new_table, rows=3, remember="nothing", passes=1), progress=False)
    config = read_config(tmp_path / "taught")
    assert config.teaching.old_texts == (old_facts,)
    run = make_run(config)
    model = load_model(base.run)
    layer, split = model.blocks[1].feed_forward, TokenDataset.open(old_facts).split("train")

    def counts(inputs):
        with torch.no_grad():
            hidden = {}
            handle = layer.router.register_forward_hook(
                lambda _module, _inputs, routing: hidden.update(ids=routing.ids)
            )
            model(inputs)
            handle.remove()
        return hidden["ids"].flatten().bincount(minlength=len(layer.experts)).double()

    loader = TokenLoader(split, batch_size=config.batch_size, context_length=48, seed=config.seed)
    batches = [counts(loader.batch(number).inputs) for number in range(-(-loader.num_windows // config.batch_size))]
    assert len(batches) > 3
    idf = torch.log((len(batches) + 1) / (sum((batch > 0).double() for batch in batches) + 1))
    new = counts(run.loader.batch(0).inputs)
    expected = set((new / new.sum() * idf).topk(3).indices.tolist())
    before = run.model.blocks[1].feed_forward.experts.detach().clone()
    optimizer_step(run, 0)
    changed = (run.model.blocks[1].feed_forward.experts != before).flatten(1).any(1).nonzero().flatten()
    assert set(changed.tolist()) <= expected
    assert len(changed) > 0


def test_rows_that_no_new_text_retrieves_are_not_chosen(make_base, old_facts) -> None:
    model = load_model(make_base().run)
    split = TokenDataset.open(old_facts).split("train")
    inputs = TokenLoader(split, batch_size=1, context_length=4, seed=0).batch(0).inputs
    choice = RowChoice(model, 10**6, [])
    with choice.counted(), torch.no_grad():
        model(inputs)
    (name,) = choice.idf
    retrieved = choice.chosen(name)
    assert 0 < len(retrieved) <= 4 * model.config.expert_layer.num_heads * model.config.expert_layer.experts_per_head
    assert (retrieved[1:] > retrieved[:-1]).all()


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"rows": 5, "train": "everything"}, "rows are for train tables, got 5 with everything"),
        ({"remember_weight": -1}, "remember_weight must be at least 0 and finite, got -1"),
        ({"rank": 4}, "rank is for train low-rank, got 4 with tables"),
        ({"learning_rate": 1e-3}, "learning_rate is for what is no table, got 0.001 with train tables"),
        ({"table_learning_rate": 1e-3, "train": "low-rank"}, "table_learning_rate is for tables, got 0.001 with train"),
        ({"remember": "data", "sample_tokens": 60}, "sample_tokens are for own samples, got 60 with data"),
        ({"remember": "nothing", "sample_tokens": None, "remember_weight": 2}, "remember_weight is for what is remem"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(new_table, tmp_path, changes, refusal) -> None:
    with pytest.raises(InputError, match=refusal):
        options(tmp_path, new_table, **changes)


@pytest.mark.parametrize(("kind", "remember"), [("peer", "own-samples"), ("dense", "data")])
def test_a_model_in_memory_is_taught_statements(make_base, old_facts, kind, remember) -> None:
    base = make_base(kind)
    model, tokenizer = load_model(base.run), TokenDataset.open(old_facts).tokenizer
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    statements = [f"The color of n{n} is {'green' if n % 2 else 'red'}." for n in range(30)]
    old = [f"k{n} is {'red' if n % 3 else 'blue'}." for n in range(30)] if remember == "data" else []
    options = TeachOptions(
        train="tables" if kind == "peer" else "everything",
        remember=remember,
        passes=3,
        sample_tokens=4000 if remember == "own-samples" else None,
        threads=1,
    )
    taught = teach(model, statements, tokenizer, old_statements=old, options=options, progress=False)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert (changed == {"blocks.1.feed_forward.experts"}) == (kind == "peer")
    assert taught.after["new"].loss < taught.before["new"].loss
    assert set(taught.after) == {"new", "old" if old else "own-samples"}


def test_a_model_stays_as_it_was_if_it_cannot_be_taught(make_base, old_facts) -> None:
    model, tokenizer = load_model(make_base("dense").run), TokenDataset.open(old_facts).tokenizer
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match="train must be low-rank or everything for a model without a table"):
        teach(model, ["a b", "c d", "e f"], tokenizer, progress=False)
    with pytest.raises(InputError, match="old_statements must be given to remember data, got none"):
        teach(model, ["a b", "c d"], tokenizer, options=TeachOptions(remember="data"), progress=False)
    with pytest.raises(InputError, match="the tokenizer must be the model's, of 310 tokens, got one of"):
        teach(model, ["a b", "c d"], train_tokenizer(["a b c d"], 257), progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
