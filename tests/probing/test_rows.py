"""Rows and labels of a probe: what takes part, what is left out and counted, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

import genoembed
from genoembed.contracts import EmbeddingBlock, ObsRow
from genoembed.errors import ConfigError, GenoembedWarning, LabelError, LayerError, SequenceFormatError
from genoembed.probing.run import divide_options
from genoembed.probing.vectors import RowsOfLayers
from genoembed.store import EmbeddingWriter, open_embeddings

NUM = 40
CODES = np.arange(NUM) // 2 % 2


def obs_row(number, flags="", source="a.fa"):
    return ObsRow(
        id=f"r{number}", description="", length=4, start=0, end=4, strand="+", source=source, n_windows=1,
        sha256="", flags=flags,
    )  # fmt: skip


def store(path, *, failed=(), flagged=(), sources=("a.fa",)):
    rng = np.random.default_rng(0)
    matrices = {
        name: (rng.normal(size=(NUM, 3)) + size * CODES[:, None]).astype(np.float32)
        for name, size in (("blocks.0", 0), ("blocks.1", 4))
    }
    for matrix in matrices.values():
        matrix[list(failed)] = np.nan
    rows = tuple(
        obs_row(n, "masked:2,failed:no memory" if n in flagged else "", sources[n % len(sources)])
        for n in range(NUM)
    )
    with EmbeddingWriter(path, kind="pooled") as writer:
        writer.append(EmbeddingBlock(rows=rows, matrices=matrices))
        writer.finish({"version": "1"})
    return path


def write_labels(path, *, names=None, header="id\tlabel", values=None):
    names = [f"r{number}" for number in range(NUM)] if names is None else names
    values = [f"{'xy'[CODES[int(name[1:]) % NUM]]}" for name in names] if values is None else values
    path.write_text(header + "\n" + "".join(f"{n}\t{v}\n" for n, v in zip(names, values, strict=True)))
    return path


def run(tmp_path, **options):
    given = {
        "labels": tmp_path / "l.tsv",
        "output": tmp_path / "out",
        "num_folds": 3,
        "untrained": False,
        "baselines": False,
        "plot": False,
    }
    return genoembed.probe(tmp_path / "a.h5", **(given | options))


def test_failed_and_unlabeled_rows_are_left_out_and_counted(tmp_path):
    store(tmp_path / "a.h5", failed=(3, 5), flagged=(3, 5, 9))
    write_labels(tmp_path / "l.tsv", names=[f"r{number}" for number in range(36)])
    report = run(tmp_path)
    assert report.num_rows == 33
    assert report.counts["rows without a vector"] == 3
    assert report.counts["rows without a label"] == 4
    assert report.choice.layers == ("blocks.1",)
    assert report.recommendation.startswith("use layer blocks.1: MCC 1.000")


def test_empty_label_is_no_label(tmp_path):
    store(tmp_path / "a.h5")
    values = ["" if number < 2 else "xy"[CODES[number]] for number in range(NUM)]
    write_labels(tmp_path / "l.tsv", values=values)
    assert run(tmp_path).counts["rows without a label"] == 2


def test_labels_without_a_record_stop_or_warn(tmp_path):
    store(tmp_path / "a.h5")
    names = [*(f"r{number}" for number in range(NUM)), "r100"]
    write_labels(tmp_path / "l.tsv", names=names)
    with pytest.raises(
        LabelError, match=r"1 label\(s\) without a record \('r100'\).*set unmatched to 'warn'"
    ):
        run(tmp_path)
    with pytest.warns(GenoembedWarning, match=r"1 label\(s\) without a record"):
        report = run(tmp_path, unmatched="warn")
    assert report.counts["labels without a record"] == 1


def test_labels_of_no_record_at_all_always_stop(tmp_path):
    store(tmp_path / "a.h5")
    write_labels(tmp_path / "l.tsv", names=[f"q{number}" for number in range(NUM)])
    with pytest.raises(LabelError, match="give the labels of these records"):
        run(tmp_path, unmatched="warn")


def test_chromosome_is_the_source_where_ids_say_nothing(tmp_path):
    store(tmp_path / "a.h5", sources=("1.fa", "2.fa", "3.fa", "4.fa", "5.fa"))
    write_labels(tmp_path / "l.tsv")
    assert run(tmp_path, cv="chromosome").num_groups == 5


def test_chromosome_that_cannot_be_told_is_refused(tmp_path):
    store(tmp_path / "a.h5")
    write_labels(tmp_path / "l.tsv")
    with pytest.raises(ConfigError, match="cv is 'chromosome', but ids such as 'r0' name none"):
        run(tmp_path, cv="chromosome")


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        ("name\tlabel", {}, r"no column 'id' \(there are 'name', 'label'\); set id_column"),
        ("id\tclass", {}, r"no column 'label' .*label_column"),
        ("id\tlabel", {"cv": "grouped"}, r"no column 'group' .*group_column"),
        ("id\tlabel", {"preset": "geneb"}, r"no column 'split' .*split_column"),
    ],
)
def test_column_that_is_not_there_is_named(tmp_path, header, options, message):
    store(tmp_path / "a.h5")
    write_labels(tmp_path / "l.tsv", header=header)
    with pytest.raises(SequenceFormatError, match=message):
        run(tmp_path, **options)


def test_columns_can_have_other_names(tmp_path):
    store(tmp_path / "a.h5")
    write_labels(tmp_path / "l.tsv", header="name\tclass")
    assert run(tmp_path, id_column="name", label_column="class").num_rows == NUM


def test_id_that_appears_twice_is_refused_by_line(tmp_path):
    store(tmp_path / "a.h5")
    write_labels(tmp_path / "l.tsv", names=["r0", "r1", "r0"])
    with pytest.raises(LabelError, match=r"l\.tsv:4: record 'r0': id 'r0' appears twice"):
        run(tmp_path)


def test_value_that_is_no_number_is_refused_by_line(tmp_path):
    store(tmp_path / "a.h5")
    write_labels(tmp_path / "l.tsv")
    with pytest.raises(LabelError, match=r"l\.tsv:2: .*label 'x' is not a number"):
        run(tmp_path, task="regression")
    write_labels(tmp_path / "l.tsv", values=["1_0"] * NUM)  # which Python reads as 10
    with pytest.raises(LabelError, match=r"l\.tsv:2: .*label '1_0' is not a number"):
        run(tmp_path, task="regression")


def test_split_word_that_is_not_known_is_refused(tmp_path):
    store(tmp_path / "a.h5")
    names = [f"r{number}" for number in range(NUM)]
    rows = "".join(f"{name}\tx\ttrain\n" for name in names[:-1])
    (tmp_path / "l.tsv").write_text("id\tlabel\tsplit\n" + rows + f"{names[-1]}\ty\tholdout\n")
    with pytest.raises(LabelError, match="the split column has 'holdout', expected one of train"):
        run(tmp_path, preset="geneb")


def test_layers_of_a_file_are_taken_by_name(tmp_path):
    store(tmp_path / "a.h5")
    write_labels(tmp_path / "l.tsv")
    assert [layer.name for layer in run(tmp_path, layers="blocks.1").layers] == ["blocks.1"]
    with pytest.raises(LayerError, match=r"did you mean 'blocks\.1'"):
        run(tmp_path, layers=["blocks.11"], overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cvv": "grouped"}, "'cvv' is not an option; did you mean 'cv'?"),
        ({"fusion": "mean"}, "fusion is decided by the probe"),
        ({"num_folds": 2}, "set num_folds to 3 or more"),
        ({"cv": "random"}, "set cv to one of stratified, grouped, homology, chromosome"),
        ({"preset": "geneb", "task": "regression"}, "preset 'geneb' is for classes"),
        ({"split_column": "s"}, "split and split_column are for a preset"),
        ({"preset": "geneb", "split": "a", "split_column": "s"}, "give one of the two"),
        ({"group_column": "g"}, "set cv='grouped'"),
        ({"top": (1,)}, "set top to numbers of 2 or more"),
        ({"homolog_identity": 0.0}, "set homolog_identity above 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError) as caught:
        divide_options(options)
    assert message in str(caught.value)


def test_layers_are_read_again_where_there_is_no_room(tmp_path):
    store(tmp_path / "a.h5")
    rows = np.array([1, 4, 7])
    with open_embeddings(tmp_path / "a.h5") as file:
        kept, read = (RowsOfLayers(file, file.layers, rows, room_bytes=room) for room in (1 << 20, 0))
        for name in file.layers:
            assert kept[name] is kept[name]
            assert read[name] is not read[name]
            np.testing.assert_array_equal(kept[name], read[name])
            np.testing.assert_array_equal(kept.of(np.array([True, False, True]))[name], read[name][[0, 2]])
        assert (len(kept), list(kept)) == (2, ["blocks.0", "blocks.1"])


def test_transform_is_applied_to_its_own_layer(tmp_path):
    """The direction that tells classes apart is the strongest of one layer: nothing is left without it."""
    store(tmp_path / "a.h5")
    write_labels(tmp_path / "l.tsv")
    settings = {"method": "remove-top", "components": 1, "layer": "blocks.1"}
    genoembed.fit_transform(tmp_path / "a.h5", output=tmp_path / "t.h5", **settings)
    plain = {layer.name: layer.metrics["mcc"].mean for layer in run(tmp_path).layers}
    report = run(tmp_path, transform=tmp_path / "t.h5", overwrite=True)
    found = {layer.name: layer.metrics["mcc"].mean for layer in report.layers}
    assert plain["blocks.1"] > 0.9 > 0.5 > found["blocks.1"]
    assert found["blocks.0"] == plain["blocks.0"]
    assert "transform" not in " ".join(report.notes)
    alone = run(tmp_path, transform=tmp_path / "t.h5", layers="blocks.1", overwrite=True)
    assert "scored after the transform" in alone.notes[0]
    with pytest.raises(
        ConfigError, match=r"t\.h5: fitted on layer 'blocks\.1', which is not among those probed"
    ):
        run(tmp_path, transform=tmp_path / "t.h5", layers="blocks.0", overwrite=True)
    with pytest.raises(ConfigError, match=r"a second one for layer 'blocks\.1'"):
        run(tmp_path, transform=[tmp_path / "t.h5"] * 2, overwrite=True)
