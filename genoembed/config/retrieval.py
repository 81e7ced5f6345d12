"""What contrastive training compares, and the heads and the loss of BGE-M3."""

from __future__ import annotations

import math
from dataclasses import dataclass

from genoembed.config.choices import (
    ContrastScope,
    Distillation,
    TokenPooling,
)
from genoembed.config.embed import field_problems
from genoembed.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastiveConfig:
    """What queries are compared with."""

    temperature: float = 0.05
    """Scores are divided by it; above 0."""
    scope: ContrastScope = "one_way"
    """``one_way``: queries against passages. ``symmetric``: the mean of that and positives against queries.
    ``full``: one softmax over passages, and over the other queries and positives from either side."""
    in_batch_negatives: bool = True
    """Use the passages of other queries; without, only the query's own group."""
    across_devices: bool = False
    """Use those of other ranks, too."""
    mask_hard_negatives: bool = False
    """Leave the query's own negatives to the teacher, and out of the cross-entropy."""

    def __post_init__(self) -> None:
        problems = list(field_problems(self))
        if not (isinstance(self.temperature, float | int) and 0 < self.temperature < math.inf):
            problems.append(f"temperature is {self.temperature}; set it above 0, such as 0.05")
        if not self.in_batch_negatives and (self.scope != "one_way" or self.across_devices):
            problems.append(
                "in_batch_negatives is False, but scope and across_devices are about them; set "
                "in_batch_negatives to True, or scope to 'one_way' and across_devices to False"
            )
        if problems:
            raise ConfigError(*problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class M3HeadsConfig:
    """Shape of the heads; saved with a model, since its weights mean nothing without."""

    pooling: TokenPooling = "mean"
    """How tokens become the dense vector."""
    add_pooler: bool = False
    """Put a linear projection after the pooling."""
    normalise_dense: bool = True
    """Give dense vectors length 1, so that scores are cosines."""
    normalise_sparse: bool = True
    """Give rows of term weights length 1: else a sequence twice as long scores about twice as high."""
    vector_width: int | None = None
    """Width of the vectors of the multi-vector head; None is the hidden size."""
    vector_window: int = 8
    """Tokens averaged to one vector of the multi-vector head; 1 keeps a vector a token."""
    skip_first: int = 0
    """Kept tokens at the start of a row that the multi-vector head leaves out; 1 for a row that starts with
    a special token, as BGE-M3's do."""

    def __post_init__(self) -> None:
        least = {"vector_width": (1, ""), "vector_window": (1, "tokens"), "skip_first": (0, "tokens")}
        problems = list(field_problems(self, at_least=least))
        if problems:
            raise ConfigError(*problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class M3LossConfig:
    """Weights and options of the loss. The defaults are those of BGE-M3."""

    temperature: float = 0.02
    """Scores are divided by it; above 0."""
    sparse_in_ensemble: float = 0.3
    """Weight of the sparse scores in the ensemble; the others have 1."""
    sparse_in_loss: float = 0.1
    """Weight of the sparse head's loss; the others have 1."""
    self_distillation_start: int | None = None
    """Let the ensemble teach the heads in a forward pass in training mode before which more than so many were
    done: -1 from the first on, 0 from the second. None: never."""
    distillation: Distillation = "m3"
    """What takes the place of the cross-entropy when there are teacher scores."""
    in_batch_negatives: bool = True
    """Use the passages of other queries; without, only the query's own group."""
    across_devices: bool = False
    """Use those of other ranks, too."""

    def __post_init__(self) -> None:
        problems = list(field_problems(self, at_least={"self_distillation_start": (-1, "")}))
        if not (isinstance(self.temperature, float | int) and 0 < self.temperature < math.inf):
            problems.append(f"temperature is {self.temperature}; set it above 0, such as 0.02")
        if not self.in_batch_negatives and self.across_devices:
            problems.append(
                "across_devices is about in-batch negatives, but in_batch_negatives is False; set "
                "across_devices to False"
            )
        if problems:
            raise ConfigError(*problems)
