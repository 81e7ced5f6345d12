"""``search`` from sequences: embedded as the database was, and scored with the heads of a retrieval model."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from genoembed import extract, finetune, open_embeddings, search
from genoembed.errors import ConfigError, GenoembedError, NonFiniteError
from genoembed.pipeline.embedding_file import read_file_settings
from genoembed.pipeline.forward import BatchRunner
from genoembed.retrieval.models import load_retriever
from genoembed.retrieval.terms import KmerTerms
from genoembed.searching.hybrid import best_matches, shared_terms
from tests.finetuning.cases import FAST, build_model, sequences, write_examples, write_fasta

pytestmark = pytest.mark.filterwarnings("ignore::genoembed.errors.GenoembedWarning")
DATABASE = sequences(14, seed=5, shortest=20, longest=40)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("search_model") / "tiny")


@pytest.fixture(scope="module")
def retrieval(model, tmp_path_factory):
    """A folder with all three heads."""
    folder = tmp_path_factory.mktemp("search_heads")
    report = finetune(
        write_examples(folder / "pairs.jsonl", 12),
        task="retrieval",
        model=model,
        layers=("1",),
        term_bases=5,
        vector_window=4,
        output_dir=str(folder / "run"),
        split="random",
        **{**FAST, "max_epochs": 1},
    )
    return str(report.output)


def written(path, found):
    return write_fasta(path, found)


RECIPES = [
    {"layers": 1, "pooling": "max", "rc": "mean", "skip_first": 2},
    {"layers": (0, 1), "pooling": "mean", "fusion": "weighted", "fusion_weights": (0.25, 0.75)},
    {"layers": (0, 1), "pooling": "last", "fusion": "none"},
    {"layers": 1, "window": 16, "stride": 8, "keep_case": True},
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_search_embeds_sequences_as_the_database_was(model, tmp_path, recipe):
    fasta = written(tmp_path / "d.fa", DATABASE)
    database = extract(fasta, model=model, dtype="float32", output=tmp_path / "d.h5", **recipe).output
    queries = written(tmp_path / "q.fa", DATABASE[3:6])
    report = search(queries, database, k=1, metric="euclidean", dtype="float32")
    assert [hit.subject for hit in report.hits] == ["s3", "s4", "s5"]
    assert max(hit.score for hit in report.hits) < 1e-4


def test_settings_of_a_file_take_one_layer_where_layers_are_not_fused(model, tmp_path):
    fasta = written(tmp_path / "d.fa", DATABASE)
    database = extract(fasta, model=model, layers=(0, 1), output=tmp_path / "d.h5").output
    with open_embeddings(database) as file:
        settings = read_file_settings(file, remedy="")
        assert settings.embedding_options()["layers"] == tuple(file.layers)
        assert settings.embedding_options(file.layers[1])["layers"] == (file.layers[1],)


def test_search_reads_what_extract_reads_under_the_same_policies(model, tmp_path):
    fasta = written(tmp_path / "d.fa", DATABASE)
    database = extract(fasta, model=model, layers=1, output=tmp_path / "d.h5").output
    (tmp_path / "q.fa").write_text(f">a\n{DATABASE[2].lower()}\n>a\n{DATABASE[4]}J\n")
    with pytest.raises(GenoembedError, match="'J' at position"):
        search(tmp_path / "q.fa", database)
    report = search(tmp_path / "q.fa", database, k=1, invalid="mask", duplicates="suffix")
    assert [(hit.query, hit.rank) for hit in report.hits] == [("a", 1), ("a_2", 1)]
    assert next(iter(report.hits)).subject == "s2"


def test_search_refuses_a_model_with_other_weights(model, tmp_path):
    fasta = written(tmp_path / "d.fa", DATABASE)
    database = extract(fasta, model=model, layers=1, output=tmp_path / "d.h5").output
    with pytest.raises(GenoembedError, match=r"blocks\.1|vectors of another kind"):
        search(fasta, database, model="genoembed-mini", dtype="float32")


def test_search_says_that_a_file_without_recipe_takes_no_sequences(tmp_path):
    from tests.store.blocks import pooled_block, write_file

    database = write_file(tmp_path / "d.h5", pooled_block(["a", "b"]))
    fasta = written(tmp_path / "q.fa", DATABASE[:1])
    with pytest.raises(ConfigError, match="give queries as an embedding file"):
        search(fasta, database)


def test_retriever_makes_the_same_of_a_sequence_alone_and_among_others(retrieval):
    retriever = load_retriever(retrieval)
    texts = [
        text.encode() for text in [*DATABASE[:5], DATABASE[0] * 4]
    ]  # the last is longer than the context
    together = retriever.encode(texts)
    for text, found in zip(texts, together, strict=True):
        (alone,) = retriever.encode([text])
        np.testing.assert_array_equal(alone.term_ids, found.term_ids)
        np.testing.assert_allclose(alone.term_weights, found.term_weights, atol=1e-5)
        np.testing.assert_allclose(alone.vectors, found.vectors, atol=1e-5)
        terms = KmerTerms(k=5).of(text)
        assert set(found.term_ids.tolist()) == set(terms[terms >= 0].tolist())
        for term, start in zip(found.term_ids, found.term_starts, strict=True):
            assert KmerTerms(k=5).of(text[start : start + 5])[-1] == term
        assert found.spans[0, 0] == 0
        assert found.spans[-1, 1] == len(text)
        np.testing.assert_array_equal(found.spans[1:, 0], found.spans[:-1, 1])
        assert len(found.vectors) == len(found.spans) == -(-len(text) // 4)


@pytest.mark.parametrize("depth", [4, 50])
def test_hybrid_search_ranks_by_the_sum_of_all_heads_and_says_what_matched(retrieval, tmp_path, depth):
    fasta = written(tmp_path / "d.fa", DATABASE)
    database = extract(fasta, model=retrieval, dtype="float32", output=tmp_path / "d.h5").output
    queries = written(tmp_path / "q.fa", [DATABASE[3][:-2] + "AC", DATABASE[8]])
    report = search(queries, database, k=3, mode="hybrid", depth=depth, hybrid_weights=(1, 0.5, 2))
    dense = search(queries, database, k=14)
    retriever = load_retriever(retrieval)
    texts = [DATABASE[3][:-2] + "AC", DATABASE[8]]
    asked = retriever.encode([text.encode() for text in texts])
    rows = retriever.encode([text.encode() for text in DATABASE])
    assert len(report.hits) == 6
    for number, (query, text) in enumerate(zip(asked, texts, strict=True)):
        totals = {}
        for hit in list(dense.hits.of_row(number))[:depth]:
            row = int(hit.subject.removeprefix("s"))
            sparse = shared_terms(
                query.term_ids, query.term_weights, rows[row].term_ids, rows[row].term_weights
            )
            multi = best_matches(query.vectors, rows[row].vectors)
            totals[hit.subject] = hit.score + 0.5 * sparse.score + 2 * multi.score
        hits = list(report.hits.of_row(number))
        assert [hit.subject for hit in hits] == sorted(totals, key=lambda name: -totals[name])[:3]
        for hit in hits:
            assert hit.score == pytest.approx(totals[hit.subject], abs=1e-4)
            subject = DATABASE[int(hit.subject.removeprefix("s"))]
            for term in filter(None, hit.hybrid.terms.split(",")):
                kmer = term.split(":")[0]
                assert len(kmer) == 5
                assert kmer in text
                other = kmer.translate(str.maketrans("ACGT", "TGCA"))[::-1]
                assert kmer in subject or other in subject
            place, _, _ = hit.hybrid.matches.split(",")[0].split(":")
            start, end = map(int, place.split("-"))
            assert 0 <= start < end <= len(text)
    assert next(iter(report.hits.of_row(1))).subject == "s8"
    assert report.hits.columns()["sparse"][0] == pytest.approx(next(iter(report.hits)).hybrid.sparse)


def test_hybrid_search_refuses_sequences_that_are_not_those_that_were_embedded(retrieval, tmp_path):
    fasta = written(tmp_path / "d.fa", DATABASE)
    database = extract(fasta, model=retrieval, dtype="float32", output=tmp_path / "d.h5").output
    other = written(tmp_path / "o.fa", DATABASE[::-1])
    with pytest.raises(ConfigError, match=r"of its sequences .* are not in .*o\.fa as they were embedded"):
        search(database, database, mode="hybrid", subject_sequences=[other])
    moved = tmp_path / "moved.fa"
    (tmp_path / "d.fa").rename(moved)
    with pytest.raises(ConfigError, match=r"d.fa' is no file; set subject_sequences"):
        search(written(tmp_path / "q.fa", DATABASE[:2]), database, mode="hybrid")
    found = search(
        written(tmp_path / "q.fa", DATABASE[:2]), database, mode="hybrid", subject_sequences=[moved]
    )
    assert [hit.subject for hit in found.hits if hit.rank == 1] == ["s0", "s1"]


@pytest.mark.parametrize("mode", ["vectors", "hybrid"])
def test_search_takes_queries_from_a_pipe_and_writes_nothing_on_the_way(
    retrieval, tmp_path, monkeypatch, mode
):
    fasta = written(tmp_path / "d.fa", DATABASE)
    database = extract(fasta, model=retrieval, dtype="float32", output=tmp_path / "d.h5").output
    queries = written(tmp_path / "q.fa", [DATABASE[3][:-2] + "AC", DATABASE[8]])
    asked = extract(queries, model=retrieval, dtype="float32", output=tmp_path / "q.h5").output
    wanted = search(asked, database, k=3, mode=mode).hits.columns()

    def refused(*_, **__):
        pytest.fail("a search needs no temporary file")

    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path(queries).read_bytes())))
    piped = search("-", database, k=3, mode=mode).hits.columns()
    assert len(piped["score"]) == 6
    for name, column in wanted.items():
        np.testing.assert_array_equal(piped[name], column)  # NaN equals NaN


def test_query_that_fails_stops_the_search_or_is_left_out_and_named(model, tmp_path, monkeypatch):
    extract(written(tmp_path / "d.fa", DATABASE), model=model, layers=1, output=tmp_path / "d.h5")
    queries = tmp_path / "q.fa"
    queries.write_text(f">good\n{DATABASE[0]}\n>spoiled\n{DATABASE[1]}\n")
    run = BatchRunner._forward

    def spoil(runner, batch):
        values = run(runner, batch)
        bad = torch.tensor(batch.rows)[:, None] == 1
        return {name: torch.where(bad, torch.nan, matrix) for name, matrix in values.items()}

    monkeypatch.setattr(BatchRunner, "_forward", spoil)
    with pytest.raises(NonFiniteError, match="record 'spoiled'"):
        search(queries, tmp_path / "d.h5")
    report = search(queries, tmp_path / "d.h5", k=2, on_error="skip")
    assert report.failed == {"spoiled": "not finite"}
    assert set(report.hits.columns()["query"]) == {"good"}
    search(queries, tmp_path / "d.h5", k=2, on_error="skip", output=tmp_path / "hits.tsv")
    *_, last = (tmp_path / "hits.tsv").read_text().splitlines()
    assert last.split("\t") == [
        "spoiled",
        *["NA"] * 5,
        "0",
        str(len(DATABASE[1])),
        "NA",
        "NA",
        "NA",
        "NA",
    ]
