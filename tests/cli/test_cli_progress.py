"""Speed and time left, from running totals and a clock that the test turns."""

from __future__ import annotations

import gzip
import logging

import pytest

from genoembed.cli import output as progress
from genoembed.cli.output import Meter, estimate_bases, show_progress
from genoembed.pipeline.units import RunStats


def totals(**fields: float) -> RunStats:
    return RunStats(**{"slots": fields.get("real_tokens", 0), **fields})


def test_meter_counts_bases_of_records_that_are_not_done_yet():
    now = [100.0]
    meter = Meter(1000, clock=lambda: now[0])
    first = meter.read(totals(bases_under_way=100, real_tokens=100, slots=125, forward_s=2.0))
    assert (first.bases, first.bases_per_s, first.elapsed_s) == (100, 50, 2)
    assert first.padding_share == pytest.approx(0.2)
    assert first.left_s == pytest.approx(18)
    now[0] = 102.0
    done = meter.read(totals(records=3, bases=600, real_tokens=200, forward_s=3.0))
    assert (done.records, done.bases, done.left_s) == (3, 600, pytest.approx(400 / 150))
    under_way = totals(records=3, bases=600, bases_under_way=30, real_tokens=210, forward_s=3.0)
    assert meter.read(under_way).bases == 630


def test_meter_never_owes_time():
    meter = Meter(50, clock=lambda: 10.0)
    reading = meter.read(totals(bases=80, real_tokens=80, forward_s=1.0))
    assert (reading.bases, reading.left_s) == (80, 0)


def test_meter_without_size_tells_time_elapsed():
    reading = Meter(None, clock=lambda: 10.0).read(totals(records=1, bases=4_600_000, forward_s=75.0))
    assert reading.left_s is None
    assert str(reading) == "1 record, 4.6 Mb, 61.3 kb/s, 0.0% padding, 1:15 elapsed"


def test_estimate_is_the_size_of_plain_fasta_and_unknown_otherwise(tmp_path):
    plain, packed = tmp_path / "a.fa", tmp_path / "a.fa.gz"
    plain.write_text(">a\nACGT\n")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert estimate_bases([str(plain), str(plain)]) == 16
    assert estimate_bases([str(plain), str(packed)]) is None
    assert estimate_bases(["-"]) is None
    assert estimate_bases([str(tmp_path), str(tmp_path / "missing")]) is None


def test_lines_come_at_intervals(caplog, monkeypatch):
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.0)
    caplog.set_level(logging.INFO, logger="genoembed")
    with show_progress(None) as on_totals:
        assert on_totals is not None
        on_totals(totals(records=2, real_tokens=10, forward_s=1.0))
        monkeypatch.setattr(progress, "LINE_INTERVAL_S", 3600.0)
        on_totals(totals(records=9, real_tokens=10, forward_s=1.0))
    assert [record.getMessage().split(",")[0] for record in caplog.records] == ["2 records"]


def test_quiet_shows_nothing(caplog):
    caplog.set_level(logging.WARNING, logger="genoembed")
    with show_progress(None) as on_totals:
        assert on_totals is None


def test_closed_standard_error_shows_nothing(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="genoembed")
    monkeypatch.setattr("sys.stderr", None)
    with show_progress(None) as on_totals:
        assert on_totals is not None
        on_totals(totals(records=2, bases=10, forward_s=1.0))


def test_no_line_while_nothing_is_done(caplog, monkeypatch):
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.0)
    caplog.set_level(logging.INFO, logger="genoembed")
    with show_progress(None) as on_totals:
        assert on_totals is not None
        on_totals(totals(real_tokens=10, forward_s=1.0))
        assert not caplog.records
        on_totals(totals(bases_under_way=7, real_tokens=10, forward_s=2.0))
    assert [record.getMessage().split(",")[:2] for record in caplog.records] == [["7 b", " 7 b/s"]]
