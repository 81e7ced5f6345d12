"""Suffixes never make two ids equal, and are found fast."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.errors import DuplicateIdError
from genoembed.sequences.records import IdRegistry


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(["a", "a_2", "a_2_2", "a_3", "b"]), max_size=30))
def test_suffixed_ids_are_unique_and_new_ids_keep_their_name(names):
    registry = IdRegistry("suffix")
    given_out = []
    for line, name in enumerate(names, start=1):
        chosen = registry.admit(name, path="x.fa", line=line)
        assert chosen not in given_out
        assert (chosen == name) == (name not in given_out)
        given_out.append(chosen)


def test_many_records_of_one_id_are_named_in_linear_time():
    registry = IdRegistry("suffix")
    began = time.perf_counter()
    names = [registry.admit("seq", path="x.fa", line=line) for line in range(1, 100_001)]
    assert names[-1] == "seq_100000"
    assert time.perf_counter() - began < 20  # a search from _2 each time would take hours


def test_duplicate_error_names_both_places():
    registry = IdRegistry("error")
    registry.admit("x", path="a.fa", line=12)
    registry.admit("y", path="b.fa", line=1)
    with pytest.raises(
        DuplicateIdError, match=r"^b\.fa:88: record 'x': appears again \(first at a\.fa:12\);"
    ):
        registry.admit("x", path="b.fa", line=88)
    with pytest.raises(DuplicateIdError, match=r"first at line 1\)"):
        registry.admit("y", path="b.fa", line=89)
