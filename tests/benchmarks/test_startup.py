"""The start-up benchmark measures what it says, in one round of two commands that need no torch."""

from __future__ import annotations

import startup


def test_a_round_gives_seconds_and_a_table(tmp_path):
    seconds = startup.measure(tmp_path, rounds=1, names=["extract a missing file", "--help"])
    assert set(seconds) == {"extract a missing file", "--help"}
    assert all(0 < value < 60 for value in seconds.values())
    text = startup.table({startup.IMPORT_TORCH: 2.0, "extract one record": 3.0})
    assert "| extract one record | 3.00 | 1.50 | 1.4 x import torch |" in text


def test_the_first_line_is_waited_for(tmp_path):
    words = ["-c", "import sys, time; print('one', file=sys.stderr, flush=True); time.sleep(0.5)"]
    assert startup.first_line_seconds(words, {}) > 0
