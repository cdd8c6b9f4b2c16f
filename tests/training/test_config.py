"""TrainConfig: what it refuses, and changes by dotted names."""

from __future__ import annotations

import dataclasses
from operator import attrgetter
from pathlib import Path

import pytest

from tinyexperts.errors import InputError
from tinyexperts.training import recipes
from tinyexperts.training.config import ScheduleConfig, with_settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": None}, "exactly one of num_steps and training_flops, got None and None"),
        ({"training_flops": 1e9}, "got 8 and 1000000000.0"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"optimizer.table_learning_rate": -1.0}, "optimizer.table_learning_rate must be at least 0, got -1.0"),
        ({"optimizer.betas": (0.9, 1.0)}, r"optimizer.betas must be at least 0 and below 1, got \(0.9, 1.0\)"),
        ({"optimizer.gradient_clip": 0.0}, "optimizer.gradient_clip must be positive"),
        ({"checkpoint.every": 0}, "checkpoint.every must be at least 1, got 0"),
        ({"schedule.warmup_fraction": 0.5, "schedule.decay_fraction": 0.6}, r"at most 1 together, got \(0.5, 0.6\)"),
        ({"seed": -1}, "seed must be between 0 and 2\\^63 - 1, got -1"),
    ],
)
def test_bad_settings_are_refused(make_config, changes, message):
    with pytest.raises(InputError, match=message):
        make_config(**changes)


@pytest.mark.parametrize("recipe", [recipes.dense, recipes.expert_choice_moe, recipes.product_key_memory, recipes.peer])
def test_recipes_differ_in_the_expert_layer_alone(recipe):
    config, twin = recipe(), recipes.dense()
    model = dataclasses.replace(config.model, expert_layer=twin.model.expert_layer)
    assert dataclasses.replace(config, run=twin.run, model=model) == twin


def test_settings_are_changed_together_by_their_dotted_names(make_config):
    config = make_config()
    changes = {"schedule.warmup_fraction": 1.0, "schedule.decay_fraction": 0.0, "batch_size": 2}
    changes |= {"model.dense.hidden_dim": 5}
    changed = with_settings(config, changes)
    assert changed.schedule == ScheduleConfig(warmup_fraction=1.0, decay_fraction=0.0)
    assert (changed.batch_size, changed.model.dense.hidden_dim) == (2, 5)
    back = {name: attrgetter(name)(config) for name in changes}
    assert with_settings(changed, back) == config
    with pytest.raises(TypeError, match="learning_rates"):
        with_settings(config, {"optimizer.learning_rates": 1.0})


def test_paths_are_given_in_any_form(make_config, tmp_path):
    class Entry:
        def __fspath__(self):
            return str(tmp_path / "run")

    for given in (str(tmp_path / "run"), tmp_path / "run", Entry()):
        config = make_config(run=given, data=given)
        assert config == make_config(run=tmp_path / "run", data=tmp_path / "run")
        assert isinstance(config.run, Path)


@pytest.mark.parametrize("name", ["run", "data"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("runs/\udcff", r"must be a path in UTF-8, got b'runs/\\xff'"),
        (Path("\udce4/x"), r"must be a path in UTF-8, got b'\\xe4/x'"),
        (b"runs/x", "must be a path, got b'runs/x'"),
        (7, "must be a path, got 7"),
        (None, "must be a path, got None"),
    ],
)
def test_what_is_no_path_or_not_utf_8_is_refused(make_config, name, value, message):
    with pytest.raises(InputError, match=f"^{name} {message}$"):
        make_config(**{name: value})
