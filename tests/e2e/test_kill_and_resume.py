"""Real processes that are killed with SIGKILL: nothing is lost, the file is that of an undisturbed run."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

import genoembed
from genoembed import extract, open_embeddings
from tests.by_hand import folder_of, random_dna, write_fasta

NUM_RECORDS = 240
UNIT_BASES = 100


@pytest.fixture
def fasta(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    for folder in ("whole", "killed"):
        path = write_fasta(
            tmp_path / folder / "in.fa", {f"r{n}": random_dna(50, n) for n in range(NUM_RECORDS)}
        )
    monkeypatch.chdir(path.parent)
    return tmp_path


def words():
    main = str(Path(genoembed.__file__).parent / "__main__.py")
    options = ["--layer", "0", "--layer", "final", "--unit-bases", str(UNIT_BASES), "--threads", "1", "-q"]
    return [
        main,
        "extract",
        "in.fa",
        "--model",
        str(folder_of("llama")),
        "--device",
        "cpu",
        *options,
        "-o",
        "out.h5",
    ]


def run_here(monkeypatch):
    """Run the command in this process, which costs no second start."""
    from genoembed.cli import main

    monkeypatch.setattr(sys, "argv", words())
    main(words()[1:], prog_name="genoembed", standalone_mode=False)


def wait_for(condition, process, *, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert not process.has_ended, process.err.read_text()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def test_killed_process_loses_no_unit_and_the_file_is_the_same_byte_for_byte(fasta, monkeypatch, warm):
    script, *options = words()
    date = {"SOURCE_DATE_EPOCH": os.environ["SOURCE_DATE_EPOCH"]}
    process = warm.start(*options, script=script, cwd=Path.cwd(), env=date)
    wait_for(lambda: list(Path("out.parts").glob("unit-*.json")), process)
    process.signal(signal.SIGKILL)
    assert process.wait().code == -signal.SIGKILL
    kept = sorted(Path("out.parts").glob("unit-*.json"))
    assert 1 <= len(kept) < NUM_RECORDS * 50 // UNIT_BASES
    assert not Path("out.h5").exists()
    stamps = {path: path.stat().st_mtime_ns for path in kept}
    made = []
    original = genoembed.store.Parts.save

    def save(parts, unit):
        made.append(unit.record.number)
        original(parts, unit)

    monkeypatch.setattr(genoembed.store.Parts, "save", save)
    run_here(monkeypatch)
    assert made == list(range(len(stamps), NUM_RECORDS * 50 // UNIT_BASES))
    assert sorted(path.name for path in Path().iterdir()) == ["in.fa", "out.h5"]
    monkeypatch.chdir(fasta / "whole")
    run_here(monkeypatch)
    assert (fasta / "whole" / "out.h5").read_bytes() == (fasta / "killed" / "out.h5").read_bytes()


def children(before=()):
    psutil = pytest.importorskip("psutil")
    return [child for child in psutil.Process().children(recursive=True) if child not in before]


def test_worker_of_ray_that_is_killed_is_replaced(fasta, caplog):
    pytest.importorskip("ray")
    settings = {
        "model": str(folder_of("llama")),
        "layers": [0, "final"],
        "unit_bases": 2000,
        "threads": 1,
        "device": "cpu",
    }
    before = children()  # of other tests, such as what starts commands warm
    extract("in.fa", output="local.h5", **settings)
    killed = []

    def kill_once(_totals):
        if killed or not list(Path("ray.parts").glob("unit-*.json")):
            return
        workers = [child for child in children() if "UnitWorker" in " ".join(child.cmdline()[:1])]
        if workers:
            killed.append(workers[0].pid)
            workers[0].kill()

    report = extract("in.fa", output="ray.h5", engine="ray", workers=1, progress=kill_once, **settings)
    assert len(killed) == 1
    assert [text for text in caplog.messages if "died over unit" in text]
    assert report.num_rows == NUM_RECORDS
    with open_embeddings("local.h5") as one, open_embeddings("ray.h5") as other:
        assert one.ids == other.ids
        assert list(one.obs["sha256"]) == list(other.obs["sha256"])
        for layer in one.layers:
            assert one[layer][:].tobytes() == other[layer][:].tobytes()
    end = time.monotonic() + 30
    while [child for child in children(before) if child.status() != "zombie"] and time.monotonic() < end:
        time.sleep(0.05)
    assert [" ".join(child.cmdline()) for child in children(before) if child.status() != "zombie"] == []
