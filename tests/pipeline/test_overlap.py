"""Threads beside the forward pass: order, bounds, errors, clean ends."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.pipeline.threads import read_ahead, write_behind

READING, WRITING = "genoembed-reading", "genoembed-writing"


class SpoiledError(Exception):
    """What goes wrong in a thread of these tests."""


def threads(name):
    return [thread for thread in threading.enumerate() if thread.name == name]


def wait_for(condition, *, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@settings(max_examples=40)
@given(items=st.lists(st.integers(), max_size=20), depth=st.integers(1, 5))
def test_items_come_through_in_order(items, depth):
    written = []
    with read_ahead(iter(items), depth=depth) as ahead, write_behind(written.append, depth=depth) as put:
        for item in ahead:
            put(item)
    assert written == items


def test_source_runs_in_a_thread_ahead_of_its_user_and_no_further_than_the_depth():
    made = []

    def source():
        for number in itertools.count():
            made.append((number, threading.current_thread().name))
            yield number

    with read_ahead(source(), depth=3) as ahead:
        wait_for(lambda: len(made) == 4)  # three wait, one more is in hand
        time.sleep(0.05)
        assert [number for number, _ in made] == [0, 1, 2, 3]
        assert {name for _, name in made} == {READING}
        assert next(ahead) == 0
        wait_for(lambda: len(made) == 5)
    assert threads(READING) == []


def test_error_of_the_source_comes_after_the_items_before_it():
    def source():
        yield from "ab"
        raise SpoiledError("c")

    seen = []

    def use():
        with read_ahead(source(), depth=5) as ahead:
            seen.extend(ahead)

    with pytest.raises(SpoiledError, match=r"^c$") as caught:
        use()
    assert seen == ["a", "b"]
    assert "source" in [entry.name for entry in caught.traceback]
    assert threads(READING) == []


@pytest.mark.parametrize("error", [SpoiledError, KeyboardInterrupt, GeneratorExit])
def test_user_that_leaves_early_ends_the_source(error):
    closed = threading.Event()

    def source():
        try:
            yield from itertools.count()
        finally:
            closed.set()

    def use():
        with read_ahead(source(), depth=1) as ahead:
            assert next(ahead) == 0
            raise error("enough")

    with pytest.raises(error, match="enough"):
        use()
    assert threads(READING) == []
    wait_for(closed.is_set)


def test_source_that_hangs_is_left_behind():
    goes_on = threading.Event()

    def source():
        yield 1
        goes_on.wait()
        yield 2

    started = time.monotonic()
    with read_ahead(source(), depth=1) as ahead:
        assert next(ahead) == 1
    assert time.monotonic() - started < 10
    (left,) = threads(READING)
    assert left.daemon
    goes_on.set()
    left.join(timeout=10)
    assert not left.is_alive()


def test_sink_runs_in_a_thread_while_the_next_item_is_made():
    written, may_write = [], threading.Event()

    def write(item):
        may_write.wait(20)
        written.append((item, threading.current_thread().name))

    with write_behind(write, depth=2) as put:
        put("a")
        put("b")  # does not wait for "a"
        assert written == []
        may_write.set()
    assert written == [("a", WRITING), ("b", WRITING)]
    assert threads(WRITING) == []


def test_sink_of_depth_one_takes_an_item_when_the_one_before_is_consumed():
    begun, done = [], []

    def write(item):
        begun.append(item)
        time.sleep(0.02)
        done.append(item)

    with write_behind(write, depth=1) as put:
        for item in range(5):
            put(item)
            assert len(done) >= item  # so that a run that is killed has lost one at most
    assert begun == done == list(range(5))


def test_error_of_the_sink_stops_who_feeds_it():
    seen = []

    def write(item):
        seen.append(item)
        raise SpoiledError(str(item))

    def feed():
        with write_behind(write, depth=1) as put:
            for item in itertools.count():
                put(item)

    with pytest.raises(SpoiledError, match=r"^0$"):
        feed()
    assert seen == [0]
    assert threads(WRITING) == []


def test_error_of_the_sinks_last_item_is_not_lost():
    def write(item):
        raise SpoiledError(item)

    with pytest.raises(SpoiledError, match=r"^only$"), write_behind(write, depth=1) as put:
        put("only")


def test_sink_is_done_with_all_items_when_its_user_fails():
    written, has_begun = [], threading.Event()

    def write(item):
        has_begun.set()
        time.sleep(0.1)
        written.append(item)

    def feed():
        with write_behind(write, depth=5) as put:
            for item in range(4):
                put(item)
            has_begun.wait(20)
            raise SpoiledError("elsewhere")

    with pytest.raises(SpoiledError, match="elsewhere"):
        feed()
    assert written == [0, 1, 2, 3]
    assert threads(WRITING) == []


def test_read_of_standard_input_that_hangs_does_not_spoil_the_exit():
    """Python closes standard input as it exits, and aborts if a thread holds its lock."""
    code = """
import sys, time
from genoembed.pipeline.threads import read_ahead

def source():
    yield 1
    yield sys.stdin.buffer.read(1000)

with read_ahead(source(), depth=1) as ahead:
    next(ahead)
    time.sleep(0.3)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        returncode = process.wait(timeout=60)
        message = process.stderr.read().decode()
    assert (returncode, message) == (0, "")
