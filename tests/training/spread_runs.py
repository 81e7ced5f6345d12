"""What ``test_sharding.py`` starts with ``accelerate launch``, and runs by itself: a run of each kind.

Arguments: folder with the model and the files, folder for results.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import genoembed

FINETUNE: dict[str, Any] = {
    "task": "classification",
    "tuning": "lora",
    "layers": ["1"],
    "dropout": 0.0,
    "max_epochs": 1,
    "eval_steps": 2,
}
"""Cut within the last block that runs, and adapters on frozen weights: what is hard for parts of a model."""
STEPS = 4


def pretrain(files: Path, output: Path, *, distributed: str, processes: int, resume: bool = False) -> None:
    """Train on documents that fill a row each, so that processes share out the rows of one."""
    genoembed.pretrain(
        str(files / "corpus.fa"),
        output,
        heldout=str(files / "heldout.fa"),
        like="evo2_7b",
        hidden_size=32,
        layers=4,
        window=16,
        both_strands=False,
        shuffle_documents=1,
        rows_per_device=4 // processes,
        max_steps=STEPS,
        logging_steps=1,
        eval_steps=STEPS,
        save_steps=2,
        dtype="float32",
        report_to=["none"],
        distributed=distributed,
        resume=resume,
    )


def finetune(files: Path, output: Path, *, distributed: str, processes: int) -> None:
    """Fine-tune on the same rows, 8 a step."""
    genoembed.finetune(
        str(files / "classes.tsv"),
        output,
        model=str(files / "model"),
        validation=[str(files / "held.tsv")],
        test=[str(files / "test.tsv")],
        rows_per_device=8 // processes,
        logging_steps=1,
        learning_rate=1e-2,
        dtype="float32",
        report_to=["none"],
        distributed=distributed,
        **FINETUNE,
    )


def run_both(files: Path, output: Path, *, distributed: str, processes: int) -> None:
    """Train both ways."""
    shared = {"distributed": distributed, "processes": processes}
    pretrain(files, output / "pretrain", **shared)  # type: ignore[arg-type]
    finetune(files, output / "finetune", **shared)  # type: ignore[arg-type]


def main() -> None:
    """Train in this process, one of two, and once more from the checkpoint in the middle."""
    files, output = map(Path, sys.argv[1:])
    run_both(files, output, distributed="fsdp", processes=2)
    resumed = output / "resumed"
    if os.environ["RANK"] == "0":
        shutil.copytree(output / "pretrain", resumed)
        for name in (f"checkpoint-{STEPS}", "final"):
            shutil.rmtree(resumed / name)
        (resumed / "report.json").unlink()
    import torch.distributed

    torch.distributed.barrier()
    pretrain(files, resumed, distributed="fsdp", processes=2, resume=True)


if __name__ == "__main__":
    main()
    # without the interpreter's farewell: torch 2.13 aborts there in about 1 of 25 runs of any gloo program
    sys.stdout.flush()
    os._exit(0)
