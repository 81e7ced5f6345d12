"""``probe`` from sequences to report, with a tiny model: one pass, reuse, options that work."""

from __future__ import annotations

import json
import os
import shlex

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import genoembed
from genoembed.cli import main
from genoembed.errors import ConfigError, GenoembedError, NonFiniteError, StoreError, StoreFormatError
from genoembed.pipeline.forward import BatchRunner
from genoembed.probing.recommendation import LayerChoice, extraction_line
from genoembed.probing.scalar_mix import mix_layers
from genoembed.probing.vectors import untrained_copy
from genoembed.sequences.composition import BASELINES
from tests.by_hand import STRIPED, model_of

LAYERS = [f"blocks.{number}.mlp.l3" for number in range(4)]
NUM = 48


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Short sequences of two compositions, with labels, values, groups and a split."""
    folder = tmp_path_factory.mktemp("probe")
    rng = np.random.default_rng(0)
    fasta, table = [], ["id\tlabel\tgroup\tsplit\tvalue"]
    for number in range(NUM):
        rich = number % 2
        letters = rng.choice(list("ACGT"), 30, p=[0.4, 0.1, 0.1, 0.4] if rich else [0.25] * 4)
        fasta.append(f">chr{number % 6}:{number}\n{''.join(letters)}\n")
        side, value = "test" if number >= 36 else "train", rich + rng.normal() / 9
        table.append(
            f"chr{number % 6}:{number}\t{'rich' if rich else 'even'}\tg{number // 4}\t{side}\t{value}"
        )
    (folder / "a.fa").write_text("".join(fasta))
    (folder / "a.tsv").write_text("\n".join(table) + "\n")
    return folder


@pytest.fixture(scope="module")
def report(data):
    return genoembed.probe(
        data / "a.fa", labels=data / "a.tsv", model=model_of(STRIPED), output=data / "out", num_folds=3
    )


def again(data, tmp_path, **options):
    options = {
        "labels": data / "a.tsv",
        "output": tmp_path / "o",
        "num_folds": 3,
        "untrained": False,
    } | options
    return genoembed.probe(options.pop("inputs", data / "out" / "embeddings.h5"), **options)


def test_probe_scores_layers_fusions_and_baselines(report):
    assert [layer.name for layer in report.layers] == LAYERS
    assert len(report.fusions) == 4
    assert [one.name for one in report.baselines] == list(BASELINES)
    assert [layer.kind for layer in report.untrained] == ["untrained"] * 4
    assert [layer.metrics for layer in report.untrained] != [layer.metrics for layer in report.layers]
    names = [row["name"] for row in report.table()]
    assert names[-2:] == ["one-hot letters", "untrained copy, layer chosen in the same way"]
    assert names[8:10] == ["layer chosen in training folds", "layer or fusion chosen in training folds"]
    assert report.was_extracted
    assert report.num_rows == NUM
    assert report.classes == {"even": 24, "rich": 24}


def test_recommendation_verdict_and_files_say_the_same(report):
    name = report.choice.name
    assert report.recommendation.startswith(
        f"use {f'layer {name[7]} ({name})' if name in LAYERS else f'the {name}'}, mean "
    )
    assert "mean pooling: MCC" in report.recommendation
    assert {one.name for one in report.comparisons} >= {"4-mer counts", "the untrained copy"}
    stored = json.loads((report.output / "probe.json").read_text())
    assert stored["recommendation"] == report.recommendation
    assert stored["command"] == report.command
    assert stored["recommended"] == name
    assert stored["layer"] == (name if name in LAYERS else None)
    assert stored["verdict"] == report.verdict
    assert stored["fusion_weights"] == dict(report.fusion_weights)
    assert [path.name for path in report.plots] == ["layers.png", "layers.svg"]
    assert all(path.stat().st_size > 1000 for path in report.plots)


def model_folder(tmp_path):
    model_of(STRIPED).module.save_pretrained(tmp_path / "model")
    model_of(STRIPED).tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def pasted(command, output):
    """Run a command line as a shell would split it."""
    words = shlex.split(command)
    assert words[0] == "genoembed"
    result = CliRunner().invoke(main, [*words[1:], "-o", str(output), "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    with genoembed.open_embeddings(output) as file:
        return file.X[:]


def test_recommended_command_makes_the_vectors_that_were_scored(data, tmp_path):
    found = genoembed.probe(
        data / "a.fa",
        labels=data / "a.tsv",
        model=model_folder(tmp_path),
        output=tmp_path / "out",
        num_folds=3,
        untrained=False,
        pooling="max",
        skip_first=3,
        dtype="float32",  # scores of layers are close, and decide what is recommended
        plot=False,
    )
    assert "--skip-first 3" in found.command
    assert found.choice.fusion == "none"
    made = pasted(found.command, tmp_path / "one.h5")
    with genoembed.open_embeddings(found.embeddings) as file:
        np.testing.assert_allclose(made, file[found.choice.name][:], rtol=1e-4, atol=1e-5)
        mean = LayerChoice(
            name="weighted mean of all layers",
            layers=tuple(file.layers),
            fusion="weighted",
            best_layer="",
            near_best=(),
            sentence="",
        )
        command = extraction_line(file.provenance, mean, weights=found.fusion_weights, are_all=True)
        assert "--layer all" in command
        expected = mix_layers({name: file[name][:] for name in file.layers}, found.fusion_weights)
    np.testing.assert_allclose(pasted(command, tmp_path / "w.h5"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("labels", "options", "said"),
    [
        (["x"] * 12, {}, r"one class \(x\), expected two classes or more"),
        (["x"] * 11 + ["y"], {}, r"class y has 1 row, expected at least num_folds \(3\)"),
        (["x", "y"] * 6, {"num_folds": 7}, r"class x has 6 rows, expected at least num_folds \(7\)"),
        (["x", "y"] * 6, {"label_column": "host"}, "no column 'host'"),
        (["x", "y"] * 6, {"cv": "grouped"}, "no column 'group'"),
        (["x", "y"] * 6, {"cv": "chromosome"}, "name none before a colon"),
        (["x", "y"] * 7, {}, r"2 label\(s\) without a record \('s12', 's13'\)"),
        (["x", "y"] * 6 + ["x", "y", "y"], {"unmatched": "warn", "num_folds": 7}, "class x has 6 rows"),
        ([""] * 12, {}, "no label, expected two classes or more"),
    ],
)
@pytest.mark.filterwarnings("ignore::genoembed.errors.GenoembedWarning")
def test_what_is_wrong_with_labels_is_said_before_anything_is_embedded(
    tmp_path, monkeypatch, labels, options, said
):
    monkeypatch.setattr("genoembed.probing.vectors.embed_layers", None)
    (tmp_path / "a.fa").write_text("".join(f">s{number}\nACGTACGTTGCA\n" for number in range(12)))
    rows = "".join(f"s{number}\t{label}\n" for number, label in enumerate(labels))
    (tmp_path / "a.tsv").write_text("id\tlabel\n" + rows)
    with pytest.raises(GenoembedError, match=said):
        genoembed.probe(
            tmp_path / "a.fa", labels=tmp_path / "a.tsv", output=tmp_path / "o", **{"num_folds": 3, **options}
        )
    assert not (tmp_path / "o").exists()


def pipe_of(path):
    """A name that can be read once, as the shell writes it for the output of a command."""
    end, other = os.pipe()
    os.write(other, path.read_bytes())
    os.close(other)
    return end, f"/dev/fd/{end}"


def test_sequences_of_a_pipe_are_read_once_and_a_table_of_labels_from_one_is_refused(data, tmp_path):
    end, name = pipe_of(data / "a.fa")
    lean = {"labels": data / "a.tsv", "model": model_of(STRIPED), "baselines": False, "plot": False}
    assert again(data, tmp_path, inputs=name, layers=[0], **lean).num_rows == NUM
    os.close(end)
    end, name = pipe_of(data / "a.tsv")
    with pytest.raises(ConfigError, match="a table is read twice, for its labels and its sequences"):
        again(data, tmp_path, inputs=name, labels=None, output=tmp_path / "p")
    os.close(end)


def test_few_rows_are_warned_of_before_anything_is_embedded(data, report, tmp_path, caplog):
    again(data, tmp_path, plot=False, num_folds=5, layers=[0], baselines=False)
    assert "48 labels, about 9 rows in each of 5 test folds: scores will vary" in caplog.text


def test_report_is_drawn_again_in_other_formats(report, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = genoembed.plot(report.output / "probe.json", ["p.pdf", "p.svg"], theme="dark", title="promoters")
    assert (drawn.method, drawn.num_points, drawn.layer) == (None, 4, report.choice.name)
    text = (tmp_path / "p.svg").read_text()
    assert "promoters" in text
    assert "6-mer counts (" in text
    (beside,) = genoembed.plot(report.output).outputs
    assert beside == report.output.with_name("out.png")
    for options, said in (
        ({"output": "m.html"}, "a probe is drawn as .png, .svg, .pdf"),
        ({"output": "m.png", "color": "length"}, "color: for a map"),
        ({"output": "m.png", "method": "umap"}, "method: for a map"),
        ({"output": "p.pdf"}, "exists already"),
    ):
        with pytest.raises(GenoembedError, match=said):
            genoembed.plot(report.output, **options)
    (tmp_path / "other.json").write_text('{"layers": 3}')
    with pytest.raises(StoreFormatError, match="is not a report of a probe"):
        genoembed.plot(tmp_path / "other.json", "m.png")


def test_rerun_takes_the_vectors_that_are_there(data, report):
    model = model_of(STRIPED)
    same = genoembed.probe(
        data / "a.fa", labels=data / "a.tsv", model=model, output=data / "out", num_folds=3, overwrite=True
    )
    assert not same.was_extracted
    assert same.table() == report.table()
    assert same.fusion_weights == report.fusion_weights


def test_embedding_file_gives_the_same_scores(data, report, tmp_path):
    found = again(data, tmp_path)
    assert not found.was_extracted
    assert found.table() == report.table()[:-1]
    assert found.baselines == report.baselines
    assert found.untrained == ()


def test_results_stay_unless_told(data, report):
    with pytest.raises(StoreError, match=r"probe\.json exists already; set overwrite"):
        genoembed.probe(data / "a.fa", labels=data / "a.tsv", output=report.output)


def test_layers_of_a_file_are_taken_by_number_too_and_in_the_order_of_the_model(data, report, tmp_path):
    found = again(data, tmp_path, layers=[2, "blocks.0.mlp.l3", 0], baselines=False, plot=False)
    assert [layer.name for layer in found.layers] == ["blocks.0.mlp.l3", "blocks.2.mlp.l3"]
    assert "--layer all" not in found.command


def test_options_of_the_pass_are_refused_for_an_embedding_file(data, report, tmp_path):
    with pytest.raises(ConfigError, match=r"window: the rows of .* are embedded already"):
        again(data, tmp_path, window=10)


@pytest.mark.parametrize("cv", ["grouped", "chromosome", "homology"])
def test_groups_are_kept_together(data, report, tmp_path, cv):
    found = again(data, tmp_path, cv=cv, plot=False)
    assert found.num_groups == {"grouped": 12, "chromosome": 6, "homology": NUM}[cv]
    assert found.cv == cv


def test_regression_ends_in_correlations(data, report, tmp_path):
    found = again(data, tmp_path, task="regression", label_column="value", plot=False)
    assert found.metrics == ("R2", "Pearson", "Spearman")
    assert found.classes == {}
    assert "R2" in found.recommendation


def test_preset_scores_the_test_split_in_three_regimes(data, report, tmp_path):
    found = again(data, tmp_path, preset="geneb", untrained=True, model=model_of(STRIPED))
    assert (found.num_rows, found.num_test) == (36, 12)
    assert list(found.shots["blocks.0.mlp.l3"]) == ["full", "10-shot", "1-shot"]
    means = ["mean of all layers", "weighted mean of all layers"]
    assert list(found.shots) == [*LAYERS, *means, *BASELINES, "untrained copy, layer chosen in the same way"]
    summary = found.shots["4-mer counts"]["10-shot"]["mcc"]
    assert len(summary.values) == 5
    table = (data / "a.tsv").read_text().splitlines()
    ids = [line.split("\t") for line in table[1:]]
    (tmp_path / "s.tsv").write_text("id\tsplit\n" + "".join(f"{row[0]}\t{row[3]}\n" for row in ids))
    lean = {"overwrite": True, "plot": False, "baselines": False, "layers": "blocks.0.mlp.l3"}
    other = again(data, tmp_path, preset="geneb", split=tmp_path / "s.tsv", **lean)
    assert other.shots == {"blocks.0.mlp.l3": found.shots["blocks.0.mlp.l3"]}


def test_sequences_that_are_gone_leave_baselines_out_and_say_so(data, report, tmp_path):
    moved = tmp_path / "moved.fa"
    moved.write_bytes((data / "a.fa").read_bytes())
    file = tmp_path / "m.h5"
    genoembed.extract(moved, model=model_of(STRIPED), layers="all", output=file)
    moved.unlink()
    found = again(data, tmp_path, inputs=file, untrained=True, model=model_of(STRIPED), plot=False)
    assert found.baselines == ()
    assert len(found.notes) == 2
    assert "no baselines were measured" in found.verdict
    with pytest.raises(ConfigError, match="set sequences to their files"):
        again(data, tmp_path, inputs=file, cv="homology", overwrite=True)
    found = again(data, tmp_path, inputs=file, sequences=data / "a.fa", overwrite=True, plot=False)
    assert found.baselines == report.baselines


def test_untrained_copy_is_of_the_same_shape_and_of_its_seed():
    model = model_of(STRIPED)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    state = torch.get_rng_state()
    first, same, other = (untrained_copy(model, seed=seed).module.state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: tensor.shape for name, tensor in first.items()} == {n: t.shape for n, t in before.items()}
    assert all(torch.equal(first[name], same[name]) for name in first)
    weight = next(name for name in first if name.endswith("mlp.l3.weight"))
    assert not torch.equal(first[weight], other[weight])
    assert not torch.equal(first[weight], before[weight])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.module.state_dict().items())


def test_record_that_fails_stops_the_probe_or_is_left_out_and_named(data, tmp_path, monkeypatch, caplog):
    run = BatchRunner._forward

    def spoil(runner, batch):
        values = run(runner, batch)
        bad = torch.tensor(batch.rows)[:, None] == 1
        return {name: torch.where(bad, torch.nan, matrix) for name, matrix in values.items()}

    monkeypatch.setattr(BatchRunner, "_forward", spoil)
    options = {"inputs": data / "a.fa", "model": model_of(STRIPED), "layers": 1, "plot": False}
    with pytest.raises(NonFiniteError, match="record 'chr1:1'"):
        again(data, tmp_path, **options)
    report = again(data, tmp_path, **options, on_error="skip")
    assert (report.num_rows, report.counts["rows without a vector"]) == (NUM - 1, 1)
    assert "1 record(s) without a vector are left out ('chr1:1')" in caplog.text
