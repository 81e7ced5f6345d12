"""Encoders with and without their decoder, as T5 and its kin are published; and how long inputs may be."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from transformers import (
    AutoTokenizer,
    LongT5Config,
    LongT5EncoderModel,
    LongT5ForConditionalGeneration,
    MT5Config,
    MT5EncoderModel,
    MT5ForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
    UMT5ForConditionalGeneration,
)

from genoembed.cli import main
from genoembed.models.describe import describe_layers
from genoembed.models.load import load_model

KINDS = {
    "t5": (T5Config, T5EncoderModel, T5ForConditionalGeneration),
    "mt5": (MT5Config, MT5EncoderModel, MT5ForConditionalGeneration),
    "umt5": (UMT5Config, UMT5EncoderModel, UMT5ForConditionalGeneration),
    "longt5": (LongT5Config, LongT5EncoderModel, LongT5ForConditionalGeneration),
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 6]])


def config_of(kind, **more):
    shape = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
    return KINDS[kind][0](**shape | more)


def saved(model, folder, tiny_folder, **changes):
    """Write a model with a tokenizer, and other values in its config.json."""
    model.save_pretrained(folder)
    for path in tiny_folder("llama").glob("*token*"):
        shutil.copy(path, folder)
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def check(folder, encoder):
    model = load_model(str(folder), device="cpu", dtype="float32")
    assert [layer.path for layer in model.resolve([-1, "final"])] == ["block.1", "final_layer_norm"]
    assert describe_layers(str(folder)).numbered == ("block.0", "block.1")
    with torch.inference_mode():
        expected = encoder.eval()(IDS).last_hidden_state
        assert torch.equal(model.module(IDS).last_hidden_state, expected)
    assert not any("decoder" in name for name, _ in model.module.named_parameters())
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_alone_opens_as_transformers_saves_it(kind, tiny_folder, tmp_path):
    encoder = KINDS[kind][1](config_of(kind))
    check(saved(encoder, tmp_path / "x", tiny_folder), encoder)


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_alone_opens_as_older_releases_saved_it(kind, tiny_folder, tmp_path):
    encoder = KINDS[kind][1](config_of(kind))
    folder = saved(encoder, tmp_path / "x", tiny_folder, is_encoder_decoder=True, n_positions=512)
    (folder / "model.safetensors").unlink()
    torch.save(encoder.state_dict(), folder / "pytorch_model.bin")
    model = check(folder, encoder)
    assert model.max_length is None  # relative positions have no end


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_of_both_is_taken_and_opens_when_saved(kind, tiny_folder, tmp_path):
    whole = KINDS[kind][2](config_of(kind))
    model = check(saved(whole, tmp_path / "x", tiny_folder), whole.get_encoder())
    check(saved(model.module, tmp_path / "again", tiny_folder), whole.get_encoder())


def test_encoder_of_both_is_taken_whatever_its_configuration_says_of_a_decoder(tiny_folder, tmp_path):
    config = config_of("t5")
    T5EncoderModel(config)  # which writes into the configuration that there is no decoder
    whole = T5ForConditionalGeneration(config)
    folder = saved(whole, tmp_path / "x", tiny_folder)
    assert not json.loads((folder / "config.json").read_text())["is_encoder_decoder"]
    check(folder, whole.get_encoder())


def test_gated_encoder_opens(tiny_folder, tmp_path):
    encoder = T5EncoderModel(config_of("t5", feed_forward_proj="gated-gelu"))
    check(saved(encoder, tmp_path / "x", tiny_folder), encoder)


def test_commands_run_on_an_encoder_alone(tiny_folder, tmp_path):
    folder = saved(T5EncoderModel(config_of("t5")), tmp_path / "x", tiny_folder)
    fasta, labels = tmp_path / "in.fa", tmp_path / "labels.tsv"
    fasta.write_text("".join(f">r{i}\n{'ACGTTGCA' * (i % 3 + 1)}\n" for i in range(12)))
    labels.write_text("id\tlabel\n" + "".join(f"r{i}\t{'ab'[i % 2]}\n" for i in range(12)))
    run = tmp_path / "run"
    finetune = ("finetune", fasta, "--task", "classification", "--labels", labels, "--model", folder)
    for words in (
        ("extract", fasta, "--model", folder, "--layer", "final", "-o", tmp_path / "a.h5"),
        (*finetune, "--max-steps", 1, "-o", run),
        ("predict", run, fasta, "-o", tmp_path / "p.tsv"),
    ):
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("in_config", "in_tokenizer", "expected"),
    [
        ({}, 700, 700),
        ({}, 10**30, None),
        ({}, 1e6, 1_000_000),
        ({"n_positions": 512}, 700, 700),
        ({"max_seqlen": 8192}, 700, 8192),
        ({"max_position_embeddings": 64}, 700, 64),
        ({"max_position_embeddings": 900}, 700, 900),
    ],
)
def test_context_is_the_configuration_s_or_else_the_tokenizer_s(
    in_config, in_tokenizer, expected, tiny_folder, tmp_path
):
    folder = saved(T5EncoderModel(config_of("t5")), tmp_path / "x", tiny_folder, **in_config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = in_tokenizer
    tokenizer.save_pretrained(folder)
    model = load_model(str(folder), device="cpu")
    assert model.max_length == expected
    assert model.provenance["max_length"] == expected
