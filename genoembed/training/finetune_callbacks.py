"""What watches a fine-tuning run: epochs, early stopping, and the lines that people read."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from genoembed.training.metrics_file import MetricsFile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch.utils.data import Sampler

    from genoembed.training.epoch_rows import EpochDataset

logger = logging.getLogger(__name__)


class SetEpoch(TrainerCallback):
    """Tell rows and their order which epoch begins, whatever the data loader is wrapped in."""

    def __init__(self, dataset: EpochDataset, sampler: Sampler[int]) -> None:
        self._listeners: list[Any] = [dataset, sampler]

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: object) -> None:
        """Pass the epoch on."""
        for listener in self._listeners:
            listener.set_epoch(int(state.epoch or 0))


class StopEarly(TrainerCallback):
    """End training when the metric has not become better for some evaluations.

    Of equal metrics, the one with the smaller loss is better. It looks at the whole log each time and keeps
    nothing, so a run that goes on stops where it would have.
    """

    def __init__(self, metric: str, *, is_greater_better: bool, patience: int, min_epochs: int) -> None:
        self._metric, self._sign = metric, 1 if is_greater_better else -1
        self._patience, self._min_epochs = patience, min_epochs

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: object) -> None:
        """Decide."""
        values = [
            (self._sign * line[self._metric], -line.get("eval_loss", 0.0))
            for line in state.log_history
            if self._metric in line
        ]
        if not values or (state.epoch or 0) < self._min_epochs:
            return
        since_best = len(values) - 1 - values.index(max(values))
        if since_best >= self._patience:
            logger.info(
                "%s has not become better for %d evaluations: training ends", self._metric, since_best
            )
            control.should_training_stop = True


class FinetuneLog(MetricsFile):
    """Append what the trainer logs to ``metrics.jsonl``, and say it in a line."""

    loss_in_bits = False

    def __init__(self, path: Path, *, shown: Sequence[str]) -> None:
        super().__init__(path)
        self._shown = tuple(shown)

    def describe(self, line: Mapping[str, float]) -> str:
        """Say the loss, what it compared, and the task's metrics."""
        said = [f"{name} {line[name]:.4g}" for name in line if self._is_said(name)]
        return f"step {line['step']}: {', '.join(said)}" if said else ""

    def _is_said(self, name: str) -> bool:
        bare = name.removeprefix("eval_").removeprefix("test_")
        return name in _SAID or (name != bare and bare in self._shown)


_SAID = (
    "loss",
    "learning_rate",
    "padding_percent",
    "tokens_per_second",
    "negatives_per_query",
    "positive_score",
    "negative_score",
)
