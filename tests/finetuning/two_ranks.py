"""What ``test_finetune_distributed.py`` starts with torchrun, and runs by itself: watched fine-tuning runs.

Arguments: folder with the model and the files, folder for results.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import genoembed
from genoembed.finetuning.rows import GroupDataset, RowDataset, ViewDataset
from genoembed.finetuning.trainer import FinetuneTrainer

if TYPE_CHECKING:
    from collections.abc import Iterator

ROWS_TOGETHER = 8
CASES: dict[str, dict[str, Any]] = {
    "views": {"task": "contrastive", "across_devices": True},
    "labels": {"task": "contrastive", "across_devices": True},
    "examples": {"task": "contrastive", "across_devices": True, "micro_batch": 2, "train_group_size": 3},
    "heads": {
        "task": "retrieval",
        "across_devices": True,
        "train_group_size": 2,
        "self_distillation_start": 1,
    },
    "classes": {"task": "classification", "dropout": 0.0},
}
"""Options by case; the file ``CASE.*`` has the rows, ``CASE-held.*`` those that are held out."""


def watched_run(case: str, files: Path, output: Path, *, rows_per_device: int) -> dict[str, Any]:
    """Fine-tune, and give the rows that this process drew, its first gradient, and the report.

    Args:
        case: One of ``CASES``.
        files: Holds the model and the rows.
        output: Folder of the run.
        rows_per_device: Of this process.

    Returns:
        ``rows`` (numbers, in order), ``grads`` (of the first step, by name) and ``report``.
    """
    rows: list[int] = []
    grads: dict[str, torch.Tensor] = {}
    with _Patched(rows, grads):
        report = genoembed.finetune(
            next(files.glob(f"{case}.*")),
            output,
            model=str(files / "model"),
            validation=[next(files.glob(f"{case}-held.*"))],
            test=[next(files.glob(f"{case}-test.*"))],
            max_epochs=1,
            rows_per_device=rows_per_device,
            logging_steps=1,
            eval_steps=2,
            learning_rate=1e-3,
            dtype="float32",
            **CASES[case],
        )
    return {"rows": rows, "grads": grads, "report": dataclasses.asdict(report)}


class _Patched:
    """Watch what datasets are asked for and what the first step leaves, for as long as it is open."""

    def __init__(self, rows: list[int], grads: dict[str, torch.Tensor]) -> None:
        self._rows, self._grads = rows, grads
        self._saved: list[tuple[type, str, Any]] = []

    def __enter__(self) -> None:
        rows, grads = self._rows, self._grads
        for cls in (RowDataset, ViewDataset, GroupDataset):
            self._replace(cls, "__getitem__", lambda inner: lambda s, i: (rows.append(i), inner(s, i))[1])

        def noting(inner: Any) -> Any:
            def step(trainer: FinetuneTrainer, model: Any, *args: Any) -> torch.Tensor:
                loss = inner(trainer, model, *args)
                if not grads:
                    named = trainer.accelerator.unwrap_model(model).named_parameters()
                    grads.update({name: p.grad.clone() for name, p in named if p.grad is not None})
                return loss

            return step

        self._replace(FinetuneTrainer, "training_step", noting)

    def _replace(self, cls: type, name: str, wrap: Any) -> None:
        inner = getattr(cls, name)
        self._saved.append((cls, name, inner))
        setattr(cls, name, wrap(inner))

    def __exit__(self, *_: object) -> None:
        for cls, name, inner in self._saved:
            setattr(cls, name, inner)


def lines_of(report: dict[str, Any]) -> Iterator[dict[str, float]]:
    """Return the lines about training steps."""
    for text in Path(report["metrics"]).read_text().splitlines():
        line = json.loads(text)
        if "loss" in line:
            yield line


def main() -> None:
    """Run every case in this process, one of two, and save what was seen."""
    files, output = map(Path, sys.argv[1:])
    found = {
        case: watched_run(case, files, output / case, rows_per_device=ROWS_TOGETHER // 2) for case in CASES
    }
    torch.save(found, output / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
    # without the interpreter's farewell: torch 2.13 aborts there in about 1 of 25 runs of any gloo program
    sys.stdout.flush()
    os._exit(0)
