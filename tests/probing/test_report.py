"""What a probe says in words, and what is in its plot."""

from __future__ import annotations

import pytest

from genoembed.errors import StoreError
from genoembed.probing.cross_validation import MetricSummary
from genoembed.probing.report import choose_layer, compare_baselines, layer_number, plot_layers, verdict
from genoembed.probing.sweep import InsideChoice, Scored

METRICS = ("mcc", "accuracy", "macro_f1")


def summary(mean, spread=0.02):
    return MetricSummary(mean=mean, sd=spread, values=(mean - spread, mean, mean + spread))


def scored(name, mean, kind="layer"):
    return Scored(
        name=name, kind=kind, metrics={metric: summary(mean) for metric in METRICS}, inner=(mean,) * 3
    )


def inside(mean, folds=None):
    found = summary(mean) if folds is None else MetricSummary(mean=mean, sd=0.1, values=folds)
    return InsideChoice(metrics=dict.fromkeys(METRICS, found), chosen=("a",) * 3)


def sweep(*means):
    return [scored(f"blocks.{number}.mlp.l3", mean) for number, mean in enumerate(means)]


def chosen(*means):
    return choose_layer(sweep(*means), inside(0.7), pooling="mean", task="classification")


def test_neighbors_of_the_best_are_a_range():
    found = chosen(0.2, 0.68, 0.71, 0.69, 0.5)
    assert found.layer == "blocks.2.mlp.l3"
    assert found.sentence == (
        "use layer 2 (blocks.2.mlp.l3), mean pooling: MCC 0.710 +- 0.020; 95 % of the best within "
        "layers 1-3; MCC 0.700 +- 0.020 where the layer is chosen without the test fold"
    )


def test_gap_between_good_layers_is_said():
    found = chosen(0.7, 0.2, 0.71)
    assert "95 % of the best at 2 layers between 0 and 2" in found.sentence


def test_lone_best_layer_is_said():
    assert "no other layer reaches 95 % of it" in chosen(0.1, 0.9, 0.2).sentence


def test_nothing_is_near_a_best_that_is_chance():
    found = chosen(-0.1, -0.02)
    assert found.near_best == ()
    assert "no layer is better than chance" in found.sentence


def test_single_layer_needs_no_choice():
    sentence = choose_layer([scored("X", 0.5)], inside(0.5), pooling=None, task="classification").sentence
    assert sentence == "use layer X: MCC 0.500 +- 0.020"


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("blocks.7.mlp.l3", 7),
        ("blocks.7", None),
        ("encoder.layer.11", 11),
        ("model.layers.3", 3),
        ("layers.3.mlp", None),
        ("norm", None),
    ],
)
def test_number_stands_only_where_it_means_the_module(path, number):
    assert layer_number(path) == number


def test_comparison_is_by_fold_and_the_strongest_comes_first():
    found = compare_baselines(
        inside(0.7, (0.6, 0.7, 0.8)),
        [("weak", summary(0.1)), ("strong", summary(0.65, 0.1))],
        task="classification",
    )
    assert [one.name for one in found] == ["strong", "weak"]
    assert found[0].difference == pytest.approx(0.05)
    assert found[0].difference_sd == pytest.approx(0, abs=1e-12)
    assert all(one.is_beaten for one in found)


@pytest.mark.parametrize(
    ("folds", "words"),
    [
        ((0.79, 0.80, 0.81), "beats every baseline; the strongest is 6-mer (MCC 0.700), beaten by"),
        ((0.50, 0.60, 0.70), "does NOT beat 6-mer (MCC 0.700): for this label the embeddings are not needed"),
        ((0.90, 0.40, 0.86), "is above 6-mer (+0.020 +- "),
    ],
)
def test_verdict_says_it_in_plain_words(folds, words):
    model = inside(sum(folds) / 3, folds)
    comparisons = compare_baselines(
        model, [("6-mer", summary(0.7, 0.0)), ("GC", summary(0.1, 0.0))], task="classification"
    )
    assert words in verdict(model, comparisons, task="classification")


def test_verdict_without_baselines_claims_nothing():
    assert "no baselines were measured" in verdict(inside(0.9), [], task="classification")


def draw(path, paths):
    plot_layers(
        path,
        [scored(name, 0.1 * place, "layer") for place, name in enumerate(paths)],
        lines=[scored("best 2 concatenated", 0.6, "fusion"), scored("6-mer counts", 0.3, "baseline")],
        untrained=[scored(name, 0.2, "untrained") for name in paths],
        best=paths[-1],
        task="classification",
        title="60 rows",
    )


def test_svg_names_layers_lines_and_the_best(tmp_path):
    draw(tmp_path / "a.svg", [f"blocks.{number}.mlp.l3" for number in range(4)])
    text = (tmp_path / "a.svg").read_text()
    for words in (
        "6-mer counts (0.300)",
        "best 2 concatenated (0.600)",
        "untrained copy, by layer",
        "best: 3 (0.300)",
    ):
        assert words in text
    assert "layer (module path)" not in text


def test_paths_are_spelt_out_where_numbers_do_not_mean_them(tmp_path):
    draw(tmp_path / "a.svg", ["blocks.0", "norm"])
    text = (tmp_path / "a.svg").read_text()
    assert "layer (module path)" in text
    assert "best: norm" in text


def test_png_is_a_picture(tmp_path):
    draw(tmp_path / "a.png", ["blocks.0.mlp.l3"])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_picture_that_cannot_be_written_says_so(tmp_path):
    with pytest.raises(StoreError, match="cannot be written"):
        draw(tmp_path / "nowhere" / "a.png", ["blocks.0.mlp.l3"])
