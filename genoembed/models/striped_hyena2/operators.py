"""The convolutions of StripedHyena 2: exactly causal, differentiable, channels last, without FFT.

Everything takes and returns ``(B, L, D)``, the layout in which a Linear leaves its output, so nothing is
transposed between a projection and its filter. Sums are float32 (float64 for float64 input); the result is
rounded once to the input's dtype.

B sequences, L positions, D channels, G filter groups (each serves ``D / G`` neighbouring channels),
K taps, S states, C chunk length, M chunks.

With ``starts_BM`` the row is cut into M equal chunks, and history ends where a chunk starts afresh: what lies
before it has no influence and gets no gradient, exactly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 128
"""Positions a Toeplitz product covers."""


def causal_fir(x: Tensor, taps: Tensor, *, starts_BM: Tensor | None = None) -> Tensor:
    """Correlate each channel with a short filter whose last tap weighs the current position.

    ``y[t] = sum_k taps[k] * x[t - (K - 1) + k]``, as shifted multiply-adds.

    Args:
        x: Input. Floating, shape ``(B, L, D)``.
        taps: Filters. Floating, shape ``(G, K)``; G divides D.
        starts_BM: True where a chunk starts afresh. Bool, shape ``(B, M)``; M divides L.

    Returns:
        Shape ``(B, L, D)``, dtype of ``x``.

    Example:
        >>> x = torch.tensor([[[1.0], [10.0], [100.0]]])
        >>> causal_fir(x, torch.tensor([[0.5, 1.0]])).flatten()
        tensor([  1.0000,  10.5000, 105.0000])
    """
    length, num_taps = x.shape[1], taps.shape[1]
    weights = taps.to(_accumulator(x)).repeat_interleave(x.shape[2] // taps.shape[0], dim=0)
    if starts_BM is None:
        padded = F.pad(x, (0, 0, num_taps - 1, 0)).to(weights.dtype)
    else:
        frames_BMFD = _chunks_with_history(x, starts_BM, num_taps - 1)
        padded = frames_BMFD.flatten(0, 1).to(weights.dtype)
        length = x.shape[1] // starts_BM.shape[1]
    total = padded[:, num_taps - 1 :] * weights[:, -1]
    for k in range(num_taps - 1):
        total = total + padded[:, k : k + length] * weights[:, k]
    return total.view_as(x).to(x.dtype)


def causal_convolution(
    x: Tensor, taps: Tensor, skip: Tensor | None = None, *, starts_BM: Tensor | None = None
) -> Tensor:
    """Convolve each channel with a filter whose first tap weighs the current position.

    ``y[t] = sum_k taps[k] * x[t - k] + skip * x[t]``, as one Toeplitz product per filter group over chunks of
    the sequence and what precedes them.

    Args:
        x: Input. Floating, shape ``(B, L, D)``.
        taps: Filters. Floating, shape ``(G, K)``; G divides D.
        skip: Weight of the input itself. Floating, shape ``(D,)``.
        starts_BM: True where a chunk starts afresh. Bool, shape ``(B, M)``; M divides L.

    Returns:
        Shape ``(B, L, D)``, dtype of ``x``; one rounding.

    Example:
        >>> x = torch.tensor([[[1.0], [10.0], [100.0]]])
        >>> causal_convolution(x, torch.tensor([[1.0, 0.5]])).flatten()
        tensor([  1.0000,  10.5000, 105.0000])
    """
    batch, length, width = x.shape
    if not length:
        return x
    num_groups = taps.shape[0]
    taps = taps[:, :length].to(_accumulator(x))
    chunk = min(CHUNK, length) if starts_BM is None else length // starts_BM.shape[1]
    history = -(-(taps.shape[1] - 1) // chunk) * chunk
    num_chunks = -(-length // chunk)
    if starts_BM is None:
        padded = F.pad(x, (0, 0, history, num_chunks * chunk - length))
        frames_BMFD = padded.unfold(1, history + chunk, chunk).transpose(2, 3)
    else:
        frames_BMFD = _chunks_with_history(x, starts_BM, history)
    frames = frames_BMFD.reshape(batch * num_chunks, history + chunk, num_groups, width // num_groups)
    columns = frames.permute(2, 1, 0, 3).reshape(num_groups, history + chunk, -1).to(taps.dtype)
    toeplitz = toeplitz_matrix(taps, num_rows=chunk, history=history)
    product = torch.bmm(toeplitz, columns).view(num_groups, chunk, batch, num_chunks, width // num_groups)
    result = product.permute(2, 3, 1, 0, 4).reshape(batch, num_chunks * chunk, width)[:, :length]
    if skip is not None:
        result = result + skip.to(taps.dtype) * x
    return result.to(x.dtype)


def modal_convolution(
    x: Tensor, log_poles: Tensor, residues: Tensor, skip: Tensor, *, starts_BM: Tensor | None = None
) -> Tensor:
    """Convolve each channel with a sum of decaying exponentials over the whole past.

    ``h[t] = sum_s residues[s] * exp(log_poles[s] * t)``, ``y = round(h * x) + skip x``: within a chunk a
    Toeplitz product per channel, between chunks the S states that the exponentials carry.

    Args:
        x: Input. Floating, shape ``(B, L, D)``.
        log_poles: Logarithms of the real poles, negative. Shape ``(D, S)``.
        residues: Weight of each mode. Shape ``(D, S)``.
        skip: Weight of the input itself. Shape ``(D,)``.
        starts_BM: True where a chunk starts afresh. Bool, shape ``(B, M)``; M divides L.

    Returns:
        Shape ``(B, L, D)``, dtype of ``x``.

    Example:
        >>> x = torch.tensor([[[1.0], [0.0], [0.0]]])
        >>> half = torch.tensor([[0.5]]).log()
        >>> modal_convolution(x, half, torch.ones(1, 1), torch.zeros(1)).flatten()
        tensor([1.0000, 0.5000, 0.2500])
    """
    batch, length, width = x.shape
    if not length:
        return x
    dtype = _accumulator(x)
    log_poles, residues = log_poles.to(dtype), residues.to(dtype)
    chunk = min(CHUNK, length) if starts_BM is None else length // starts_BM.shape[1]
    num_chunks = -(-length // chunk)
    padded = F.pad(x, (0, 0, 0, num_chunks * chunk - length)).view(batch, num_chunks, chunk, width)
    columns = padded.permute(3, 2, 0, 1).reshape(width, chunk, batch * num_chunks).to(dtype)
    steps = torch.arange(chunk, device=x.device, dtype=dtype)
    decay = torch.exp(log_poles[:, :, None] * steps)  # (D, S, C): a mode's value after 0 .. C - 1 steps
    impulse = torch.einsum("ds,dsc->dc", residues, decay)
    inside = torch.bmm(toeplitz_matrix(impulse, num_rows=chunk, history=0), columns)
    if num_chunks > 1:
        num_states = log_poles.shape[1]
        entering = torch.bmm(decay.flip(-1), columns).view(width, num_states, batch, num_chunks)
        carried = _scan_chunks(entering, torch.exp(log_poles * chunk), starts_BM)
        # what the state before the chunk still gives after 1 .. C steps
        leaving = (residues * torch.exp(log_poles))[:, :, None] * decay
        carried = carried.reshape(width, num_states, batch * num_chunks)
        inside = inside + torch.bmm(leaving.transpose(1, 2), carried)
    filtered = inside.view(width, chunk, batch, num_chunks).permute(2, 3, 1, 0)
    filtered = filtered.reshape(batch, num_chunks * chunk, width)[:, :length].to(x.dtype)
    return filtered + skip.to(x.dtype) * x


def toeplitz_matrix(taps: Tensor, *, num_rows: int, history: int) -> Tensor:
    """Lay filters out as banded matrices that turn ``history + num_rows`` inputs into ``num_rows`` outputs.

    Entry ``[i, j]`` is ``taps[history + i - j]``, zero outside the filter. Built by shearing one repeated
    row, so that the gradient is a dense sum, not a scatter.

    Args:
        taps: Filters, first tap for the current position. Shape ``(G, K)``.
        num_rows: Outputs.
        history: Inputs before the first output.

    Returns:
        Shape ``(G, num_rows, history + num_rows)``, dtype of ``taps``.

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


def _chunks_with_history(x: Tensor, starts_BM: Tensor, history: int) -> Tensor:
    """Give each chunk behind the positions before it, 0 where a start lies between; ``(B, M, F, D)``."""
    batch, length, width = x.shape
    num_chunks = starts_BM.shape[1]
    chunks_BMCD = x.view(batch, num_chunks, length // num_chunks, width)
    chunk = chunks_BMCD.shape[2]
    frames = [chunks_BMCD]
    is_cut_BM = torch.zeros_like(starts_BM)
    for back in range(1, -(-history // chunk) + 1):
        # the chunk that lies `back` before is cut off by a start in this chunk or in any between
        is_cut_BM = is_cut_BM | F.pad(starts_BM, (back - 1, 0), value=True)[:, :num_chunks]
        earlier = F.pad(chunks_BMCD, (0, 0, 0, 0, back, 0))[:, :num_chunks]
        frames.insert(0, earlier.masked_fill(is_cut_BM[..., None, None], 0))
    joined = torch.cat(frames, dim=2)
    return joined[:, :, joined.shape[2] - chunk - history :]


def _scan_chunks(entering: Tensor, decay: Tensor, starts_BM: Tensor | None = None) -> Tensor:
    """State before each chunk, from what each chunk adds: a recurrence over the last axis, by doubling."""
    state = F.pad(entering, (1, 0))[..., :-1]
    factor = decay[:, :, None, None]
    if starts_BM is not None:
        state = state.masked_fill(starts_BM, 0)
        factor = factor.expand_as(state).masked_fill(starts_BM, 0)
    shift = 1
    while shift < entering.shape[-1]:
        state = state + factor * F.pad(state, (shift, 0))[..., :-shift]
        earlier = factor if starts_BM is None else F.pad(factor, (shift, 0))[..., :-shift]
        factor = factor * earlier
        shift *= 2
    return state


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
