"""Heads for retrieval: from hidden states to dense, sparse and multi-vector representations.

In: hidden states of a padded batch, masks, terms. Out: :class:`~genoembed.retrieval.m3.M3Vectors`.
Promised: no kept token is dropped unless ``skip_first`` says so, and no output depends on padding.

B rows, L padded length, D hidden size, E width of a head's output, T terms, U different terms, M windows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from genoembed.config.retrieval import M3HeadsConfig
from genoembed.errors import ShapeError
from genoembed.pooling.reduce import pool, pooled_width
from genoembed.retrieval.m3 import M3Vectors
from genoembed.retrieval.terms import NO_TERM, TokenTerms
from genoembed.training.heads import at_least_float32, new_linear

if TYPE_CHECKING:
    from torch import Tensor

    from genoembed.config.choices import M3Mode, TokenPooling


class DenseHead(nn.Module):
    """One vector per sequence.

    Args:
        width: Hidden size.
        pooling: How tokens become one vector.
        add_pooler: Put a linear projection after the pooling; it starts as the identity.
        normalize: Scale vectors to length 1.

    Example:
        >>> head = DenseHead(2)
        >>> head(torch.tensor([[[3.0, 4.0], [9.0, 9.0]]]), torch.tensor([[True, False]]))
        tensor([[0.6000, 0.8000]])
    """

    def __init__(
        self, width: int, *, pooling: TokenPooling = "mean", add_pooler: bool = False, normalize: bool = True
    ) -> None:
        super().__init__()
        self.pooling, self.normalize = pooling, normalize
        # as the identity it changes no vector before the first step, so nothing pretrained is lost
        size = pooled_width(width, pooling)
        self.pooler = new_linear(size, size) if add_pooler else None
        if self.pooler is not None:
            nn.init.eye_(self.pooler.weight)

    def forward(
        self, hidden_BLD: Tensor, mask_BL: Tensor, *, attention_mask_BL: Tensor | None = None
    ) -> Tensor:
        """Pool, project, normalize.

        Args:
            hidden_BLD: Floating, shape ``(B, L, D)``.
            mask_BL: True where a token counts, shape ``(B, L)``; floating: the bases that it counts for.
            attention_mask_BL: Nonzero where a token is real, for ``cls``, shape ``(B, L)``.

        Returns:
            float32 (float64 for float64 input), shape ``(B, D)``.

        Raises:
            EmptyPoolError: If a row keeps no token.
            ShapeError: If shapes do not belong together.
        """
        pooled_BD = pool(hidden_BLD, mask_BL, method=self.pooling, attention_mask_BL=attention_mask_BL)
        return self.project(pooled_BD)

    def project(self, pooled_BD: Tensor) -> Tensor:
        """Project and normalize what is pooled already, such as the mean over a sequence's windows.

        Args:
            pooled_BD: Floating, shape ``(B, D)``.

        Returns:
            float32 (float64 for float64 input), shape ``(B, D)``.
        """
        if self.pooler is not None:
            pooled_BD = self.pooler(pooled_BD.to(self.pooler.weight.dtype))
        pooled_BD = at_least_float32(pooled_BD)
        return F.normalize(pooled_BD, dim=-1) if self.normalize else pooled_BD


class SparseHead(nn.Module):
    """A weight for each term of a sequence: ``relu(w h + b)`` where it stands, the maximum over its places.

    It starts with w = 0 and b = 1, where every term weighs the same: before the first step, the score is that
    of plain k-mer sets.

    Args:
        width: Hidden size.
        normalize: Scale the weights of a row to length 1.

    Example:
        >>> terms = TokenTerms(ids=torch.tensor([[7, 7, 5]]), positions=torch.tensor([[0, 1, 2]]))
        >>> ids, weights = SparseHead(4, normalize=False)(torch.zeros(1, 3, 4), terms)
        >>> ids.tolist(), weights.tolist()
        ([[5, 7]], [[1.0, 1.0]])
    """

    def __init__(self, width: int, *, normalize: bool = True) -> None:
        super().__init__()
        self.normalize = normalize
        self.linear = new_linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.ones_(self.linear.bias)

    def forward(self, hidden_BLD: Tensor, terms: TokenTerms) -> tuple[Tensor, Tensor]:
        """Weigh the terms.

        Args:
            hidden_BLD: Floating, shape ``(B, L, D)``.
            terms: Of the same rows.

        Returns:
            Terms, each once a row, ascending, then ``NO_TERM``: int64, ``(B, U)``. Their weights, at least 0:
            float32 (float64 for float64 input), ``(B, U)``.

        Raises:
            ShapeError: If a term belongs to a token that is not there.
        """
        batch, length, _ = hidden_BLD.shape
        ids_BT, positions_BT = terms.ids.to(hidden_BLD.device), terms.positions.to(hidden_BLD.device)
        if len(ids_BT) != batch or (positions_BT.numel() and int(positions_BT.max()) >= length):
            last = int(positions_BT.max()) if positions_BT.numel() else -1
            message = (
                f"terms: {len(ids_BT)} rows up to position {last} for hidden states of shape "
                f"{tuple(hidden_BLD.shape)}; make terms and tokens from the same sequences"
            )
            raise ShapeError(message)
        weights_BL = torch.relu(at_least_float32(self.linear(hidden_BLD.to(self.linear.weight.dtype))))[
            ..., 0
        ]
        # places without a term point at token 0; _strongest takes their weight away
        ids_BU, weights_BU = _strongest(ids_BT, weights_BL.gather(1, positions_BT))
        return ids_BU, F.normalize(weights_BU, dim=-1) if self.normalize else weights_BU


class MultiVectorHead(nn.Module):
    """A vector of length 1 for each window of tokens.

    Args:
        width: Hidden size.
        vector_width: Width of the vectors; None is ``width``.
        window: Tokens averaged to one vector, counted from a row's first kept token; the last may hold fewer.
        skip_first: Kept tokens at the start of a row that are left out.

    Example:
        >>> vectors, mask = MultiVectorHead(4, window=2)(torch.ones(1, 5, 4), torch.ones(1, 5, dtype=bool))
        >>> vectors.shape, mask.tolist()
        (torch.Size([1, 3, 4]), [[True, True, True]])
    """

    def __init__(
        self, width: int, *, vector_width: int | None = None, window: int = 1, skip_first: int = 0
    ) -> None:
        super().__init__()
        self.window, self.skip_first = window, skip_first
        self.linear = new_linear(width, vector_width or width)

    def forward(self, hidden_BLD: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Average windows, project, normalize.

        Args:
            hidden_BLD: Floating, shape ``(B, L, D)``.
            mask_BL: True (or above 0) where a token counts, shape ``(B, L)``.

        Returns:
            Vectors, zero where the mask is False: float32 (float64 for float64 input), ``(B, M, E)``. The
            mask: bool, ``(B, M)``.
        """
        counts_BL = mask_BL != 0
        order_BL = counts_BL.cumsum(dim=1) - 1
        mask_BM = counts_BL & (order_BL >= self.skip_first)
        hidden_BMD = hidden_BLD
        if self.window > 1:
            window_BL = ((order_BL - self.skip_first) // self.window).clamp(min=0)
            hidden_BMD, mask_BM = _average_windows(hidden_BLD, mask_BM, window_BL)
        vectors_BME = self.linear(hidden_BMD.to(self.linear.weight.dtype))
        # masked after the layer: its bias would give padding a vector
        vectors_BME = F.normalize(torch.where(mask_BM[..., None], at_least_float32(vectors_BME), 0), dim=-1)
        return vectors_BME, mask_BM


class M3Heads(nn.Module):
    """The heads of one encoder.

    Args:
        width: Hidden size.
        config: Their shape; None is ``M3HeadsConfig()``.
        mode: ``dense`` makes the dense head alone, others all three.

    Example:
        >>> heads = M3Heads(4, mode="dense")
        >>> len(heads(torch.ones(2, 3, 4), torch.ones(2, 3, dtype=bool)))
        2
    """

    def __init__(self, width: int, config: M3HeadsConfig | None = None, *, mode: M3Mode = "all") -> None:
        super().__init__()
        self.config, self.mode = config or M3HeadsConfig(), mode
        shape = self.config
        self.dense = DenseHead(
            width, pooling=shape.pooling, add_pooler=shape.add_pooler, normalize=shape.normalize_dense
        )
        self.sparse: SparseHead | None = None
        self.multi_vector: MultiVectorHead | None = None
        if mode != "dense":
            self.sparse = SparseHead(width, normalize=shape.normalize_sparse)
            self.multi_vector = MultiVectorHead(
                width,
                vector_width=shape.vector_width,
                window=shape.vector_window,
                skip_first=shape.skip_first,
            )

    def forward(
        self,
        hidden_BLD: Tensor,
        mask_BL: Tensor,
        *,
        terms: TokenTerms | None = None,
        attention_mask_BL: Tensor | None = None,
    ) -> M3Vectors:
        """Make all representations.

        Args:
            hidden_BLD: Floating, shape ``(B, L, D)``.
            mask_BL: True where a token counts, shape ``(B, L)``; floating: the bases that it counts for.
            terms: Of the same rows; without them the sparse head does not run.
            attention_mask_BL: Nonzero where a token is real, for ``cls`` pooling, shape ``(B, L)``.

        Returns:
            What the heads make.

        Raises:
            EmptyPoolError: If a row keeps no token.
            ShapeError: If shapes do not belong together.
        """
        found: dict[str, Tensor] = {
            "dense": self.dense(hidden_BLD, mask_BL, attention_mask_BL=attention_mask_BL)
        }
        if self.sparse is not None and terms is not None:
            found["term_ids"], found["term_weights"] = self.sparse(hidden_BLD, terms)
        if self.multi_vector is not None:
            found["tokens"], found["token_mask"] = self.multi_vector(hidden_BLD, mask_BL)
        return M3Vectors(**found)


def set_trainable(encoder: nn.Module, heads: M3Heads) -> None:
    """Make the parameters trainable that the mode of the heads selects.

    ``all`` and ``dense``: the encoder and its heads. ``fix_encoder``: the sparse and multi-vector head alone;
    dense vectors stay what they are and still take part in the ensemble.

    Args:
        encoder: What makes the hidden states.
        heads: On top of it; their ``mode`` decides.

    Example:
        >>> encoder, heads = torch.nn.Linear(2, 2), M3Heads(2, mode="fix_encoder")
        >>> set_trainable(encoder, heads)
        >>> encoder.weight.requires_grad, heads.sparse.linear.weight.requires_grad
        (False, True)
    """
    is_fixed = heads.mode == "fix_encoder"
    encoder.requires_grad_(not is_fixed)
    heads.requires_grad_(True)
    heads.dense.requires_grad_(not is_fixed)


def _strongest(ids_BT: Tensor, weights_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Keep each term of a row once, with its largest weight."""
    # fillers get the largest number, so that sorting puts them behind all terms of a row
    last = torch.iinfo(torch.int64).max
    sorted_BT, order_BT = ids_BT.masked_fill(ids_BT == NO_TERM, last).sort(dim=1, stable=True)
    weights_BT = torch.where(sorted_BT == last, 0, weights_BT.gather(1, order_BT))
    is_new_BT = torch.ones_like(sorted_BT, dtype=torch.bool)
    is_new_BT[:, 1:] = sorted_BT[:, 1:] != sorted_BT[:, :-1]
    place_BT = is_new_BT.cumsum(dim=1) - 1
    # the maximum starts from 0, and no weight is below: they come from relu
    strongest_BT = torch.zeros_like(weights_BT).scatter_reduce(1, place_BT, weights_BT, "amax")
    unique_BT = torch.full_like(sorted_BT, last).scatter(1, place_BT, sorted_BT)
    unique_BT = unique_BT.masked_fill(unique_BT == last, NO_TERM)
    used = int((unique_BT != NO_TERM).sum(dim=1).max()) if unique_BT.numel() else 0
    return unique_BT[:, :used], strongest_BT[:, :used]


def _average_windows(hidden_BLD: Tensor, mask_BL: Tensor, window_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Average the kept tokens of each window."""
    # replaced rather than multiplied by 0: NaN in padding would stay NaN
    hidden_BLD = torch.where(mask_BL[..., None], at_least_float32(hidden_BLD), 0)
    windows = int(window_BL.max()) + 1
    shape = (len(hidden_BLD), windows, hidden_BLD.shape[2])
    sum_BMD = hidden_BLD.new_zeros(shape).scatter_add(
        1, window_BL[..., None].expand_as(hidden_BLD), hidden_BLD
    )
    count_BM = hidden_BLD.new_zeros(shape[:2]).scatter_add(1, window_BL, mask_BL.to(hidden_BLD.dtype))
    return sum_BMD / count_BM.clamp(min=1)[..., None], count_BM > 0
