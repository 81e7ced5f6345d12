"""How the three scores of a retrieval model are added: weights, and their choice on held-out queries.

BGE-M3 adds dense, sparse and multi-vector scores as 1 : 0.3 : 1, which suits languages, where dense vectors
are good. On DNA, words are often the best of the three, so the weights are chosen when a run ends: of all
weights in steps of a twentieth that add up to 1, and BGE-M3's own, those that rank the validation queries
best. Promised: on these queries the sum is never below the best head alone, nor below BGE-M3's weights, since
both are among what is tried; the same scores give the same weights.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, NamedTuple

from genoembed.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

HEADS = ("dense", "sparse", "multi_vector")
_STEPS = 20
_DIGITS = 9


@dataclass(frozen=True, slots=True)
class HybridWeights:
    """How the three scores are added; the defaults are those of BGE-M3."""

    dense: float = 1.0
    sparse: float = 0.3
    multi_vector: float = 1.0

    def __post_init__(self) -> None:
        if not (all(0 <= weight < math.inf for weight in astuple(self)) and any(astuple(self))):
            message = (
                f"hybrid_weights is {list(astuple(self))}; set hybrid_weights to three finite numbers, none "
                "below 0 and not all 0"
            )
            raise ConfigError(message)

    def __str__(self) -> str:
        return " : ".join(f"{weight:g}" for weight in astuple(self))

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights, scaled so that they add up to 1: the ranking stays as it is."""
        return tuple(weight / sum(astuple(self)) for weight in astuple(self))

    def of(self, head: str) -> float:
        """Return the weight of a head."""
        return float(getattr(self, head))

    def total(self, *, dense: float, sparse: float, multi_vector: float) -> float:
        """Add scores.

        Example:
            >>> HybridWeights().total(dense=1.0, sparse=1.0, multi_vector=0.5)
            1.8
        """
        return self.dense * dense + self.sparse * sparse + self.multi_vector * multi_vector


class ChosenWeights(NamedTuple):
    """The weights of a model, and how well they and others rank the validation queries."""

    weights: HybridWeights
    metric: float
    """Of the sum at these weights."""
    usual: float
    """Of the sum at BGE-M3's weights."""
    alone: dict[str, float]
    """Of each head by itself."""


def candidate_weights() -> list[HybridWeights]:
    """List the weights that are tried.

    Example:
        >>> tried = candidate_weights()
        >>> len(tried), str(tried[0]), str(tried[-1])
        (232, '1 : 0.3 : 1', '1 : 0 : 0')
    """
    grid = [
        HybridWeights(dense / _STEPS, sparse / _STEPS, (_STEPS - dense - sparse) / _STEPS)
        for dense in range(_STEPS + 1)
        for sparse in range(_STEPS + 1 - dense)
    ]
    return [HybridWeights(), *grid]


def choose_weights(measure: Callable[[HybridWeights], float]) -> ChosenWeights:
    """Try weights and keep the best ones.

    Of weights that rank equally well, those nearest to the mean of all such are kept: the middle of a plateau
    is more likely to hold for other queries than its edge.

    Args:
        measure: Returns the metric of the sum at the given weights; higher is better.

    Returns:
        The weights, with what was measured.

    Example:
        >>> str(choose_weights(lambda weights: -abs(weights.sparse - 0.7)).weights)
        '0.15 : 0.7 : 0.15'
    """
    usual, *_ = tried = candidate_weights()
    found = {weights: measure(weights) for weights in tried}
    best = max(found.values())
    tied = {weights: weights.shares for weights in tried if found[weights] == best}
    center = [sum(values) / len(tied) for values in zip(*tied.values(), strict=True)]
    # of two at the same distance the first: rounded, since distances differ in their last bits
    chosen = min(tied, key=lambda weights: round(math.dist(tied[weights], center), _DIGITS))
    alone = {head: found[HybridWeights(*(float(head == other) for other in HEADS))] for head in HEADS}
    return ChosenWeights(chosen, found[chosen], found[usual], alone)
