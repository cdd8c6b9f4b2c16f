"""TrainConfig: what it refuses, and its round trip through JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from tinyexperts.errors import InputError
from tinyexperts.training import TrainConfig, recipes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": None}, "exactly one of num_steps and training_flops, got None and None"),
        ({"training_flops": 1e9}, "got 8 and 1000000000.0"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"table_learning_rate": -1.0}, "table_learning_rate must be at least 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas must be at least 0 and below 1, got \(0.9, 1.0\)"),
        ({"gradient_clip": 0.0}, "gradient_clip must be positive"),
        ({"warmup_fraction": 0.5, "decay_fraction": 0.6}, r"at most 1 together, got \(0.5, 0.6\)"),
        ({"seed": -1}, "seed must be between 0 and 2\\^63 - 1, got -1"),
    ],
)
def test_bad_settings_are_told(make_config, changes, message):
    with pytest.raises(InputError, match=message):
        make_config(**changes)


@pytest.mark.parametrize("recipe", [recipes.dense, recipes.expert_choice_moe, recipes.product_key_memory, recipes.peer])
def test_recipes_survive_json_and_differ_in_the_sparse_layer_alone(recipe):
    adapter = TypeAdapter(TrainConfig)
    config = recipe()
    assert adapter.validate_json(adapter.dump_json(config)) == config
    twin = recipes.dense()
    model = dataclasses.replace(config.model, expert_layer=twin.model.expert_layer)
    assert dataclasses.replace(config, run=twin.run, model=model) == twin


def test_an_unknown_field_in_json_is_refused(make_config):
    adapter = TypeAdapter(TrainConfig)
    text = adapter.dump_json(make_config()).decode().replace('"num_experts"', '"num_expert"')
    with pytest.raises(ValueError, match="num_expert"):
        adapter.validate_json(text)


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
def test_what_is_no_path_or_not_utf_8_is_told(make_config, name, value, message):
    with pytest.raises(InputError, match=f"^{name} {message}$"):
        make_config(**{name: value})
