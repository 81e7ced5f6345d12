"""`score` against plain torch: sums, padding, start token, strands, windows, blocks, tables."""

from __future__ import annotations

import csv
import math
from types import SimpleNamespace

import pytest
import torch

import genoembed
from genoembed import load_model
from genoembed.errors import (
    CheckpointError,
    ConfigError,
    EmptyRecordError,
    ModelError,
    NonFiniteError,
    StoreError,
)
from genoembed.models.language_model import LanguageModel
from genoembed.scoring.scorer import ScorerOptions, SequenceScorer
from tests.by_hand import build_family, random_dna, revcomp
from tests.scoring.by_plain_torch import CAUSAL, folder_of, loaded, log_probs, start_id

STRIPED = "striped_hyena2"
TOLERANCE = 1e-5
RECORDS = {"long": random_dna(50, 1), "one": "G", "mid": random_dna(23, 2), "also": random_dna(22, 3)}


def write(folder, records=RECORDS, name="in.fa"):
    path = folder / name
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in records.items()))
    return path


def rows_of(folder, family, records=RECORDS, **options):
    report = genoembed.score(write(folder, records), model=loaded(family), **options)
    assert [row.id for row in report.rows] == list(records)
    return {row.id: row for row in report.rows}


@pytest.mark.parametrize("batch_tokens", [1, 1000])
@pytest.mark.parametrize("family", CAUSAL)
def test_score_is_the_sum_of_plain_log_softmax_alone_and_batched(tmp_path, family, batch_tokens):
    rows = rows_of(tmp_path, family, batch_tokens=batch_tokens)
    for name, sequence in RECORDS.items():
        expected = log_probs(family, sequence)
        row = rows[name]
        assert row.log_likelihood == pytest.approx(float(expected.sum()), abs=TOLERANCE * len(sequence))
        assert (row.length, row.scored, row.start_token) == (
            len(sequence),
            len(sequence),
            str(start_id(family)),
        )
        mean = float(expected.sum()) / len(sequence)
        assert row.mean_log_likelihood == pytest.approx(mean, abs=TOLERANCE)
        assert row.perplexity == pytest.approx(math.exp(-mean), rel=1e-4)
        assert row.bits_per_base == pytest.approx(-mean / math.log(2), abs=1e-4)


@pytest.mark.parametrize("family", CAUSAL)
def test_score_of_a_record_does_not_change_with_its_company(tmp_path, family):
    together = rows_of(tmp_path, family)
    for name, sequence in RECORDS.items():
        alone = rows_of(tmp_path, family, {name: sequence})[name]
        assert together[name].log_likelihood == pytest.approx(alone.log_likelihood, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("family", CAUSAL)
def test_without_start_token_the_first_token_has_no_prediction(tmp_path, family):
    records = {name: RECORDS[name] for name in ("long", "mid")}
    rows = rows_of(tmp_path, family, records, start_token="none")
    for name, sequence in records.items():
        expected = log_probs(family, sequence, start=False)
        assert rows[name].log_likelihood == pytest.approx(float(expected.sum()), abs=1e-3)
        assert rows[name].start_token == "none"
        if family != "gpt_neox":
            assert rows[name].scored == len(sequence) - 1


def test_padding_never_enters_a_short_row(tmp_path, monkeypatch):
    """What published code did: the first pad's log-probability was added to short rows of a batch."""
    seen = []
    original = LanguageModel.log_probs

    def spying(self, batch, **options):
        found = original(self, batch, **options)
        seen.append((batch, found))
        return found

    monkeypatch.setattr(LanguageModel, "log_probs", spying)
    rows = rows_of(tmp_path, "llama", batch_tokens=10_000)
    ((batch, found),) = [pair for pair in seen if pair[0].input_ids.shape[0] > 1] or seen[:1]
    assert bool((batch.attention_mask == 0).any()), "no row was padded, so nothing was tested"
    assert bool(found[batch.attention_mask == 0].isnan().all())
    assert bool(found[:, 0].isnan().all())
    assert rows["one"].log_likelihood == pytest.approx(float(log_probs("llama", "G").sum()), abs=1e-5)


@pytest.mark.parametrize("family", CAUSAL)
def test_pad_token_does_not_matter(tmp_path, family):
    model = loaded(family)
    before = rows_of(tmp_path, family)
    pad, model.tokenizer.pad_token = model.tokenizer.pad_token, model.tokenizer.eos_token
    try:
        after = rows_of(tmp_path, family)
    finally:
        model.tokenizer.pad_token = pad
    assert [row.log_likelihood for row in after.values()] == pytest.approx(
        [row.log_likelihood for row in before.values()], abs=1e-5
    )


@pytest.mark.parametrize("family", ["llama", STRIPED])
def test_rc_mean_is_the_mean_of_both_strands(tmp_path, family):
    rows = rows_of(tmp_path, family, rc="mean")
    for name, sequence in RECORDS.items():
        both = [float(log_probs(family, text).sum()) for text in (sequence, revcomp(sequence))]
        assert rows[name].log_likelihood == pytest.approx(sum(both) / 2, abs=1e-4)
    turned = rows_of(tmp_path, family, {"mid": revcomp(RECORDS["mid"])}, rc="mean")
    assert turned["mid"].log_likelihood == pytest.approx(rows["mid"].log_likelihood, abs=1e-5)


def test_letters_that_are_no_bases_are_context_only(tmp_path):
    sequence = "ACGTNNACRGT"
    row = rows_of(tmp_path, "llama", {"a": sequence})["a"]
    expected = log_probs("llama", sequence)
    kept = torch.tensor([letter in "ACGT" for letter in sequence])
    assert row.scored == 8
    assert row.log_likelihood == pytest.approx(float(expected[kept].sum()), abs=1e-4)


def test_record_without_prediction_is_na_and_counted(tmp_path, caplog):
    output = tmp_path / "out.tsv"
    report = genoembed.score(write(tmp_path, {"n": "NNN", "a": "ACGT"}), model=loaded("llama"), output=output)
    assert (report.unscored, report.num_rows, report.rows) == (1, 2, ())
    assert "1 records have no base with a prediction" in caplog.text
    with output.open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert [row["log_likelihood"] == "NA" for row in rows] == [True, False]


def test_windows_score_each_base_once_with_the_context_of_its_window(tmp_path):
    sequence = random_dna(150, 9)
    row = rows_of(tmp_path, "llama", {"a": sequence}, window=40, stride=30)["a"]
    total = float(log_probs("llama", sequence[:40]).sum())
    for start in (30, 60, 90, 110):
        before = {30: 40, 60: 70, 90: 100, 110: 130}[start]
        piece = log_probs("llama", sequence[start : start + 40], start=False)
        total += float(piece[before - start - 1 :].sum())
    assert row.scored == 150
    assert row.log_likelihood == pytest.approx(total, abs=1e-3)


def test_context_holds_the_start_token_too(tmp_path):
    report = genoembed.score(write(tmp_path, {"a": random_dna(64, 4)}), model=loaded("llama"))
    assert report.stats.windows == 2
    assert report.rows[0].scored == 64
    assert (
        genoembed.score(write(tmp_path, {"a": random_dna(63, 4)}), model=loaded("llama")).stats.windows == 1
    )


def test_stride_of_a_whole_window_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="set stride to 39 or less"):
        rows_of(tmp_path, "llama", window=40, stride=40)


def test_blocks_with_carried_state_are_one_long_pass(tmp_path, monkeypatch):
    monkeypatch.setattr("genoembed.pipeline.forward.LEAST_BLOCK_TOKENS", 7)
    blocks = rows_of(tmp_path, STRIPED, batch_tokens=7)
    whole = rows_of(tmp_path, STRIPED, batch_tokens=1000)
    assert [row.log_likelihood for row in blocks.values()] == pytest.approx(
        [row.log_likelihood for row in whole.values()], rel=1e-5
    )


def test_equal_records_run_once(tmp_path):
    report = genoembed.score(write(tmp_path, {"a": "ACGT", "b": "ACGT"}), model=loaded("llama"))
    assert report.stats.repeats == 1
    assert report.rows[0].log_likelihood == report.rows[1].log_likelihood


@pytest.mark.parametrize("rc", ["none", "mean"])
def test_per_base_table_adds_up(tmp_path, rc):
    output, per_base = tmp_path / "out.tsv", tmp_path / "bases.tsv"
    genoembed.score(write(tmp_path), model=loaded("llama"), output=output, per_base=per_base, rc=rc)
    with per_base.open() as stream:
        bases = list(csv.DictReader(stream, delimiter="\t"))
    with output.open() as stream:
        rows = {row["id"]: row for row in csv.DictReader(stream, delimiter="\t")}
    assert list(rows) == list(RECORDS)
    for name, sequence in RECORDS.items():
        mine = [row for row in bases if row["id"] == name]
        assert "".join(row["bases"] for row in mine) == sequence
        assert [(int(row["start"]), int(row["end"])) for row in mine] == [
            (at, at + 1) for at in range(len(sequence))
        ]
        total = sum(float(row["log_likelihood"]) for row in mine)
        assert total == pytest.approx(float(rows[name]["log_likelihood"]), abs=1e-5)
    if rc == "none":
        values = [float(row["log_likelihood"]) for row in bases if row["id"] == "long"]
        assert values == pytest.approx(log_probs("llama", RECORDS["long"]).tolist(), abs=1e-5)


def test_tokens_of_several_bases_have_their_bases(tmp_path):
    per_base = tmp_path / "tokens.tsv"
    genoembed.score(write(tmp_path), model=loaded("gpt_neox"), per_base=per_base)
    with per_base.open() as stream:
        rows = [row for row in csv.DictReader(stream, delimiter="\t") if row["id"] == "long"]
    assert max(len(row["bases"]) for row in rows) > 1
    assert "".join(row["bases"] for row in rows) == RECORDS["long"]
    with pytest.raises(ConfigError, match="per_base with rc='mean' needs one token per base"):
        genoembed.score(write(tmp_path), model=loaded("gpt_neox"), per_base=tmp_path / "x.tsv", rc="mean")


def test_bidirectional_model_without_masks_is_refused_with_the_way_out(tmp_path):
    model = load_model(str(build_family("bert", tmp_path / "bert")), device="cpu")
    model.tokenizer.mask_token = None
    with pytest.raises(ModelError, match=r"its tokens see what follows them.*set model to a causal one"):
        genoembed.score(write(tmp_path), model=model)


def test_masked_checkpoint_without_its_head_is_refused(tmp_path):
    folder = build_family("bert", tmp_path / "bert")
    with pytest.raises(CheckpointError, match="holds no masked-language head"):
        genoembed.score(write(tmp_path), model=str(folder), device="cpu")


def test_checkpoint_without_its_head_is_refused(tmp_path):
    folder = build_family("llama", tmp_path / "llama")
    with pytest.raises(CheckpointError, match="holds no next-token head"):
        genoembed.score(write(tmp_path), model=str(folder), device="cpu")


def test_model_given_by_name_is_loaded_in_float32(tmp_path):
    report = genoembed.score(write(tmp_path), model=folder_of("llama"), device="cpu", threads=1)
    expected = rows_of(tmp_path, "llama")
    assert [row.log_likelihood for row in report.rows] == [row.log_likelihood for row in expected.values()]


def test_options_are_refused_together(tmp_path):
    with pytest.raises(ConfigError) as caught:
        genoembed.score(
            write(tmp_path), model=loaded("llama"), rc="both", start_token="bos", dtype="float32", window=0
        )
    assert len(caught.value.problems) == 4
    with pytest.raises(ConfigError, match="'layers' is not an option"):
        genoembed.score(write(tmp_path), layers=3)
    with pytest.raises(StoreError, match="a: would be written twice"):
        genoembed.score(write(tmp_path), model=loaded("llama"), output="a", per_base="a")


def test_outputs_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    output, per_base = tmp_path / "out.tsv", tmp_path / "bases.tsv"
    options = {"model": loaded("llama"), "output": output, "per_base": per_base}
    output.write_text("mine\n")
    with pytest.raises(StoreError, match=r"out\.tsv: exists already; set overwrite"):
        genoembed.score(write(tmp_path), **options)
    with pytest.raises(EmptyRecordError, match="no record is left to score"):
        genoembed.score(write(tmp_path, {"a": ""}), empty="skip", overwrite=True, **options)
    assert output.read_text() == "mine\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.fa", "out.tsv"]


def test_values_that_are_not_finite_name_their_record(tmp_path, monkeypatch):
    original = LanguageModel.log_probs

    def spoil(self, batch, **options):
        found = original(self, batch, **options)
        found[batch.rows.index(1), 2] = math.inf
        return found

    monkeypatch.setattr(LanguageModel, "log_probs", spoil)
    scorer = SequenceScorer(LanguageModel(loaded("llama")), ScorerOptions())
    records = list(genoembed.read_sequences(write(tmp_path, {"a": "ACGTA", "b": "GGGTA"})))
    with pytest.raises(
        NonFiniteError, match=r"record 'b': the model's head gives values that are not finite"
    ):
        scorer.score(records)


def test_rows_that_wait_are_few_and_all_are_scored(tmp_path, monkeypatch):
    monkeypatch.setattr("genoembed.pipeline.batches.SLAB_BATCHES", 1)
    records = {str(number): random_dna(10 + number, number) for number in range(12)}
    few = rows_of(tmp_path, "llama", records, batch_tokens=30)
    monkeypatch.undo()
    many = rows_of(tmp_path, "llama", records)
    assert [row.log_likelihood for row in few.values()] == pytest.approx(
        [row.log_likelihood for row in many.values()], abs=1e-4
    )


def test_model_that_was_tuned_for_vectors_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "genoembed.models.language_model.find_facts", lambda model: SimpleNamespace(values={})
    )
    with pytest.raises(ModelError, match="was fine-tuned for vectors or labels, so its next-token head"):
        rows_of(tmp_path, "llama")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    ],
)
def test_budget_halves_when_memory_is_short_and_scores_are_the_same(error, tmp_path, monkeypatch):
    records = {str(number): random_dna(30 + number % 3, number) for number in range(8)}
    whole = rows_of(tmp_path, "llama", records)
    shapes = []
    original = LanguageModel.log_probs

    def log_probs(self, batch, **options):
        shapes.append(tuple(batch.input_ids.shape))
        if batch.num_tokens > 70:
            raise error
        return original(self, batch, **options)

    monkeypatch.setattr(LanguageModel, "log_probs", log_probs)
    report = genoembed.score(write(tmp_path, records), model=loaded("llama"))
    assert shapes[0] == (8, 33)
    assert report.stats.halvings == 2
    assert max(rows * length for rows, length in shapes[2:]) <= 70
    for row in report.rows:
        assert row.log_likelihood == pytest.approx(whole[row.id].log_likelihood, abs=1e-5)
    monkeypatch.setattr(LanguageModel, "log_probs", lambda *_args, **_options: (_ for _ in ()).throw(error))
    with pytest.raises(ModelError, match=r"has no memory left for 1 x 3\d tokens; set window"):
        rows_of(tmp_path, "llama", records)
