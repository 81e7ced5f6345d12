"""How well right passages are found: recall at k and mean reciprocal rank.

In: scores, and who is right for whom. Out: numbers by name. Promised: vectors that are all alike do not look
good, since a tie counts against the right passage.

Q queries, P passages.
"""

from __future__ import annotations

import torch

from genoembed.errors import ConfigError

RECALL_AT = (1, 10)


def ranking_metrics(
    scores_QP: torch.Tensor, relevant_QP: torch.Tensor, *, allowed_QP: torch.Tensor | None = None
) -> dict[str, float]:
    """Rank the best right passage of each query among the wrong ones.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5]])
        >>> ranking_metrics(scores, torch.tensor([[True, False, False], [False, False, True]]))["mrr"]
        0.75
    """
    allowed_QP = torch.ones_like(relevant_QP) if allowed_QP is None else allowed_QP
    relevant_QP = relevant_QP & allowed_QP
    has_right_Q = relevant_QP.any(dim=1)
    if not bool(has_right_Q.any()):
        message = "ranking: no query has a right passage among the others; hold out more rows of each group"
        raise ConfigError(message)
    scores_QP, relevant_QP = scores_QP[has_right_Q].float(), relevant_QP[has_right_Q]
    wrong_QP = allowed_QP[has_right_Q] & ~relevant_QP
    best_Q = scores_QP.masked_fill(~relevant_QP, -torch.inf).amax(dim=1)
    rank_Q = 1 + (wrong_QP & ~(scores_QP < best_Q[:, None])).sum(dim=1)
    metrics = {"mrr": float((1 / rank_Q.double()).mean())}
    metrics |= {f"recall_at_{k}": float((rank_Q <= k).double().mean()) for k in RECALL_AT}
    return metrics | {"ranked_queries": float(len(rank_Q))}
