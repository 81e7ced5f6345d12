"""The curve of a run: what a trainer logs, as a file of JSON lines and as lines of text."""

from __future__ import annotations

import json
import logging
import math
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

logger = logging.getLogger(__name__)


class MetricsFile(TrainerCallback):
    """Append what the trainer logs to a JSON-lines file, losses in bits as well as in nats, and say it."""

    loss_in_bits = True
    """Whether losses are those of a language model."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: object, state: Any, control: object, **kwargs: object) -> None:
        """Drop the lines of steps that will be trained again, or of an earlier run from scratch."""
        if not state.is_world_process_zero or not self.path.is_file():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _step_of(line) <= state.global_step] if state.global_step else []
        if len(kept) < len(lines):
            logger.info(
                "%s: left out %d lines of steps that are trained again", self.path, len(lines) - len(kept)
            )
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_log(
        self,
        args: object,
        state: Any,
        control: object,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Write one line."""
        if not state.is_world_process_zero:
            return
        line: dict[str, float] = {"step": state.global_step, **(logs or {})}
        for name in ("loss", "eval_loss"):
            if self.loss_in_bits and name in line:
                line[f"{name}_bits"] = line[name] / math.log(2)
        said = self.describe(line)
        if said:
            logger.info("%s", said)
        self.write(line)

    def describe(self, line: Mapping[str, float]) -> str:
        """Say a line in words."""
        return describe_line(line)

    def write(self, line: Mapping[str, float]) -> None:
        """Append a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def describe_line(line: Mapping[str, float]) -> str:
    """Say a line of ``metrics.jsonl`` in words that fit a terminal.

    Example:
        >>> describe_line({"step": 20, "loss_bits": 1.923, "learning_rate": 2e-3, "packing_percent": 100})
        'step 20: loss 1.923 bits, rate 0.002, packing 100.0 %'
    """
    said = [text % line[name] for name, text in _WORDS.items() if name in line]
    return f"step {line['step']}: {', '.join(said)}"


_WORDS = {
    "loss_bits": "loss %.3f bits",
    "eval_loss_bits": "held-out loss %.3f bits",
    "eval_bits_per_base": "held-out %.4f bits per base",
    "tokens_per_second": "%.0f tokens/s",
    "learning_rate": "rate %.3g",
    "grad_norm": "gradient %.3g",
    "packing_percent": "packing %.1f %%",
    "padding_percent": "padding %.1f %%",
    "padded_cost": "padded batches would cost %.2fx",
    "train_runtime": "%.0f s in all",
}


def _step_of(line: str) -> float:
    """Read the step of a line; one that a killed run has cut short counts as later than every step."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return math.inf
