"""The configuration of a pretraining run: strict files, options that win, differences in words."""

from __future__ import annotations

import json

import pytest

from genoembed.config.fields import differences
from genoembed.config.pretrain import KEY_STAGE, train_config
from genoembed.errors import ConfigError, InputFileError

KEYS = {"corpus": ("a.fa",), "heldout_fraction": 0.1, "like": "evo2_7b", "max_steps": 5}


def test_train_config_spreads_keys_over_stages():
    config = train_config({**KEYS, "window": 64, "packing": "bins", "seed": 3})
    assert (config.data.window, config.data.packing, config.recipe.seed) == (64, "bins", 3)
    assert config.start.like == "evo2_7b"
    assert set(KEY_STAGE.values()) == {"start", "data", "recipe", "vectors", "teacher"}


@pytest.mark.parametrize("kind", ["toml", "json"])
def test_train_config_reads_a_file_and_options_win(kind, tmp_path):
    path = tmp_path / f"run.{kind}"
    values = {"corpus": ["a.fa", "b.fa"], "heldout": ["h.fa"], "max_steps": 9, "window": 32}
    if kind == "json":
        path.write_text(json.dumps({**values, "shape": {"hidden_size": 64}}))
    else:
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        path.write_text("\n".join([*lines, "[shape]", "hidden_size = 64"]))
    config = train_config({"max_steps": 5, "window": None}, file=path)
    assert config.data.corpus == ("a.fa", "b.fa")
    assert (config.recipe.max_steps, config.data.window) == (5, 32)
    assert config.start.shape == {"hidden_size": 64}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windw": 3}, "'windw' is not an option; did you mean 'window'"),
        ({"window": 1}, "window is 1; set window to 2 or more tokens"),
        ({"window": "32"}, "set window to a whole number"),
        ({"packing": "tight"}, "set packing to one of stream, bins"),
        ({"model": "x"}, "model and like given, expected exactly one"),
        ({"like": None}, "neither model, like nor shape given"),
        ({"like": None, "model": "x", "layers": 2}, "shrink like, which is not given"),
        ({"like": None, "shape": 3}, "set shape to a table of names and values"),
        ({"heldout": ("h.fa",)}, "expected exactly one of heldout_fraction and files"),
        ({"heldout_fraction": None, "heldout": ("a.fa",)}, "heldout: a.fa is in the corpus as well"),
        ({"heldout_fraction": None}, "expected exactly one of heldout_fraction and files"),
        ({"heldout_fraction": 1.5}, "heldout_fraction is 1.5; set heldout_fraction above 0, below 1"),
        ({"corpus": None}, "corpus is missing"),
        ({"max_steps": None}, "max_steps is missing"),
        ({"max_steps": 0}, "set max_steps to 1 or more"),
        ({"learning_rate": 0.0}, "set learning_rate above 0"),
        ({"weight_decay": -1.0}, "set weight_decay to 0 or more"),
        ({"dtype": "float64"}, "set dtype to one of auto, float32, bfloat16, float16"),
    ],
)
def test_train_config_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        train_config({**KEYS, **options})


def test_train_config_reports_everything_at_once():
    with pytest.raises(ConfigError, match="window") as caught:
        train_config({**KEYS, "window": 0, "max_steps": 0, "like": None, "nonsense_at_all": 1})
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "windw = 3", "a.toml: 'windw' is not an option"),
        ("a.toml", "window = ", "not TOML"),
        ("a.json", "{", "not JSON"),
        ("a.json", "[1]", "list, expected keys and values"),
    ],
)
def test_train_config_refuses_a_bad_file(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        train_config(KEYS, file=tmp_path / name)


def test_train_config_names_a_missing_file(tmp_path):
    with pytest.raises(InputFileError, match=r"none\.toml: cannot be read"):
        train_config(KEYS, file=tmp_path / "none.toml")


def test_differences_are_none_between_a_config_and_its_json():
    config = train_config(KEYS)
    stored = json.loads(json.dumps(config.to_dict()))
    assert differences(stored, config.to_dict(), where="run") == []
    other = train_config({**KEYS, "window": 8, "seed": 2})
    found = differences(stored, other.to_dict(), where="run")
    assert [text.split(":")[0] for text in found] == ["seed", "window"]
