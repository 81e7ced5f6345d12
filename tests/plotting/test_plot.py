"""Maps of embedding files: what is on them, what is left out, and the files they become."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import sys

import numpy as np
import pytest

from genoembed import fit_transform, plot
from genoembed.config.plot import MapConfig
from genoembed.errors import ConfigError, GenoembedError, MissingExtraError, StoreError
from genoembed.plotting import reduction
from genoembed.plotting.colors import (
    MISSING,
    PALETTE,
    THEMES,
    ClassColumn,
    MapContent,
    NumberColumn,
    class_column,
    number_column,
    text_column,
)
from genoembed.plotting.drawing import build_page, draw_map
from genoembed.plotting.reduction import PlaneMap, lay_out
from genoembed.plotting.run import read_values
from tests.plotting.map_file import NASTY, write_map_file, write_values


@pytest.fixture
def file(tmp_path):
    write_map_file(tmp_path / "a.h5", failed=(7,), nan=(11,))
    write_values(tmp_path / "values.tsv")
    return tmp_path / "a.h5"


def read_table(path):
    header, *lines = [line.split("\t") for line in path.read_text().splitlines()]
    return [dict(zip(header, line, strict=True)) for line in lines]


def content_of(path):
    text = path.read_text()
    (found,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', text, flags=re.S)
    return json.loads(found)


def decoded(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype)


@pytest.mark.parametrize(
    ("module", "named", "options"),
    [
        ("matplotlib", "a picture needs matplotlib", {}),
        ("sklearn", "plot needs scikit-learn", {}),
        ("umap", "method 'umap' needs umap-learn", {"method": "umap"}),
    ],
)
def test_missing_package_is_named_before_vectors_are_read(
    module, named, options, file, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("genoembed.plotting.run.read_points", lambda *_, **__: pytest.fail("were read"))
    with pytest.raises(MissingExtraError, match=rf"{named}; install it with: .*\[analysis\]"):
        plot(file, tmp_path / "map.png", **options)


def test_plot_writes_all_kinds_and_leaves_out_what_has_no_vector(file, tmp_path):
    outputs = [tmp_path / f"map.{kind}" for kind in ("png", "svg", "html", "tsv")]
    report = plot(file, outputs, values=tmp_path / "values.tsv")
    assert report.outputs == tuple(outputs)
    assert (report.num_points, report.num_in_file) == (58, 60)
    assert (report.num_failed, report.num_not_finite, report.num_not_sampled) == (1, 1, 0)
    assert (report.num_without_value, report.num_unknown_ids) == (1, 1)
    assert report.colors[:3] == ("kind", "gc", "cluster")
    assert {"length", "flags", "strand"} < set(report.colors)
    assert "source" not in report.colors  # of all rows the same
    assert outputs[0].read_bytes().startswith(b"\x89PNG")
    svg = outputs[1].read_text()
    assert "58 of 60 records" in svg
    assert "2 without a vector left out" in svg
    assert "PC1" in svg
    rows = read_table(outputs[3])
    assert len(rows) == 58
    assert {"r7", "r11"}.isdisjoint(row["id"] for row in rows)
    assert rows[1]["id"] == "r1/x"
    assert (rows[4]["id"], rows[4]["kind"], rows[4]["length"]) == ("r4", "NA", "140")


def test_pca_of_the_map_is_that_of_the_singular_values(file, tmp_path):
    vectors = write_map_file(tmp_path / "b.h5")
    plot(tmp_path / "b.h5", tmp_path / "b.tsv")
    centered = vectors.astype(np.float64) - vectors.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centered, full_matrices=False)
    expected = np.abs(left[:, :2] * sizes[:2])
    found = np.array([[float(row["x"]), float(row["y"])] for row in read_table(tmp_path / "b.tsv")])
    np.testing.assert_allclose(np.abs(found), expected, rtol=1e-3, atol=1e-3)


def test_page_holds_every_point_and_nothing_from_elsewhere(file, tmp_path):
    plot(file, tmp_path / "map.html", values=tmp_path / "values.tsv", color="length")
    text = (tmp_path / "map.html").read_text()
    assert "default-src 'none'" in text
    assert "unsafe" not in text.partition("</head>")[0]
    for kind, body in (("script", text.rpartition("<script>")[2]), ("style", text.partition("<style>")[2])):
        digest = hashlib.sha256(body.partition(f"</{kind}>")[0].encode()).digest()
        assert f"{kind}-src 'sha256-{base64.b64encode(digest).decode()}'" in text  # or nothing would run
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']|url\(|https?://", text)
    assert len(text) < 100_000
    assert NASTY not in text  # it would end the script element
    found = content_of(tmp_path / "map.html")
    assert found["descriptions"][0] == NASTY
    assert found["ids"][1] == "r1/x"
    assert len(found["ids"]) == len(decoded(found["x"], "<f4")) == len(decoded(found["y"], "<f4")) == 58
    assert sorted(decoded(found["order"], "<i4")) == list(range(58))
    assert [column["name"] for column in found["columns"]][:3] == ["length", "kind", "gc"]
    kind = found["columns"][1]
    assert [kind["classes"][code] for code in decoded(kind["codes"], "<i2")[:3]] == ["a", "b", "c"]
    assert decoded(kind["codes"], "<i2")[4] == MISSING
    assert decoded(found["columns"][0]["values"], "<f8")[:3].tolist() == [100, 110, 120]


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_plot_gives_the_same_bytes_again(method, file, tmp_path):
    names = ("map.png", "map.svg", "map.pdf", "map.html")
    runs = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        plot(file, [folder / name for name in names], method=method, title="t")
        runs.append([(folder / name).read_bytes() for name in names])
    assert [first == second for first, second in zip(*runs, strict=True)] == [True] * 4


@pytest.mark.parametrize("method", ["pca", "umap", "tsne"])
def test_map_keeps_groups_apart(method):
    if method == "umap":
        pytest.importorskip("umap")
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(3, 20)) * 10
    group = np.arange(60) % 3
    vectors = (centers[group] + generator.normal(size=(60, 20))).astype(np.float32)
    before = vectors.copy()
    plane = lay_out(vectors, MapConfig(method=method, neighbors=8, perplexity=8))
    np.testing.assert_array_equal(vectors, before)
    again = lay_out(vectors, MapConfig(method=method, neighbors=8, perplexity=8))
    np.testing.assert_array_equal(plane.points, again.points)  # the seed decides
    assert plane.points.shape == (60, 2)
    gaps = np.linalg.norm(plane.points[:, None] - plane.points[None], axis=2)
    np.fill_diagonal(gaps, np.inf)
    assert (group[gaps.argmin(axis=1)] == group).all()


def test_sample_is_stated_and_the_same_for_a_seed(file, tmp_path):
    reports = [
        plot(file, [tmp_path / f"{n}.tsv", tmp_path / f"{n}.svg"], max_points=20, seed=seed)
        for n, seed in enumerate((5, 5, 6))
    ]
    tables = [(tmp_path / f"{n}.tsv").read_text() for n in range(3)]
    assert tables[0] == tables[1] != tables[2]
    assert all(report.num_points + report.num_not_finite == 20 for report in reports)
    assert reports[0].num_not_sampled == 59 - 20
    assert "39 records are not shown" in (tmp_path / "0.svg").read_text()


def test_transform_is_applied_first(tmp_path):
    vectors = write_map_file(tmp_path / "b.h5")
    fit_transform(tmp_path / "b.h5", output=tmp_path / "white.h5", method="whiten")
    plot(tmp_path / "b.h5", tmp_path / "b.tsv", transform=tmp_path / "white.h5")
    found = np.array([[float(row["x"]), float(row["y"])] for row in read_table(tmp_path / "b.tsv")])
    np.testing.assert_allclose(found.var(axis=0), 1, rtol=1e-3)
    assert np.abs(found).max() < np.abs(vectors).max()


def test_values_without_header_are_named_after_their_file(tmp_path):
    (tmp_path / "classes.tsv").write_text("b\tx\na\ty\n")
    assert read_values(tmp_path / "classes.tsv", ["a", "b", "c"]) == ({"classes": ("y", "x", None)}, 0)
    (tmp_path / "classes.csv").write_text('a,"x, y",1\n')
    found, _ = read_values(tmp_path / "classes.csv", ["a"])
    assert found == {"classes_1": ("x, y",), "classes_2": ("1",)}


def test_values_are_read_from_any_table(tmp_path):
    """Compressed, with semicolons, or with the mark that spreadsheets begin a file with."""
    for name, raw in (
        ("v.tsv.gz", gzip.compress(b"id\tx\na\t1\n")),
        ("v.csv", b"id;x\na;1\n"),
        ("v.tsv", "\ufeffid\tx\na\t1\n".encode()),
        ("v.jsonl", b'{"id": "a", "x": 1}\n'),
    ):
        (tmp_path / name).write_bytes(raw)
        assert read_values(tmp_path / name, ["a"]) == ({"x": ("1",)}, 0)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a\n", "has no column of values"),
        ("", "the file is empty"),
        ("id\tx\na\t1\t2\n", r"v.tsv:2: the row has 3 column\(s\), expected the 2 of the header"),
        ("id\tx\na\t1\na\t2\n", r"v.tsv:3: record 'a': has a row already"),
        ("id\tx\nz\t1\n", r"none of its ids \('z' ...\) is in the embedding file \('a' ...\)"),
        ("id\tx\tx\na\t1\t2\n", "appears twice in the header"),
    ],
)
def test_malformed_values_are_refused_by_line(text, problem, tmp_path):
    (tmp_path / "v.tsv").write_text(text)
    with pytest.raises(GenoembedError, match=problem):
        read_values(tmp_path / "v.tsv", ["a", "b"])


def test_numbers_are_classes_where_that_is_said(file, tmp_path):
    plot(file, tmp_path / "map.html", values=tmp_path / "values.tsv", classes="cluster", color="cluster")
    assert content_of(tmp_path / "map.html")["columns"][0]["classes"] == ["0", "1", "2"]


def test_many_classes_keep_the_frequent_ones_and_join_the_rest():
    values = [f"c{n:03}" for n in range(40) for _ in range(41 - n)]
    column = class_column("c", values)
    assert column.classes[0] == "c000"
    assert column.classes[-1] == "other (21 classes)"
    for theme, colors in THEMES.items():
        assert column.colors(theme)[-1] == colors.other
        assert len(column.classes) == len(set(column.colors(theme))) == len(PALETTE)
    assert sum(column.counts) == len(values)
    assert column.values == tuple(values)


def test_legend_is_in_order_of_names_whatever_the_order_of_rows():
    values = ["cluster 10", "Cluster 9", "cluster 2", "cluster 10", None, "b", "B"]
    orders = [list(range(7)), [6, 4, 2, 0, 5, 3, 1]]
    columns = [class_column("c", [values[row] for row in order]) for order in orders]
    assert columns[0].classes == columns[1].classes == ("B", "b", "cluster 2", "Cluster 9", "cluster 10")
    assert columns[0].colors("dark") == columns[1].colors("dark")
    many = [f"c{n}" for n in range(40)]  # all as frequent: names decide which keep a color
    assert class_column("c", many).classes == class_column("c", many[::-1]).classes
    assert class_column("c", many).classes[:3] == ("c0", "c1", "c2")


def luminance(color):
    parts = np.array([int(color[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("theme", THEMES)
def test_colors_are_seen_on_their_background(theme):
    colors = THEMES[theme]

    def contrast(first, second):
        low, high = sorted((luminance(first), luminance(second)))
        return (high + 0.05) / (low + 0.05)

    for background in (colors.background, colors.panel, colors.grid):
        assert all(contrast(text, background) >= 4.5 for text in (colors.ink, colors.quiet, colors.accent))
    assert all(contrast(color, colors.background) >= 1.9 for color in PALETTE)
    assert all(contrast(color, colors.background) >= 1.35 for color in colors.scale)
    steps = [luminance(color) for color in colors.scale]
    assert steps == sorted(steps)  # also in gray, higher is lighter


def test_dates_have_a_scale_with_dates_on_it(file, tmp_path):
    days = [f"20{10 + row // 12}-{row % 12 + 1:02}-15" for row in range(60)]
    rows = [f"{'r1/x' if row == 1 else f'r{row}'}\t{day if row else ''}" for row, day in enumerate(days)]
    (tmp_path / "d.tsv").write_text("\n".join(["id\tcollected", *rows]) + "\n")
    plot(file, [tmp_path / "d.html", tmp_path / "d.svg", tmp_path / "out.tsv"], values=tmp_path / "d.tsv")
    column = content_of(tmp_path / "d.html")["columns"][0]
    assert column["isDate"]
    assert [label for _, label in column["ticks"]] == ["2011", "2012", "2013", "2014"]
    assert ">2013<" in (tmp_path / "d.svg").read_text()
    assert [row["collected"] for row in read_table(tmp_path / "out.tsv")][:2] == ["NA", days[1]]
    assert not isinstance(text_column("d", [*days, "soon"]), NumberColumn)
    assert not isinstance(text_column("d", days, as_classes=True), NumberColumn)


@pytest.mark.parametrize(
    ("values", "label"),
    [
        (["9999-12-31", None, "9999-12-31"], "9999-12-31"),
        (["9999-12-31T23:59:59.999999"], "9999-12-31 23:59:59"),
        (["9999-12-30", "9999-12-31T23:59:59.9"], "9999-12-31 23:59:59"),
        (["0001-01-01", "0001-01-01"], "0001-01-01"),
        (["0001-01-01", "9999-12-31"], "9999-12-31"),
    ],
)
def test_first_and_last_days_of_the_calendar_are_dates(values, label):
    column = text_column("d", values)
    assert isinstance(column, NumberColumn)
    assert column.low < column.high
    assert column.ticks
    assert label in [column.text(row) for row in range(len(values))]


def test_times_outside_the_calendar_are_classes():
    # in UTC they are of the years 0 and 10000
    for value in ("0001-01-01T00:00:00+02:00", "9999-12-31T23:00:00-02:00"):
        assert not isinstance(text_column("d", ["2020-01-01", value]), NumberColumn)


def test_names_with_an_underscore_are_no_numbers():
    column = text_column("cluster", ["1_0", "1_1", "2"])
    assert not isinstance(column, NumberColumn)
    assert column.classes == ("1_0", "1_1", "2")
    long = "1" * 5000  # more digits than Python makes an integer of
    assert text_column("cluster", [f"a{long}", "a10", "a9"]).classes == ("a9", "a10", f"a{long}")


def test_pictures_have_the_background_of_their_theme(file, tmp_path):
    plot(file, tmp_path / "light.svg", values=tmp_path / "values.tsv", color="gc")
    plot(file, [tmp_path / "dark.svg", tmp_path / "dark.pdf"], values=tmp_path / "values.tsv", theme="dark")
    for theme, others in (("light", "dark"), ("dark", "light")):
        text = (tmp_path / f"{theme}.svg").read_text()
        assert THEMES[theme].background in text
        assert THEMES[others].background not in text
    assert (tmp_path / "dark.pdf").read_bytes().startswith(b"%PDF-")


ODD = {
    "letters without a glyph": ["\u57fa\u56e0", "\U0001f9ec", "$x_1$", "_hidden", "<b>&amp;"],
    "long": ["long " * 60 + "a", "long " * 60 + "b", "x" * 400],
    "300 classes": [f"class number {number}" for number in range(300)],
    "no value at all": [None],
    "huge and tiny": ["1e308", "-1e308", "1e-320", "0"],
    "one number": ["7"],
    "beyond float": ["1e999", "3", "nan"],
    "next to each other": ["1e17", "100000000000000016"],
    "first and last day": ["0001-01-01", "9999-12-31"],
    "one day": ["2020-02-29", "2020-02-29T23:59:59.9+14:00"],
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_values_are_drawn(kind, recwarn):
    num = 60
    values = (ODD[kind] * num)[: max(num, len(ODD[kind]))]
    generator = np.random.default_rng(0)
    points = generator.normal(size=(len(values), 2)).astype(np.float32)
    content = MapContent(
        plane=PlaneMap(points=points, axis_labels=("1", "2"), settings=""),
        ids=tuple(map(str, range(len(values)))),
        descriptions=("",) * len(values),
        lengths=np.ones(len(values), dtype=np.int64),
        columns=(text_column(kind, values),),
        title=kind,
        notes=(),
        keeps_scale=False,
        seed=0,
    )
    for picture in ("png", "svg", "pdf") if kind == "letters without a glyph" else ("svg",):
        assert draw_map(content, picture, theme="dark")
    assert build_page(content)
    assert not recwarn.list


def test_scale_leaves_outliers_out_and_knows_missing_ones():
    column = number_column("x", np.array([*range(1000), 1e9, np.nan, np.inf]))
    assert column.high < 1000
    assert column.num_missing == 2
    assert not isinstance(column, ClassColumn)
    same = number_column("x", np.full(5, 3.0))
    assert same.low < same.high


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"color": "nothing"},
            "color is 'nothing', which is not a column of .*; set color to one of description",
        ),
        ({"method": "pcoa"}, "method is 'pcoa'; set method to one of pca, umap, tsne"),
        ({"output": "map.gif"}, "output is 'map.gif'; set output to names that end in .png, .svg, .pdf"),
        ({"theme": "blue"}, "theme is 'blue'"),
        ({"perplexity": 0}, "perplexity is 0; set perplexity to 1 or more"),
        ({"max_points": 2}, "max_points is 2; set max_points to 3 or more"),
        ({"speed": 2}, "'speed' is not an option"),
    ],
)
def test_wrong_options_are_refused(options, problem, file):
    with pytest.raises(ConfigError, match=problem):
        plot(file, **options)


EQUAL = {
    "ones": np.ones((30, 8)),
    "a tenth": np.full((30, 8), 0.1),  # whose mean in float32 is another number
    "zeros": np.zeros((30, 1)),
    "largest": np.full((30, 8), 3e38),
    "three": np.full((3, 8), 0.1),
}


@pytest.mark.parametrize("method", ["pca", "umap", "tsne"])
@pytest.mark.parametrize("kind", EQUAL)
def test_equal_rows_lie_on_one_point_and_the_map_says_so(kind, method):
    plane = lay_out(EQUAL[kind].astype(np.float32), MapConfig(method=method))
    assert not plane.points.any()
    assert plane.points.shape == (len(EQUAL[kind]), 2)
    assert ("are equal" in plane.settings) == (method != "pca")
    assert "nan" not in "".join(plane.axis_labels)


@pytest.mark.parametrize("method", ["pca", "tsne"])
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30, 8e37])
def test_vectors_of_any_size_are_arranged(scale, method):
    vectors = (np.random.default_rng(0).normal(size=(30, 8)) * scale).astype(np.float32)
    plane = lay_out(vectors, MapConfig(method=method))
    assert np.isfinite(plane.points).all()
    assert len(np.unique(plane.points, axis=0)) == 30
    assert "of vectors divided by 2^" in plane.settings
    assert "nan" not in "".join(plane.axis_labels)


def test_place_that_is_no_number_is_no_map(monkeypatch):
    monkeypatch.setattr(reduction, "_tsne", lambda scores, *_: np.full((len(scores), 2), np.nan))
    with pytest.raises(ConfigError, match="t-SNE finds no place for some of the 9 vectors; set method to"):
        lay_out(np.eye(9, dtype=np.float32), MapConfig(method="tsne"))


def test_too_few_vectors_are_refused(tmp_path):
    write_map_file(tmp_path / "a.h5", num_rows=5, failed=(0, 1), nan=(2,))
    with pytest.raises(
        ConfigError, match=r"2 of 5 rows have a vector \(2 failed\), but a map needs 3 or more"
    ):
        plot(tmp_path / "a.h5")


def test_existing_files_stay_unless_told(file, tmp_path):
    (tmp_path / "map.html").write_text("mine")
    with pytest.raises(StoreError, match="exists already"):
        plot(file, [tmp_path / "map.png", tmp_path / "map.html"])
    assert not (tmp_path / "map.png").exists()
    assert (tmp_path / "map.html").read_text() == "mine"
    plot(file, tmp_path / "map.html", overwrite=True)
    assert (tmp_path / "map.html").read_text() != "mine"


def test_default_outputs_lie_beside_the_file(file):
    report = plot(file)
    assert report.outputs == (file.with_suffix(".png"), file.with_suffix(".html"))
    assert report.colors[0] == "length"
