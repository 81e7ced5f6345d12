"""`extract` against hidden states pooled by hand: layers, poolings, fusion, strands, tokens."""

from __future__ import annotations

import numpy as np
import pytest

from genoembed.errors import ConfigError, LayerError, ShapeError
from tests.by_hand import (
    ALL_FAMILIES,
    CAUSAL,
    HAS_SPECIAL_TOKENS,
    LETTER_FAMILIES,
    STRIPED,
    embed,
    model_of,
    random_dna,
    reference_of,
    revcomp,
)

TOLERANCE = 1e-5
POOLINGS = ("mean", "max", "first", "last", "cls", "weighted_mean", "mean_std")
RECORDS = {
    "long": random_dna(50, 1),
    "one": "G",
    "masked": random_dna(23, 2, "ACGTN"),
    "again": random_dna(50, 3),
    "short": "ACG",
}


def path_of(family, spec):
    return model_of(family).resolve([spec])[0].path


def allowed(family):
    """Poolings that say something about the family's sequences."""
    return [method for method in POOLINGS if family not in CAUSAL or method not in ("first", "cls")]


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_layer_at_once_is_pooled_hidden_states(family, tmp_path):
    reference = reference_of(family)
    names = reference.layer_names()
    for method in allowed(family):
        found = embed(tmp_path, RECORDS, model_of(family), layers=names, pooling=method)
        assert found.ids == list(RECORDS)
        assert found.layers == list(dict.fromkeys(path_of(family, name) for name in names))
        for name in names:
            expected = [reference.pooled(sequence, name, method) for sequence in RECORDS.values()]
            assert_close(found.matrices[path_of(family, name)], expected)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_one_layer_alone_is_the_same_as_among_all(family, tmp_path):
    names = reference_of(family).layer_names()
    together = embed(tmp_path, RECORDS, model_of(family), layers=names).matrices
    for name in names:
        alone = embed(tmp_path, RECORDS, model_of(family), layers=name)
        assert alone.layers == [path_of(family, name)]
        assert_close(alone.matrices[alone.layers[0]], together[alone.layers[0]])


@pytest.mark.parametrize("family", [family for family in ALL_FAMILIES if family != "bert"])
def test_last_block_and_final_differ_where_a_norm_follows(family, tmp_path):
    *_, last, final = reference_of(family).layer_names()
    found = embed(tmp_path, RECORDS, model_of(family), layers=[last, final])
    block, normed = found.matrices.values()
    assert np.abs(block - normed).max() > 1e-3


def test_number_means_the_mlp_output_in_striped_hyena(tmp_path):
    found = embed(tmp_path, RECORDS, model_of(STRIPED), layers=[1, -1])
    assert found.layers == ["blocks.1.mlp.l3", "blocks.3.mlp.l3"]
    residual = embed(tmp_path, RECORDS, model_of(STRIPED), layers=["blocks.1"])
    assert np.abs(residual.matrices["blocks.1"] - found.matrices["blocks.1.mlp.l3"]).max() > 1e-3


@pytest.mark.parametrize("family", HAS_SPECIAL_TOKENS)
def test_special_tokens_are_not_pooled(family, tmp_path):
    """A vector of one base is that base's hidden state, and not the mean with <cls> and <eos>."""
    states = reference_of(family).states("G")["0"]
    assert len(states) == 3
    found = embed(tmp_path, {"one": "G"}, model_of(family), layers=0)
    vector = next(iter(found.matrices.values()))[0]
    assert_close(vector, states[1])
    assert np.abs(states.mean(axis=0) - states[1]).max() > 1e-2


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_tokens_are_the_hidden_states(family, tmp_path):
    reference = reference_of(family)
    found = embed(tmp_path, RECORDS, model_of(family), layers=["final"], pooling="none")
    expected = [reference.token_vectors(sequence, "final") for sequence in RECORDS.values()]
    assert found.lengths == [len(vectors) for vectors in expected]
    assert_close(found.matrices[found.layers[0]], np.concatenate(expected))


@pytest.mark.parametrize("family", LETTER_FAMILIES)
@pytest.mark.parametrize("rc", ["mean", "concat"])
def test_tokens_of_both_strands_stand_at_their_base(family, rc, tmp_path):
    reference = reference_of(family)
    found = embed(tmp_path, RECORDS, model_of(family), layers=["final"], pooling="none", rc=rc)
    assert found.lengths == [len(sequence) for sequence in RECORDS.values()]
    expected = []
    for sequence in RECORDS.values():
        forward = reference.token_vectors(sequence, "final")
        backward = reference.token_vectors(revcomp(sequence), "final")
        for base in range(len(sequence)):
            pair = forward[base], backward[len(sequence) - 1 - base]
            expected.append(np.mean(pair, axis=0) if rc == "mean" else np.concatenate(pair))
    assert_close(found.matrices[found.layers[0]], expected)


def test_tokens_of_both_strands_need_a_token_a_base(tmp_path):
    with pytest.raises(ConfigError, match=r"pooling='none' with rc needs one token per base.*set rc='none'"):
        embed(tmp_path, RECORDS, model_of("gpt_neox"), pooling="none", rc="mean")


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("method", ["mean", "max", "last"])
def test_strand_mean_does_not_depend_on_the_strand_given(family, method, tmp_path):
    records = {name: RECORDS[name] for name in ("long", "masked", "one")}
    other = {name: revcomp(sequence) for name, sequence in records.items()}
    options = {"pooling": method, "rc": "mean", "skip_first": 0}
    found = embed(tmp_path, records, model_of(family), **options).matrices
    turned = embed(tmp_path, other, model_of(family), **options).matrices
    for layer, matrix in found.items():
        assert_close(matrix, turned[layer])
    alone = embed(tmp_path, other, model_of(family), pooling=method).matrices
    assert any(np.abs(alone[layer] - matrix).max() > 1e-3 for layer, matrix in found.items())


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_strand_concat_swaps_its_halves_with_the_strand(family, tmp_path):
    other = {name: revcomp(sequence) for name, sequence in RECORDS.items()}
    found = embed(tmp_path, RECORDS, model_of(family), layers=[0, "final"], rc="concat").matrices
    turned = embed(tmp_path, other, model_of(family), layers=[0, "final"], rc="concat").matrices
    plain = embed(tmp_path, RECORDS, model_of(family), layers=[0, "final"]).matrices
    for layer, matrix in found.items():
        half = matrix.shape[1] // 2
        assert_close(matrix[:, :half], plain[layer])
        assert_close(matrix, np.concatenate([turned[layer][:, half:], turned[layer][:, :half]], axis=1))


@pytest.mark.parametrize("skip_first", [1, 3])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_skip_first_leaves_bases_out(family, skip_first, tmp_path):
    reference = reference_of(family)
    records = {name: RECORDS[name] for name in ("long", "masked")}
    for method in allowed(family):
        found = embed(tmp_path, records, model_of(family), pooling=method, skip_first=skip_first)
        expected = [
            reference.pooled(sequence, "final", method, skip_first=skip_first)
            for sequence in records.values()
        ]
        assert_close(found.matrices[found.layers[0]], expected)


@pytest.mark.parametrize("fusion", ["concat", "mean", "max", "weighted"])
def test_fusion_joins_layers(fusion, tmp_path):
    family = "esm"
    reference = reference_of(family)
    weights = {"fusion_weights": (1, 3.0, 0)} if fusion == "weighted" else {}
    found = embed(tmp_path, RECORDS, model_of(family), layers=[0, 1, "final"], fusion=fusion, **weights)
    assert found.layers == [fusion]
    parts = [
        np.array([reference.pooled(sequence, name, "mean") for sequence in RECORDS.values()])
        for name in ("0", "1", "final")
    ]
    expected = {
        "concat": np.concatenate(parts, axis=1),
        "mean": np.mean(parts, axis=0),
        "max": np.max(parts, axis=0),
        "weighted": 0.25 * parts[0] + 0.75 * parts[1],
    }[fusion]
    assert_close(found.matrices[fusion], expected)


@pytest.mark.parametrize("fusion", ["concat", "mean"])
def test_fusion_joins_layers_of_tokens_and_strands(fusion, tmp_path):
    family = "llama"
    layers = [0, "final"]
    apart = embed(tmp_path, RECORDS, model_of(family), layers=layers, pooling="none", rc="concat").matrices
    found = embed(
        tmp_path, RECORDS, model_of(family), layers=layers, pooling="none", rc="concat", fusion=fusion
    )
    parts = list(apart.values())
    expected = np.concatenate(parts, axis=1) if fusion == "concat" else np.mean(parts, axis=0)
    assert_close(found.matrices[fusion], expected)


@pytest.mark.parametrize("fusion", ["mean", "max", "weighted"])
def test_fusion_of_unequal_widths_is_refused_after_one_batch(fusion, tmp_path):
    weights = {"fusion_weights": (1, 1)} if fusion == "weighted" else {}
    batches = []
    with pytest.raises(ShapeError, match=r"layers have widths .*set fusion to 'concat'"):
        embed(
            tmp_path,
            RECORDS,
            model_of("bert"),
            layers=["encoder.layer.0", "encoder.layer.0.intermediate"],
            fusion=fusion,
            batch_tokens=1,
            progress=lambda stats: batches.append(stats.batches),
            **weights,
        )
    assert batches == []


def test_fusion_concatenates_unequal_widths(tmp_path):
    layers = ["encoder.layer.0", "encoder.layer.0.intermediate"]
    found = embed(tmp_path, RECORDS, model_of("bert"), layers=layers, fusion="concat")
    assert found.matrices["concat"].shape == (len(RECORDS), 16 + 24)
    assert found.report.width == 40


def test_float16_storage_rounds_the_float32_values(tmp_path):
    full = embed(tmp_path, RECORDS, model_of("llama"))
    half = embed(tmp_path, RECORDS, model_of("llama"), out_dtype="float16")
    layer = full.layers[0]
    assert half.matrices[layer].dtype == np.float16
    np.testing.assert_array_equal(half.matrices[layer], full.matrices[layer].astype(np.float16))


def test_unknown_layer_names_the_nearest(tmp_path):
    with pytest.raises(LayerError, match=r"'layers\.1\.mpl' is not in .*did you mean 'layers\.1\.mlp'"):
        embed(tmp_path, RECORDS, model_of("llama"), layers="layers.1.mpl")


@pytest.mark.parametrize("method", ["first", "cls"])
@pytest.mark.parametrize("family", CAUSAL)
def test_first_token_of_a_causal_model_is_refused(family, method, tmp_path):
    with pytest.raises(ConfigError, match=method):
        embed(tmp_path, RECORDS, model_of(family), pooling=method)
