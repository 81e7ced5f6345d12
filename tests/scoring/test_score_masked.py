"""Pseudo-log-likelihoods of masked models, against plain transformers calls with one mask at a time."""

from __future__ import annotations

import csv
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

import genoembed
from genoembed import load_model
from genoembed.errors import ConfigError
from genoembed.models.masked_model import MaskedModel
from genoembed.pipeline.cutting import iter_windows

GOLDEN = Path(__file__).parents[1] / "golden" / "families"
FAMILIES = ("nt_v1", "nt_v2", "dnabert2", "dnabert_k6", "gena_lm", "caduceus_ph")
RECORDS = {
    "long": "ACGTTGCAAGGTTTGACGATACCAGGCATCGATTACC",
    "short": "CATGCATTGCG",
    "same length": "TTGACGATACCAGGCATCGATTACCACGTTGCAAGGT",
    "letters": "ACGTTGCAANGTTTGACGATACC",
}


@cache
def loaded(family):
    return load_model(str(GOLDEN / family), device="cpu", dtype="float32")


@cache
def plain(family):
    model = loaded(family)
    return AutoModelForMaskedLM.from_pretrained(
        GOLDEN / family, config=model.module.config, dtype=torch.float32
    ).eval()


def words(family, sequence):
    """Ids, and for each the bases that it stands for (None of special tokens), by reading the tokens."""
    model = loaded(family)
    ids = model.tokenizer(sequence, add_special_tokens=model.special_tokens)["input_ids"]
    tokens = model.tokenizer.convert_ids_to_tokens(ids)
    spans, place = [], 0
    for token in tokens:
        letters = token.lstrip("\u2581\u0120").removeprefix("##")
        if family == "dnabert_k6":
            is_word = token == "[UNK]" or letters.isalpha()
            spans.append((place, place + 6) if is_word else None)
            place += is_word
        elif letters and sequence.startswith(letters, place):
            spans.append((place, place + len(letters)))
            place += len(letters)
        elif letters in ("[UNK]", "<unk>"):
            spans.append((place, place + 1))
            place += 1
        else:
            spans.append(None)
    return ids, spans, tokens


def by_hand(family, sequence):
    """One logarithm per base; NaN where there is none."""
    ids, spans, tokens = words(family, sequence)
    values = [math.nan] * len(sequence)

    def hidden(places):
        row = torch.tensor([ids])
        row[0, places] = loaded(family).tokenizer.mask_token_id
        with torch.inference_mode():
            table = plain(family)(row).logits[0].float().log_softmax(-1)
        return [float(table[place, ids[place]]) for place in places if "UNK" not in tokens[place].upper()]

    if family == "dnabert_k6":
        for base, letter in enumerate(sequence):
            places = [at for at, span in enumerate(spans) if span and span[0] <= base < span[1]]
            found = hidden(places)
            if letter in "ACGT" and found:
                values[base] = sum(found) / len(found)
        return values
    for at, span in enumerate(spans):
        if span and set(sequence[slice(*span)]) <= set("ACGT") and (found := hidden([at])):
            values[span[0] : span[1]] = [found[0] / (span[1] - span[0])] * (span[1] - span[0])
    return values


def write(folder, records=RECORDS):
    path = folder / "in.fa"
    path.write_text("".join(f">{name.replace(' ', '_')}\n{text}\n" for name, text in records.items()))
    return path


def total(values):
    return sum(value for value in values if not math.isnan(value))


@pytest.mark.parametrize("batch_tokens", [1, 100, 16384])
@pytest.mark.parametrize("family", FAMILIES)
def test_score_is_the_sum_of_plain_log_softmax_alone_and_batched(tmp_path, family, batch_tokens):
    report = genoembed.score(write(tmp_path), model=loaded(family), batch_tokens=batch_tokens, threads=1)
    for row, text in zip(report.rows, RECORDS.values(), strict=True):
        expected = by_hand(family, text)
        assert row.scored == sum(not math.isnan(value) for value in expected)
        assert row.log_likelihood == pytest.approx(total(expected), abs=1e-5, rel=1e-6)
        alone = genoembed.score(write(tmp_path, {row.id: text}), model=loaded(family), threads=1).rows[0]
        assert alone.log_likelihood == pytest.approx(row.log_likelihood, abs=1e-5, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rc", ["none", "mean"])
def test_each_base_has_a_row(tmp_path, family, rc):
    table = tmp_path / f"{rc}.tsv"
    report = genoembed.score(write(tmp_path), model=loaded(family), per_base=table, rc=rc, threads=1)
    with table.open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    for row, text in zip(report.rows, RECORDS.values(), strict=True):
        mine = [base for base in rows if base["id"] == row.id]
        assert "".join(base["bases"] for base in mine) == text
        found = [
            math.nan if base["log_likelihood"] == "NA" else float(base["log_likelihood"]) for base in mine
        ]
        if rc == "none":
            assert found == pytest.approx(by_hand(family, text), abs=1e-5, nan_ok=True)
            assert total(found) == pytest.approx(row.log_likelihood, abs=1e-4)


# --- variants -------------------------------------------------------------------------------------

CONTIG = "ACGTTGCAAGGTTTGACGATACCAGGCATCGATTACCACGTTGCAAGGTCATGCATTGCGA"
FLANK = 15


def score_variants(folder, family, rows, **options):
    reference = folder / "ref.fa"
    reference.write_text(f">c\n{CONTIG}\n")
    vcf = folder / "calls.vcf"
    vcf.write_text("".join(f"c\t{pos}\t.\t{ref}\t{alt}\n" for pos, ref, alt in rows))
    options = {"flank": FLANK, "threads": 1} | options
    return genoembed.score_variants(vcf, reference, model=loaded(family), **options)


def marginal(family, stretch, place, alt):
    """Log-probabilities of the hidden word with either base, the mean over those that cover it; or None."""
    changed = stretch[:place] + alt + stretch[place + 1 :]
    (ids, spans, _), (others, other_spans, _) = words(family, stretch), words(family, changed)
    if spans != other_spans:
        return None
    places = [at for at, span in enumerate(spans) if span and span[0] <= place < span[1]]
    row = torch.tensor([ids])
    row[0, places] = loaded(family).tokenizer.mask_token_id
    with torch.inference_mode():
        table = plain(family)(row).logits[0].float().log_softmax(-1)
    return [sum(float(table[at, mine[at]]) for at in places) / len(places) for mine in (ids, others)]


def test_one_pass_is_enough_for_all_bases_of_a_place(tmp_path, monkeypatch):
    run, rows = MaskedModel.word_log_probs, []

    def counting(self, ids, attention, hidden):
        rows.append(len(ids))
        return run(self, ids, attention, hidden)

    monkeypatch.setattr(MaskedModel, "word_log_probs", counting)
    changes = [(pos, CONTIG[pos - 1], alt) for pos in (20, 30) for alt in "ACGT" if alt != CONTIG[pos - 1]]
    report = score_variants(tmp_path, "dnabert_k6", changes)
    assert {row.method for row in report.rows} == {"masked-marginal"}
    assert (sum(rows), report.num_rows, report.stats.records) == (2, 6, 6)


def test_base_in_words_that_the_model_cannot_read_has_no_score(tmp_path):
    reference, vcf = tmp_path / "ref.fa", tmp_path / "calls.vcf"
    contig = CONTIG[:28] + "NN" + CONTIG[30:]
    reference.write_text(f">c\n{contig[:34]}NNNNN\n")
    vcf.write_text(f"c\t31\t.\t{contig[30]}\t{'ACGT'['ACGT'.index(contig[30]) - 1]}\n")
    (row,) = genoembed.score_variants(vcf, reference, model=loaded("dnabert_k6"), flank=15).rows
    assert math.isnan(row.delta)


def revcomp(text):
    return text[::-1].translate(str.maketrans("ACGT", "TGCA"))


@pytest.mark.parametrize("family", FAMILIES)
def test_single_bases_are_compared_where_they_are_hidden(tmp_path, family):
    rows = [
        (pos, CONTIG[pos - 1], alt) for pos in (1, 9, 30, 31, 60) for alt in "ACGT" if alt != CONTIG[pos - 1]
    ]
    report = score_variants(tmp_path, family, rows)
    alone = score_variants(tmp_path, family, rows[4:5]).rows[0]
    assert alone.delta == pytest.approx(report.rows[4].delta, abs=1e-5)
    methods = set()
    for row in report.rows:
        stretch, place = CONTIG[row.window_start : row.window_end], row.pos - 1 - row.window_start
        expected, method = marginal(family, stretch, place, row.alt), "masked-marginal"
        if expected is None:
            changed = stretch[:place] + row.alt + stretch[place + 1 :]
            expected, method = (
                [total(by_hand(family, text)) for text in (stretch, changed)],
                "pseudo-likelihood",
            )
        methods.add(method)
        assert row.method == method
        assert [row.ref_log_likelihood, row.alt_log_likelihood] == pytest.approx(expected, abs=1e-5, rel=1e-6)
        assert row.delta == pytest.approx(expected[1] - expected[0], abs=1e-5)
    assert "masked-marginal" in methods or family in ("dnabert2", "gena_lm")


@pytest.mark.parametrize("family", ["nt_v2", "dnabert_k6", "caduceus_ph"])
def test_other_variants_by_the_pseudo_likelihood_of_both_stretches(tmp_path, family):
    (row,) = score_variants(tmp_path, family, [(30, CONTIG[29:32], CONTIG[29])]).rows
    stretch = CONTIG[row.window_start : row.window_end]
    place = int(row.normalized.split(":")[0]) - 1 - row.window_start
    ref, alt = row.normalized.split(":")[1].split(">")
    changed = stretch[:place] + alt + stretch[place + len(ref) :]
    expected = [total(by_hand(family, text)) for text in (stretch, changed)]
    assert row.method == "pseudo-likelihood"
    assert [row.ref_log_likelihood, row.alt_log_likelihood] == pytest.approx(expected, abs=1e-5, rel=1e-6)


@pytest.mark.parametrize("family", ["nt_v1", "dnabert_k6"])
def test_both_strands_count_half(tmp_path, family):
    alt = next(base for base in "ACGT" if base != CONTIG[29])
    (row,) = score_variants(tmp_path, family, [(30, CONTIG[29], alt)], rc="mean").rows
    stretch, place = CONTIG[row.window_start : row.window_end], 29 - row.window_start
    there = marginal(family, stretch, place, alt)
    back = marginal(family, revcomp(stretch), len(stretch) - 1 - place, revcomp(alt))
    assert row.delta == pytest.approx((there[1] - there[0] + back[1] - back[0]) / 2, abs=1e-5)


def test_vectors_are_of_the_whole_stretch(tmp_path):
    alt = next(base for base in "ACGT" if base != CONTIG[29])
    (row,) = score_variants(tmp_path, "nt_v2", [(30, CONTIG[29], alt)], layer=0).rows
    stretch = CONTIG[row.window_start : row.window_end]
    place = 29 - row.window_start
    pair = write(tmp_path, {"ref": stretch, "alt": stretch[:place] + alt + stretch[place + 1 :]})
    genoembed.extract(pair, model=loaded("nt_v2"), layers=0, output=tmp_path / "v.h5", threads=1)
    with genoembed.open_embeddings(tmp_path / "v.h5") as file:
        ref, alt = torch.from_numpy(file[file.layers[0]][:])
    assert row.l2 == pytest.approx(float((alt - ref).norm()), rel=1e-4)


# --- promises -------------------------------------------------------------------------------------


def test_copies_halve_when_memory_is_short_and_scores_are_the_same(tmp_path, monkeypatch, caplog):
    model = loaded("nt_v2")
    expected = genoembed.score(write(tmp_path), model=model, threads=1).rows
    run, sizes = MaskedModel.log_probs, []

    def short(self, ids, attention, hidden):
        if ids.numel() > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(ids.numel())
        return run(self, ids, attention, hidden)

    monkeypatch.setattr(MaskedModel, "log_probs", short)
    report = genoembed.score(write(tmp_path), model=model, threads=1)
    assert max(sizes) <= 20
    assert report.stats.halvings > 0
    assert "no memory for a pass" in caplog.text
    for row, other in zip(report.rows, expected, strict=True):
        assert row.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-5)


@pytest.mark.parametrize(("family", "rc"), [("nt_v2", "none"), ("dnabert_k6", "mean")])
def test_totals_count_the_copies_of_a_row_as_they_run(tmp_path, monkeypatch, family, rc):
    run, shapes, seen = MaskedModel.log_probs, [], []

    def counting(self, ids, attention, hidden):
        shapes.append((ids.numel(), int(attention.sum())))
        return run(self, ids, attention, hidden)

    def on_batch(totals):
        seen.append((totals.batches, totals.slots, totals.bases + totals.bases_under_way))

    monkeypatch.setattr(MaskedModel, "log_probs", counting)
    records = {"a": RECORDS["long"], "b": RECORDS["short"]}
    stats = genoembed.score(
        write(tmp_path, records), model=loaded(family), rc=rc, batch_tokens=16, progress=on_batch
    ).stats
    num_bases = sum(map(len, records.values()))
    assert len(shapes) > 4
    assert (stats.batches, stats.slots, stats.real_tokens) == (
        len(shapes),
        *map(sum, zip(*shapes, strict=True)),
    )
    bases = [found[2] for found in seen]
    assert bases == sorted(bases)
    assert len(set(bases)) > 3
    assert (stats.bases, stats.bases_under_way) == (num_bases, 0)


@pytest.mark.parametrize("family", ["dnabert_k6", "caduceus_ph"])
def test_windows_score_each_base_once_with_the_context_of_its_window(tmp_path, family):
    table = tmp_path / "t.tsv"
    text = RECORDS["long"]
    records = {"r": text}
    genoembed.score(write(tmp_path, records), model=loaded(family), per_base=table, window=20, stride=8)
    with table.open() as stream:
        found = [float(row["log_likelihood"]) for row in csv.DictReader(stream, delimiter="\t")]
    cuts = list(iter_windows(len(text), window_bp=20, stride_bp=8, causal=False))
    assert len(cuts) > 2
    expected = []
    for cut in cuts:
        expected += by_hand(family, text[cut.start : cut.end])[
            cut.core_start - cut.start : cut.core_end - cut.start
        ]
    assert found == pytest.approx(expected, abs=1e-5)


def test_start_token_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="start_token is none, but a masked model"):
        genoembed.score(write(tmp_path), model=loaded("nt_v2"), start_token="none")


def test_a_run_that_was_cut_off_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("genoembed.scoring.scorer._MASKED_PART_BASES", 20)
    model, run, calls = loaded("nt_v2"), MaskedModel.log_probs, []
    expected = genoembed.score(write(tmp_path), model=model, output=tmp_path / "whole.tsv", batch_tokens=16)

    def counting(self, ids, attention, hidden):
        calls.append(1)
        if stop and len(calls) > 12:
            raise KeyboardInterrupt
        return run(self, ids, attention, hidden)

    monkeypatch.setattr(MaskedModel, "log_probs", counting)
    stop, table = True, tmp_path / "t.tsv"
    with pytest.raises(KeyboardInterrupt):
        genoembed.score(write(tmp_path), model=model, output=table, batch_tokens=16)
    assert not table.exists()
    stop = False
    calls.clear()
    report = genoembed.score(write(tmp_path), model=model, output=table, batch_tokens=16)
    resumed = len(calls)
    calls.clear()
    genoembed.score(write(tmp_path), model=model, output=table, batch_tokens=16, overwrite=True)
    assert 0 < resumed < len(calls)
    assert report.num_rows == expected.num_rows
    assert table.read_text() == (tmp_path / "whole.tsv").read_text()
