"""Filters laid out as matrices for products over chunks of a sequence.

G filter groups, K taps, D channels, S states, C chunk length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def toeplitz_matrix(taps: Tensor, *, num_rows: int, history: int) -> Tensor:
    """Lay filters out as banded matrices that turn ``history + num_rows`` inputs into ``num_rows`` outputs.

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
    first_row = taps[:, :kept].flip(-1)
    # place tap 0 of row 0 at column num_rows - 1 + history, later cut to columns num_rows - 1 onwards
    left = history + num_rows - kept
    row = F.pad(first_row, (left, span - left - kept + 1))  # one longer than span: this shears the rows
    sheared = row[:, None, :].expand(num_filters, num_rows, span + 1).reshape(num_filters, -1)
    rectangle = sheared[:, : num_rows * span].view(num_filters, num_rows, span)
    return rectangle[:, :, num_rows - 1 :]


def convolution_matrix(taps: Tensor, *, chunk: int, dtype: torch.dtype) -> Tensor:
    """Lay filters out for :func:`causal_convolution`; worth keeping while the taps stay."""
    history = -(-(taps.shape[1] - 1) // chunk) * chunk
    return toeplitz_matrix(taps.to(_accumulator(dtype)), num_rows=chunk, history=history).to(dtype)


class ModalMatrices(NamedTuple):
    """A modal filter laid out for chunks of C positions."""

    inside_DCC: Tensor
    """What input j of a chunk gives to output i, at ``[:, j, i]``."""
    entering_DCS: Tensor
    """What input j of a chunk adds to the state after it."""
    leaving_DSC: Tensor
    """What the state before a chunk gives to output i."""
    decay_DS: Tensor
    """What is left of a state after a chunk. float32 or float64."""


def modal_matrices(log_poles: Tensor, residues: Tensor, *, chunk: int, dtype: torch.dtype) -> ModalMatrices:
    """Lay a modal filter out for :func:`modal_convolution`; worth keeping while poles and residues stay."""
    accumulator = _accumulator(dtype)
    log_poles, residues = log_poles.to(accumulator), residues.to(accumulator)
    steps = torch.arange(chunk, device=log_poles.device, dtype=accumulator)
    decay_DSC = torch.exp(log_poles[:, :, None] * steps)  # a mode's value after 0 .. C - 1 steps
    impulse_DC = torch.bmm(residues[:, None], decay_DSC)[:, 0]
    inside_DCC = toeplitz_matrix(impulse_DC, num_rows=chunk, history=0).transpose(1, 2)
    # what the state before the chunk still gives after 1 .. C steps
    leaving_DSC = (residues * torch.exp(log_poles))[:, :, None] * decay_DSC
    return ModalMatrices(
        inside_DCC.to(dtype),
        decay_DSC.flip(-1).transpose(1, 2).to(dtype),
        leaving_DSC.to(dtype),
        torch.exp(log_poles * chunk),
    )


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
