"""A model folder of a stranger: its code is not fetched, no other file read, no more built than it has."""

import json
import logging
import shutil
import time

import pytest

from genoembed.errors import GenoembedError, ModelError
from genoembed.models.describe import describe_layers
from genoembed.models.load import load_model
from tests.tiny_models import build_tiny


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return build_tiny("bert", tmp_path_factory.mktemp("plain"))


@pytest.fixture
def folder(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "model")


def change(folder, name="config.json", **values):
    path = folder / name
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**found, **values}))
    return str(folder)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_code_that_a_configuration_names_is_not_taken(folder, key, caplog):
    with caplog.at_level(logging.WARNING):
        model = load_model(change(folder, **{key: "stranger/kernels"}))
    assert model.module.config._attn_implementation in ("sdpa", "eager")
    assert f"{key} of its config.json is not taken" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 1_000_000_000),
        ("num_hidden_layers", 5_000),
        ("num_labels", 2_000_000_000),
        ("num_attention_heads", 1_000_000_000),
        ("hidden_size", 2_000_000_000),
        ("intermediate_size", 1 << 40),
        ("vocab_size", 1 << 45),
        ("max_position_embeddings", 1 << 44),
        ("type_vocab_size", 1 << 44),
        ("hidden_size", -1),
        ("num_hidden_layers", 1e300),
    ],
)
@pytest.mark.parametrize("use", [load_model, describe_layers])
def test_sizes_beyond_the_weights_end_at_once(folder, key, value, use):
    started = time.process_time()
    with pytest.raises(GenoembedError) as caught:
        use(change(folder, **{key: value}))
    assert "\n" not in str(caught.value)
    assert time.process_time() - started < 10


def test_layers_hidden_in_a_nested_configuration_are_found(folder):
    with pytest.raises(ModelError, match=r"num_layers 1e\+09, expected at most"):
        load_model(change(folder, decoder={"num_layers": 1_000_000_000}))


def test_quantized_weights_are_refused(folder):
    with pytest.raises(ModelError, match="quantized"):
        load_model(change(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["os", "float33", "nn", 7, {"": "hub"}])
def test_dtype_that_is_none_is_refused(folder, key, value):
    with pytest.raises(ModelError, match=f"{key} .*, expected one such as float32"):
        load_model(change(folder, **{key: value}))


def test_own_code_beside_a_known_kind_is_not_run_and_that_is_said(folder, caplog):
    (folder / "modeling.py").write_text("raise SystemExit('ran')")
    change(folder, auto_map={"AutoConfig": "modeling.C", "AutoModel": "modeling.M"})
    with caplog.at_level(logging.WARNING):
        load_model(str(folder))
    assert "brings its own code (auto_map), which is not run" in caplog.text


def test_own_code_of_a_tokenizer_is_not_run_and_that_is_said(folder, caplog):
    (folder / "tok.py").write_text("raise SystemExit('ran')")
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["tok.T", None]})
    with caplog.at_level(logging.WARNING):
        load_model(str(folder))
    assert "the code that its tokenizer_config.json names is not run" in caplog.text


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret.txt", "C:\\secret.txt"])
def test_tokenizer_files_elsewhere_are_refused(folder, name):
    change(folder, "tokenizer_config.json", vocab_file=name)
    with pytest.raises(ModelError, match="expected files in its own folder"):
        load_model(str(folder))


def test_plain_model_is_loaded_as_before(folder):
    assert load_model(str(folder)).module.config.model_type == "bert"
