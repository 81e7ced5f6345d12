"""Losses that learn from the scores of a teacher, or of the model's own ensemble, as one value per query.

In: a matrix of student scores (over the temperature, -inf where a candidate is left out), the column of each
query's positive, and probabilities. Out: rows, ``(B,)``, which the caller averages. A candidate that is left
out has probability 0 and adds nothing, neither value nor gradient.

B queries, C candidates (columns), G passages of a query's own group (columns ``targets`` to
``targets + G - 1``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from genoembed.errors import ShapeError

if TYPE_CHECKING:
    from torch import Tensor


def group_scores(scores_BC: Tensor, targets_B: Tensor, *, group_size: int) -> Tensor:
    """Take the scores of each query's own group out of those of all candidates.

    Args:
        scores_BC: Scores of all candidates, ``(B, C)``.
        targets_B: Column of each query's positive, the first of its group. int64, ``(B,)``.
        group_size: Passages of a group, G.

    Returns:
        Scores of the groups, ``(B, G)``.

    Example:
        >>> group_scores(torch.arange(8.0).reshape(2, 4), torch.tensor([0, 2]), group_size=2)
        tensor([[0., 1.],
                [6., 7.]])
    """
    columns_BG = targets_B[:, None] + torch.arange(group_size, device=targets_B.device)
    return scores_BC.gather(1, columns_BG)


def teacher_probabilities(teacher_BG: Tensor, scores_BC: Tensor, targets_B: Tensor) -> Tensor:
    """Turn the scores of a teacher into probabilities over the candidates that the student compares, too.

    Args:
        teacher_BG: Scores of the teacher for each query's group, higher is better, ``(B, G)``.
        scores_BC: Of the student; -inf where a candidate is left out. ``(B, C)``.
        targets_B: Column of each query's positive. int64, ``(B,)``.

    Returns:
        Softmax over the group, ``(B, G)``; 0 where the student leaves a candidate out.

    Raises:
        ShapeError: If there is not one score for each passage of a group.

    Example:
        >>> student = torch.tensor([[0.3, 0.1, -torch.inf]])
        >>> teacher_probabilities(torch.tensor([[2.0, 2.0, 9.0]]), student, torch.tensor([0]))
        tensor([[0.5000, 0.5000, 0.0000]])
    """
    shape = tuple(teacher_BG.shape)
    if len(shape) != 2 or shape[0] != len(targets_B) or not 1 <= shape[1] <= scores_BC.shape[1]:
        message = (
            f"teacher_scores: shape {shape}, expected ({len(targets_B)}, G), one score for each passage of a "
            "query's group; give teacher scores for every passage, or none"
        )
        raise ShapeError(message)
    # a passage that the student leaves out as a false negative must not take probability from the others
    student_BG = group_scores(scores_BC.detach(), targets_B, group_size=shape[1])
    target_BG = teacher_BG.to(scores_BC).masked_fill(~student_BG.isfinite(), -torch.inf)
    return torch.softmax(target_BG, dim=1)


def soft_entropy_rows(scores_BC: Tensor, probabilities_BC: Tensor) -> Tensor:
    """Take the cross-entropy against probabilities: ``-sum_j T_ij log softmax(S_i)_j``.

    Args:
        scores_BC: Of the student, over the temperature; -inf where a candidate is left out. ``(B, C)``.
        probabilities_BC: Targets, ``(B, C)``; they get no gradient.

    Returns:
        One loss a query, ``(B,)``, in the dtype of the scores.

    Example:
        >>> soft_entropy_rows(torch.tensor([[1.0, 1.0, -torch.inf]]), torch.tensor([[0.5, 0.5, 0.0]]))
        tensor([0.6931])
    """
    # where, because the logarithm of a candidate that is left out is -inf, and 0 times -inf is NaN
    log_p_BC = F.log_softmax(scores_BC, dim=1)
    target_BC = probabilities_BC.detach()
    return -(target_BC * torch.where(target_BC > 0, log_p_BC, 0)).sum(dim=1)


def group_divergence_rows(scores_BC: Tensor, teacher_BG: Tensor, targets_B: Tensor) -> Tensor:
    """Take the Kullback-Leibler divergence of the group's scores from the teacher's probabilities.

    ``sum_g T_ig (log T_ig - log softmax(S_i over the group)_g)``: the distillation of SimLM.

    Args:
        scores_BC: Of the student, over the temperature; -inf where a candidate is left out. ``(B, C)``.
        teacher_BG: Probabilities over each query's own group, as :func:`teacher_probabilities` gives them.
        targets_B: Column of each query's positive. int64, ``(B,)``.

    Returns:
        One loss a query, ``(B,)``, in the dtype of the scores.

    Example:
        >>> scores = torch.tensor([[1.0, 1.0, 5.0]])
        >>> group_divergence_rows(scores, torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        tensor([0.])
    """
    entropy_B = torch.special.entr(teacher_BG).sum(dim=1)
    return _group_entropy_rows(scores_BC, teacher_BG, targets_B) - entropy_B


def kl_distillation_rows(scores_BC: Tensor, teacher_BG: Tensor, targets_B: Tensor) -> Tensor:
    """Add the soft cross-entropy over the group to the plain one over all candidates (``kl_div`` of BGE-M3).

    ``-sum_g T_ig log softmax(S_i over the group)_g - log softmax(S_i)_y``; as there, without the teacher's
    own entropy, which has no gradient.

    Args:
        scores_BC: Of the student, over the temperature; -inf where a candidate is left out. ``(B, C)``.
        teacher_BG: Probabilities over each query's own group, as :func:`teacher_probabilities` gives them.
        targets_B: Column of each query's positive. int64, ``(B,)``.

    Returns:
        One loss a query, ``(B,)``, in the dtype of the scores.

    Example:
        >>> kl_distillation_rows(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
        tensor([1.3863])
    """
    plain_B = F.cross_entropy(scores_BC, targets_B, reduction="none")
    return _group_entropy_rows(scores_BC, teacher_BG, targets_B) + plain_B


def m3_distillation_rows(scores_BC: Tensor, teacher_BG: Tensor, targets_B: Tensor) -> Tensor:
    """Make every passage of the group a positive in turn, weighed by the teacher (Chen et al. 2024, BGE-M3).

    ``sum_g T_ig CE(S_i without the group's passages 0 to g - 1, y + g)``.

    Args:
        scores_BC: Of the student, over the temperature; -inf where a candidate is left out. ``(B, C)``.
        teacher_BG: Probabilities over each query's own group, as :func:`teacher_probabilities` gives them.
        targets_B: Column of each query's positive. int64, ``(B,)``.

    Returns:
        One loss a query, ``(B,)``, in the dtype of the scores.

    Example:
        >>> m3_distillation_rows(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        tensor([0.3466])
    """
    loss_B = torch.zeros_like(scores_BC[:, 0])
    remaining_BC = scores_BC
    for place in range(teacher_BG.shape[1]):
        column_B1 = targets_B[:, None] + place
        is_there_B1 = remaining_BC.gather(1, column_B1).isfinite()
        # rows whose passage is left out run on whole scores, so that no softmax is over nothing
        safe_BC = torch.where(is_there_B1, remaining_BC, scores_BC)
        safe_column_B = torch.where(is_there_B1, column_B1, targets_B[:, None])[:, 0]
        entropy_B = F.cross_entropy(safe_BC, safe_column_B, reduction="none")
        loss_B = loss_B + torch.where(is_there_B1[:, 0], teacher_BG[:, place] * entropy_B, 0)
        remaining_BC = remaining_BC.scatter(1, column_B1, -torch.inf)
    return loss_B


def _group_entropy_rows(scores_BC: Tensor, teacher_BG: Tensor, targets_B: Tensor) -> Tensor:
    local_BG = group_scores(scores_BC, targets_B, group_size=teacher_BG.shape[1])
    return soft_entropy_rows(local_BG, teacher_BG)
