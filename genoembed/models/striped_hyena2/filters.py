"""Filters as matrices for products over chunks of a sequence: what depends on weights and length alone.

A :class:`FilterCache` keeps them for the next sequence.

G filter groups, K taps, D channels, S states (modes), C chunk length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from genoembed.models.precision import without_autocast

if TYPE_CHECKING:
    from collections.abc import Callable


def toeplitz_matrix(taps: Tensor, *, num_rows: int, history: int) -> Tensor:
    """Build banded matrices of filters that turn ``history + num_rows`` inputs into ``num_rows`` outputs.

    Entry ``[i, j]`` is ``taps[history + i - j]``, zero outside the filter. Built by shearing one repeated
    row, so that the gradient is a dense sum, not a scatter.

    Example:
        >>> toeplitz_matrix(torch.tensor([[1.0, 2.0]]), num_rows=2, history=1)[0]
        tensor([[2., 1., 0.],
                [0., 2., 1.]])
    """
    num_filters, num_taps = taps.shape
    kept = min(num_taps, history + num_rows)
    span = history + 2 * num_rows - 1  # columns of the sheared rectangle, one row shift to the right per row
    # row 0, read right to left from column history + num_rows - 1: taps[0], taps[1], ...
    # taps beyond history + num_rows reach no input and are left out
    first_row = taps[:, :kept].flip(-1)
    # place tap 0 of row 0 at column num_rows - 1 + history, later cut to columns num_rows - 1 onwards
    left = history + num_rows - kept
    row = F.pad(first_row, (left, span - left - kept + 1))  # one longer than span: this shears the rows
    sheared = row[:, None, :].expand(num_filters, num_rows, span + 1).reshape(num_filters, -1)
    rectangle = sheared[:, : num_rows * span].view(num_filters, num_rows, span)
    return rectangle[:, :, num_rows - 1 :]


def convolution_matrix(taps: Tensor, *, chunk: int, dtype: torch.dtype) -> Tensor:
    """Prepare filters for :func:`causal_convolution`; worth keeping while the taps stay the same."""
    # whole chunks of history, so that the chunks before one are views of the same rows
    history = -(-(taps.shape[1] - 1) // chunk) * chunk
    return toeplitz_matrix(taps.to(_accumulator(dtype)), num_rows=chunk, history=history).to(dtype)


class ModalMatrices(NamedTuple):
    """A modal filter prepared for chunks of C positions."""

    inside_DCC: Tensor
    """What input j of a chunk gives to output i, at ``[:, j, i]``."""
    entering_DCS: Tensor
    """What input j of a chunk adds to the state after it."""
    leaving_DSC: Tensor
    """What the state before a chunk gives to output i."""
    decay_DS: Tensor
    """What is left of a state after a chunk. float32 or float64."""


def modal_matrices(log_poles: Tensor, residues: Tensor, *, chunk: int, dtype: torch.dtype) -> ModalMatrices:
    """Prepare a modal filter for :func:`modal_convolution`; worth keeping while poles and residues stay."""
    accumulator = _accumulator(dtype)
    log_poles, residues = log_poles.to(accumulator), residues.to(accumulator)
    steps = torch.arange(chunk, device=log_poles.device, dtype=accumulator)
    # Poles are real and stored as logarithms (below 0), so a power is one exp of a product, not a chain of
    # rounded products. Entry [d, s, t]: what is left of a mode after t = 0 .. C - 1 steps.
    decay_DSC = torch.exp(log_poles[:, :, None] * steps)
    with without_autocast(log_poles.device):  # it would sum the modes in half precision
        impulse_DC = torch.bmm(residues[:, None], decay_DSC)[:, 0]
    inside_DCC = toeplitz_matrix(impulse_DC, num_rows=chunk, history=0).transpose(1, 2)
    # The state before the chunk is a mode's value at the chunk's last position but one chunk ago: output i is
    # i + 1 steps later, hence the extra pole. Residues weigh here and in `inside`, never in the state itself.
    leaving_DSC = (residues * torch.exp(log_poles))[:, :, None] * decay_DSC
    return ModalMatrices(
        inside_DCC.to(dtype),
        decay_DSC.flip(-1).transpose(1, 2).to(dtype),
        leaving_DSC.to(dtype),
        torch.exp(log_poles * chunk),
    )


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


_Built = TypeVar("_Built")


class FilterCache:
    """What was built last of the weights of one filter."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._weights: tuple[Tensor, ...] = ()
        self._built: object = None

    def get(
        self, build: Callable[[], _Built], weights: tuple[Tensor, ...], key: tuple[object, ...]
    ) -> _Built:
        """Return what ``build`` returns, built anew only for another key or other weights.

        Example:
            >>> cache, weight = FilterCache(), torch.ones(2)
            >>> first = cache.get(lambda: weight * 2, (weight,), ())
            >>> cache.get(lambda: weight * 2, (weight,), ()) is first
            True
            >>> weight.data[0] = 5.0
            >>> cache.get(lambda: weight * 2, (weight,), ())
            tensor([10.,  2.])
        """
        # By value: optimizers, merged adapters and `load_state_dict` change weights in place, and tensors'
        # version counters do not see a change through `.data`.
        is_same = key == self._key and all(
            kept.dtype == now.dtype and kept.device == now.device and torch.equal(kept, now)
            for kept, now in zip(self._weights, weights, strict=True)
        )
        if not is_same:
            self._built = build()
            # copies, as the weights themselves would always equal themselves
            self._weights = tuple(weight.detach().clone() for weight in weights)
            self._key = key
        built: _Built = self._built  # type: ignore[assignment]
        return built
