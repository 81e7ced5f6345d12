"""Pooling: from hidden states per token to one vector per sequence, at once or block by block.

B rows, L padded length, D hidden size, K windows of one sequence.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING, Literal

import torch

from genoembed.errors import ConfigError, EmptyPoolError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from genoembed.config.choices import Pooling, TokenPooling
    from genoembed.contracts import Batch


# Values of a row that are copied (masked, widened to the accumulator's dtype) at a time. On a CPU the copy
# stays in the cache; elsewhere few large kernels are better than many small ones. Not shared among the rows,
# as a row's sum must not depend on how many there are.
_CHUNK_VALUES = {"cpu": 1 << 16}
_CHUNK_VALUES_ELSEWHERE = 1 << 26


def pool(
    hidden_BLD: Tensor,
    mask_BL: Tensor,
    *,
    method: TokenPooling,
    attention_mask_BL: Tensor | None = None,
    empty: Literal["error", "nan"] = "error",
) -> Tensor:
    """Reduce the hidden states of the kept tokens of each row to one vector.

    ``mean``, ``max``, ``first`` and ``last`` speak of kept tokens; ``mean`` weighs them where the mask says
    how much each counts. ``weighted_mean`` weighs the i-th kept token by i, counted from 1, besides, so that
    tokens which saw more context count more (for causal models). ``cls`` is the row's first token, kept or
    not: the special token that many encoders put there. ``mean_std`` puts the standard deviation over tokens
    behind the mean, weighed alike (of the population, so 0 for one token; statistics pooling, Snyder et al.
    2018).

    Sums run in float64 (float32 on devices without it), whatever the input's dtype: a half-precision sum over
    a long sequence overflows. What stands at other positions, NaN and infinity too, has no effect; neither
    has the amount of padding. No input is modified.

    Args:
        hidden_BLD: Hidden states. Floating, shape ``(B, L, D)``.
        mask_BL: True where a token is kept, shape ``(B, L)``; floating: how much it counts, 0 if not kept.
        method: How to reduce.
        attention_mask_BL: Nonzero where a token is real, shape ``(B, L)``; only ``cls`` looks at it, to find
            the first token under left padding. None: it stands at position 0.
        empty: What to do with a row of which no token is kept: raise, or return NaN for it (one window of a
            sequence may be empty, see ``merge_windows``).

    Returns:
        One vector per row. float32 (float64 for float64 input), shape ``(B, D)``, ``(B, 2 D)`` for
        ``mean_std``, on ``hidden_BLD.device``.

    Raises:
        ConfigError: If ``method`` is no pooling.
        EmptyPoolError: If a row keeps no token and ``empty`` is ``error``.
        ShapeError: If shapes or dtypes do not belong together.

    Example:
        >>> hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]])
        >>> pool(hidden, torch.tensor([[True, True, False]]), method="mean")
        tensor([[2., 3.]])
        >>> pool(hidden, torch.tensor([[True, True, False]]), method="last")
        tensor([[3., 4.]])
    """
    if method not in _REDUCERS:
        raise ConfigError(_unknown_method(method))
    if problem := _shape_problem(hidden_BLD, mask_BL, attention_mask_BL):
        raise ShapeError(problem)
    mask_BL = mask_BL.to(hidden_BLD.device)
    if method == "cls":
        is_real_BL = torch.ones_like(mask_BL) if attention_mask_BL is None else attention_mask_BL.to(mask_BL)
        mask_BL = is_real_BL != 0
    has_token_B = (mask_BL != 0).any(dim=1)
    if empty == "error" and not bool(has_token_B.all()):
        rows = (~has_token_B).nonzero().flatten().tolist()
        message = (
            f"rows {rows}: no token is left to pool, expected at least one; lower skip_first, or widen the "
            "region (special tokens, padding and flanks never count)"
        )
        raise EmptyPoolError(message)
    pooled_BD = _REDUCERS[method](hidden_BLD, mask_BL)
    # A reducer leaves something arbitrary (-inf, the vector at position 0) in a row without tokens.
    return torch.where(has_token_B[:, None], pooled_BD, torch.nan)


def merge_windows(vectors_KD: Tensor, weights_K: Tensor, *, method: TokenPooling) -> Tensor:
    """Combine the pooled vectors of a sequence's windows to the vector of the sequence.

    ``mean`` weighs windows by the tokens they kept, which is exactly the mean over the sequence when each
    token is kept in one window. ``weighted_mean`` does the same with the windows' own weighted means: the
    model's context starts anew in each window, so position weights do too. ``mean_std`` adds the variance of
    the windows' means to the mean of their variances, which is exactly the variance over the sequence.
    ``max`` is the maximum; ``first`` and ``last`` are the first and last window that kept a token; ``cls`` is
    the first window.

    Args:
        vectors_KD: Pooled vectors in the order of the sequence. Floating, shape ``(K, D)``.
        weights_K: Tokens (or bases) each window kept, at least 0, shape ``(K,)``. The vector of a window with
            weight 0 is never looked at (``cls`` excepted) and may be NaN.
        method: The pooling that made the vectors.

    Returns:
        One vector. float32 (float64 for float64 input), shape ``(D,)``.

    Raises:
        ConfigError: If ``method`` is no pooling.
        EmptyPoolError: If no window kept a token.
        ShapeError: If shapes do not belong together, or a weight is negative.

    Example:
        >>> merge_windows(torch.tensor([[1.0], [4.0]]), torch.tensor([2, 1]), method="mean")
        tensor([2.])
    """
    if method not in _REDUCERS:
        raise ConfigError(_unknown_method(method))
    if vectors_KD.ndim != 2 or weights_K.shape != vectors_KD.shape[:1] or bool((weights_K < 0).any()):
        message = (
            f"windows: vectors of shape {tuple(vectors_KD.shape)} and weights of shape "
            f"{tuple(weights_K.shape)}, expected (K, D) and (K,), no weight below 0"
        )
        raise ShapeError(message)
    weights_K = weights_K.to(vectors_KD.device)
    is_kept_K = weights_K > 0
    if not bool(is_kept_K.any()):
        message = (
            f"{len(weights_K)} windows: no token is left to pool, expected at least one; lower skip_first, "
            "or widen the region"
        )
        raise EmptyPoolError(message)
    if method == "cls":
        return vectors_KD[0].to(_result_dtype(vectors_KD))
    if method in ("mean", "weighted_mean"):
        return _weighted_sum_mean(vectors_KD[None], is_kept_K[None], weights_K[None])[0]
    if method == "mean_std":
        return _merge_moments(vectors_KD[is_kept_K], weights_K[is_kept_K])
    return _REDUCERS[method](vectors_KD[None], is_kept_K[None])[0]


def pooled_width(width: int, method: str) -> int:
    """Return the width of a pooled vector.

    Args:
        width: Width of the hidden states.
        method: A pooling.

    Returns:
        Features of the pooled vector: twice as many where it holds mean and deviation.

    Example:
        >>> pooled_width(128, "mean"), pooled_width(128, "mean_std")
        (128, 256)
    """
    return 2 * width if method == "mean_std" else width


def check_pooling(method: str, *, is_causal: bool) -> None:
    """Raise if a pooling says nothing about a sequence.

    Args:
        method: A pooling, or ``none`` (one vector per token).
        is_causal: Whether each token of the model sees only those before it.

    Raises:
        ConfigError: If ``method`` is no pooling, or is ``first`` or ``cls`` on a causal model.

    Example:
        >>> check_pooling("cls", is_causal=False)
        >>> check_pooling("mean", is_causal=True)
    """
    if method not in (*_REDUCERS, "none"):
        raise ConfigError(_unknown_method(method))
    if is_causal and method in ("first", "cls"):
        message = (
            f"pooling {method!r}: the model is causal, so its first token sees nothing of the sequence but "
            "itself and the vector is a constant; set pooling to 'mean', 'last' or 'weighted_mean'"
        )
        raise ConfigError(message)


def _unknown_method(method: str) -> str:
    return f"pooling {method!r}: expected one of {', '.join(_REDUCERS)}; set pooling to one of them"


def _shape_problem(hidden_BLD: Tensor, mask_BL: Tensor, attention_mask_BL: Tensor | None) -> str | None:
    shape, expected = tuple(hidden_BLD.shape), tuple(hidden_BLD.shape[:2])
    if len(shape) != 3 or not hidden_BLD.is_floating_point():
        return f"hidden states: {hidden_BLD.dtype} of shape {shape}, expected floating (B, L, D)"
    if mask_BL.shape != expected or not (mask_BL.dtype == torch.bool or mask_BL.is_floating_point()):
        found = f"{mask_BL.dtype} of shape {tuple(mask_BL.shape)}"
        return f"mask: {found}, expected torch.bool of {expected}, or floating weights"
    if attention_mask_BL is not None and attention_mask_BL.shape != expected:
        return f"attention mask: shape {tuple(attention_mask_BL.shape)}, expected {expected}"
    return None


def _result_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _kept_chunks(hidden_BLD: Tensor, mask_BL: Tensor, fill: float) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the positions with their values, ``fill`` where a token is not kept."""
    length, width = hidden_BLD.shape[1:]
    on_cpu = hidden_BLD.device.type == "cpu"
    values = _CHUNK_VALUES.get(hidden_BLD.device.type, _CHUNK_VALUES_ELSEWHERE)
    step = max(1, values // max(1, width))
    for start in range(0, length, step):
        chunk = slice(start, start + step)
        # most chunks keep all; to ask would stop a GPU
        if on_cpu and bool(mask_BL[:, chunk].all()):
            yield chunk, hidden_BLD[:, chunk]
        else:
            # Masked values are replaced, not multiplied by 0: NaN times 0 is NaN.
            yield chunk, torch.where(mask_BL[:, chunk, None], hidden_BLD[:, chunk], fill)


def weighted_sum(hidden_BLD: Tensor, mask_BL: Tensor, weights_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the hidden states of the kept tokens, and their weights.

    Args:
        hidden_BLD: Hidden states. Floating, shape ``(B, L, D)``.
        mask_BL: True where a token is kept. Bool, shape ``(B, L)``.
        weights_BL: Shape ``(B, L)``.

    Returns:
        Weighted sums ``(B, D)`` and sums of weights ``(B, 1)``, float64 (float32 on devices without it).
    """
    wide = torch.float32 if hidden_BLD.device.type == "mps" else torch.float64
    weights_BL = torch.where(mask_BL, weights_BL, 0).to(wide)
    sum_BD = hidden_BLD.new_zeros((hidden_BLD.shape[0], hidden_BLD.shape[2]), dtype=wide)
    for chunk, kept_BLD in _kept_chunks(hidden_BLD, mask_BL, 0):
        sum_BD += torch.bmm(weights_BL[:, None, chunk], kept_BLD.to(wide))[:, 0]
    return sum_BD, weights_BL.sum(dim=1, keepdim=True)


def _weighted_sum_mean(hidden_BLD: Tensor, mask_BL: Tensor, weights_BL: Tensor) -> Tensor:
    sum_BD, weight_B1 = weighted_sum(hidden_BLD, mask_BL, weights_BL)
    return (sum_BD / weight_B1).to(_result_dtype(hidden_BLD))


def _max_pool(hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    max_BD = hidden_BLD.new_full((hidden_BLD.shape[0], hidden_BLD.shape[2]), -torch.inf)
    for _, kept_BLD in _kept_chunks(hidden_BLD, mask_BL, -torch.inf):
        max_BD = torch.maximum(max_BD, kept_BLD.amax(dim=1))
    return max_BD.to(_result_dtype(hidden_BLD))


def _first_pool(hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    return _take(hidden_BLD, mask_BL.int().argmax(dim=1))


def _last_pool(hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    # argmax gives the first of equals, so the mask is read from its end
    return _take(hidden_BLD, mask_BL.shape[1] - 1 - mask_BL.flip(1).int().argmax(dim=1))


def _take(hidden_BLD: Tensor, position_B: Tensor) -> Tensor:
    row_B = torch.arange(len(position_B), device=hidden_BLD.device)
    return hidden_BLD[row_B, position_B].to(_result_dtype(hidden_BLD))


def _weights(mask_BL: Tensor, *, positions_BL: Tensor | None = None) -> Tensor:
    """Return how much each token counts, in integers where the mask has no weights."""
    weights_BL = mask_BL if mask_BL.is_floating_point() else mask_BL.long()
    return weights_BL if positions_BL is None else weights_BL * positions_BL


def _mean_pool(hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    return _weighted_sum_mean(hidden_BLD, mask_BL != 0, _weights(mask_BL))


def _position_pool(hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    is_kept_BL = mask_BL != 0
    weights_BL = _weights(mask_BL, positions_BL=is_kept_BL.cumsum(dim=1))
    return _weighted_sum_mean(hidden_BLD, is_kept_BL, weights_BL)


def moments(hidden_BLD: Tensor, mask_BL: Tensor, weights_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return means ``(B, D)``, weighted sums of squares about them, and sums of weights ``(B, 1)``.

    In two passes: the difference of a sum of squares and a squared sum would lose what varies little.
    """
    sum_BD, weight_B1 = weighted_sum(hidden_BLD, mask_BL, weights_BL)
    mean_BD = sum_BD / weight_B1
    weights_BL = torch.where(mask_BL, weights_BL, 0).to(sum_BD.dtype)
    squares_BD = torch.zeros_like(sum_BD)
    for chunk, kept_BLD in _kept_chunks(hidden_BLD, mask_BL, 0):
        from_mean_BLD = kept_BLD.to(sum_BD.dtype) - mean_BD[:, None]
        squares_BD += torch.bmm(weights_BL[:, None, chunk], from_mean_BLD.square())[:, 0]
    return mean_BD, squares_BD, weight_B1


def _mean_and_std(mean_BD: Tensor, squares_BD: Tensor, weight_B1: Tensor) -> Tensor:
    variance_BD = squares_BD / weight_B1
    varies_BD = variance_BD > 0
    # the root has no gradient at 0, and NaN would go into all weights
    std_BD = torch.where(varies_BD, torch.where(varies_BD, variance_BD, 1.0).sqrt(), variance_BD)
    return torch.cat([mean_BD, std_BD], dim=-1)


def _moments_pool(hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    found = moments(hidden_BLD, mask_BL != 0, _weights(mask_BL))
    return _mean_and_std(*found).to(_result_dtype(hidden_BLD))


def _merge_moments(vectors_KD: Tensor, weights_K: Tensor) -> Tensor:
    wide = torch.float32 if vectors_KD.device.type == "mps" else torch.float64
    means_KD, stds_KD = vectors_KD.to(wide).chunk(2, dim=-1)
    shares_K1 = (weights_K.to(wide) / weights_K.to(wide).sum())[:, None]
    mean_D = (shares_K1 * means_KD).sum(dim=0)
    variance_D = (shares_K1 * (stds_KD.square() + (means_KD - mean_D).square())).sum(dim=0)
    return torch.cat([mean_D, variance_D.sqrt()]).to(_result_dtype(vectors_KD))


_REDUCERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean_pool,
    "max": lambda hidden, mask: _max_pool(hidden, mask != 0),
    "first": lambda hidden, mask: _first_pool(hidden, mask != 0),
    "last": lambda hidden, mask: _last_pool(hidden, mask != 0),
    "cls": lambda hidden, mask: _first_pool(hidden, mask != 0),
    "weighted_mean": _position_pool,
    "mean_std": _moments_pool,
}


class RunningPool:
    """Pools the blocks of rows from left to right; memory does not grow with their number.

    Example:
        >>> running = RunningPool("mean")
        >>> running.add(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[True, True]]))
        >>> running.add(torch.tensor([[[6.0], [9.0]]]), torch.tensor([[True, False]]))
        >>> running.pooled()
        tensor([[3.]])
    """

    def __init__(self, method: TokenPooling) -> None:
        self._method = method
        self._dtype = torch.float32
        self._sum_BD: Tensor | None = None
        self._weight_B1: Tensor | None = None
        self._kept_B1: Tensor | None = None
        self._chosen_BD: Tensor | None = None
        self._moments: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, hidden_BLD: Tensor, mask_BL: Tensor) -> None:
        """Take the next block in."""
        if hidden_BLD.dtype == torch.float64:
            self._dtype = torch.float64
        if self._method in ("mean", "weighted_mean"):
            self._add_sum(hidden_BLD, mask_BL)
            return
        if self._method == "mean_std":
            self._add_moments(*moments(hidden_BLD, mask_BL != 0, _weights(mask_BL)))
            return
        block_BD = pool(hidden_BLD, mask_BL, method=self._method, empty="nan")
        count_B1 = (mask_BL != 0).sum(dim=1, keepdim=True)
        if self._chosen_BD is None or self._kept_B1 is None:
            self._chosen_BD, self._kept_B1 = block_BD, count_B1
        elif self._method != "cls":  # which is the first token of the first block
            # a block without kept tokens has NaN for a vector: neither side may take it over
            joined_BD = block_BD
            if self._method == "max":
                joined_BD = torch.maximum(self._chosen_BD, block_BD)
            elif self._method == "first":
                joined_BD = self._chosen_BD
            joined_BD = torch.where(self._kept_B1 == 0, block_BD, joined_BD)
            self._chosen_BD = torch.where(count_B1 == 0, self._chosen_BD, joined_BD)
            self._kept_B1 = self._kept_B1 + count_B1

    def pooled(self) -> Tensor:
        """Return one vector per row."""
        if self._sum_BD is not None and self._weight_B1 is not None:
            return (self._sum_BD / self._weight_B1).to(self._dtype)
        if self._moments is not None:
            return _mean_and_std(*self._moments).to(self._dtype)
        assert self._chosen_BD is not None, "a batch has a block"
        return self._chosen_BD

    def _add_sum(self, hidden_BLD: Tensor, mask_BL: Tensor) -> None:
        is_kept_BL = mask_BL != 0
        count_BL = is_kept_BL.cumsum(dim=1)
        if self._method == "mean":
            weights_BL = _weights(mask_BL)
        else:
            # positions go on counting where the block before ended
            positions_BL = count_BL if self._kept_B1 is None else count_BL + self._kept_B1
            weights_BL = _weights(mask_BL, positions_BL=positions_BL)
        sum_BD, weight_B1 = weighted_sum(hidden_BLD, is_kept_BL, weights_BL)
        self._sum_BD = sum_BD if self._sum_BD is None else self._sum_BD + sum_BD
        self._weight_B1 = weight_B1 if self._weight_B1 is None else self._weight_B1 + weight_B1
        block_B1 = count_BL[:, -1:]
        self._kept_B1 = block_B1 if self._kept_B1 is None else self._kept_B1 + block_B1

    def _add_moments(self, mean_BD: Tensor, squares_BD: Tensor, weight_B1: Tensor) -> None:
        """Join the moments of two parts (Chan, Golub and LeVeque 1979)."""
        if self._moments is None:
            self._moments = mean_BD, squares_BD, weight_B1
            return
        mean_before_BD, squares_before_BD, weight_before_B1 = self._moments
        total_B1 = weight_before_B1 + weight_B1
        # a part without kept tokens has NaN for a mean
        mean_before_BD = torch.where(weight_before_B1 > 0, mean_before_BD, mean_BD)
        apart_BD = torch.where(weight_B1 > 0, mean_BD, mean_before_BD) - mean_before_BD
        share_B1 = torch.where(total_B1 > 0, weight_B1 / total_B1, 0.0)
        squares_BD = torch.where(weight_B1 > 0, squares_BD, 0.0)
        squares_before_BD = torch.where(weight_before_B1 > 0, squares_before_BD, 0.0)
        self._moments = (
            mean_before_BD + apart_BD * share_B1,
            squares_before_BD + squares_BD + apart_BD.square() * (weight_before_B1 * share_B1),
            total_B1,
        )


class BatchPooling:
    """Reduces the activations of one batch as its layers run."""

    def __init__(self, method: Pooling, batch: Batch) -> None:
        self.seconds = 0.0
        self._method = method
        self._batch = batch
        self._counts = batch.counted.sum(dim=1).tolist()
        self._masks: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._running: dict[str, RunningPool] = {}
        self._parts: dict[str, list[Tensor]] = defaultdict(list)
        self._tokens: dict[str, list[tuple[Tensor, ...]]] = {}

    def __call__(self, _: str, hidden_BLD: Tensor) -> Tensor:
        started = time.perf_counter()
        mask_BL, real_BL = self._masks_on(hidden_BLD.device)
        if self._method == "none":
            # to the CPU at once: unlike pooled vectors these would fill the device
            taken = hidden_BLD[mask_BL != 0].float().cpu()
        else:
            # every row has a token; to make sure would stop a GPU at each layer
            taken = pool(hidden_BLD, mask_BL, method=self._method, attention_mask_BL=real_BL, empty="nan")
        self.seconds += time.perf_counter() - started
        return taken

    def take_block(self, layer: str, hidden_BCD: Tensor, span: slice) -> None:
        """Take the activations of some positions in."""
        started = time.perf_counter()
        mask_BC = self._masks_on(hidden_BCD.device)[0][:, span]
        if self._method == "none":
            is_kept_BC = mask_BC != 0
            tokens = tuple(row[kept].float().cpu() for row, kept in zip(hidden_BCD, is_kept_BC, strict=True))
            self._tokens.setdefault(layer, []).append(tokens)
        elif self._batch.parts:
            self._pool_parts(layer, hidden_BCD, mask_BC, span)
        else:
            if layer not in self._running:
                self._running[layer] = RunningPool(self._method)
            self._running[layer].add(hidden_BCD, mask_BC)
        self.seconds += time.perf_counter() - started

    def _pool_parts(self, layer: str, hidden_1CD: Tensor, mask_1C: Tensor, span: slice) -> None:
        """Take a block in that may end some parts and begin another."""
        assert self._method != "none", "vectors of tokens are not pooled"
        done = self._parts[layer]
        for part in self._batch.parts[len(done) :]:
            first, last = max(part.start, span.start), min(part.stop, span.stop)
            if first >= last:
                return
            here = slice(first - span.start, last - span.start)
            running = self._running.setdefault(layer, RunningPool(self._method))
            running.add(hidden_1CD[:, here], mask_1C[:, here])
            if part.stop > span.stop:
                return
            done.append(self._running.pop(layer).pooled())

    def joined(self) -> dict[str, Tensor]:
        """Join what the blocks gave, as if all positions had come at once."""
        if self._batch.parts:
            return {layer: torch.cat(vectors) for layer, vectors in self._parts.items()}
        if self._method == "none":
            return {
                layer: torch.cat([block[row] for row in range(len(self._counts)) for block in blocks])
                for layer, blocks in self._tokens.items()
            }
        return {layer: running.pooled() for layer, running in self._running.items()}

    def split(self, vectors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Split token vectors into rows; the rows of a matrix are split already."""
        return torch.split(vectors, self._counts) if self._method == "none" else vectors

    def _masks_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._masks:
            self._masks[device] = self._batch.pool_mask.to(device), self._batch.attention_mask.to(device)
        return self._masks[device]
