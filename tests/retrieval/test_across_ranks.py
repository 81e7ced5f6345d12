"""Negatives of other ranks: two gloo processes have loss and gradient of one process with all rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from genoembed.errors import ShapeError
from genoembed.training import distributed as across_ranks
from genoembed.training.distributed import RankRows
from tests.retrieval.rank_losses import CASES, batch_of, encoder_of, loss_of

SCRIPT = Path(__file__).with_name("two_ranks.py")
ROOT = SCRIPT.parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of both ranks, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    }
    command = [sys.executable, str(SCRIPT)]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "meeting"), str(folder / f"{rank}.pt")],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=180)[1] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_the_gradient_of_one_process(ranks, case):
    encoder = encoder_of(case)
    alone = loss_of(case, encoder, batch_of(case, None))
    alone.loss.backward()
    assert ranks[0][case]["loss"].item() == pytest.approx(alone.loss.item(), rel=1e-12)
    for name, parameter in encoder.named_parameters():
        expected = parameter.grad
        # biases under a softmax may have a gradient of 0
        ratio = float(ranks[0][case]["grads"][name].norm() / expected.norm()) if expected.norm() > 1e-9 else 1
        assert ratio == pytest.approx(1.0, abs=1e-9), name
        for rank in range(2):
            torch.testing.assert_close(ranks[rank][case]["grads"][name], expected, rtol=1e-9, atol=1e-12)


def test_two_ranks_use_the_negatives_of_both(ranks):
    for case, per_query in (("one_way even", 7), ("one_way uneven", 7), ("full uneven", 7 + 9)):
        assert [rank[case]["negatives"] for rank in ranks] == [per_query, per_query]


def test_two_ranks_mask_false_negatives_of_each_other(ranks):
    alone = loss_of("masked uneven", encoder_of("masked"), batch_of("masked uneven", None))
    assert sum(rank["masked uneven"]["masked"] for rank in ranks) == alone.statistics.masked_false_negatives
    # query 3 lies alone on rank 1 and is left out of passages of rank 0 only
    assert ranks[1]["masked uneven"]["masked"] > 0


def test_gathered_rows_and_their_gradient_are_exact_under_autocast(monkeypatch):
    # two ranks that hold the same rows, this one the second
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "all_gather", lambda parts, rows: [part.copy_(rows) for part in parts])
    monkeypatch.setattr(dist, "all_reduce", lambda rows: rows.mul_(2))
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.randn(3, 4).to(dtype).requires_grad_()
        weights = torch.randn(6, 4).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            gathered = across_ranks._Gather.apply(rows, (3, 3))
            (gathered * weights).sum().backward()
        assert gathered.dtype == rows.grad.dtype == dtype
        assert torch.equal(gathered, torch.cat([rows, rows]))
        assert torch.equal(rows.grad, 2 * weights[3:])


def test_rank_rows_without_a_group_are_all_rows():
    rows = RankRows(3, across=True, device=torch.device("cpu"))
    vectors = torch.ones(3, 2, requires_grad=True)
    assert (rows.world_size, rows.start, rows.total) == (1, 0, 3)
    assert rows.gather(vectors) is vectors


def test_rank_rows_refuse_an_empty_batch():
    with pytest.raises(ShapeError, match="expected 1 or more; drop the last, short batch"):
        RankRows(0, across=False, device=torch.device("cpu"))
