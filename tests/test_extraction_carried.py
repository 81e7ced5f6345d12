"""`extract` with a state that goes on from window to window: each base runs once."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from genoembed import extract, open_embeddings, plan, verify
from genoembed.errors import ConfigError, GenoembedError
from genoembed.models.striped_hyena2.network import StripedHyena2Network
from tests.banded import banded, seen_from
from tests.by_hand import (
    CONTEXT,
    STRIPED,
    embed,
    folder_of,
    model_of,
    random_dna,
    reference_of,
    revcomp,
    write_fasta,
)
from tests.oracles import pool_row

LONG = {"long": random_dna(200, 11), "short": random_dna(20, 12), "edge": random_dna(65, 13)}
LAYER = "blocks.3"


@cache
def states(sequence: str, window: int, stride: int) -> np.ndarray:
    """One pass over a strand; attention sees what windows let it see."""
    windows = SimpleNamespace(window=window, stride=stride)
    with torch.no_grad():
        output = banded(reference_of(STRIPED).model, torch.tensor([list(sequence.encode())]), windows)
    return output.hidden_states[-1][0].double().numpy()


def pooled(sequence, window, stride, method, *, core=None, skip_first=0):
    start, end = core or (0, len(sequence))
    counts = [max(start, skip_first) <= base < end for base in range(len(sequence))]
    return np.array(pool_row(states(sequence, window, stride).tolist(), counts, method))


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def carried(folder, records=LONG, **options):
    return embed(folder, records, model_of(STRIPED), layers="final", carry_state=True, **options)


@pytest.mark.parametrize(
    ("pooling", "window", "stride", "skip_first"),
    [
        ("mean", None, None, 0),
        ("mean", 30, 7, 4),
        ("weighted_mean", 40, 25, 0),
        ("max", 40, 40, 50),
        ("last", 24, 1, 0),
        ("mean_std", None, 20, 3),
    ],
)
def test_vectors_are_those_of_one_pass_with_windows_of_attention(
    pooling, window, stride, skip_first, tmp_path
) -> None:
    options = {"window": window, "stride": stride, "skip_first": skip_first, "pooling": pooling}
    kept = {name: text for name, text in LONG.items() if len(text) > skip_first}
    found = carried(tmp_path, kept, rc="concat", **options)
    size = window or CONTEXT
    step = stride or size - size // 4
    expected = [
        np.concatenate(
            [pooled(text, size, step, pooling, skip_first=skip_first) for text in (forward, revcomp(forward))]
        )
        for forward in kept.values()
    ]
    assert_close(next(iter(found.matrices.values())), expected)
    assert found.obs["n_windows"] == [1 + max(0, -(-(len(text) - size) // step)) for text in kept.values()]
    assert found.provenance["config"]["windows"]["carry_state"] is True


def test_a_window_that_holds_all_gives_the_bits_of_one_pass(tmp_path) -> None:
    texts = {name: text[:CONTEXT] for name, text in LONG.items()}
    found = carried(tmp_path, texts)
    without = embed(tmp_path, texts, model_of(STRIPED), layers="final")
    assert all(np.array_equal(found.matrices[name], without.matrices[name]) for name in found.matrices)


def test_vectors_of_tokens(tmp_path) -> None:
    found = carried(tmp_path, pooling="none", window=40, stride=25)
    expected = np.concatenate([states(text, 40, 25) for text in LONG.values()])
    assert_close(next(iter(found.matrices.values())), expected)
    assert found.lengths == [len(text) for text in LONG.values()]


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last"])
def test_rows_of_windows(pooling, tmp_path) -> None:
    found = carried(tmp_path, per_window=True, window=40, stride=25, rc="mean", pooling=pooling, skip_first=2)
    expected, places = [], []
    for text in LONG.values():
        backward = revcomp(text)
        firsts = [base for base in range(len(text)) if base and seen_from_40(base) != seen_from_40(base - 1)]
        for start, end in zip([0, *firsts], [*firsts, len(text)], strict=True):
            places.append((start, end))
            mirrored = (len(text) - end, len(text) - start)
            strands = [
                pooled(strand, 40, 25, pooling, core=core, skip_first=2)
                for strand, core in ((text, (start, end)), (backward, mirrored))
            ]
            expected.append(np.mean(strands, axis=0))
    assert list(zip(found.obs["start"], found.obs["end"], strict=True)) == places
    assert_close(next(iter(found.matrices.values())), expected)


def seen_from_40(base: int) -> int:
    return seen_from(base, SimpleNamespace(window=40, stride=25))


def test_rows_of_a_palindrome_keep_their_windows(tmp_path) -> None:
    half = random_dna(50, 3)
    text = half + revcomp(half)
    found = carried(tmp_path, {"palindrome": text}, per_window=True, window=40, rc="concat")
    (matrix,) = found.matrices.values()
    vectors = [pooled(text, 40, 30, "mean", core=core) for core in ((60, 100), (30, 60), (0, 30))]
    assert_close(matrix[:, 16:], vectors)


def test_regions_read_their_flank_once(tmp_path) -> None:
    fasta = write_fasta(tmp_path / "genome.fa", LONG)
    output = tmp_path / "regions.h5"
    place = {"regions": ["long:101-180"], "flank": 70, "window": 40, "stride": 30}
    report = extract(fasta, model=model_of(STRIPED), layers="final", carry_state=True, output=output, **place)
    expected = pooled(LONG["long"][30:200], 40, 30, "mean", core=(70, 150))
    with open_embeddings(output) as file:
        assert_close(file["final" if "final" in file.layers else file.layers[0]][:], [expected])
    # the flank behind the region is never seen from within it
    assert report.stats.real_tokens == 150


def test_nothing_but_the_record_decides_its_vector(tmp_path) -> None:
    options = {"window": 40, "stride": 25, "rc": "mean"}
    texts = {**LONG, "longer": random_dna(600, 4), "twin": LONG["long"]}
    (matrix,) = carried(tmp_path, texts, **options).matrices.values()
    shuffled = dict(reversed(texts.items()))
    (other,) = carried(tmp_path, shuffled, batch_tokens=90, **options).matrices.values()
    assert_close(other[::-1], matrix)
    for number, (name, text) in enumerate(texts.items()):
        (alone,) = carried(tmp_path, {name: text}, **options).matrices.values()
        assert_close(alone[0], matrix[number])
    assert np.array_equal(matrix[0], matrix[-1])


def test_bases_are_the_same_whatever_follows_them(tmp_path) -> None:
    options = {"pooling": "none", "window": 40, "stride": 25}
    long = next(iter(carried(tmp_path, {"all": LONG["long"]}, **options).matrices.values()))
    start = next(iter(carried(tmp_path, {"start": LONG["long"][:133]}, **options).matrices.values()))
    assert_close(start, long[:133])


def test_each_base_runs_once(tmp_path) -> None:
    texts = {"long": random_dna(790, 5)}
    counts = {}
    for carry_state in (False, True):
        report = embed(
            tmp_path, texts, model_of(STRIPED), layers="final", window=40, carry_state=carry_state
        ).report
        counts[carry_state] = report.stats.real_tokens
        planned = plan(
            tmp_path / "input.fa", model=model_of(STRIPED), layers="final", window=40, carry_state=carry_state
        )
        assert (planned.tokens, planned.windows) == (report.stats.real_tokens, report.stats.windows)
    assert counts == {False: 40 * 26, True: 790}


def test_short_memory_takes_smaller_blocks(tmp_path, monkeypatch) -> None:
    (expected,) = carried(tmp_path, per_window=True).matrices.values()
    original = StripedHyena2Network.run_blocks

    def run_blocks(self, input_ids, *rest, **options):
        if input_ids.shape[1] > 50:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, input_ids, *rest, **options)

    monkeypatch.setattr(StripedHyena2Network, "run_blocks", run_blocks)
    monkeypatch.setattr("genoembed.pipeline.forward._LEAST_BLOCK", 8)
    found = carried(tmp_path, per_window=True)
    assert_close(next(iter(found.matrices.values())), expected)
    assert found.report.stats.halvings > 0


def test_a_model_without_state_is_refused_before_anything_runs(tmp_path) -> None:
    for family in ("llama", "bert"):
        with pytest.raises(
            ConfigError, match=r"carry_state asks model .* but it cannot .*leave carry_state out"
        ):
            embed(tmp_path, LONG, model_of(family), carry_state=True)


def test_a_file_says_it_and_is_made_again_like_that(tmp_path) -> None:
    fasta, output = write_fasta(tmp_path / "input.fa", LONG), tmp_path / "carried.h5"
    extract(fasta, model=str(folder_of(STRIPED)), layers="final", carry_state=True, output=output)
    assert verify(output).is_within
    with pytest.raises(GenoembedError, match="carry_state"):
        extract(
            fasta, model=str(folder_of(STRIPED)), layers="final", output=output, resume=True, overwrite=False
        )


def test_a_plan_measures_windows_longer_than_what_it_runs(tmp_path) -> None:
    fasta = write_fasta(tmp_path / "input.fa", {"long": random_dna(1200, 6)})
    options = {"window": 1000, "batch_tokens": 256, "per_window": True, "dtype": "float32"}
    planned = plan(fasta, layers=0, carry_state=True, **options)
    assert (planned.rows, planned.measured_batches) == (2, 1)
    assert planned.widths == {"blocks.0.mlp.l3": 128}
