"""``genoembed.predict``: what was saved predicts, in windows, in parts, under the policies of ``extract``."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import genoembed
from genoembed.errors import (
    AlphabetError,
    CheckpointError,
    ConfigError,
    EmptyRecordError,
    Interrupted,
    ModelError,
    NonFiniteError,
    StoreError,
)
from genoembed.finetuning import predict as predict_module
from genoembed.finetuning.saved import load_predictor
from genoembed.models.trained_folder import read_finetuned
from genoembed.pipeline.forward import UnitRunner
from tests.finetuning.cases import (
    CONTEXT,
    FAST,
    build_model,
    sequences,
    write_classes,
    write_fasta,
    write_table,
)
from tests.tiny_models import build_six_mers

TASKS = ("classification", "multilabel", "regression", "token")


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A model for each task, fine-tuned for two epochs."""
    folder = tmp_path_factory.mktemp("predict")
    model, found = build_model(folder / "model"), sequences(40)
    names = str.maketrans("ACGT", "0110")
    files = {
        "classification": (
            write_classes(folder / "c.tsv", 40),
            {
                "layers": (0, 2),
                "fusion": "weighted",
                "validation": write_classes(folder / "v.tsv", 10, seed=5),
                "test": write_classes(folder / "test.tsv", 12, seed=6),
            },
        ),
        "multilabel": (
            write_table(
                folder / "m.tsv", [{"sequence": s, "a": int("AC" in s), "b": int("GG" in s)} for s in found]
            ),
            {"label_columns": ("a", "b")},
        ),
        "regression": (
            write_table(folder / "r.tsv", [{"sequence": s, "label": s.count("G")} for s in found]),
            {"add_pooler": True},
        ),
        "token": (
            write_table(folder / "t.tsv", [{"sequence": s, "label": s.translate(names)} for s in found]),
            {},
        ),
    }
    return {
        task: genoembed.finetune(
            path, folder / task, task=task, model=model, learning_rate=3e-3, **FAST, **options
        )
        for task, (path, options) in files.items()
    }


def table_of(path):
    return pd.read_csv(path, sep="\t", dtype={"id": str, "label": str, "labels": str}, keep_default_na=False)


@pytest.mark.parametrize("task", TASKS)
def test_predict_writes_the_columns_of_the_task(runs, tmp_path, task):
    fasta = write_fasta(tmp_path / "s.fa", sequences(5, seed=4))
    report = genoembed.predict(runs[task].output, fasta, output=tmp_path / "p.tsv")
    table = table_of(tmp_path / "p.tsv")
    columns = {
        "classification": ["id", "label", "p_at", "p_gc"],
        "multilabel": ["id", "labels", "p_a", "p_b"],
        "regression": ["id", "label"],
        "token": ["id", "start", "end", "label", "p_0", "p_1"],
    }
    assert list(table.columns) == columns[task]
    assert (report.num_records, report.num_rows, report.task) == (5, len(table), task)
    if task == "token":
        assert len(table) == sum(map(len, sequences(5, seed=4)))
        assert (table["end"] - table["start"] == 1).all()
        first = table[table["id"] == "s0"]
        assert first["start"].tolist() == list(range(len(sequences(5, seed=4)[0])))
    else:
        assert table["id"].tolist() == [f"s{i}" for i in range(5)]
    if task in ("classification", "token"):
        shares = table[[name for name in table if name.startswith("p_")]]
        assert np.allclose(shares.sum(axis=1), 1, atol=1e-4)
        assert (shares.idxmax(axis=1).str.removeprefix("p_") == table["label"]).all()


def test_folder_of_a_run_that_is_not_complete_says_so(runs, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    fasta = write_fasta(tmp_path / "s.fa", sequences(12))
    words = "the folder of a training run without its 'final'; go on with the run until it is complete"
    for call in (
        lambda: genoembed.predict(tmp_path / "run", fasta),
        lambda: genoembed.extract(fasta, model=tmp_path / "run", output=tmp_path / "a.h5"),
        lambda: genoembed.score(fasta, model=str(tmp_path / "run"), output=tmp_path / "a.tsv"),
        lambda: genoembed.finetune(fasta, tmp_path / "o", task="lm", model=tmp_path / "run"),
    ):
        with pytest.raises(ModelError, match=words):
            call()


def test_folder_of_a_run_stands_for_its_model(runs, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    fasta = write_fasta(tmp_path / "s.fa", sequences(5, seed=4))
    run = Path(runs["classification"].output).parent
    for name, folder in (("run", run), ("final", run / "final")):
        genoembed.predict(folder, fasta, output=tmp_path / f"{name}.tsv")
        genoembed.extract(fasta, model=folder, output=tmp_path / f"{name}.h5")
    assert (tmp_path / "run.tsv").read_bytes() == (tmp_path / "final.tsv").read_bytes()
    with (
        genoembed.open_embeddings(tmp_path / "run.h5") as one,
        genoembed.open_embeddings(tmp_path / "final.h5") as other,
    ):
        said = [line for line in caplog.messages if line.endswith(f"the model in it, {run / 'final'}")]
        assert len(said) == 2  # by predict and by extract, where the folder of the run was named
        assert one.layers == other.layers
        assert one.X[:].tobytes() == other.X[:].tobytes()


def test_predict_agrees_with_what_training_measured(runs, tmp_path):
    report = runs["classification"]
    (path,) = json.loads(Path(report.config).read_text())["test"]
    rows = pd.read_csv(path, sep="\t")
    genoembed.predict(
        report.output, write_fasta(tmp_path / "s.fa", rows["sequence"].tolist()), output=tmp_path / "p.tsv"
    )
    table = table_of(tmp_path / "p.tsv")
    assert (table["label"] == rows["label"]).mean() == pytest.approx(report.test["accuracy"])
    own = table["p_gc"].where(rows["label"] == "gc", table["p_at"])
    assert -np.log(own).mean() == pytest.approx(report.test["loss"], rel=1e-4)
    weights = load_predictor(report.output).facts.fusion_weights
    assert len(weights) == 2
    assert sum(weights) == pytest.approx(1)
    assert weights[0] != 0.5


def test_prediction_does_not_depend_on_batch_mates_or_parts(runs, tmp_path, monkeypatch):
    found = [s * n for n, s in zip((1, 5, 2, 9, 1, 3), sequences(6, seed=5), strict=True)]
    fasta = write_fasta(tmp_path / "s.fa", found)
    folder = runs["classification"].output
    genoembed.predict(folder, fasta, output=tmp_path / "together.tsv")
    monkeypatch.setattr(predict_module, "PART_RECORDS", 1)
    genoembed.predict(folder, fasta, output=tmp_path / "alone.tsv", batch_rows=1)
    one, other = table_of(tmp_path / "together.tsv"), table_of(tmp_path / "alone.tsv")
    assert np.allclose(one[["p_at", "p_gc"]], other[["p_at", "p_gc"]], atol=1e-5)


def test_long_sequences_are_seen_whole_as_extract_sees_them(runs, tmp_path):
    long = "".join(sequences(12, seed=6))
    assert len(long) > 3 * CONTEXT
    fasta = write_fasta(tmp_path / "s.fa", [long])
    saved = load_predictor(runs["regression"].output, device="cpu")
    vectors = genoembed.extract(fasta, model=saved.genomic, layers="norm", output=tmp_path / "v.h5")
    assert vectors.stats.windows > 1
    row = torch.from_numpy(genoembed.open_embeddings(tmp_path / "v.h5").X[:])
    expected = saved.model(vectors=row, want="predict")["predictions"].item()
    genoembed.predict(runs["regression"].output, fasta, output=tmp_path / "p.tsv")
    assert table_of(tmp_path / "p.tsv")["label"].astype(float)[0] == pytest.approx(expected, rel=1e-4)
    report = genoembed.predict(runs["token"].output, fasta, output=tmp_path / "t.tsv")
    assert report.num_rows == len(long)
    assert table_of(tmp_path / "t.tsv")["start"].tolist() == list(range(len(long)))


def test_predict_writes_parquet_and_standard_output(runs, tmp_path, capsys):
    fasta = write_fasta(tmp_path / "s.fa", sequences(3))
    genoembed.predict(runs["classification"].output, fasta, output=tmp_path / "p.parquet")
    table = pd.read_parquet(tmp_path / "p.parquet")
    genoembed.predict(runs["classification"].output, fasta)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("\t") == list(table.columns)
    assert [line.split("\t")[1] for line in lines[1:]] == table["label"].tolist()
    with pytest.raises(ConfigError, match="standard output cannot take"):
        genoembed.predict(runs["classification"].output, fasta, format="parquet")


def test_predict_keeps_the_policies_of_extract(runs, tmp_path):
    fasta = tmp_path / "s.fa"
    fasta.write_text(">a\nACGTJ\n>b\nacgu\n>b\nAC-GT\n>c\n\n")
    folder, output = runs["classification"].output, tmp_path / "p.tsv"
    with pytest.raises(AlphabetError, match="'J' at position 5"):
        genoembed.predict(folder, fasta, output=output)
    assert not output.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["s.fa"]
    report = genoembed.predict(
        folder, fasta, output=output, invalid="skip", duplicates="suffix", gaps="strip", empty="skip"
    )
    assert table_of(output)["id"].tolist() == ["b", "b_2"]
    assert (report.counts.skipped_invalid, report.counts.skipped_empty) == (1, 1)
    with pytest.raises(StoreError, match="exists already"):
        genoembed.predict(folder, fasta, output=output, invalid="skip")
    with pytest.raises(ConfigError, match="'regions' is not an option"):
        genoembed.predict(folder, fasta, regions="a:1-2")
    fasta.write_text(">c\n\n")
    with pytest.raises(EmptyRecordError, match="no record is left to predict"):
        genoembed.predict(folder, fasta, output=tmp_path / "none.tsv", empty="skip")


def test_folders_that_do_not_predict_are_refused(runs, tmp_path):
    fasta = write_fasta(tmp_path / "s.fa", sequences(2))
    with pytest.raises(
        ConfigError, match=r"no genoembed_finetuned.json; name the folder of a fine-tuning run"
    ):
        genoembed.predict("genoembed-mini", fasta)
    folder = tmp_path / "final"
    shutil.copytree(runs["classification"].output, folder)
    facts = json.loads((folder / "genoembed_finetuned.json").read_text())
    for change, match in (
        ({"format": 9}, r"format 9 is newer than this genoembed reads \(1-1\)"),
        ({"labels": None, "task": "contrastive"}, "fine-tuned for contrastive, which predicts no label"),
        ({"labels": {"kind": "class", "names": ["a", "b", "c"]}}, "weights have another shape"),
    ):
        (folder / "genoembed_finetuned.json").write_text(json.dumps(facts | change))
        with pytest.raises((ConfigError, CheckpointError), match=match):
            genoembed.predict(folder, fasta)
    (folder / "genoembed_finetuned.json").write_text("{")
    with pytest.raises(CheckpointError, match="it is damaged"):
        read_finetuned(folder)
    (folder / "genoembed_finetuned.json").write_text(json.dumps(facts))
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("head.")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"weights head.input_deviation, .* are missing .*; fine-tune again"
    ):
        genoembed.predict(folder, fasta)


class Passes:
    """Passes of the model, which may end a run or give no numbers for records that hold a word."""

    def __init__(self, monkeypatch):
        self.rows, self.stop_after, self.spoiled = 0, np.inf, None
        original = UnitRunner._report

        def report(runner):
            self.rows = runner.stats.real_tokens
            if self.rows >= self.stop_after:
                raise Interrupted
            original(runner)

        monkeypatch.setattr(UnitRunner, "_report", report)
        monkeypatch.setattr(predict_module, "PART_RECORDS", 2)
        forward = torch.nn.Embedding.forward

        def embed(module, ids):
            found = forward(module, ids)
            if self.spoiled is not None and ids.dim() == 2:
                bad = (
                    (ids.unfold(1, len(self.spoiled), 1) == torch.tensor(self.spoiled)).all(dim=2).any(dim=1)
                )
                found = torch.where(bad[:, None, None], torch.full_like(found, np.nan), found)
            return found

        monkeypatch.setattr(torch.nn.Embedding, "forward", embed)


@pytest.mark.parametrize("task", TASKS)
def test_prediction_that_was_cut_off_goes_on_where_it_was(runs, tmp_path, monkeypatch, task):
    fasta, folder = write_fasta(tmp_path / "s.fa", sequences(7)), runs[task].output
    genoembed.predict(folder, fasta, output=tmp_path / "plain.tsv")
    passes = Passes(monkeypatch)
    genoembed.predict(folder, fasta, output=tmp_path / "whole.tsv")
    whole = passes.rows
    passes.stop_after = whole // 2
    with pytest.raises(KeyboardInterrupt) as caught:
        genoembed.predict(folder, fasta, output=tmp_path / "p.tsv")
    assert "finished unit" in caught.value.__notes__[0]
    passes.stop_after = np.inf
    with pytest.raises(StoreError, match=r"of another run: .*weights has other content"):
        genoembed.predict(
            runs["regression" if task == "token" else "token"].output, fasta, output=tmp_path / "p.tsv"
        )
    report = genoembed.predict(folder, fasta, output=tmp_path / "p.tsv")
    assert report.stats.units_kept > 0
    assert passes.rows < whole
    assert (tmp_path / "p.tsv").read_bytes() == (tmp_path / "whole.tsv").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.tsv", "plain.tsv", "s.fa", "whole.tsv"]


@pytest.mark.parametrize("ending", ["tsv", "parquet"])
@pytest.mark.parametrize("task", TASKS)
def test_prediction_that_fails_stops_the_run_or_is_left_out(runs, tmp_path, monkeypatch, task, ending):
    found, folder, output = sequences(5), runs[task].output, tmp_path / f"p.{ending}"
    fasta = write_fasta(tmp_path / "s.fa", ["ACGTACGTACGTACGT" + found[0], *found[1:]])
    passes = Passes(monkeypatch)
    monkeypatch.setattr(predict_module, "PART_RECORDS", 1)
    passes.spoiled = load_predictor(folder).genomic.tokenizer("ACGTACGTACGTACGT", add_special_tokens=False)[
        "input_ids"
    ]
    (name, *others) = (record.id for record in genoembed.read_sequences(fasta))
    with pytest.raises(NonFiniteError, match=f"record '{name}'"):
        genoembed.predict(folder, fasta, output=output)
    report = genoembed.predict(folder, fasta, output=output, on_error="skip")
    assert report.failed == {name: "not finite"}
    table = (
        pd.read_parquet(output) if ending == "parquet" else pd.read_csv(output, sep="\t", dtype={"id": str})
    )
    assert table["id"].tolist()[0] == name
    assert table["id"].tolist().count(name) == 1
    assert table.drop(columns=["id", "start", "end"], errors="ignore").iloc[0].isna().all()
    labels = table.drop(columns=["labels"], errors="ignore").iloc[1:]
    assert set(labels["id"]) == {*others}
    assert not labels.isna().any(axis=None)


def test_unknown_policy_for_failures_is_refused(runs, tmp_path):
    fasta = write_fasta(tmp_path / "s.fa", ["ACGT"])
    with pytest.raises(ConfigError, match="on_error is 'never'"):
        genoembed.predict(runs["regression"].output, fasta, on_error="never")


def test_units_of_another_head_are_refused(runs, tmp_path, monkeypatch):
    folder = tmp_path / "final"
    shutil.copytree(runs["classification"].output, folder)
    fasta = write_fasta(tmp_path / "s.fa", sequences(7))
    passes = Passes(monkeypatch)
    genoembed.predict(folder, fasta, output=tmp_path / "whole.tsv")
    passes.stop_after = passes.rows // 2
    with pytest.raises(KeyboardInterrupt):
        genoembed.predict(folder, fasta, output=tmp_path / "p.tsv")
    passes.stop_after = np.inf
    weights = load_file(folder / "model.safetensors")
    weights["head.output.bias"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StoreError, match="of another run: weights has other content"):
        genoembed.predict(folder, fasta, output=tmp_path / "p.tsv")


def test_values_of_a_word_are_repeated_over_its_bases(tmp_path):
    found = sequences(12, seed=3)
    names = str.maketrans("ACGT", "0110")
    table = write_table(tmp_path / "t.tsv", [{"sequence": s, "label": s.translate(names)} for s in found])
    model = build_six_mers("bert", tmp_path / "model")
    report = genoembed.finetune(
        table, tmp_path / "run", task="token", model=str(model), several_bases="first", max_steps=1, **FAST
    )
    sequence = "ACGTTGCATTAGACCA"
    fasta = write_fasta(tmp_path / "s.fa", [sequence])
    genoembed.predict(report.output, fasta, output=tmp_path / "p.tsv")
    rows = table_of(tmp_path / "p.tsv")
    assert rows["start"].tolist() == list(range(16))
    assert (rows["end"] - rows["start"] == 1).all()
    shares = rows["p_0"].tolist()
    assert [len(set(shares[:6])), len(set(shares[6:12])), len(set(shares[12:]))] == [1, 1, 4]
