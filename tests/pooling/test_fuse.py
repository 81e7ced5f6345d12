"""Fusion over layers and strands."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.errors import ConfigError, ShapeError
from genoembed.pooling.fuse import combine_strands, combine_token_strands, feature_names, fuse


def layers_of(*widths, num_rows=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(widths))
    return {
        f"blocks.{index}.mlp.l3": torch.randn(num_rows, width, generator=generator).to(dtype)
        for index, width in enumerate(widths)
    }


def test_fuse_none_keeps_every_layer():
    layers = layers_of(3, 5)
    fused = fuse(layers, method="none")
    assert list(fused) == list(layers)
    assert all(fused[name] is layers[name] for name in layers)


def test_fuse_concat_keeps_order_and_takes_unequal_widths():
    layers = layers_of(3, 5)
    (fused,) = fuse(layers, method="concat").values()
    assert torch.equal(fused[:, :3], layers["blocks.0.mlp.l3"])
    assert torch.equal(fused[:, 3:], layers["blocks.1.mlp.l3"])


@pytest.mark.parametrize("method", ["mean", "max"])
def test_fuse_equals_the_loop(method):
    layers = layers_of(3, 3, 3)
    fused = fuse(layers, method=method)[method]
    for row in range(4):
        for column in range(3):
            values = [matrix[row, column].item() for matrix in layers.values()]
            expected = max(values) if method == "max" else sum(values) / 3
            assert fused[row, column].item() == pytest.approx(expected, rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(weights=st.lists(st.floats(0.01, 100), min_size=3, max_size=3))
def test_fuse_weighted_does_not_depend_on_the_scale_of_the_weights(weights):
    layers = layers_of(2, 2, 2, dtype=torch.float64)
    fused = fuse(layers, method="weighted", weights=weights)["weighted"]
    scaled = fuse(layers, method="weighted", weights=[3 * weight for weight in weights])["weighted"]
    expected = sum(weight * matrix for weight, matrix in zip(weights, layers.values(), strict=True)) / sum(
        weights
    )
    torch.testing.assert_close(fused, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fused, scaled, rtol=1e-12, atol=1e-12)


def test_fuse_weighted_with_one_layer_alone_in_the_mix_is_that_layer():
    layers = layers_of(2, 2)
    assert torch.equal(fuse(layers, method="weighted", weights=[0, 5])["weighted"], layers["blocks.1.mlp.l3"])


def test_fuse_half_precision_means_do_not_overflow():
    layers = {name: torch.full((1, 2), 60000.0, dtype=torch.float16) for name in "abcd"}
    fused = fuse(layers, method="mean")["mean"]
    assert fused.dtype == torch.float32
    assert fused.tolist() == [[60000.0, 60000.0]]


@pytest.mark.parametrize("method", ["concat", "mean", "max"])
def test_fuse_of_one_layer_is_that_layer_and_inputs_stay(method):
    layers = layers_of(3)
    assert list(fuse(layers, method=method)) == list(layers)
    two = layers_of(3, 3)
    before = {name: matrix.clone() for name, matrix in two.items()}
    fuse(two, method=method)[method].fill_(0)
    assert all(torch.equal(two[name], before[name]) for name in two)


@pytest.mark.parametrize("method", ["mean", "max"])
def test_fuse_refuses_unequal_widths(method):
    with pytest.raises(ShapeError, match=f"fusion '{method}': layers have widths .*set fusion to 'concat'"):
        fuse(layers_of(3, 5), method=method)
    with pytest.raises(ShapeError, match=f"fusion '{method}': layers have widths"):
        feature_names({"a": 3, "b": 5}, method=method)


def test_fuse_refuses_different_row_counts_and_no_layers():
    layers = {"a": torch.ones(2, 3), "b": torch.ones(3, 3)}
    with pytest.raises(ShapeError, match=r"layers have shapes .*expected \(N, D\) with one N"):
        fuse(layers, method="concat")
    with pytest.raises(ShapeError, match="at least one layer"):
        fuse({}, method="none")
    with pytest.raises(ShapeError, match="no layers, expected at least one"):
        feature_names({}, method="none")


@pytest.mark.parametrize(
    ("method", "weights", "problem"),
    [
        ("weighted", None, "weights: none for 2 layers; give one weight per layer"),
        ("weighted", [1.0], "weights: 1 for 2 layers"),
        ("weighted", [1.0, -1.0], "none below 0 and not all 0"),
        ("weighted", [0.0, 0.0], "none below 0 and not all 0"),
        ("weighted", [1.0, float("nan")], "expected finite numbers"),
        ("mean", [1.0, 1.0], "weights: given with fusion 'mean'; set fusion to 'weighted'"),
        ("sum", None, "fusion 'sum': expected one of none, concat, mean, max, weighted"),
    ],
)
def test_fuse_refuses_weights_and_methods_that_make_no_sense(method, weights, problem):
    with pytest.raises(ConfigError, match=problem):
        fuse(layers_of(2, 2), method=method, weights=weights)


@pytest.mark.parametrize("method", ["none", "concat", "mean", "max", "weighted"])
@pytest.mark.parametrize("strands", ["none", "mean", "concat"])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_feature_names_fit_the_matrices_and_are_unique(method, strands, num_layers):
    layers = layers_of(*[2] * num_layers)
    combined = {name: combine_strands(matrix, matrix, method=strands) for name, matrix in layers.items()}
    weights = [1.0] * num_layers if method == "weighted" else None
    fused = fuse(combined, method=method, weights=weights)
    names = feature_names(dict.fromkeys(layers, 2), method=method, strands=strands)
    assert list(names) == list(fused)
    for key, matrix in fused.items():
        assert len(names[key]) == len(set(names[key])) == matrix.shape[1]


def test_feature_names_known_answers():
    widths = {"blocks.28.mlp.l3": 2, "final": 1}
    assert feature_names(widths, method="concat")["concat"] == (
        "blocks.28.mlp.l3:0",
        "blocks.28.mlp.l3:1",
        "final:0",
    )
    assert feature_names({"a": 1, "b": 1}, method="mean", strands="concat")["mean"] == ("mean:0", "mean:rc:0")


def test_combine_strands_mean_is_the_same_for_either_strand():
    forward, reverse = layers_of(3, 3).values()
    mean = combine_strands(forward, reverse, method="mean")
    assert torch.equal(mean, combine_strands(reverse, forward, method="mean"))
    torch.testing.assert_close(mean, (forward + reverse) / 2)


def test_combine_strands_concat_and_none():
    forward, reverse = layers_of(3, 3).values()
    both = combine_strands(forward, reverse, method="concat")
    assert torch.equal(both[:, :3], forward)
    assert torch.equal(both[:, 3:], reverse)
    assert combine_strands(forward, None, method="none") is forward


def test_combine_token_strands_turns_the_reverse_strand_round():
    forward = torch.arange(5.0)[:, None]
    reverse = forward.flip(0)
    assert torch.equal(combine_token_strands(forward, reverse, method="mean"), forward)
    assert torch.equal(
        combine_token_strands(forward, reverse, method="concat"), torch.cat([forward, forward], dim=1)
    )
    assert combine_token_strands(forward, None, method="none") is forward
    assert torch.equal(reverse, torch.arange(4.0, -1.0, -1.0)[:, None])


def test_combine_strands_refuses_what_does_not_fit():
    with pytest.raises(ShapeError, match=r"reverse strand: nothing, expected \(2, 3\)"):
        combine_strands(torch.ones(2, 3), None, method="mean")
    with pytest.raises(ShapeError, match=r"reverse strand: shape \(3, 3\), expected \(2, 3\)"):
        combine_token_strands(torch.ones(2, 3), torch.ones(3, 3), method="concat")
    with pytest.raises(ConfigError, match="rc 'max': expected one of none, mean, concat; set rc"):
        combine_strands(torch.ones(2, 3), torch.ones(2, 3), method="max")
