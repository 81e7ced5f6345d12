"""The embedder of work units: batches, running totals, slabs, memory."""

from __future__ import annotations

import dataclasses
import itertools
import time
import weakref

import numpy as np
import pytest
import torch

from genoembed.config.embed import embed_config
from genoembed.contracts import SequenceRecord
from genoembed.errors import ModelError
from genoembed.pipeline.batches import BATCH_TOKENS
from genoembed.pipeline.embedder import UnitEmbedder
from genoembed.pipeline.units import RunStats, WorkUnit
from genoembed.pooling import reduce
from tests.by_hand import ALL_FAMILIES, STRIPED, embed, model_of, random_dna, revcomp

RECORDS = tuple(
    SequenceRecord(id=f"r{index}", sequence=random_dna(length, index).encode())
    for index, length in enumerate((40, 3, 17, 17, 40, 1, 60, 17))
)


def embedder_of(family, *, on_batch=None, **options):
    config = embed_config({"inputs": ("a.fa",), **options})
    return UnitEmbedder(model_of(family), config, on_batch=on_batch)


def watched_batches(monkeypatch, family):
    """Collect the lengths of the rows of each batch that reaches the model."""
    seen = []
    model = model_of(family)
    original = type(model).forward

    def forward(self, batch, *args, **options):
        seen.append(batch.attention_mask.sum(dim=1).tolist())
        return original(self, batch, *args, **options)

    monkeypatch.setattr(type(model), "forward", forward)
    return seen


def test_model_without_mask_that_sees_both_sides_gets_equal_lengths(monkeypatch):
    seen = watched_batches(monkeypatch, "custom_conv")
    embedder_of("custom_conv")(WorkUnit(number=0, records=RECORDS))
    assert sorted(map(len, seen)) == [1, 1, 1, 2, 3]
    assert all(len(set(lengths)) == 1 for lengths in seen)


@pytest.mark.parametrize("family", [family for family in ALL_FAMILIES if family != "custom_conv"])
def test_other_models_share_batches_between_lengths(family, monkeypatch):
    seen = watched_batches(monkeypatch, family)
    embedder_of(family, batch_tokens=8192)(WorkUnit(number=0, records=RECORDS))
    assert len(seen) == 1
    assert len(set(seen[0])) > 2


def test_batch_is_closed_before_a_piece_that_would_pad_it_much(monkeypatch):
    seen = watched_batches(monkeypatch, "llama")
    embedder = embedder_of("llama", batch_tokens=640)
    embedder(WorkUnit(number=0, records=RECORDS))
    assert seen == [[1, 3, 17, 17, 17], [40, 40, 60]]
    assert embedder.stats.slots - embedder.stats.real_tokens == (16 + 14) + (20 + 20)


@pytest.mark.parametrize(("batch_tokens", "most_rows"), [(1, 1), (120, 7), (10_000, 8)])
def test_batches_keep_to_the_budget(batch_tokens, most_rows, monkeypatch):
    seen = watched_batches(monkeypatch, "llama")
    embedder_of("llama", batch_tokens=batch_tokens)(WorkUnit(number=0, records=RECORDS))
    assert sum(map(len, seen)) == len(RECORDS)
    assert max(map(len, seen)) <= most_rows
    assert all(len(rows) * max(rows) <= batch_tokens or len(rows) == 1 for rows in seen)


def test_running_totals_add_up():
    totals = []
    embedder = embedder_of("llama", batch_tokens=64, on_batch=lambda s: totals.append(dataclasses.replace(s)))
    embedder(WorkUnit(number=0, records=RECORDS[:4]))
    embedder(WorkUnit(number=1, records=RECORDS[4:]))
    stats = embedder.stats
    num_bases = sum(len(record.sequence) for record in RECORDS)
    assert (stats.records, stats.bases, stats.windows) == (len(RECORDS), num_bases, len(RECORDS))
    assert stats.real_tokens == num_bases
    assert stats.slots >= stats.real_tokens
    assert stats.padding_share == 1 - stats.real_tokens / stats.slots
    assert totals[-1] == stats
    assert [total.batches for total in totals] == sorted(total.batches for total in totals)
    assert 0 < stats.forward_s
    assert RunStats().padding_share == 0


@pytest.mark.parametrize("slab_batches", [1, 32])
def test_records_are_counted_once_and_as_they_are_done(slab_batches, monkeypatch):
    monkeypatch.setattr("genoembed.pipeline.batches.SLAB_BATCHES", slab_batches)
    records = (*RECORDS, dataclasses.replace(RECORDS[6], id="flanked", core_start=35, core_end=-1))
    done = []
    embedder = embedder_of(
        "esm", window=20, stride=15, rc="mean", batch_tokens=24, on_batch=lambda s: done.append(s.records)
    )
    embedder(WorkUnit(number=0, records=records))
    assert embedder.stats.records == len(records)
    assert embedder.stats.bases == sum(len(record.sequence) for record in records)
    assert done == sorted(done)
    assert any(0 < count < len(records) for count in done)


@pytest.mark.parametrize(
    "options", [{"stride": 20}, {"stride": 10}, {"rc": "mean"}], ids=["apart", "overlap", "strands"]
)
def test_totals_count_overlap_and_the_other_strand_once(options):
    record = SequenceRecord(id="long", sequence=random_dna(400, 1).encode())
    seen = []
    embedder = embedder_of(
        "llama",
        window=20,
        batch_tokens=40,
        on_batch=lambda stats: seen.append(stats.bases + stats.bases_under_way),
        **options,
    )
    embedder(WorkUnit(number=0, records=(record,)))
    assert seen == sorted(seen)
    steps = [later - earlier for earlier, later in itertools.pairwise([0, *seen[:-1]])]
    assert len(steps) >= 10
    assert all(0 < step <= 40 for step in steps)
    assert seen[-2:] == [400, 400]
    assert embedder.stats.bases_under_way == 0


def test_budget_follows_the_device_unless_it_is_set():
    assert embedder_of("llama").batch_tokens == BATCH_TOKENS["cpu"]
    assert embedder_of("llama", batch_tokens=77).batch_tokens == 77


@pytest.mark.parametrize("pooling", ["mean", "none"])
@pytest.mark.parametrize("slab_batches", [1, 32])
@pytest.mark.parametrize("family", ["esm", "custom_conv", STRIPED])
def test_equal_sequences_run_once_and_each_has_its_row(family, slab_batches, pooling, monkeypatch):
    """Also on the other strand: the reverse complement of b is a."""
    monkeypatch.setattr("genoembed.pipeline.batches.SLAB_BATCHES", slab_batches)
    one, other = random_dna(30, 1), random_dna(20, 2)
    sequences = {"a": one, "b": revcomp(one), "c": other, "d": one, "e": "ACGT", "f": other}
    records = tuple(SequenceRecord(id=name, sequence=text.encode()) for name, text in sequences.items())
    options = {"pooling": pooling, "rc": "concat", "layers": ("0", "final"), "batch_tokens": 40}
    alone = [
        embedder_of(family, **options)(WorkUnit(number=0, records=(record,))).block for record in records
    ]
    seen = watched_batches(monkeypatch, family)
    embedder = embedder_of(family, **options)
    together = embedder(WorkUnit(number=0, records=records)).block
    # both strands of a and c, and the palindrome once
    num_special = 2 if family == "esm" else 0
    assert sorted(itertools.chain(*seen)) == [length + num_special for length in (4, 20, 20, 30, 30)]
    assert embedder.stats.repeats == 12 - 5
    assert embedder.stats.real_tokens == sum(itertools.chain(*seen))
    assert (embedder.stats.records, embedder.stats.bases) == (6, sum(map(len, sequences.values())))
    assert [row.id for row in together.rows] == list(sequences)
    field = "values" if pooling == "none" else "matrices"
    for layer, matrix in getattr(together, field).items():
        expected = np.concatenate([getattr(block, field)[layer] for block in alone])
        np.testing.assert_allclose(matrix, expected, rtol=1e-5, atol=1e-5)
        if pooling == "mean":
            np.testing.assert_array_equal(matrix[0], matrix[3])
            np.testing.assert_array_equal(matrix[2], matrix[5])


def test_token_vectors_are_given_up_as_they_are_joined():
    """A record's tokens may fill most of the memory: they are never held twice."""
    records = tuple(SequenceRecord(id=str(n), sequence=random_dna(40, n).encode()) for n in range(3))
    embedder = embedder_of("esm", pooling="none", layers=("0", "final"), window=20, stride=16)
    results = embedder.runner(WorkUnit(number=0, records=records))
    block = embedder.rows(results).block
    assert len(block.lengths) == 3
    pieces = [number for windows in results.taken.values() for number in windows.values()]
    for layer in results.vectors.names:
        assert len(block.values[layer]) == block.lengths.sum() > 0
        assert results.vectors.num_tokens(layer, [piece.number for piece in pieces]) == 0


def test_equal_windows_of_one_record_run_once(monkeypatch):
    seen = watched_batches(monkeypatch, "llama")
    embedder = embedder_of("llama", window=10, stride=10, per_window=True)
    block = embedder(
        WorkUnit(number=0, records=(SequenceRecord(id="n", sequence=b"N" * 50 + b"ACGTA" + b"N" * 25),))
    ).block
    assert len(block.rows) == 8
    assert sum(map(len, seen)) == 2
    assert embedder.stats.repeats == 6
    assert embedder.stats.windows == 8


def test_equal_sequences_of_two_units_run_in_each(monkeypatch):
    """What a unit holds is gone when it is written."""
    seen = watched_batches(monkeypatch, "llama")
    embedder = embedder_of("llama")
    for number in range(2):
        embedder(WorkUnit(number=number, records=(SequenceRecord(id=str(number), sequence=b"ACGT"),)))
    assert seen == [[4], [4]]
    assert embedder.stats.repeats == 0


@pytest.mark.parametrize("family", ["llama", "bert", STRIPED])
@pytest.mark.parametrize("pooling", ["mean", "max", "last", "weighted_mean", "mean_std"])
def test_no_activation_outlives_its_layer(family, pooling, monkeypatch):
    """Pooled on the fly: memory does not grow with the number of layers."""
    captured, alive, original = [], [], reduce.pool

    def pool(hidden_BLD, *args, **options):
        # the one before is this block's input, the caller's variable still
        alive.append(sum(reference() is not None for reference in captured[:-1]))
        captured.append(weakref.ref(hidden_BLD))
        pooled = original(hidden_BLD, *args, **options)
        assert pooled.untyped_storage().nbytes() < hidden_BLD.untyped_storage().nbytes()
        return pooled

    monkeypatch.setattr("genoembed.pooling.reduce.pool", pool)
    embedder_of(family, layers=("all",), pooling=pooling)(WorkUnit(number=0, records=RECORDS))
    assert len(captured) >= 3
    assert set(alive) == {0}


def test_forward_and_pooling_are_timed_apart(monkeypatch):
    original = reduce.pool

    def pool(*args, **options):
        time.sleep(0.05)
        return original(*args, **options)

    monkeypatch.setattr("genoembed.pooling.reduce.pool", pool)
    embedder = embedder_of("llama", layers=("all",))
    started = time.perf_counter()
    embedder(WorkUnit(number=0, records=RECORDS))
    whole = time.perf_counter() - started
    assert 0.15 <= embedder.stats.pooling_s < whole
    assert 0 < embedder.stats.forward_s <= whole - embedder.stats.pooling_s


def test_no_memory_left_says_what_to_set(monkeypatch):
    def forward(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(type(model_of("llama")), "forward", forward)
    with pytest.raises(ModelError, match=r"'cpu' has no memory left for 1 x 60 tokens; set window to cut"):
        embedder_of("llama", batch_tokens=8192)(WorkUnit(number=0, records=RECORDS))


@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_slabs_change_nothing(pooling, monkeypatch):
    options = {"pooling": pooling, "window": 20, "stride": 10, "rc": "mean", "layers": ("0", "final")}
    whole = embedder_of("esm", **options)(WorkUnit(number=0, records=RECORDS)).block
    monkeypatch.setattr("genoembed.pipeline.batches.SLAB_BATCHES", 1)
    cut = embedder_of("esm", batch_tokens=24, **options)(WorkUnit(number=0, records=RECORDS)).block
    assert cut.rows == whole.rows
    field = "values" if pooling == "none" else "matrices"
    for layer, matrix in getattr(whole, field).items():
        np.testing.assert_allclose(getattr(cut, field)[layer], matrix, rtol=1e-5, atol=1e-5)


def test_slab_bounds_what_is_encoded_at_once(monkeypatch):
    """A record of many windows is not encoded whole before the first forward pass."""
    encoded, at_first_batch = [], []
    embedder = embedder_of("llama", batch_tokens=64, on_batch=lambda _: at_first_batch.append(len(encoded)))
    encoder = embedder._cutter.encoder
    original = type(encoder).encode
    monkeypatch.setattr(
        type(encoder), "encode", lambda self, text: encoded.append(len(text)) or original(self, text)
    )
    long = SequenceRecord(id="long", sequence=random_dna(64 * 200, 1).encode())
    embedder(WorkUnit(number=0, records=(long,)))
    assert len(encoded) > 200
    assert at_first_batch[0] < 50


def test_window_rows_hash_what_they_show_only():
    """Hashing the record for each of its windows would take quadratic time."""
    hashed = []

    class Watched(SequenceRecord):
        @property
        def sha256(self):
            hashed.append(self.id)
            return super().sha256

    record = Watched(id="long", sequence=random_dna(64 * 20, 1).encode())
    block = embedder_of("llama", per_window=True)(WorkUnit(number=0, records=(record,))).block
    assert len(block.rows) > 20
    assert hashed == []
    assert len({row.sha256 for row in block.rows}) == len(block.rows)


def test_token_units_shrink_with_the_width(tmp_path, monkeypatch):
    units = []
    original = UnitEmbedder.rows

    def rows(self, embedded):
        units.append(len(embedded.unit.records))
        return original(self, embedded)

    monkeypatch.setattr(UnitEmbedder, "rows", rows)
    monkeypatch.setattr("genoembed.pipeline.embedder._UNIT_VALUES", 16 * 2 * 60)
    records = {record.id: record.sequence.decode() for record in RECORDS}
    found = embed(tmp_path, records, model_of("llama"), layers=[0, "final"], pooling="none")
    assert units == [3, 3, 1, 1]
    assert found.ids == list(records)
    units.clear()
    embed(tmp_path, records, model_of("llama"), layers=[0, "final"])
    assert units == [8]


@pytest.mark.parametrize(
    ("options", "num_records"),
    [
        ({}, [5, 3]),  # five vectors of two layers
        ({"rc": "mean"}, [2, 2, 2, 2]),
        ({"window": 20, "stride": 10, "per_window": True}, [2, 2, 2, 1, 1]),  # 50 bases
        ({"window": 20, "stride": 20}, [4, 2, 2]),  # 100 bases
    ],
)
def test_pooled_units_shrink_with_layers_strands_and_windows(options, num_records, tmp_path, monkeypatch):
    """Vectors of all layers are held until a unit is written."""
    units = []
    original = UnitEmbedder.rows
    monkeypatch.setattr(
        UnitEmbedder, "rows", lambda self, done: units.append(len(done.unit.records)) or original(self, done)
    )
    monkeypatch.setattr("genoembed.pipeline.embedder._UNIT_VALUES", 16 * 2 * 5)
    records = {record.id: record.sequence.decode() for record in RECORDS}
    embed(tmp_path, records, model_of("llama"), layers=[0, "final"], **options)
    assert units == num_records
