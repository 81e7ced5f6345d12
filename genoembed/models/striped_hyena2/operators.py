"""The convolutions of StripedHyena 2: exactly causal, differentiable, channels last, without FFT.

Everything takes and returns ``(B, L, D)``, the layout in which a Linear leaves its output. A short filter
is a depthwise convolution in that layout. The others are Toeplitz products over chunks of the sequence, for
which channels move before positions and back. Which product serves which filter, and in which dtype, is
decided here and nowhere else. Half-precision input whose products are float32 is rounded where the original
rounds it. What depends on weights and length alone, a :class:`FilterCache` keeps for the next sequence.

B sequences, L positions, D channels, G filter groups (each serves ``D / G`` neighboring channels),
K taps, S states (modes), C chunk length, M chunks.

A sequence can come in blocks: what an operator needs of the past goes in as ``history`` or ``state``.
With ``starts_BM`` the row is cut into M equal chunks, and history ends where a chunk starts afresh: what lies
before it has no influence and gets no gradient, exactly.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from genoembed.models.precision import multiplies_bfloat16, without_autocast

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
    """What input j of a chunk adds to the state after it; of complex states, real and imaginary parts."""
    leaving_DSC: Tensor
    """What the state before a chunk gives to output i."""
    decay_DS: Tensor
    """What is left of a state after a chunk. float32 or float64, or complex of that precision."""


def modal_matrices(log_poles: Tensor, residues: Tensor, *, chunk: int, dtype: torch.dtype) -> ModalMatrices:
    """Prepare a modal filter for :func:`modal_convolution`; worth keeping while poles and residues stay."""
    accumulator = _accumulator(dtype)
    if log_poles.is_complex():
        # taken as precise as they come: an angle's error grows with the steps
        kept = accumulator.to_complex()
    else:
        kept = accumulator
        log_poles, residues = log_poles.to(accumulator), residues.to(accumulator)
    steps = torch.arange(chunk, device=log_poles.device, dtype=log_poles.real.dtype)
    # Poles come as logarithms (real ones below 0), so a power is one exp of a product, not a chain of
    # rounded products. Entry [d, s, t]: what is left of a mode after t = 0 .. C - 1 steps.
    decay_DSC = torch.exp(log_poles[:, :, None] * steps)
    with without_autocast(log_poles.device):  # it would sum the modes in half precision
        impulse_DC = torch.bmm(residues[:, None], decay_DSC)[:, 0].real
    inside_DCC = toeplitz_matrix(impulse_DC, num_rows=chunk, history=0).transpose(1, 2)
    # The state before the chunk is a mode's value at the chunk's last position but one chunk ago: output i is
    # i + 1 steps later, hence the extra pole. Residues weigh here and in `inside`, never in the state itself.
    leaving_DSC = (residues * torch.exp(log_poles))[:, :, None] * decay_DSC
    # the real part of a product is that of the real parts, less that of the imaginary ones
    leaving_DCS = _as_values(leaving_DSC.transpose(1, 2).conj())
    return ModalMatrices(
        inside_DCC.to(dtype),
        _as_values(decay_DSC.flip(-1).transpose(1, 2)).to(dtype),
        leaving_DCS.transpose(1, 2).to(dtype),
        torch.exp(log_poles * chunk).to(kept),
    )


def _as_values(states: Tensor) -> Tensor:
    """Return real numbers for a product: of complex ones, real and imaginary parts in turn."""
    return torch.view_as_real(states.resolve_conj()).flatten(-2) if states.is_complex() else states


def _as_states(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `_as_values`, in the dtype of the states."""
    if not dtype.is_complex:
        return values.to(dtype)
    return torch.view_as_complex(values.to(dtype.to_real()).unflatten(-1, (-1, 2)).contiguous())


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


_Matrices = TypeVar("_Matrices")

CHUNK = 128
"""Positions that a Toeplitz product of the medium filter covers."""
MODAL_CHUNK = 64
"""The same for the long filter, whose matrices are one a channel and should stay in cache."""


def causal_fir(
    x: Tensor, taps: Tensor, *, history: Tensor | None = None, starts_BM: Tensor | None = None
) -> Tensor:
    """Correlate each channel with a short filter whose last tap weighs the current position.

    ``y[t] = sum_k taps[k] * x[t - (K - 1) + k]``.

    Example:
        >>> x = torch.tensor([[[1.0], [10.0], [100.0]]])
        >>> causal_fir(x, torch.tensor([[0.5, 1.0]])).flatten()
        tensor([  1.0000,  10.5000, 105.0000])
    """
    if not x.numel():
        return x
    # groups serve neighboring channels: channel d has filter d * G // D
    dtype, reach = product_dtype(x), taps.shape[1] - 1
    taps_DK = taps.to(dtype).repeat_interleave(x.shape[2] // taps.shape[0], dim=0)
    if starts_BM is not None:
        frames_BMFD = _chunks_with_history(x.to(dtype), starts_BM, reach)
        filtered = depthwise_correlation(frames_BMFD.flatten(0, 1), taps_DK, left_zeros=0)
        return filtered.reshape(x.shape).to(x.dtype)
    if history is not None:
        if x.shape[1] == 1:
            return _filter_position(x, history, taps_DK).to(x.dtype)
        x = torch.cat((history.to(x.dtype), x), dim=1)
    return depthwise_correlation(x.to(dtype), taps_DK, left_zeros=reach if history is None else 0).to(x.dtype)


def causal_convolution(
    x: Tensor,
    taps: Tensor,
    skip: Tensor | None = None,
    *,
    history: Tensor | None = None,
    starts_BM: Tensor | None = None,
    kept: FilterCache | None = None,
) -> Tensor:
    """Convolve each channel with a filter whose first tap weighs the current position.

    ``y[t] = sum_k taps[k] * x[t - k] + skip * x[t]``, as one Toeplitz product per filter group over chunks of
    the sequence and what precedes them. The skip is added in the dtype of the products: to a sum
    rounded to half precision, or to the float32 sum, which is then rounded once.

    Example:
        >>> x = torch.tensor([[[1.0], [10.0], [100.0]]])
        >>> causal_convolution(x, torch.tensor([[1.0, 0.5]])).flatten()
        tensor([  1.0000,  10.5000, 105.0000])
    """
    batch, length, width = x.shape
    if not x.numel():
        return x
    num_groups = taps.shape[0]
    if length == 1 and history is not None:
        dtype = product_dtype(x)
        taps_DK = taps.to(dtype).repeat_interleave(width // num_groups, dim=0)
        filtered = _filter_position(x, history, taps_DK.flip(1)).to(dtype)
        if skip is not None:
            filtered = torch.addcmul(filtered, x.to(dtype), skip.to(dtype))
        return filtered.to(x.dtype)
    if starts_BM is not None:
        chunk = length // starts_BM.shape[1]
    else:  # blocks of any length share one matrix
        chunk = min(CHUNK, length) if history is None else CHUNK
    matrix = _laid_out(convolution_matrix, (taps,), chunk, product_dtype(x), kept)
    reach = matrix.shape[2] - chunk
    num_chunks = -(-length // chunk)
    if starts_BM is not None:
        frames_BMFD = _chunks_with_history(x, starts_BM, reach)
    else:
        frames_BMFD = _overlapping_chunks(x, history, chunk=chunk, num_chunks=num_chunks, reach=reach)
    # one product per group: its channels, rows and chunks are all columns of one matrix
    frames = frames_BMFD.reshape(batch * num_chunks, reach + chunk, num_groups, width // num_groups)
    columns = frames.permute(2, 1, 0, 3).reshape(num_groups, reach + chunk, -1)
    with _in_chosen_dtype(x):
        product = torch.bmm(matrix, columns.to(matrix.dtype))
    product = product.view(num_groups, chunk, batch, num_chunks, width // num_groups)
    filtered = product.permute(2, 3, 1, 0, 4).reshape(batch, num_chunks * chunk, width)[:, :length]
    if skip is not None:
        filtered = torch.addcmul(filtered, x.to(matrix.dtype), skip.to(matrix.dtype))
    return filtered.to(x.dtype)


def _filter_position(x_B1D: Tensor, history_BTD: Tensor, taps_DK: Tensor) -> Tensor:
    """Weigh one position and those before it, the last tap the position itself; float32 or float64."""
    # a chunk's matrix would do the work of all its positions for this one
    wide = _accumulator(x_B1D.dtype)
    frame_BKD = torch.cat((history_BTD.to(x_B1D.dtype), x_B1D), dim=1)[:, -taps_DK.shape[1] :].to(wide)
    return (frame_BKD * taps_DK.t()[-frame_BKD.shape[1] :].to(wide)).sum(dim=1, keepdim=True)


class ModalOutput(NamedTuple):
    """Output of a modal filter and what it carries on."""

    output: Tensor
    """Shape ``(B, L, D)``, dtype of the input."""
    state_BDS: Tensor
    """Every mode's value after the last position. As the decay of `ModalMatrices` or wider, ``(B, D, S)``."""


def modal_convolution(
    x: Tensor,
    log_poles: Tensor,
    residues: Tensor,
    skip: Tensor,
    *,
    starts_BM: Tensor | None = None,
    kept: FilterCache | None = None,
) -> Tensor:
    """Convolve each channel with a sum of decaying exponentials over the whole past.

    ``h[t] = sum_s residues[s] * exp(log_poles[s] * t)``, ``y = round(h * x) + skip x``: within a chunk a
    Toeplitz product per channel, between chunks the S states that the exponentials carry. ``skip x`` is
    rounded, too, where half-precision input has float32 products. Of complex poles and residues, the real
    part of the sum is the filter.

    Example:
        >>> x = torch.tensor([[[1.0], [0.0], [0.0]]])
        >>> half = torch.tensor([[0.5]]).log()
        >>> modal_convolution(x, half, torch.ones(1, 1), torch.zeros(1)).flatten()
        tensor([1.0000, 0.5000, 0.2500])
    """
    if not x.numel():
        return x
    chunk = min(MODAL_CHUNK, x.shape[1]) if starts_BM is None else x.shape[1] // starts_BM.shape[1]
    with _in_chosen_dtype(x):
        matrices = _laid_out(modal_matrices, (log_poles, residues), chunk, product_dtype(x), kept)
        rows_DBMC = _channels_first(x.to(matrices.inside_DCC.dtype), chunk=chunk)
        before_DBMS = None
        if rows_DBMC.shape[2] > 1:
            before_DBMS = _states_before(_enter(rows_DBMC, matrices), matrices.decay_DS, starts_BM=starts_BM)
        return _add_skip(_leave(rows_DBMC, before_DBMS, matrices, like=x), x, skip)


def modal_convolution_from(
    x: Tensor,
    log_poles: Tensor,
    residues: Tensor,
    skip: Tensor,
    *,
    state_BDS: Tensor | None,
    kept: FilterCache | None = None,
) -> ModalOutput:
    """Go on with :func:`modal_convolution` where an earlier block of the sequence ended.

    Example:
        >>> half_life = torch.tensor([[0.5]]).log(), torch.ones(1, 1), torch.zeros(1)
        >>> first = modal_convolution_from(torch.ones(1, 1, 1), *half_life, state_BDS=None)
        >>> more = modal_convolution_from(torch.zeros(1, 2, 1), *half_life, state_BDS=first.state_BDS)
        >>> more.output.flatten()
        tensor([0.5000, 0.2500])
    """
    length, chunk = x.shape[1], MODAL_CHUNK
    if length == 1 and state_BDS is not None:
        output, state_BDS = _step(x, log_poles, residues, state_BDS)
        return ModalOutput(_add_skip(output, x, skip), state_BDS)
    with _in_chosen_dtype(x):
        matrices = _laid_out(modal_matrices, (log_poles, residues), chunk, product_dtype(x), kept)
        rows_DBMC = _channels_first(x.to(matrices.inside_DCC.dtype), chunk=chunk)
        entering_DBMS = _enter(rows_DBMC, matrices)
        before_DBMS = _states_before(entering_DBMS, matrices.decay_DS, first_BDS=state_BDS)
        filtered = _leave(rows_DBMC, before_DBMS, matrices, like=x)
        # the last chunk may be a short one: only its own positions enter, and the state fades by as many
        last = length - (rows_DBMC.shape[2] - 1) * chunk
        # they stand first in the chunk; counted back from their end, they have the matrix's last powers
        entered_DBS = torch.bmm(rows_DBMC[:, :, -1, :last], matrices.entering_DCS[:, chunk - last :])
        entered_DBS = _as_states(entered_DBS, matrices.decay_DS.dtype)
        # not a power of `decay_DS`, which is rounded already
        faded_DS = torch.exp(log_poles.to(matrices.decay_DS.dtype) * last)
        state_DBS = before_DBMS[:, :, -1] * faded_DS[:, None] + entered_DBS
        return ModalOutput(_add_skip(filtered, x, skip), state_DBS.transpose(0, 1))


def _step(x_B1D: Tensor, log_poles: Tensor, residues: Tensor, state_BDS: Tensor) -> tuple[Tensor, Tensor]:
    """Take one step of the recurrence that a modal filter is; the output and the state after it."""
    wide = torch.float64 if x_B1D.device.type != "mps" else _accumulator(x_B1D.dtype)
    wide = wide.to_complex() if log_poles.is_complex() else wide
    # Step by step, powers of a pole are a chain of products: with a float32 pole of 0.9999 they would be off
    # by 6e-4 after ten thousand steps. In float64 the whole sequence at once errs more than this does.
    state_BDS = state_BDS.to(wide) * torch.exp(log_poles.to(wide)) + x_B1D[:, 0, :, None].to(wide)
    return (state_BDS * residues.to(wide)).sum(dim=-1).real[:, None].to(x_B1D.dtype), state_BDS


def product_dtype(x: Tensor) -> torch.dtype:
    """Dtype in which filters are multiplied; every sum is float32 (float64 for float64).

    Half precision only where the machine multiplies in it; elsewhere float32 is faster.
    """
    if x.dtype not in _HALF or x.device.type == "cuda":
        return x.dtype
    is_faster = x.device.type == "cpu" and x.dtype == torch.bfloat16 and multiplies_bfloat16()
    return torch.bfloat16 if is_faster else torch.float32


def _in_chosen_dtype(x: Tensor) -> AbstractContextManager[None]:
    """Autocast must not take back that half-precision input is multiplied in float32."""
    return nullcontext() if product_dtype(x) == x.dtype else without_autocast(x.device)


def _add_skip(filtered: Tensor, x: Tensor, skip: Tensor) -> Tensor:
    """Add ``skip x`` to what the modal filter gives, which is rounded already.

    The original multiplies filters in float32 and rounds ``skip x`` before it adds. With float32 products so
    do we, and values are the original's to the bit but for the order of sums. Sparing the rounding
    gains nothing on average, and on one short input (b_1m in ``tests/golden``) it errs 1.27 times as much.
    """
    if product_dtype(x) == x.dtype:
        return torch.addcmul(filtered, x, skip.to(x.dtype))
    return filtered + x * skip.to(x.dtype)


_HALF = (torch.bfloat16, torch.float16)
# asked once: the compiler cannot ask, and would compile a block in pieces around the question
_HAS_ONEDNN = torch.backends.mkldnn.is_available()


def _laid_out(
    build: Callable[..., _Matrices],
    weights: tuple[Tensor, ...],
    chunk: int,
    dtype: torch.dtype,
    kept: FilterCache | None,
) -> _Matrices:
    if kept is None:
        return build(*weights, chunk=chunk, dtype=dtype)
    return kept.get(lambda: build(*weights, chunk=chunk, dtype=dtype), weights, (chunk, dtype))


def _overlapping_chunks(
    x: Tensor, history: Tensor | None, *, chunk: int, num_chunks: int, reach: int
) -> Tensor:
    """Prepend to each chunk the ``reach`` positions before it; ``(B, M, reach + C, D)``."""
    batch, length, width = x.shape
    before = 0 if history is None else history.shape[1]
    padded = F.pad(
        x if history is None else torch.cat((history.to(x.dtype), x), dim=1),
        (0, 0, reach - before, num_chunks * chunk - length),
    )
    chunks = padded.view(batch, -1, chunk, width)
    return torch.cat([chunks[:, back : back + num_chunks] for back in range(reach // chunk + 1)], dim=2)


def _chunks_with_history(x: Tensor, starts_BM: Tensor, history: int) -> Tensor:
    """Prepend to each chunk the positions before it, 0 where a start is between; ``(B, M, F, D)``."""
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


class _Turned(torch.autograd.Function):
    """A matrix copied with its axes swapped; the gradient comes back the same way, not through a view."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        return matrix.t().contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        turned: Tensor = _Turned.apply(grad)
        return turned


def _channels_first(x: Tensor, *, chunk: int) -> Tensor:
    """Cut rows into chunks (the last filled up with zeros) and put channels first; ``(D, B, M, C)``."""
    batch, length, width = x.shape
    missing = -length % chunk
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    turned: Tensor = _Turned.apply(x.reshape(-1, width))
    return turned.view(width, batch, -1, chunk)


def _enter(rows_DBMC: Tensor, matrices: ModalMatrices) -> Tensor:
    """What each chunk adds to the states; ``(D, B, M, S)``, in the dtype of the decay."""
    width, batch, num_chunks, _ = rows_DBMC.shape
    entering = torch.bmm(rows_DBMC.flatten(1, 2), matrices.entering_DCS)
    return _as_states(entering.view(width, batch, num_chunks, -1), matrices.decay_DS.dtype)


def _leave(rows_DBMC: Tensor, before_DBMS: Tensor | None, matrices: ModalMatrices, *, like: Tensor) -> Tensor:
    """Filter each chunk, with what the states before it still give; back to ``(B, L, D)``."""
    filtered = torch.bmm(rows_DBMC.flatten(1, 2), matrices.inside_DCC)
    if before_DBMS is not None:
        before = _as_values(before_DBMS).flatten(1, 2).to(filtered.dtype)
        filtered = torch.baddbmm(filtered, before, matrices.leaving_DSC)
    batch, length, width = like.shape
    turned: Tensor = _Turned.apply(filtered.view(width, -1))
    return turned.view(batch, -1, width)[:, :length].to(like.dtype)


def _states_before(
    entering_DBMS: Tensor,
    decay_DS: Tensor,
    *,
    first_BDS: Tensor | None = None,
    starts_BM: Tensor | None = None,
) -> Tensor:
    """State before each chunk, from what each chunk adds: a recurrence over chunks, by doubling."""
    # s[m] = decay * s[m - 1] + entering[m - 1]: after doubling k, each state holds the last 2**k chunks. In
    # float32 or float64: rounded to half precision, a state would drift from chunk to chunk.
    state = F.pad(entering_DBMS, (0, 0, 1, 0))[:, :, :-1]
    if first_BDS is not None:
        first = first_BDS.to(state.dtype).transpose(0, 1)[:, :, None]
        state = torch.cat((first, state[:, :, 1:]), dim=2)
    factor = decay_DS[:, None, None]
    if starts_BM is not None:
        is_start = starts_BM[..., None]
        # a start takes nothing over, and its factor 0 keeps doubling from reaching past it
        state = state.masked_fill(is_start, 0)
        factor = factor.expand_as(state).masked_fill(is_start, 0)
    shift = 1
    while shift < entering_DBMS.shape[2]:
        state = state + factor * F.pad(state, (0, 0, shift, 0))[:, :, :-shift]
        earlier = factor if starts_BM is None else F.pad(factor, (0, 0, shift, 0))[:, :, :-shift]
        factor = factor * earlier
        shift *= 2
    return state


def depthwise_correlation(x_BFD: Tensor, taps_DK: Tensor, *, left_zeros: int) -> Tensor:
    """Correlate each channel with its taps, after ``left_zeros`` zeros before each row.

    ``y[n] = sum_k taps[k] x[n + k - left_zeros]``, summed in float32 (float64 for float64), rounded once.
    The caller chooses the dtype; autocast has no say, neither here nor in the backward pass.

    Example:
        >>> x = torch.tensor([[[1.0], [10.0], [100.0]]])
        >>> depthwise_correlation(x, torch.tensor([[0.5, 1.0]]), left_zeros=1).flatten()
        tensor([  1.0000,  10.5000, 105.0000])
    """
    output: Tensor = _DepthwiseCorrelation.apply(x_BFD, taps_DK, left_zeros)
    return output


class _DepthwiseCorrelation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BFD: Tensor, taps_DK: Tensor, left_zeros: int) -> Tensor:
        ctx.save_for_backward(x_BFD, taps_DK)
        ctx.left_zeros = left_zeros
        num_outputs = x_BFD.shape[1] + left_zeros - taps_DK.shape[1] + 1
        with without_autocast(x_BFD.device):
            return _correlate(x_BFD, taps_DK, zeros=left_zeros)[:, :num_outputs]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BND: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_BFD, taps_DK = ctx.saved_tensors
        num_taps, zeros = taps_DK.shape[1], ctx.left_zeros
        grad_x = grad_taps = None
        with without_autocast(x_BFD.device):
            if ctx.needs_input_grad[0]:
                every = _correlate(grad_BND, taps_DK.flip(1), zeros=num_taps - 1)
                grad_x = every[:, zeros : zeros + x_BFD.shape[1]]
            if ctx.needs_input_grad[1]:
                taps = [_tap_gradient(x_BFD, grad_BND, shift=k - zeros) for k in range(num_taps)]
                grad_taps = torch.stack(taps, dim=1).to(taps_DK.dtype)
        return grad_x, grad_taps, None


def _correlate(x_BFD: Tensor, taps_DK: Tensor, *, zeros: int) -> Tensor:
    """Correlate with ``zeros`` zeros before and after each row."""
    if not _has_convolution(x_BFD.device.type, x_BFD.dtype):
        return _shift_and_add(x_BFD, taps_DK, zeros=zeros)
    line = x_BFD.contiguous().transpose(1, 2).unsqueeze(2)  # (B, D, 1, F), channels last in memory
    taps = taps_DK[:, None, None, :]
    return F.conv2d(line, taps, padding=(0, zeros), groups=taps_DK.shape[0]).squeeze(2).transpose(1, 2)


def _has_convolution(device_type: str, dtype: torch.dtype) -> bool:
    """Check that torch has a library that correlates on such a device, in this dtype and no other."""
    if device_type == "cuda":
        # cuDNN rounds float32 to the 10 bits of TF32 by default; to forbid that would end a compiled graph
        return dtype in _HALF
    return device_type != "cpu" or _HAS_ONEDNN


def _shift_and_add(x_BFD: Tensor, taps_DK: Tensor, *, zeros: int) -> Tensor:
    """The same where torch has no such library, and would run channel after channel or less exactly."""
    wide = torch.float64 if x_BFD.dtype == torch.float64 else torch.float32
    padded = F.pad(x_BFD, (0, 0, zeros, zeros)).to(wide)
    num_taps = taps_DK.shape[1]
    length = padded.shape[1] - num_taps + 1
    total = padded[:, :length] * taps_DK[:, 0]
    for k in range(1, num_taps):
        total = torch.addcmul(total, padded[:, k : k + length], taps_DK[:, k].to(wide))
    return total.to(x_BFD.dtype)


def _tap_gradient(x_BFD: Tensor, grad_BND: Tensor, *, shift: int) -> Tensor:
    """``sum_n grad[n] x[n + shift]`` of each channel; half-precision products are summed in float32."""
    first = max(0, -shift)
    last = min(grad_BND.shape[1], x_BFD.shape[1] - shift)
    if last <= first:
        return grad_BND.new_zeros(grad_BND.shape[2])
    products = grad_BND[:, first:last] * x_BFD[:, first + shift : last + shift]
    if products.dtype in (torch.float32, torch.float64):
        return products.sum(dim=(0, 1))
    # a sum over rows is a product with a row of ones, which matrix units do
    flat = products.reshape(-1, products.shape[2])
    return torch.mm(flat.new_ones(1, flat.shape[0]), flat)[0]
