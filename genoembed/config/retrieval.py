"""What contrastive training compares, and the heads and the loss of BGE-M3."""

from __future__ import annotations

from typing import TYPE_CHECKING

from genoembed.config.choices import ContrastScope, Distillation, TokenPooling
from genoembed.config.fields import Config, option
from genoembed.errors import Problem, Remedy

if TYPE_CHECKING:
    from collections.abc import Iterator


class ContrastiveConfig(Config):
    """What queries are compared with."""

    temperature: float = option(0.05, gt=0, help="Scores are divided by it.")
    scope: ContrastScope = option(
        "one_way",
        help="one_way: queries against passages. symmetric: the mean of that and positives against queries. "
        "full: one softmax over passages, and over the other queries and positives from either side.",
    )
    in_batch_negatives: bool = option(
        True, help="Use the passages of other queries; without, only the query's own group."
    )
    across_devices: bool = option(False, help="Use those of other ranks as well.")
    mask_hard_negatives: bool = option(
        False, help="Leave the query's own negatives to the teacher, and out of the cross-entropy."
    )

    def _problems(self) -> Iterator[str]:
        if not self.in_batch_negatives and (self.scope != "one_way" or self.across_devices):
            yield Problem(
                "in_batch_negatives is False, but scope and across_devices are about them",
                Remedy("in_batch_negatives", True),
                ", or scope to 'one_way' and across_devices to False",
            )


class M3HeadsConfig(Config):
    """Shape of the heads; saved with a model, since its weights mean nothing without."""

    pooling: TokenPooling = option("mean", help="How tokens become the dense vector.")
    add_pooler: bool = option(False, help="Put a linear projection after the pooling.")
    normalize_dense: bool = option(True, help="Scale dense vectors to length 1, so that scores are cosines.")
    normalize_sparse: bool = option(
        True,
        help="Scale rows of term weights to length 1: else a sequence twice as long scores twice as high.",
    )
    vector_width: int | None = option(
        None, ge=1, help="Width of the vectors of the multi-vector head; None is the hidden size."
    )
    vector_window: int = option(
        8, ge=1, unit="tokens", help="Tokens averaged to one vector of the multi-vector head."
    )
    skip_first: int = option(
        0,
        ge=0,
        unit="tokens",
        help="Kept tokens at the start of a row that the multi-vector head leaves out; 1 for a row that "
        "starts with a special token, as BGE-M3's do.",
    )


class M3LossConfig(Config):
    """Weights and options of the loss. The defaults are those of BGE-M3."""

    temperature: float = option(0.02, gt=0, help="Scores are divided by it.")
    sparse_in_ensemble: float = option(
        0.3, help="Weight of the sparse scores in the ensemble; the others have 1."
    )
    sparse_in_loss: float = option(0.1, help="Weight of the sparse head's loss; the others have 1.")
    self_distillation_start: int | None = option(
        None,
        ge=-1,
        help="Let the ensemble teach the heads in a forward pass in training mode before which more than so "
        "many were done: -1 from the first on, 0 from the second. None: never.",
    )
    distillation: Distillation = option(
        "m3", help="What takes the place of the cross-entropy when there are teacher scores."
    )
    in_batch_negatives: bool = option(
        True, help="Use the passages of other queries; without, only the query's own group."
    )
    across_devices: bool = option(False, help="Use those of other ranks as well.")

    def _problems(self) -> Iterator[str]:
        if not self.in_batch_negatives and self.across_devices:
            yield Problem(
                "across_devices is about in-batch negatives, but in_batch_negatives is False",
                Remedy("across_devices", False),
            )
