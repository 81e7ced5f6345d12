"""Contrastive losses: pull a query to its positive, push it from the other candidates.

In: vectors of queries and of their passages in groups of G, the positive first, or vectors with labels. Out:
:class:`~genoembed.training.log.LossOutput`. Scores are dot products, so vectors are normalized by
whoever makes them, where cosines are meant. Sums run in float32 (float64 for float64 input).

B queries of this rank, Q queries of all ranks, P = Q * G passages of all ranks, D width, N vectors, C
columns.

Triplet margin losses: an anchor closer to its positive than to its negative, by a margin.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, get_args

import torch
import torch.nn.functional as F
from torch import nn

from genoembed.config.choices import Distance
from genoembed.config.retrieval import ContrastiveConfig
from genoembed.errors import ConfigError, ShapeError
from genoembed.retrieval.candidates import (
    UNKNOWN,
    CandidateMasks,
    PairIds,
    allowed_passages,
    candidate_masks,
    check_groups,
)
from genoembed.retrieval.distillation import group_divergence_rows, teacher_probabilities
from genoembed.training.distributed import RankRows
from genoembed.training.heads import at_least_float32
from genoembed.training.log import LossOutput, StepStatistics, relative_spread, score_statistics

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


_NO_IDS = PairIds()


def info_nce(
    query_BD: Tensor,
    passage_PD: Tensor,
    *,
    config: ContrastiveConfig | None = None,
    ids: PairIds = _NO_IDS,
    teacher_scores_BG: Tensor | None = None,
) -> LossOutput:
    """Take the cross-entropy of each query's positive among its candidates (van den Oord et al. 2018).

    ``full`` is the loss of SimLM (Wang et al. 2023): for query i with positive k_i, the columns are
    ``[q_i k^T, k_i q^T, q_i q^T, k_i k^T] / t`` over all passages, other queries and other positives.
    With a teacher, the divergence of the group's scores from the teacher's is added, as SimLM does.

    Args:
        query_BD: Floating, shape ``(B, D)``.
        passage_PD: Passages of this rank's queries, the positive first in each group. Floating, shape
            ``(B * G, D)``.
        config: What is compared; None is ``ContrastiveConfig()``.
        ids: What identifies false negatives, of this rank.
        teacher_scores_BG: Scores of a teacher for each query's group, higher is better, shape ``(B, G)``.

    Returns:
        The loss, with parts ``cross_entropy`` and, with a teacher, ``distillation``.

    Raises:
        ShapeError: If shapes do not belong together.

    Example:
        >>> query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> out = info_nce(query, query, config=ContrastiveConfig(temperature=1.0))
        >>> round(float(out.loss), 4), out.statistics.negatives_per_query
        (0.3133, 1.0)
    """
    config = config or ContrastiveConfig()
    _check_vectors(query_BD, passage_PD)
    group_size = check_groups(len(query_BD), len(passage_PD), ids)
    rows = RankRows(len(query_BD), across=config.across_devices, device=query_BD.device)
    masks = candidate_masks(ids, rows, group_size=group_size, device=query_BD.device)
    query_BD, passage_PD = at_least_float32(query_BD), at_least_float32(passage_PD)
    # gathered with gradient: without it each rank would learn from its own queries alone
    all_queries = rows.gather(query_BD)
    all_passages = rows.gather(passage_PD, group_size=group_size)
    local_BP = query_BD @ all_passages.T / config.temperature
    allowed_BP = allowed_passages(masks, in_batch_negatives=config.in_batch_negatives, group_size=group_size)
    scores_BC = local_BP.masked_fill(~allowed_BP, -torch.inf)
    positive_BD = passage_PD[::group_size]
    if config.scope == "full":
        others = (positive_BD @ all_queries.T, query_BD @ all_queries.T)
        among_positives = positive_BD @ all_passages[::group_size].T
        blocks = [block / config.temperature for block in (*others, among_positives)]
        scores_BC = torch.cat([scores_BC, *(_only(block, masks.pairs) for block in blocks)], dim=1)
    entropy_scores_BC = _without_group(scores_BC, masks.targets, group_size, config)
    entropy_B = F.cross_entropy(entropy_scores_BC, masks.targets, reduction="none")
    if config.scope == "symmetric":
        entropy_B = (entropy_B + _backward_entropy(positive_BD, all_queries, masks, rows, config)) / 2
    parts = {"cross_entropy": rows.mean(entropy_B)}
    if teacher_scores_BG is not None:
        teacher_BG = teacher_probabilities(teacher_scores_BG, scores_BC, masks.targets)
        parts["distillation"] = rows.mean(group_divergence_rows(scores_BC, teacher_BG, masks.targets))
    # the smaller of the two: one side that has collapsed is enough to learn nothing
    spread = min(relative_spread(query_BD), relative_spread(positive_BD)) if len(query_BD) > 1 else math.nan
    return LossOutput(
        loss=torch.stack(list(parts.values())).sum(),
        statistics=score_statistics(
            entropy_scores_BC,
            masks.targets,
            temperature=config.temperature,
            masked=masks.masked,
            spread=spread,
        ),
        parts={name: float(value.detach()) for name, value in parts.items()},
    )


class SentenceContrastiveLoss(nn.Module):
    """:func:`info_nce` as a loss of sentence-transformers, for its ``SentenceTransformerTrainer``.

    Columns of the data are in its order: query, positive, and any number of negatives.

    Args:
        model: A ``SentenceTransformer``, or what like it returns ``sentence_embedding`` for its inputs.
        config: What is compared; None is ``ContrastiveConfig()``.

    Example:
        >>> class Doubled(torch.nn.Module):
        ...     def forward(self, features):
        ...         return {"sentence_embedding": features["input_ids"].float()}
        >>> queries, positives = {"input_ids": torch.eye(2)}, {"input_ids": torch.eye(2)}
        >>> loss = SentenceContrastiveLoss(Doubled(), ContrastiveConfig(temperature=1.0))
        >>> loss([queries, positives], None)
        tensor(0.3133)
    """

    def __init__(self, model: nn.Module, config: ContrastiveConfig | None = None) -> None:
        super().__init__()
        self.model, self.config = model, config or ContrastiveConfig()

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Embed each column, scale vectors to length 1, and take the loss.

        Args:
            sentence_features: Inputs of the model, one mapping a column: queries, positives, negatives, each
                of the same number of rows B.
            labels: Not looked at: each query has its own positive.

        Returns:
            Scalar, float32 (float64 for float64 vectors).

        Raises:
            ShapeError: If there are no positives, or columns differ in their rows.
        """
        columns = [self.model(dict(features))["sentence_embedding"] for features in sentence_features]
        if len({column.shape for column in columns}) != 1 or len(columns) < 2:
            message = f"columns: {[tuple(c.shape) for c in columns]}, expected the same (B, D) twice or more"
            raise ShapeError(message)
        query_BD, *passages = (F.normalize(at_least_float32(column), dim=-1) for column in columns)
        # group by group, the positive first
        return info_nce(query_BD, torch.stack(passages, dim=1).flatten(0, 1), config=self.config).loss

    def get_config_dict(self) -> dict[str, object]:
        """Return what sentence-transformers writes about the loss into its model card.

        Returns:
            The settings by name.
        """
        return self.config.to_dict()


def two_view_loss(
    first_BD: Tensor,
    second_BD: Tensor,
    *,
    config: ContrastiveConfig | None = None,
    ids_B: Tensor | None = None,
) -> LossOutput:
    """Contrast two views of each sequence, such as itself and a mutated or reverse-complemented copy.

    Args:
        first_BD: Floating, shape ``(B, D)``.
        second_BD: The other view of each, floating, shape ``(B, D)``.
        config: What is compared; None compares both ways (``scope="symmetric"``).
        ids_B: Identity of the sequences: copies in one batch are no negatives of each other. int64, ``(B,)``.

    Returns:
        The loss.

    Raises:
        ShapeError: If shapes do not belong together.

    Example:
        >>> views = torch.eye(3)
        >>> float(two_view_loss(views, views).loss) < 1e-6
        True
    """
    if first_BD.shape != second_BD.shape:
        message = f"views: shapes {tuple(first_BD.shape)} and {tuple(second_BD.shape)}, expected the same"
        raise ShapeError(message)
    config = config or ContrastiveConfig(scope="symmetric")
    return info_nce(first_BD, second_BD, config=config, ids=PairIds(query_ids=ids_B, passage_ids=ids_B))


def supervised_contrastive(
    vectors_ND: Tensor, labels_N: Tensor, *, temperature: float = 0.1, across_devices: bool = False
) -> LossOutput:
    """Pull the members of each class together (Khosla et al. 2020, the loss with the sum outside the log).

    For anchor i, with P(i) the others of its class:
    ``-mean_{p in P(i)} log(exp(s_ip) / sum_{a != i} exp(s_ia))``, ``s = z z^T / temperature``; averaged over
    anchors. An anchor that is alone in its class in the batch
    only serves as a negative; how many there were is in the statistics.

    Args:
        vectors_ND: Floating, shape ``(N, D)``.
        labels_N: Class of each; -1 is a class by itself. int64, shape ``(N,)``.
        temperature: Scores are divided by it; above 0.
        across_devices: Compare with the vectors of other ranks, too.

    Returns:
        The loss; 0 with a gradient of 0 where no anchor of any rank has a positive.

    Raises:
        ShapeError: If shapes do not belong together.

    Example:
        >>> vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> out = supervised_contrastive(vectors, torch.tensor([4, 4, 7]), temperature=1.0)
        >>> round(float(out.loss), 4), out.statistics.left_out
        (0.3133, 1)
    """
    if vectors_ND.ndim != 2 or labels_N.shape != vectors_ND.shape[:1]:
        message = f"labels: shape {tuple(labels_N.shape)} for vectors of shape {tuple(vectors_ND.shape)}"
        raise ShapeError(message)
    vectors_ND, labels_N = at_least_float32(vectors_ND), labels_N.to(vectors_ND.device)
    rows = RankRows(len(vectors_ND), across=across_devices, device=vectors_ND.device)
    all_labels = rows.gather(labels_N)
    scores_NC = vectors_ND @ rows.gather(vectors_ND).T / temperature
    own_N = rows.start + torch.arange(len(vectors_ND), device=vectors_ND.device)
    is_self_NC = own_N[:, None] == torch.arange(rows.total, device=vectors_ND.device)
    scores_NC = scores_NC.masked_fill(is_self_NC, -torch.inf)
    positive_NC = (labels_N[:, None] == all_labels) & (labels_N[:, None] != UNKNOWN) & ~is_self_NC
    positives_N = positive_NC.sum(dim=1)
    is_anchor_N = positives_N > 0
    # one vector alone has scores of -inf only, of which log_softmax makes NaN
    log_p_NC = F.log_softmax(scores_NC, dim=1) if rows.total > 1 else scores_NC
    loss_N = -torch.where(positive_NC, log_p_NC, 0).sum(dim=1) / positives_N.clamp(min=1)
    # averaged over the anchors of all ranks: ranks may hold different numbers of them
    anchors = int(rows.gather(is_anchor_N).sum())
    loss = rows.mean(loss_N) * (rows.total / max(anchors, 1))
    statistics = _class_statistics(scores_NC, positive_NC, temperature, relative_spread(vectors_ND))
    return LossOutput(loss=loss, statistics=statistics)


def _check_vectors(query_BD: Tensor, passage_PD: Tensor) -> None:
    shapes = tuple(query_BD.shape), tuple(passage_PD.shape)
    if query_BD.ndim != 2 or passage_PD.ndim != 2 or shapes[0][1] != shapes[1][1]:
        message = (
            f"vectors: queries of shape {shapes[0]}, passages {shapes[1]}, expected (B, D) and (B * G, D)"
        )
        raise ShapeError(message)


def _only(scores: Tensor, allowed: Tensor) -> Tensor:
    return scores.masked_fill(~allowed, -torch.inf)


def _without_group(
    scores_BC: Tensor, targets_B: Tensor, group_size: int, config: ContrastiveConfig
) -> Tensor:
    if not config.mask_hard_negatives:
        return scores_BC
    own_negatives_BG = targets_B[:, None] + torch.arange(1, group_size, device=targets_B.device)
    return scores_BC.scatter(1, own_negatives_BG, -torch.inf)


def _backward_entropy(
    positive_BD: Tensor,
    all_queries: Tensor,
    masks: CandidateMasks,
    rows: RankRows,
    config: ContrastiveConfig,
) -> Tensor:
    # masks.pairs leaves out the query itself, which is the right answer in this direction
    own_B = rows.start + torch.arange(len(positive_BD), device=positive_BD.device)
    allowed_BQ = masks.pairs.scatter(1, own_B[:, None], value=True)
    scores_BQ = _only(positive_BD @ all_queries.T / config.temperature, allowed_BQ)
    return F.cross_entropy(scores_BQ, own_B, reduction="none")


def _class_statistics(
    scores_NC: Tensor, positive_NC: Tensor, temperature: float, spread: float
) -> StepStatistics:
    scores_NC = scores_NC.detach()
    is_anchor_N = positive_NC.any(dim=1)
    negative_NC = scores_NC.isfinite() & ~positive_NC & is_anchor_N[:, None]
    anchors = int(is_anchor_N.sum())
    others = scores_NC.shape[1] - 1
    return StepStatistics(
        queries=anchors,
        left_out=len(scores_NC) - anchors,
        negatives_per_query=float(negative_NC.sum()) / max(anchors, 1),
        masked_false_negatives=0,
        positive_score=_mean_where(scores_NC, positive_NC) * temperature,
        negative_score=_mean_where(scores_NC, negative_NC) * temperature,
        chance_loss=math.log(others) if others else math.nan,
        spread=spread,
    )


def _mean_where(values: Tensor, mask: Tensor) -> float:
    return float(torch.where(mask, values, 0).sum() / mask.sum())


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
    """Take, for each vector, the farthest of its own label and the closest of others (Hermans et al. 2017).

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
    with torch.no_grad():  # which pair is hardest has no gradient; its distance is taken again below
        is_same_NN = (labels_N[:, None] == labels_N) & (labels_N[:, None] != UNKNOWN)
        is_self_NN = torch.eye(len(labels_N), dtype=torch.bool, device=labels_N.device)
        positive_NN, negative_NN = is_same_NN & ~is_self_NN, ~is_same_NN & ~is_self_NN
        # only the order counts here, so 1 minus the cosine may lack the 1
        distance_NN = -wide_ND @ wide_ND.T if distance == "cosine" else torch.cdist(wide_ND, wide_ND)
        farthest_N = distance_NN.masked_fill(~positive_NN, -torch.inf).argmax(dim=1)
        nearest_N = distance_NN.masked_fill(~negative_NN, torch.inf).argmin(dim=1)
        anchors = (positive_NN.any(dim=1) & negative_NN.any(dim=1)).nonzero().flatten()
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
    vectors = at_least_float32(vectors)
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
