"""The benchmark of two jobs at once: what the jobs are started with, and what is said of their times."""

from __future__ import annotations

import json

import two_jobs
from measuring import Sample


def test_jobs_have_only_the_variables_of_their_way(monkeypatch):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    found = two_jobs.environment({"GOMP_SPINCOUNT": "7"})
    assert {name: found[name] for name in found if name.startswith(two_jobs.LEFT_OUT)} == {
        "GOMP_SPINCOUNT": "7"
    }
    assert "PATH" in found


def test_two_at_once_are_held_against_two_in_a_row(monkeypatch, tmp_path, capsys):
    def run_jobs(number, folder, way, *, threads, dtype):
        assert (folder / "in.fa").read_text().count(">") == 2
        assert (threads, dtype) == (2, "float32")
        return Sample((4.0 if way else 3.0) * number**2, 1.0, 0.0)

    monkeypatch.setattr(two_jobs, "run_jobs", run_jobs)
    monkeypatch.setattr("sys.argv", ["two_jobs.py", "--quick", "--results", str(tmp_path)])
    two_jobs.main()
    figures = json.loads((tmp_path / "two_jobs.json").read_text())["figures"]
    ours = {figure["name"]: (figure["value"], figure["is_met"]) for figure in figures if figure["at_most"]}
    assert [*ours.values()] == [(2.0, False), (0.75, True)]
    assert "Two jobs at once" in capsys.readouterr().out
