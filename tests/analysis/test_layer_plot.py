"""The picture of a sweep: that it is written, and what is in it."""

from __future__ import annotations

import pytest

from genoembed.errors import StoreError
from genoembed.probing.layer_plot import plot_layers
from genoembed.probing.linear import MetricSummary
from genoembed.probing.sweep import Scored

pytest.importorskip("matplotlib")


def scored(name, mean, kind):
    summary = MetricSummary(mean=mean, sd=0.05, folds=(mean,))
    return Scored(name=name, kind=kind, metrics={"mcc": summary}, inner=(mean,))


def draw(path, paths):
    plot_layers(
        path,
        [scored(name, 0.1 * place, "layer") for place, name in enumerate(paths)],
        lines=[scored("best 2 side by side", 0.6, "fusion"), scored("6-mer counts", 0.3, "baseline")],
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
        "best 2 side by side (0.600)",
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
