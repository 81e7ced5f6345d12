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
