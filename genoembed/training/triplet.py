"""Triplet margin losses: an anchor nearer to its positive than to its negative, by a margin.

In: vectors in threes, or vectors with labels among which the hardest three are found. Out:
:class:`~genoembed.training.step_statistics.LossOutput`; scores in its statistics are minus distances.

B triplets, N vectors, D width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F

from genoembed.errors import ConfigError, ShapeError
from genoembed.training.candidates import UNKNOWN
from genoembed.training.step_statistics import LossOutput, StepStatistics, relative_spread

if TYPE_CHECKING:
    from torch import Tensor

Distance: TypeAlias = Literal["euclidean", "cosine"]


def triplet_margin(
    anchor_BD: Tensor,
    positive_BD: Tensor,
    negative_BD: Tensor,
    *,
    margin: float = 1.0,
    distance: Distance = "euclidean",
) -> LossOutput:
    """Take ``mean max(0, d(anchor, positive) - d(anchor, negative) + margin)`` (Schroff et al. 2015).

    Args:
        anchor_BD: Floating, shape ``(B, D)``.
        positive_BD: Of the same kind as the anchors, shape ``(B, D)``.
        negative_BD: Of another kind, shape ``(B, D)``.
        margin: Above 0; cosine distances go from 0 to 2.
        distance: ``euclidean``, or ``cosine``: 1 minus the cosine.

    Returns:
        The loss.

    Raises:
        ConfigError: If ``margin`` or ``distance`` is none.
        ShapeError: If shapes differ.

    Example:
        >>> anchor, near, far = torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.5]])
        >>> triplet_margin(anchor, near, far).loss
        tensor(0.5000)
    """
    _check_options(margin, distance)
    shapes = {tuple(vectors.shape) for vectors in (anchor_BD, positive_BD, negative_BD)}
    if len(shapes) != 1 or anchor_BD.ndim != 2:
        message = f"triplets: shapes {sorted(shapes)}, expected the same (B, D) three times"
        raise ShapeError(message)
    wide = [_directed(vectors, distance) for vectors in (anchor_BD, positive_BD, negative_BD)]
    near_B = _paired_distance(wide[0], wide[1], distance)
    far_B = _paired_distance(wide[0], wide[2], distance)
    return _output(near_B, far_B, margin, vectors=anchor_BD, left_out=0)


def batch_hard_triplet(
    vectors_ND: Tensor, labels_N: Tensor, *, margin: float = 1.0, distance: Distance = "euclidean"
) -> LossOutput:
    """Take, for each vector, the farthest of its own label and the nearest of others (Hermans et al. 2017).

    Args:
        vectors_ND: Floating, shape ``(N, D)``.
        labels_N: Class of each; -1 is unlike every other. int64, shape ``(N,)``.
        margin: Above 0.
        distance: As in :func:`triplet_margin`.

    Returns:
        The loss over the anchors that have both; the others are counted as left out. Without any, 0 with a
        gradient of 0.

    Raises:
        ConfigError: If ``margin`` or ``distance`` is none.
        ShapeError: If shapes do not belong together.

    Example:
        >>> vectors = torch.tensor([[0.0], [1.0], [3.0]])
        >>> out = batch_hard_triplet(vectors, torch.tensor([5, 5, 6]), margin=2.0)
        >>> float(out.loss), out.statistics.left_out
        (0.5, 1)
    """
    _check_options(margin, distance)
    if vectors_ND.ndim != 2 or labels_N.shape != vectors_ND.shape[:1]:
        message = f"labels: shape {tuple(labels_N.shape)} for vectors of shape {tuple(vectors_ND.shape)}"
        raise ShapeError(message)
    labels_N = labels_N.to(vectors_ND.device)
    wide_ND = _directed(vectors_ND, distance)
    with torch.no_grad():
        is_same_NN = (labels_N[:, None] == labels_N) & (labels_N[:, None] != UNKNOWN)
        is_self_NN = torch.eye(len(labels_N), dtype=torch.bool, device=labels_N.device)
        fellow_NN, stranger_NN = is_same_NN & ~is_self_NN, ~is_same_NN & ~is_self_NN
        distance_NN = -wide_ND @ wide_ND.T if distance == "cosine" else torch.cdist(wide_ND, wide_ND)
        farthest_N = distance_NN.masked_fill(~fellow_NN, -torch.inf).argmax(dim=1)
        nearest_N = distance_NN.masked_fill(~stranger_NN, torch.inf).argmin(dim=1)
        anchors = (fellow_NN.any(dim=1) & stranger_NN.any(dim=1)).nonzero().flatten()
    near_B = _paired_distance(wide_ND[anchors], wide_ND[farthest_N[anchors]], distance)
    far_B = _paired_distance(wide_ND[anchors], wide_ND[nearest_N[anchors]], distance)
    left_out = len(labels_N) - len(anchors)
    return _output(near_B, far_B, margin, vectors=vectors_ND, left_out=left_out)


def _check_options(margin: float, distance: str) -> None:
    problems = [] if 0 < margin < math.inf else [f"margin is {margin}; set margin above 0"]
    if distance not in get_args(Distance):
        problems.append(f"distance {distance!r}: set distance to one of {', '.join(get_args(Distance))}")
    if problems:
        raise ConfigError(*problems)


def _directed(vectors: Tensor, distance: Distance) -> Tensor:
    vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
    return F.normalize(vectors, dim=-1) if distance == "cosine" else vectors


def _paired_distance(first_BD: Tensor, second_BD: Tensor, distance: Distance) -> Tensor:
    if distance == "cosine":
        return 1 - (first_BD * second_BD).sum(dim=-1)
    squared_B = (first_BD - second_BD).square().sum(dim=-1)
    # the root has no gradient at 0, where two vectors are equal
    tiny = torch.finfo(squared_B.dtype).tiny
    return torch.where(squared_B > 0, squared_B.clamp(min=tiny).sqrt(), squared_B)


def _output(near_B: Tensor, far_B: Tensor, margin: float, *, vectors: Tensor, left_out: int) -> LossOutput:
    loss_B = torch.relu(near_B - far_B + margin)
    triplets = len(loss_B)
    statistics = StepStatistics(
        queries=triplets,
        left_out=left_out,
        negatives_per_query=1.0 if triplets else 0.0,
        masked_false_negatives=0,
        positive_score=-float(near_B.detach().mean()),
        negative_score=-float(far_B.detach().mean()),
        chance_loss=margin,
        spread=relative_spread(vectors) if len(vectors) > 1 else math.nan,
    )
    loss = loss_B.sum() / max(triplets, 1)
    parts = {"active": float((loss_B.detach() > 0).to(loss_B.dtype).mean())} if triplets else {}
    return LossOutput(loss=loss, statistics=statistics, parts=parts)
