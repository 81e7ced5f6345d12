"""Work units: consecutive, complete, bounded."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.contracts import SequenceRecord
from genoembed.pipeline.units import iter_units


def records_of(lengths):
    return [SequenceRecord(id=str(index), sequence=b"A" * length) for index, length in enumerate(lengths)]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 30), max_size=30),
    max_bases=st.integers(1, 40),
    max_records=st.integers(1, 5),
)
def test_iter_units_keeps_every_record_once_within_bounds(lengths, max_bases, max_records):
    records = records_of(lengths)
    units = list(iter_units(records, max_bases=max_bases, max_records=max_records))
    assert [record for unit in units for record in unit.records] == records
    assert [unit.number for unit in units] == list(range(len(units)))
    for unit in units:
        sizes = [len(record.sequence) for record in unit.records]
        assert 1 <= len(sizes) <= max_records
        assert sum(sizes) <= max_bases or len(sizes) == 1


def test_iter_units_is_greedy_so_that_the_same_input_gives_the_same_units():
    units = list(iter_units(records_of([4, 4, 4, 4]), max_bases=8))
    assert [len(unit.records) for unit in units] == [2, 2]


def test_iter_units_reads_no_further_than_it_must():
    read = []

    def source():
        for record in records_of([5] * 10):
            read.append(record.id)
            yield record

    units = iter_units(source(), max_bases=10)
    next(units)
    assert read == ["0", "1", "2"]
