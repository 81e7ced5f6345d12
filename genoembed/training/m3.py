"""The unified loss of BGE-M3 (Chen et al. 2024): dense, sparse and multi-vector together, and their ensemble.

With ``S_e = S_d + 0.3 S_s + S_c`` and ``L_h`` the loss over the scores of head h (cross-entropy, or a
distillation from a teacher)::

    L = (L_d + L_e + 0.1 L_s + L_c) / 4

After the start step the ensemble teaches the heads, without gradient to the teacher:
``D_h = -mean_i sum_j softmax(S_e)_ij log softmax(S_h)_ij`` and::

    L <- (L + (D_d + 0.1 D_s + D_c) / 3) / 2

In: representations of queries and of passages in groups, the positive first. Out: a
:class:`~genoembed.training.step_statistics.LossOutput`.

B queries of this rank, P passages of all ranks, G passages of a query.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from genoembed.config import field_problems
from genoembed.errors import ConfigError, ShapeError
from genoembed.training.across_ranks import RankRows
from genoembed.training.candidates import PairIds, candidate_masks, check_groups
from genoembed.training.contrastive import allowed_passages
from genoembed.training.distillation import (
    kl_distillation_rows,
    m3_distillation_rows,
    soft_entropy_rows,
    teacher_probabilities,
)
from genoembed.training.m3_vectors import HEADS, head_scores
from genoembed.training.step_statistics import LossOutput, relative_spread, score_statistics

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from genoembed.training.m3_vectors import M3Vectors

Distillation: TypeAlias = Literal["m3", "kl"]
_DISTILLATIONS: dict[Distillation, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "m3": m3_distillation_rows,
    "kl": kl_distillation_rows,
}
_NO_IDS = PairIds()


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


class M3Loss(nn.Module):
    """The unified loss, or that of the dense head alone where only that is there.

    The number of forward passes in training mode is part of the state: a run that goes on from a checkpoint
    starts self-distillation where the run that was never stopped does.

    Args:
        config: Weights and options; None is ``M3LossConfig()``.
    """

    forwards: Tensor

    def __init__(self, config: M3LossConfig | None = None) -> None:
        super().__init__()
        self.config = config or M3LossConfig()
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        query: M3Vectors,
        passage: M3Vectors,
        *,
        ids: PairIds = _NO_IDS,
        teacher_scores_BG: Tensor | None = None,
    ) -> LossOutput:
        """Take the loss of a batch.

        Args:
            query: Representations of this rank's queries, B rows.
            passage: Of their passages, B * G rows, the positive first in each group.
            ids: What tells false negatives; they are left out for all heads alike.
            teacher_scores_BG: Scores of a teacher for each query's group, larger is better, shape ``(B, G)``.

        Returns:
            The loss; its parts are the heads' losses, and ``self_dense`` ... where the ensemble teaches.
            Statistics are those of the ensemble, or of the dense head alone.

        Raises:
            ShapeError: If shapes do not belong together, or there is neither dense alone nor all three.
        """
        scores, targets_B, rows, masked = self._scores(query, passage, ids)
        rows_of_losses = {
            name: self._head_loss(s, targets_B, teacher_scores_BG) for name, s in scores.items()
        }
        losses = {name: rows.mean(loss_B) for name, loss_B in rows_of_losses.items()}
        loss = self._unified(losses)
        if self._takes_part() and "ensemble" in scores:
            teacher = torch.softmax(scores["ensemble"], dim=1)  # soft_entropy_rows sends it no gradient
            taught = {h: rows.mean(soft_entropy_rows(scores[h], teacher)) for h in HEADS}
            loss = (loss + self._weighed(taught) / 3) / 2
            losses |= {f"self_{name}": value for name, value in taught.items()}
        if self.training:
            self.forwards += 1
        dense = query.dense if query.dense is not None else torch.zeros(1, 1)
        best = scores["ensemble" if "ensemble" in scores else "dense"]
        statistics = score_statistics(
            best,
            targets_B,
            temperature=self.config.temperature,
            masked=masked,
            spread=relative_spread(dense) if len(dense) > 1 else math.nan,
        )
        parts = torch.stack([value.detach() for value in losses.values()]).tolist()
        return LossOutput(loss=loss, statistics=statistics, parts=dict(zip(losses, parts, strict=True)))

    def _scores(
        self, query: M3Vectors, passage: M3Vectors, ids: PairIds
    ) -> tuple[dict[str, Tensor], Tensor, RankRows, int]:
        """Score this rank's queries against all passages, with -inf where they are not compared."""
        config = self.config
        group_size = check_groups(len(query), len(passage), ids)
        device = next(iter(query.tensors().values())).device
        rows = RankRows(len(query), across=config.across_devices, device=device)
        masks = candidate_masks(ids, rows, group_size=group_size, device=device)
        found = head_scores(query, passage.gather(rows, group_size=group_size))
        if set(found) not in ({"dense"}, set(HEADS)):
            message = (
                f"representations: {sorted(found)}, expected dense alone, or dense, sparse and multi_vector"
            )
            raise ShapeError(message)
        if len(found) > 1:
            sparse = config.sparse_in_ensemble * found["sparse"]
            found["ensemble"] = found["dense"] + sparse + found["multi_vector"]
        allowed_BP = allowed_passages(
            masks, in_batch_negatives=config.in_batch_negatives, group_size=group_size
        )
        scores = {
            name: (values / config.temperature).masked_fill(~allowed_BP, -torch.inf)
            for name, values in found.items()
        }
        return scores, masks.targets, rows, masks.masked

    def _head_loss(self, scores_BP: Tensor, targets_B: Tensor, teacher_BG: Tensor | None) -> Tensor:
        if teacher_BG is None:
            return F.cross_entropy(scores_BP, targets_B, reduction="none")
        wanted_BG = teacher_probabilities(teacher_BG, scores_BP, targets_B)
        return _DISTILLATIONS[self.config.distillation](scores_BP, wanted_BG, targets_B)

    def _weighed(self, losses: dict[str, Tensor]) -> Tensor:
        return losses["dense"] + self.config.sparse_in_loss * losses["sparse"] + losses["multi_vector"]

    def _unified(self, losses: dict[str, Tensor]) -> Tensor:
        if "ensemble" not in losses:
            return losses["dense"]
        return (self._weighed(losses) + losses["ensemble"]) / 4

    def _takes_part(self) -> bool:
        """Whether the ensemble teaches in this pass."""
        start = self.config.self_distillation_start
        return self.training and start is not None and int(self.forwards) > start
