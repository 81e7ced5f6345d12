"""Notice, while an encoder trains, that it learns nothing, and say so in plain words, each thing once.

In: what each step says about itself. Out: warnings. A loss of 0, a loss that stays where guessing would be,
and vectors that have become one vector look like progress in a log; none of them is.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from genoembed.errors import TrainingWarning

if TYPE_CHECKING:
    from genoembed.training.step_statistics import LossOutput, StepStatistics

Trouble: TypeAlias = Literal["zero", "no_negatives", "chance", "collapsed", "not_finite"]


@dataclass(slots=True)
class LossWatch:
    """Watch the steps of a run.

    Example:
        >>> from genoembed.training.contrastive import info_nce
        >>> import torch
        >>> watch, same = LossWatch(patience=1), torch.ones(4, 2)
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     watch.observe(info_nce(same, same))
        >>> sorted(watch.seen)
        ['chance', 'collapsed']
    """

    patience: int = 20
    """Steps in a row that must look the same before a warning; a missing negative warns at once."""
    near_chance: float = 1e-3
    """Share of the chance loss within which a loss is stuck at it."""
    least_spread: float = 1e-4
    """Spread (see ``StepStatistics``) below which vectors have become one."""
    seen: set[Trouble] = field(default_factory=set)
    """What was warned about."""
    _streaks: dict[Trouble, int] = field(default_factory=dict)

    def observe(self, output: LossOutput) -> None:
        """Look at one training step."""
        loss, statistics = float(output.loss.detach()), output.statistics
        cross_entropy = output.parts.get("cross_entropy", output.parts.get("dense", loss))
        is_guessing = (
            math.isfinite(statistics.chance_loss)
            and statistics.negatives_per_query > 0
            and abs(cross_entropy - statistics.chance_loss) <= self.near_chance * statistics.chance_loss
        )
        found: dict[Trouble, bool] = {
            "not_finite": not math.isfinite(loss),
            "no_negatives": statistics.negatives_per_query == 0,
            "zero": loss == 0 and statistics.negatives_per_query > 0,
            "chance": is_guessing,
            "collapsed": statistics.spread < self.least_spread,
        }
        for trouble, is_there in found.items():
            self._streaks[trouble] = self._streaks.get(trouble, 0) + 1 if is_there else 0
            at_once = trouble in ("no_negatives", "not_finite")
            if self._streaks[trouble] >= (1 if at_once else self.patience):
                self._warn(trouble, loss, statistics)

    def _warn(self, trouble: Trouble, loss: float, statistics: StepStatistics) -> None:
        if trouble in self.seen:
            return
        self.seen.add(trouble)
        message = _MESSAGES[trouble].format(
            loss=loss,
            patience=self.patience,
            chance=statistics.chance_loss,
            candidates=1 + statistics.negatives_per_query,
            negatives=statistics.negatives_per_query,
            spread=statistics.spread,
            margin=statistics.positive_score - statistics.negative_score,
        )
        warnings.warn(message, TrainingWarning, stacklevel=3)


_MESSAGES: dict[Trouble, str] = {
    "not_finite": (
        "the loss is {loss}: nothing can be learned from it; lower the learning rate, raise the temperature, "
        "or train in float32 or bfloat16"
    ),
    "no_negatives": (
        "the loss is {loss:g} and no query has a negative (after false negatives were left out): this step "
        "teaches nothing; raise the batch size or train_group_size, and look at how labels and identities "
        "group the sequences"
    ),
    "zero": (
        "the loss has been exactly 0 for {patience} steps with {negatives:.1f} negatives a query: every "
        "positive wins by far (mean lead {margin:.3g}), so nothing more is learned; use harder negatives, a "
        "larger batch or a higher temperature, and check that positives are no copies of their queries"
    ),
    "chance": (
        "the loss has been {chance:.4g} for {patience} steps, the value of guessing among {candidates:.1f} "
        "candidates: the model tells positives and negatives apart no better than a coin; check that it "
        "learns at all (learning rate, frozen parameters), and that the pooling is not a constant, as the "
        "first token of a causal model is"
    ),
    "collapsed": (
        "the vectors of a batch have become almost one vector (spread {spread:.2g}) for {patience} steps: "
        "the encoder has collapsed; lower the learning rate, use more negatives, or another layer or pooling"
    ),
}
