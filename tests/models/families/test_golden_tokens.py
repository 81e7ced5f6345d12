"""What published tokenizers make of bases: spans, unread bases, special tokens that are left out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, EsmTokenizer

from genoembed import extract, open_embeddings, score
from genoembed.cli import main
from genoembed.contracts import SequenceRecord
from genoembed.errors import UnreadError
from genoembed.models.load import load_model
from genoembed.pipeline.cutting import Cutter
from genoembed.tokenization.hf import build_encoder
from tests.by_hand import write_fasta
from tests.models.families.test_goldens import GOLDEN, inputs_of, outputs_of


def tokens_of(family, records, tmp_path, **options):
    """Extract one vector per token, and return the open file."""
    fasta = write_fasta(tmp_path / "in.fa", records)
    options = {"layers": "final", "pooling": "none", "dtype": "float32"} | options
    extract(fasta, model=str(GOLDEN / family), output=tmp_path / "a.h5", overwrite=True, **options)
    return open_embeddings(tmp_path / "a.h5")


def test_overlapping_kmers_are_stored_with_their_bases(tmp_path):
    names = ("len6", "len37", "len100", "with_n")
    records = {name: inputs_of("dnabert_k6")[name] for name in names}
    official = outputs_of("dnabert_k6")
    with tokens_of("dnabert_k6", records, tmp_path) as file:
        for name, sequence in records.items():
            expected = [[at, at + 6] for at in range(len(sequence) - 5)]
            assert file.token_spans(name).tolist() == expected
            np.testing.assert_allclose(file.tokens(name), official[name]["final"][1:-1], atol=1e-5)
            assert np.isfinite(file.bases(name)).all()
        assert file.obs["unread"].tolist() == [0, 0, 0, records["with_n"].count("N")]
        first = official["len37"]["final"][1:-1].double()
        np.testing.assert_allclose(file.bases("len37")[2], first[:3].mean(dim=0), atol=1e-5)


def test_words_side_by_side_are_stored_with_their_bases(tmp_path):
    names = ("len7", "len37", "with_n")
    records = {name: inputs_of("generator")[name] for name in names}
    official = outputs_of("generator")
    with tokens_of("generator", records, tmp_path) as file:
        for name, sequence in records.items():
            spans = file.token_spans(name).tolist()
            assert spans == [[at, min(at + 6, len(sequence))] for at in range(0, len(sequence), 6)]
            np.testing.assert_allclose(file.tokens(name), official[name]["final"][1:], atol=1e-5)
        assert file.obs["unread"].tolist() == [1, 1, 6 + 6 + 1]


def test_one_token_for_a_run_of_n_has_the_run(tmp_path):
    records = {"run": "ACGT" + "N" * 20 + "ACGTAACC" + "N" * 12, "alone": "ACGNNACG"}
    with tokens_of("gena_lm", records, tmp_path) as file:
        spans = file.token_spans("run").tolist()
        assert [4, 24] in spans
        assert spans[-1] == [32, 44]
        assert [base for start, end in spans for base in range(start, end)] == list(range(44))
        assert file.obs["unread"].tolist() == [0, 0]


@pytest.mark.parametrize("family", ["hyenadna", "caduceus_ph"])
def test_authors_who_embed_without_special_tokens_are_followed(family, tmp_path):
    with tokens_of(family, {"a": "ACGTTGCAAC"}, tmp_path) as file:
        assert file.provenance["model"]["special_tokens"] is False
        assert len(file.tokens("a")) == 10
    model = load_model(str(GOLDEN / family))
    encoder = build_encoder(model.tokenizer, add_special_tokens=model.special_tokens)
    assert len(encoder.encode(b"ACGT").input_ids) == 4
    assert len(build_encoder(model.tokenizer).encode(b"ACGT").input_ids) == 5


def test_record_that_cannot_be_read_is_refused_or_skipped(tmp_path):
    fasta = write_fasta(tmp_path / "in.fa", {"fine": "ACGTACGTTAGC", "bad": "N" * 30 + "ACGTTGCA"})
    words = ["extract", str(fasta), "--model", str(GOLDEN / "dnabert_k6"), "-o", str(tmp_path / "a.h5")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert "record 'bad': 30 of 38 bases cannot be read by the model's tokenizer" in result.output
    result = CliRunner().invoke(main, [*words, "--on-error", "skip"])
    assert result.exit_code == 3
    assert "30 bases could not be read" in result.output
    assert "bad (unread)" in result.output
    with open_embeddings(tmp_path / "a.h5") as file:
        assert file.obs["unread"].tolist() == [0, 30]
        assert np.isnan(file.X[1]).all()
        assert file.provenance["counts"]["unread"] == 30


def test_lower_case_that_is_kept_is_refused(tmp_path):
    fasta = write_fasta(tmp_path / "in.fa", {"soft": "acgtacgttagc"})
    with pytest.raises(UnreadError, match=r"12 of 12 bases .* they are in lower case"):
        extract(
            fasta, model=str(GOLDEN / "dnabert_k6"), layers="final", keep_case=True, output=tmp_path / "a.h5"
        )


def test_vocabulary_of_rna_is_given_u(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", *"ACGUN"]))
    encoder = build_encoder(EsmTokenizer(str(path)))
    found, spelled = encoder.encode(b"ACGTTN"), encoder.encode(b"ACGUUN")
    assert found.input_ids.tolist() == spelled.input_ids.tolist() == [0, 4, 5, 6, 7, 7, 8, 2]
    assert not found.is_unread.any()
    assert found.base_start.tolist() == [-1, 0, 1, 2, 3, 4, 5, -1]


def test_scores_over_windows_count_every_base_once(tmp_path):
    """Words are scored in the window that answers for them, and what cannot be read is context only."""
    sequence = inputs_of("generator")["len150"] + "NACG"
    fasta = write_fasta(tmp_path / "in.fa", {"a": sequence})
    options = {"window": 38, "stride": 20, "dtype": "float32"}
    report = score(fasta, model=str(GOLDEN / "generator"), per_base=tmp_path / "b.tsv", **options)
    ((row),) = report.rows
    assert row.scored == 150
    model = load_model(str(GOLDEN / "generator"), dtype="float32")
    whole = AutoModelForCausalLM.from_pretrained(GOLDEN / "generator", dtype=torch.float32).eval()
    cutter = Cutter(
        encoder=build_encoder(model.tokenizer), max_tokens=512, is_causal=True, window=38, stride=20
    )
    windows = cutter.windows(SequenceRecord(id="a", sequence=sequence.encode()))
    assert {(w.start % 6, (w.end - w.start) % 6) for w in windows[:-1]} == {(0, 0)}
    total = 0.0
    for window in windows:
        ids = model.tokenizer(sequence[window.start : window.end])["input_ids"]
        ids = ids if window.start == 0 else ids[1:]
        with torch.inference_mode():
            logits = whole(torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)
        for place, token in enumerate(ids):
            first = window.start + 6 * (place - (window.start == 0))
            if place and token >= 32 and window.core_start <= first < window.core_end:
                total += float(logits[place - 1, token])
    assert row.log_likelihood == pytest.approx(total, rel=1e-5)
    lines = (tmp_path / "b.tsv").read_text().splitlines()[1:]
    assert [json.loads(line.split("\t")[1]) for line in lines] == [*range(0, 150, 6), 150]
