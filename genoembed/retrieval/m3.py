"""The three representations of BGE-M3 (Chen et al. 2024) and the scores between them.

In: dense vectors, sparse weights of terms, and a vector for each kept token or window. Out: matrices of
similarities, all before any temperature. Promised: a score depends on no padding. MaxSim looks for the best
passage token among the kept ones only; against zero vectors in padding, every score below 0 would rise to 0.

B queries, P passages, D width, U terms of a row, M vectors of a row.

The unified loss of BGE-M3 (Chen et al. 2024): dense, sparse and multi-vector together, and their ensemble.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from genoembed.config.retrieval import M3LossConfig
from genoembed.errors import ShapeError
from genoembed.retrieval.candidates import PairIds, allowed_passages, candidate_masks, check_groups
from genoembed.retrieval.distillation import (
    kl_distillation_rows,
    m3_distillation_rows,
    soft_entropy_rows,
    teacher_probabilities,
)
from genoembed.retrieval.terms import NO_TERM
from genoembed.retrieval.weights import HEADS, HybridWeights
from genoembed.training.distributed import RankRows
from genoembed.training.heads import at_least_float32
from genoembed.training.log import LossOutput, relative_spread, score_statistics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from genoembed.config.choices import Distillation


@dataclass(frozen=True, kw_only=True, slots=True)
class M3Vectors:
    """What the heads make of a batch; a head that was not run leaves None."""

    dense: Tensor | None = None
    """Floating, ``(B, D)``."""
    term_ids: Tensor | None = None
    """Terms, each once a row, ``NO_TERM`` where a row has fewer. int64, ``(B, U)``."""
    term_weights: Tensor | None = None
    """At least 0, and 0 where there is no term. Floating, ``(B, U)``."""
    tokens: Tensor | None = None
    """Vectors of tokens or windows. Floating, ``(B, M, D)``."""
    token_mask: Tensor | None = None
    """True where a vector counts. Bool, ``(B, M)``."""

    def __post_init__(self) -> None:
        if (self.term_ids is None) != (self.term_weights is None):
            message = "sparse: term_ids and term_weights, expected both or neither"
            raise ShapeError(message)
        if (self.tokens is None) != (self.token_mask is None):
            message = "multi-vector: tokens and token_mask, expected both or neither"
            raise ShapeError(message)

    def __len__(self) -> int:
        return max((len(value) for value in self.tensors().values()), default=0)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is set by name, for :func:`~genoembed.retrieval.grad_cache.cached_backward`."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    def gather(self, rows: RankRows, *, group_size: int = 1) -> M3Vectors:
        """Concatenate the rows of all ranks."""
        gathered = {}
        for name, value in self.tensors().items():
            gathered[name] = rows.gather(value, group_size=group_size, pad=_FILL[name])
        return M3Vectors(**gathered)


_FILL = {"dense": None, "term_ids": NO_TERM, "term_weights": 0.0, "tokens": 0.0, "token_mask": 0.0}


def join_vectors(chunks: Sequence[Mapping[str, Tensor]]) -> M3Vectors:
    """Concatenate the rows of several chunks, padded to the longest.

    Args:
        chunks: What :meth:`M3Vectors.tensors` gives, chunk by chunk; all with the same names.

    Returns:
        All rows, in the order given.

    Example:
        >>> parts = [{"dense": torch.ones(2, 3)}, {"dense": torch.zeros(1, 3)}]
        >>> len(join_vectors(parts))
        3
    """
    joined = {}
    for name in chunks[0]:
        values = [chunk[name] for chunk in chunks]
        fill = _FILL[name]
        if fill is not None:
            width = max(value.shape[1] for value in values)
            values = [_widened(value, width, fill) for value in values]
        joined[name] = torch.cat(values)
    return M3Vectors(**joined)


def dense_scores(query_BD: Tensor, passage_PD: Tensor) -> Tensor:
    """Take dot products: cosines, for normalized vectors.

    Args:
        query_BD: Floating, ``(B, D)``.
        passage_PD: Floating, ``(P, D)``.

    Returns:
        float32 (float64 for float64 input), ``(B, P)``.

    Example:
        >>> dense_scores(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[11.]])
    """
    return at_least_float32(query_BD) @ at_least_float32(passage_PD).T


def sparse_scores(
    query_ids: Tensor, query_weights: Tensor, passage_ids: Tensor, passage_weights: Tensor
) -> Tensor:
    """Sum the products of the weights of shared terms.

    Works on the terms that occur in these rows, not on a vocabulary, so terms may be of any number.

    Args:
        query_ids: Terms, each once a row, ``NO_TERM`` where a row has fewer. int64, ``(B, U)``.
        query_weights: Weights of the terms, floating, ``(B, U)``.
        passage_ids: Likewise, ``(P, U)``; U may be another.
        passage_weights: Likewise.

    Returns:
        float32 (float64 for float64 input), ``(B, P)``.

    Example:
        >>> ids, weights = torch.tensor([[7, 5], [9, -1]]), torch.tensor([[2.0, 1.0], [4.0, 0.0]])
        >>> sparse_scores(ids, weights, ids, weights)
        tensor([[ 5.,  0.],
                [ 0., 16.]])
    """
    # columns for the terms at hand: a table of all 4^k would not fit in memory
    every, columns = torch.unique(
        torch.cat([query_ids.flatten(), passage_ids.flatten()]), return_inverse=True
    )
    query_columns = columns[: query_ids.numel()].reshape(query_ids.shape)
    passage_columns = columns[query_ids.numel() :].reshape(passage_ids.shape)
    query_BV = _spread_terms(query_ids, query_weights, query_columns, len(every))
    passage_PV = _spread_terms(passage_ids, passage_weights, passage_columns, len(every))
    return query_BV @ passage_PV.T


def multi_vector_scores(
    query_BMD: Tensor, query_mask_BM: Tensor, passage_PMD: Tensor, passage_mask_PM: Tensor
) -> Tensor:
    """Average, over a query's kept vectors, the best dot product with a kept vector of the passage (MaxSim).

    Runs query by query: the memory for values is that of one query against all passages.

    Args:
        query_BMD: Vectors of the queries, floating, ``(B, M, D)``.
        query_mask_BM: True where a vector counts. Bool, ``(B, M)``.
        passage_PMD: Vectors of the passages, ``(P, M, D)``; M may be another.
        passage_mask_PM: True where a vector counts. Bool, ``(P, M)``.

    Returns:
        float32 (float64 for float64 input), ``(B, P)``.

    Raises:
        ShapeError: If a row keeps no vector.

    Example:
        >>> query, passage = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[-3.0], [0.0]]])
        >>> kept = torch.tensor([[True, False]])
        >>> multi_vector_scores(query, kept, passage, kept)
        tensor([[-3.]])
    """
    for name, mask in (("query", query_mask_BM), ("passage", passage_mask_PM)):
        if not bool(mask.any(dim=1).all()):
            empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
            message = f"{name} rows {empty}: no vector is kept, expected at least one; lower skip_first"
            raise ShapeError(message)
    query_BMD, passage_PMD = at_least_float32(query_BMD), at_least_float32(passage_PMD)
    scores = []
    for query_MD, query_mask_M in zip(query_BMD, query_mask_BM, strict=True):
        # masked with -inf, not 0: against zero vectors in padding a best score below 0 would rise to 0
        products_MPM = torch.einsum("id,pjd->ipj", query_MD, passage_PMD)
        best_MP = products_MPM.masked_fill(~passage_mask_PM, -torch.inf).max(dim=-1).values
        kept_MP = torch.where(query_mask_M[:, None], best_MP, 0)
        scores.append(kept_MP.sum(dim=0) / query_mask_M.sum())
    return torch.stack(scores)


def hybrid_scores(
    query: M3Vectors, passage: M3Vectors, *, weights: tuple[float, float, float] = (1.0, 0.3, 1.0)
) -> Tensor:
    """Score with all representations that both sides have; at inference, and as the ensemble in training.

    Args:
        query: Representations of B queries.
        passage: Representations of P passages.
        weights: Of the dense, sparse and multi-vector scores.

    Returns:
        Weighted sum, float32 (float64 for float64 input), ``(B, P)``.

    Raises:
        ShapeError: If the two have no representation in common.

    Example:
        >>> one = M3Vectors(dense=torch.ones(1, 1))
        >>> hybrid_scores(one, one, weights=(2.0, 0.3, 1.0))
        tensor([[2.]])
    """
    found = head_scores(query, passage)
    if not found:
        message = "hybrid: query and passage have no representation in common, expected at least one"
        raise ShapeError(message)
    return add_scores(found, HybridWeights(*weights))


def add_scores(by_head: Mapping[str, Tensor], weights: HybridWeights) -> Tensor:
    """Add the scores of :func:`head_scores`, those of one head at least."""
    return torch.stack([weights.of(name) * scores for name, scores in by_head.items()]).sum(dim=0)


def head_scores(query: M3Vectors, passage: M3Vectors) -> dict[str, Tensor]:
    """Score with each representation that both sides have.

    Args:
        query: Representations of B queries.
        passage: Representations of P passages.

    Returns:
        Scores by name of the head, each ``(B, P)``; in the order of ``HEADS``.

    Example:
        >>> one = M3Vectors(dense=torch.ones(1, 2))
        >>> head_scores(one, one)
        {'dense': tensor([[2.]])}
    """
    found = {}
    q, p = query, passage
    if q.dense is not None and p.dense is not None:
        found["dense"] = dense_scores(q.dense, p.dense)
    if (
        q.term_ids is not None
        and q.term_weights is not None
        and p.term_ids is not None
        and p.term_weights is not None
    ):
        found["sparse"] = sparse_scores(q.term_ids, q.term_weights, p.term_ids, p.term_weights)
    if (
        q.tokens is not None
        and q.token_mask is not None
        and p.tokens is not None
        and p.token_mask is not None
    ):
        found["multi_vector"] = multi_vector_scores(q.tokens, q.token_mask, p.tokens, p.token_mask)
    return found


def _widened(rows: Tensor, width: int, value: float) -> Tensor:
    filler = rows.new_full((rows.shape[0], width - rows.shape[1], *rows.shape[2:]), value)
    return torch.cat([rows, filler], dim=1)


def _spread_terms(ids: Tensor, weights: Tensor, columns: Tensor, num_columns: int) -> Tensor:
    weights = torch.where(ids == NO_TERM, 0, at_least_float32(weights))
    table = weights.new_zeros((len(ids), num_columns))
    return table.scatter_add(1, columns, weights)


_DISTILLATIONS: dict[Distillation, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "m3": m3_distillation_rows,
    "kl": kl_distillation_rows,
}
_NO_IDS = PairIds()


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
            ids: What identifies false negatives; they are left out for all heads alike.
            teacher_scores_BG: Scores of a teacher for each query's group, higher is better, shape ``(B, G)``.

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
            # L_final of the paper: the mean of the heads' loss and of what the ensemble teaches three heads
            loss = (loss + self._weighed(taught) / 3) / 2
            losses |= {f"self_{name}": value for name, value in taught.items()}
        # counted in the state, not by the trainer: FlagEmbedding's counter starts anew when a run is resumed
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
        target_BG = teacher_probabilities(teacher_BG, scores_BP, targets_B)
        return _DISTILLATIONS[self.config.distillation](scores_BP, target_BG, targets_B)

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
