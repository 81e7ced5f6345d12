"""What a probe says in words, and what is in its plot."""

from __future__ import annotations

import pytest

from genoembed.plotting.layers import DrawnScore, LayerScores, layer_number
from genoembed.probing.cross_validation import MetricSummary
from genoembed.probing.recommendation import choose_layer, extraction_line
from genoembed.probing.report import compare_baselines, verdict
from genoembed.probing.sweep import InsideChoice, Scored

METRICS = ("mcc", "accuracy", "macro_f1")


def summary(mean, spread=0.02):
    return MetricSummary(mean=mean, sd=spread, values=(mean - spread, mean, mean + spread))


def scored(name, mean, kind="layer", spread=0.02, members=()):
    return Scored(
        name=name,
        kind=kind,
        metrics={metric: summary(mean, spread) for metric in METRICS},
        inner=(mean,) * 3,
        members=members,
    )


def inside(mean, folds=None):
    found = summary(mean) if folds is None else MetricSummary(mean=mean, sd=0.1, values=folds)
    return InsideChoice(metrics=dict.fromkeys(METRICS, found), chosen=("a",) * 3)


def sweep(*means):
    return [scored(f"blocks.{number}.mlp.l3", mean) for number, mean in enumerate(means)]


def chosen(*means):
    return choose_layer(sweep(*means), inside(0.7), pooling="mean", task="classification")


def test_best_layer_is_recommended_where_no_earlier_one_is_within_one_standard_error():
    found = chosen(0.2, 0.68, 0.71, 0.69, 0.5)  # the standard error is 0.02 / sqrt(3) = 0.0115
    assert (found.name, found.layers, found.fusion) == ("blocks.2.mlp.l3", ("blocks.2.mlp.l3",), "none")
    assert found.near_best == ("blocks.1.mlp.l3", "blocks.2.mlp.l3", "blocks.3.mlp.l3")
    assert found.sentence == (
        "use layer 2 (blocks.2.mlp.l3), mean pooling: MCC 0.710 +- 0.020; expect MCC 0.700 +- 0.020, as "
        "where the choice is made without the test fold"
    )


def test_earliest_layer_within_one_standard_error_is_recommended():
    found = chosen(0.2, 0.70, 0.71, 0.705, 0.5)
    assert found.layers == ("blocks.1.mlp.l3",)
    assert found.best_layer == "blocks.2.mlp.l3"
    assert (
        "the earliest layer within one standard error (0.012) of the best, layer 2 (blocks.2.mlp.l3), MCC "
        "0.710 +- 0.020" in found.sentence
    )


FUSIONS = [
    scored("mean of all layers", 0.75, "fusion", members=(tuple("abc"),) * 3),
    scored("best 2 layers concatenated", 0.748, "fusion", members=(("a", "b"), ("b", "c"), ("a", "c"))),
]


@pytest.mark.parametrize(
    ("means", "name", "layers", "fusion"),
    [
        ((0.5, 0.7, 0.6), "best 2 layers concatenated", ("b", "c"), "concat"),
        ((0.5, 0.745, 0.6), "b", ("b",), "none"),
    ],
)
def test_fusion_is_recommended_only_where_no_layer_is_within_reach(means, name, layers, fusion):
    singles = [scored(letter, mean) for letter, mean in zip("abc", means, strict=True)]
    found = choose_layer(singles, inside(0.7), fusions=FUSIONS, pooling="mean", task="classification")
    assert (found.name, found.layers, found.fusion) == (name, layers, fusion)
    assert "within one standard error (0.012) of the best, mean of all layers" in found.sentence


def test_nothing_is_near_a_best_that_is_chance():
    found = chosen(-0.1, -0.02)
    assert found.near_best == ()
    assert "no candidate is better than chance" in found.sentence


def test_single_layer_needs_no_choice():
    sentence = choose_layer([scored("X", 0.5)], inside(0.5), pooling=None, task="classification").sentence
    assert sentence == "use layer X: MCC 0.500 +- 0.020"


MADE = {
    "config": {
        "input": {"inputs": ["my genes.fa"], "flank": 20, "regions": ["a.bed", "b.bed"], "keep_case": True},
        "model": {"model": "evo2_7b", "dtype": "auto", "device": "cuda", "trust_remote_code": False},
        "windows": {"window": None, "per_window": False},
        "embedding": {"layers": ["all"], "pooling": "max", "skip_first": 15, "fusion": "none"},
    }
}


def test_command_names_all_options_that_change_vectors_and_no_others():
    choice = chosen(0.2, 0.9)
    assert extraction_line(MADE, choice, weights={}, are_all=True) == (
        "genoembed extract 'my genes.fa' --keep-case --regions a.bed --regions b.bed --flank 20 "
        "--model evo2_7b --skip-first 15 --layer blocks.1.mlp.l3 --pool max"
    )
    assert extraction_line({}, choice, weights={}, are_all=True) == ""
    odd = {
        "config": {**MADE["config"], "input": {"inputs": ["-odd.fa", "-"]}},
        "model": {"code": {"module": "their_models.network", "package": None}},
    }
    line = extraction_line(odd, choice, weights={}, are_all=True)
    assert line.startswith("genoembed extract ./-odd.fa - --import their_models --model")


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


def drawn(paths, chosen):
    return LayerScores(
        layers=[DrawnScore(name, "layer", 0.1 * place, 0.02) for place, name in enumerate(paths)],
        lines=[
            DrawnScore("best 2 layers concatenated", "fusion", 0.6, 0.02),
            DrawnScore("6-mer counts", "baseline", 0.3, 0.02),
        ],
        untrained=[DrawnScore(name, "untrained", 0.2, 0.02) for name in paths],
        chosen=chosen,
        metric="MCC",
        title="60 rows",
    )


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_svg_names_layers_lines_and_the_recommended(theme):
    paths = [f"blocks.{number}.mlp.l3" for number in range(4)]
    text = drawn(paths, paths[-1]).draw("svg", theme=theme).decode()
    for words in (
        "6-mer counts (0.300)",
        "best 2 layers concatenated (0.600)",
        "untrained copy, by layer",
        "recommended: 3 (0.300)",
    ):
        assert words in text
    assert "layer (module path)" not in text
    assert drawn(paths, paths[-1]).draw("svg", theme=theme).decode() == text


def test_paths_are_spelt_out_where_numbers_do_not_mean_them():
    text = drawn(["blocks.0", "norm"], "norm").draw("svg").decode()
    assert "layer (module path)" in text
    assert "recommended: norm" in text


def test_recommended_fusion_is_named_among_the_lines():
    assert "recommended: best 2 layers" in drawn(["a"], "best 2 layers concatenated").draw("svg").decode()


@pytest.mark.parametrize(("kind", "begins"), [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_picture_is_of_its_kind(kind, begins):
    assert drawn(["blocks.0.mlp.l3"], "blocks.0.mlp.l3").draw(kind).startswith(begins)
