"""What a training step of an encoder says about itself, beside its loss.

Frozen numbers for logs and for :mod:`genoembed.training.loss_watch`; nothing here takes part in a gradient.

B queries, C candidates of a query, N vectors, D their width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


COUNTED = ("queries", "left_out", "masked_false_negatives")
"""Numbers of a step that add up over ranks; the others are means."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStatistics:
    """What one step really compared, on this rank."""

    queries: int
    """Queries (or anchors) that took part."""
    left_out: int = 0
    """Anchors that did not, because the batch held no partner for them."""
    negatives_per_query: float
    """Negatives really used, averaged over queries; after masks, those of other ranks included."""
    masked_false_negatives: int
    """Pairs of query and candidate left out because label or identity say that they belong together."""
    positive_score: float
    """Mean similarity of the positives, before the temperature."""
    negative_score: float
    """Mean similarity of the negatives that were used, before the temperature; NaN where there is none."""
    chance_loss: float
    """Loss of an encoder that tells nothing apart: the mean of ln(1 + negatives); NaN for other losses."""
    spread: float
    """Variance of the vectors over their mean squared length: 0 if all are equal, 1 if they are centred."""

    def as_metrics(self) -> dict[str, float]:
        """Give all numbers by name, as loggers take them."""
        return {
            "queries": float(self.queries),
            "left_out": float(self.left_out),
            "negatives_per_query": self.negatives_per_query,
            "masked_false_negatives": float(self.masked_false_negatives),
            "positive_score": self.positive_score,
            "negative_score": self.negative_score,
            "chance_loss": self.chance_loss,
            "spread": self.spread,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """A loss, and what it was made of."""

    loss: Tensor
    """Scalar with gradient. Its average over ranks is the loss of the whole batch."""
    statistics: StepStatistics
    parts: Mapping[str, float] = field(default_factory=dict)
    """Terms of the loss by name, before their weights."""


def score_statistics(
    scores_BC: Tensor, targets_B: Tensor, *, temperature: float, masked: int, spread: float
) -> StepStatistics:
    """Read off a matrix of scores what a cross-entropy over it compares.

    Example:
        >>> scores = torch.tensor([[0.8, 0.2, -torch.inf], [0.4, 0.6, 0.2]])
        >>> found = score_statistics(scores, torch.tensor([0, 1]), temperature=1.0, masked=1, spread=1.0)
        >>> found.negatives_per_query, round(found.positive_score, 4), round(found.negative_score, 4)
        (1.5, 0.7, 0.2667)
    """
    scores_BC = scores_BC.detach()
    positive_B = scores_BC.gather(1, targets_B[:, None])[:, 0]
    used_BC = scores_BC.isfinite().scatter(1, targets_B[:, None], value=False)
    used_B = used_BC.sum(dim=1)
    negative = torch.where(used_BC, scores_BC, 0).sum() / used_B.sum()
    wide = _widest(scores_BC)
    numbers = torch.stack(
        [
            used_B.to(wide).mean(),
            positive_B.to(wide).mean() * temperature,
            negative.to(wide) * temperature,
            torch.log1p(used_B.to(wide)).mean(),
        ]
    ).tolist()
    return StepStatistics(
        queries=len(scores_BC),
        negatives_per_query=numbers[0],
        masked_false_negatives=masked,
        positive_score=numbers[1],
        negative_score=numbers[2],
        chance_loss=numbers[3],
        spread=spread,
    )


@torch.no_grad()
def relative_spread(vectors_ND: Tensor) -> float:
    """Measure how much of the vectors' length is difference between them.

    Example:
        >>> relative_spread(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        1.0
        >>> relative_spread(torch.tensor([[3.0, 4.0], [3.0, 4.0]]))
        0.0
    """
    wide_ND = vectors_ND.detach().to(_widest(vectors_ND))
    from_centre = (wide_ND - wide_ND.mean(dim=0)).square().sum(dim=1).mean()
    length = wide_ND.square().sum(dim=1).mean()
    return float(from_centre / length) if bool(length > 0) else 0.0


@torch.no_grad()
def gradient_norms(modules: Mapping[str, nn.Module]) -> dict[str, float]:
    """Measure the gradient that has reached each part of a model.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> layer(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> gradient_norms({"dense": layer})
        {'dense': 5.0}
    """
    norms = {}
    for name, module in modules.items():
        grads = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        squares = [grad.to(torch.float32).square().sum() for grad in grads]
        norms[name] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    return norms


def _widest(values: Tensor) -> torch.dtype:
    """Give the widest floating dtype of a device."""
    return torch.float32 if values.device.type == "mps" else torch.float64
