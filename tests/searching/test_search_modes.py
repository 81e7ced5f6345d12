"""Centering, search by k-mers and by both, and what hits have in common: against slow oracles."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from genoembed import extract, search
from genoembed.contracts import EmbeddingBlock
from genoembed.errors import ConfigError
from genoembed.searching.kmers import KmerIndex, kmer_neighbors, measure_likeness
from genoembed.searching.neighbors import Neighbors
from genoembed.sequences import reverse_complement
from tests.finetuning.cases import build_model, write_fasta
from tests.searching.test_search_files import MADE, made, vectors
from tests.store.blocks import obs_row, write_file


def letters(length, seed):
    return "".join(np.random.default_rng(seed).choice(list("ACGT"), length))


def mutated(sequence, share, seed):
    """Replace a share of the letters by others."""
    random = np.random.default_rng(seed)
    found = list(sequence)
    for place in random.choice(len(found), round(share * len(found)), replace=False):
        found[place] = random.choice([letter for letter in "ACGT" if letter != found[place]])
    return "".join(found)


def kmers_of(sequence, k):
    """List the canonical k-mers, without microsatellites, which unrelated sequences share."""
    texts = [sequence[start : start + k].encode() for start in range(len(sequence) - k + 1)]
    periods = range(1, min(6, k // 3) + 1)
    return {
        min(text, reverse_complement(text))
        for text in texts
        if not any(text[period:] == text[:-period] for period in periods)
    }


def jaccard(one, other, k):
    mine, theirs = kmers_of(one, k), kmers_of(other, k)
    return len(mine & theirs) / len(mine | theirs)


def write(path, matrix, names, provenance=MADE):
    block = EmbeddingBlock(rows=tuple(map(obs_row, names)), matrices={"blocks.1": matrix})
    return write_file(path, block, provenance=provenance)


# ------------------------------------------------------------------------------------------------ centering


def centered(values, rows, components):
    """Subtract the mean of rows and remove their strongest directions, by a decomposition of the rows."""
    wide = rows.astype(np.float64)
    top = np.linalg.svd(wide - wide.mean(axis=0), full_matrices=False)[2][:components]
    moved = values - wide.mean(axis=0)
    return moved - moved @ top.T @ top


def cosines(one, other):
    unit = [values / np.linalg.norm(values, axis=1, keepdims=True) for values in (one, other)]
    return unit[0] @ unit[1].T


@pytest.mark.parametrize(
    ("num_rows", "width", "ruling", "components"),
    [(60, 48, 2, 2), (40, 128, 5, 3), (120, 160, 1, 1), (120, 160, 9, 8), (30, 5, 1, 0), (120, 160, 0, 0)],
)
@pytest.mark.parametrize("approximate", [False, True])
def test_cosines_are_of_vectors_that_are_centered_on_the_database(
    tmp_path, num_rows, width, ruling, components, approximate
):
    """Components are removed until no few directions rule the rows."""
    rows, asked = vectors(num_rows, width=width), vectors(5, seed=1, width=width)
    sizes = np.ones(width, np.float32)
    sizes[:ruling] = 20 * 1.3 ** np.arange(ruling)
    rows, asked = rows * sizes, asked * sizes
    names = [f"r{number}" for number in range(num_rows)]
    database = write(tmp_path / "d.h5", rows, names)
    queries = write(tmp_path / "q.h5", asked, [f"q{number}" for number in range(5)])
    found = search(queries, database, k=4, approximate=approximate)
    expected = cosines(centered(asked, rows, components), centered(rows, rows, components))
    order = np.argsort(-expected, axis=1)[:, :4]
    np.testing.assert_array_equal(found.hits.neighbors.rows, order)
    np.testing.assert_allclose(
        found.hits.neighbors.scores, np.take_along_axis(expected, order, axis=1), atol=2e-6
    )
    assert found.vectors.startswith(f"centered on the database ({num_rows} rows)")
    assert ("leading" in found.vectors) == bool(components)
    # the same rows in another order: the same scores to the last bit
    shuffled = np.random.default_rng(2).permutation(num_rows)
    other = write(tmp_path / "o.h5", rows[shuffled], [names[row] for row in shuffled])
    again = search(queries, other, k=4, approximate=approximate)
    assert [hit.subject for hit in again.hits] == [hit.subject for hit in found.hits]
    if not approximate:
        np.testing.assert_array_equal(again.hits.neighbors.scores, found.hits.neighbors.scores)


def test_queries_find_the_same_alone_and_among_others(tmp_path):
    database = write(tmp_path / "d.h5", vectors(60, width=48), [f"r{number}" for number in range(60)])
    asked = vectors(7, seed=1, width=48)
    every = search(write(tmp_path / "q.h5", asked, list("abcdefg")), database, k=5).hits.neighbors
    for number in range(7):
        alone = search(write(tmp_path / "one.h5", asked[[number]], "q"), database, k=5).hits.neighbors
        np.testing.assert_array_equal(alone.rows[0], every.rows[number])
        np.testing.assert_array_equal(alone.scores[0], every.scores[number])
        (tmp_path / "one.h5").unlink()


@pytest.mark.parametrize(
    ("rows", "options", "provenance", "said"),
    [
        (vectors(23), {}, MADE, "compared as they are: 23 rows, fewer than 24, are not centered"),
        (vectors(40), {"center": False}, MADE, "compared as they are"),
        (vectors(40), {"metric": "dot"}, MADE, "compared as they are"),
        (vectors(40), {"metric": "dot", "center": True}, MADE, "centered on the database (40 rows)"),
        (
            vectors(40),
            {},
            made(finetuned={"task": "retrieval"}),
            "compared as they are: the model was fine-tuned",
        ),
        (np.ones((40, 5), np.float32), {}, MADE, "compared as they are: the rows hardly differ"),
    ],
)
def test_search_says_how_vectors_are_compared(tmp_path, rows, options, provenance, said):
    database = write(tmp_path / "d.h5", rows, [f"r{number}" for number in range(len(rows))], provenance)
    assert search(database, database, k=1, **options).vectors == said


@pytest.mark.parametrize(
    ("rows", "said"), [(vectors(9), "9 rows, fewer than 24"), (np.ones((30, 5), "f4"), "hardly differ")]
)
def test_search_cannot_center_on_too_little(tmp_path, rows, said):
    database = write(tmp_path / "d.h5", rows, [f"r{number}" for number in range(len(rows))])
    with pytest.raises(ConfigError, match=f"{said}.*; set center=False"):
        search(database, database, center=True)


def test_rows_that_differ_in_few_directions_keep_half_of_them(tmp_path):
    corners = np.eye(4, 64, dtype=np.float32)[np.arange(120) % 4] + 1
    database = write(tmp_path / "d.h5", corners, [f"r{number}" for number in range(120)])
    found = search(database, database, k=30)
    assert (found.hits.neighbors.rows % 4 == np.arange(120)[:, None] % 4).all()
    np.testing.assert_allclose(found.hits.neighbors.scores, 1, atol=1e-6)


# ---------------------------------------------------------------------------------------------- k-mer search


@pytest.mark.parametrize("block_bases", [1, 100, 1 << 20])
def test_search_by_kmers_ranks_by_the_share_of_canonical_kmers(block_bases):
    texts = [letters(80, seed) for seed in range(12)]
    asked = [
        mutated(texts[3], 0.1, 1),
        reverse_complement(texts[7].encode()).decode(),
        texts[0][:40] + "N",
        "AC",
    ]
    index = KmerIndex([text.encode() for text in asked], 7)
    rows = [(number, text.encode()) for number, text in enumerate(texts)]
    found = kmer_neighbors(index, rows, k=5, block_bases=block_bases).neighbors
    for query, text in enumerate(asked):
        clean = text.replace("N", "")
        shares = np.array([jaccard(clean, other, 7) for other in texts])
        order = [row for row in np.lexsort((np.arange(12), -shares)) if shares[row] > 0][:5]
        assert [row for row in found.rows[query] if row >= 0] == order
        np.testing.assert_allclose(found.scores[query][: len(order)], shares[order], rtol=1e-12)
    backwards = kmer_neighbors(index, rows[::-1], k=5, block_bases=block_bases).neighbors
    np.testing.assert_array_equal(backwards.rows, found.rows)
    np.testing.assert_array_equal(backwards.scores, found.scores)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("modes_model") / "tiny")


@pytest.fixture(scope="module")
def world(model, tmp_path_factory):
    """30 sequences and their file, and queries that are like some of them."""
    folder = tmp_path_factory.mktemp("modes")
    texts = [letters(90, seed) for seed in range(30)]
    fasta = write_fasta(folder / "d.fa", texts)
    database = extract(fasta, model=model, layers=1, dtype="float32", output=folder / "d.h5").output
    asked = [mutated(texts[4], 0.05, 0), reverse_complement(texts[9].encode()).decode(), letters(60, 99)]
    return texts, database, asked, write_fasta(folder / "q.fa", asked)


def test_search_by_kmers_runs_no_model(world, monkeypatch):
    texts, database, asked, queries = world
    monkeypatch.setattr("genoembed.searching.run.embed_queries", None)
    report = search(queries, database, k=3, mode="kmer", kmer_size=9)
    best = [hit for hit in report.hits if hit.rank == 1]
    assert [hit.subject for hit in best][:2] == ["s4", "s9"]
    assert best[0].score == pytest.approx(jaccard(asked[0], texts[4], 9))
    assert (report.mode, report.vectors) == ("kmer", "")
    assert all(
        hit.query != hit.subject for hit in search(database, database, mode="kmer", exclude_self=True).hits
    )


def test_hybrid_search_adds_cosines_and_shares_of_kmers(world):
    texts, database, asked, queries = world
    report = search(queries, database, k=5, mode="hybrid", kmer_size=5, hybrid_weights=(1, 3))
    by_vector = search(queries, database, k=30).hits
    for query, text in enumerate(asked):
        cosine = {hit.subject: hit.score for hit in by_vector.of_row(query)}
        totals = {
            f"s{row}": cosine[f"s{row}"] + 3 * jaccard(text, other, 5) for row, other in enumerate(texts)
        }
        hits = list(report.hits.of_row(query))
        assert [hit.subject for hit in hits] == sorted(totals, key=lambda name: -totals[name])[:5]
        for hit in hits:
            assert hit.score == pytest.approx(totals[hit.subject], abs=1e-6)
            assert hit.hybrid.dense == pytest.approx(cosine[hit.subject], abs=1e-6)
    assert report.hits.header()[-2:] == ["dense", "sparse"]
    assert "score = 1 x cosine + 3 x share of 5-mers" in report.vectors


# ----------------------------------------------------------------------------- what hits have in common


@pytest.mark.parametrize("share", [0.02, 0.1, 0.2])
def test_identity_is_that_of_mutated_copies(share):
    texts = [letters(3000, seed) for seed in range(8)]
    copies = [mutated(text, share, seed) for seed, text in enumerate(texts)]
    found = Neighbors(np.arange(8)[:, None], np.zeros((8, 1)))
    likeness = measure_likeness(
        found, [text.encode() for text in copies], {row: text.encode() for row, text in enumerate(texts)}
    )
    assert likeness.identity.mean() == pytest.approx(1 - share, abs=0.01)


def test_identity_of_fragments_strands_and_unrelated_sequences():
    text = letters(500, 1).encode()
    subjects = {
        0: text,
        1: reverse_complement(text),
        2: text[100:200],
        3: letters(500, 2).encode(),
        4: b"ACGT",
    }
    found = Neighbors(np.arange(5)[None], np.zeros((1, 5)))
    likeness = measure_likeness(found, [text], subjects)
    np.testing.assert_array_equal(likeness.shared_kmers, [[1, 1, 1, 0, np.nan]])
    np.testing.assert_array_equal(likeness.identity, [[1, 1, 1, np.nan, np.nan]])


def test_short_piece_of_a_long_sequence_is_found_whole():
    text = letters(400_000, 1).encode()
    pieces = [text[start : start + 60] for start in range(1000, 9000, 1000)]
    pieces += [reverse_complement(text[-12_000:]), letters(60, 7).encode(), b"A" * 60]
    found = Neighbors(np.zeros((len(pieces), 1), np.int64), np.zeros((len(pieces), 1)))
    for queries, subjects in ((pieces, {0: text}), ([text], dict(enumerate(pieces)))):
        hits = found if len(queries) > 1 else Neighbors(np.arange(len(pieces))[None], found.scores.T)
        likeness = measure_likeness(hits, queries, subjects)
        np.testing.assert_array_equal(likeness.shared_kmers.ravel(), [*[1] * 9, 0, np.nan])


def test_windows_are_compared_by_their_own_bases(model, tmp_path):
    texts = [letters(160, seed) for seed in range(3)]
    fasta = write_fasta(tmp_path / "d.fa", texts)
    (tmp_path / "r.bed").write_text("s0\t10\t150\tforward\t0\t+\ns1\t5\t155\tbackward\t0\t-\n")
    database = extract(
        fasta,
        model=model,
        layers=1,
        regions=str(tmp_path / "r.bed"),
        flank=5,
        window=48,
        stride=40,
        per_window=True,
        output=tmp_path / "d.h5",
    ).output
    found = search(database, database, k=1, center=False)
    for hit in found.hits:
        assert (hit.subject, hit.shared_kmers, hit.identity) == (hit.query, 1, 1)
    piece = write_fasta(tmp_path / "q.fa", [texts[1][75:110]])
    best, *_ = search(piece, database, k=1, mode="kmer").hits
    assert best.subject_start <= 75
    assert best.subject_end >= 110
    assert best.identity == 1
    (tmp_path / "d.fa").write_text((tmp_path / "d.fa").read_text().replace("A", "C", 1))
    with pytest.raises(ConfigError, match=r"have changed|as they were embedded"):
        search(piece, database, mode="kmer")


def test_columns_are_empty_where_sequences_are_gone(world, tmp_path, caplog):
    _, database, _, queries = world
    elsewhere = tmp_path / "elsewhere.fa"
    moved = database.with_name("d.fa").rename(elsewhere)
    try:
        with caplog.at_level(logging.WARNING):
            report = search(queries, database, k=2)
        assert "shared_kmers and identity are empty" in caplog.text
        assert "set subject_sequences to where they are now" in caplog.text
        assert np.isnan(report.hits.columns()["identity"]).all()
        caplog.clear()
        named = search(queries, database, k=2, subject_sequences=[elsewhere])
        assert named.hits.columns()["shared_kmers"][0] > 0.1
        off = search(queries, database, k=2, compare_sequences=False)
        assert np.isnan(off.hits.columns()["shared_kmers"]).all()
        assert not caplog.text
        with pytest.raises(ConfigError, match="set subject_sequences to where they are now"):
            search(queries, database, mode="kmer")
    finally:
        moved.rename(database.with_name("d.fa"))
