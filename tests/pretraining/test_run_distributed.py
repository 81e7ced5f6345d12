"""Two processes under torchrun: disjoint documents, one curve, one measurement."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import genoembed
from genoembed.config.pretrain import CorpusConfig
from genoembed.pretraining.corpus import DocumentStream

SCRIPT = Path(__file__).with_name("two_processes.py")
ROOT = SCRIPT.parents[2]


@pytest.mark.slow
def test_two_processes_see_disjoint_documents_and_agree(tmp_path):
    generator = np.random.default_rng(0)
    corpus, heldout, output = tmp_path / "c.fa", tmp_path / "h.fa", tmp_path / "run"
    for path, count in ((corpus, 20), (heldout, 5)):
        records = ["".join(generator.choice(list("ACGT"), 30)) for _ in range(count)]
        path.write_text("".join(f">r{i}\n{record}\n" for i, record in enumerate(records)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*launch, str(SCRIPT), str(corpus), str(heldout), str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr
    (first, bits), (second, bits_too) = (
        json.loads((output / f"documents.{rank}.json").read_text()) for rank in range(2)
    )
    assert first
    assert second
    assert not set(first) & set(second)
    config = CorpusConfig(both_strands=False, shuffle_documents=1)
    assert {*first, *second} <= {document.decode() for document in DocumentStream([corpus], config=config)}
    assert bits == bits_too
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    # one process measures the same: a step at a rate of nothing changes nothing
    alone = genoembed.pretrain(
        corpus,
        tmp_path / "alone",
        model=str(output / "final"),
        heldout=heldout,
        window=16,
        max_steps=1,
        learning_rate=1e-12,
        dtype="float32",
    )
    assert alone.bits_per_base == pytest.approx(bits, rel=1e-5)
