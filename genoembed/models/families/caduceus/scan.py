"""Mamba's selective scan in plain torch: chunk by chunk, so that memory does not grow with the states.

B rows, L positions, T positions of a chunk, E channels, N states of a channel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def selective_scan(
    u_BLE: Tensor,
    raw_step_BLE: Tensor,
    gate_BLE: Tensor,
    A_NE: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    skip_E: Tensor,
    *,
    reverse: bool = False,
) -> Tensor:
    """Run Mamba's recurrence over the positions, and gate what it gives.

    With ``step = softplus(raw_step)``, ``h[t] = exp(step[t] A) h[t-1] + step[t] u[t] B[t]`` and
    ``y[t] = (C[t] h[t] + skip u[t]) silu(gate[t])``. Computed in float32. The states of all positions never
    exist at once: they are computed chunk by chunk, and again in the backward pass.

    Args:
        u_BLE: What flows in, shape ``(B, L, E)``.
        raw_step_BLE: Sizes of the steps before the softplus.
        gate_BLE: Gates before the SiLU.
        A_NE: Rates of decay, all negative.
        B_BLN: How each position writes to the states.
        C_BLN: How each position reads the states.
        skip_E: Weights of the direct way.
        reverse: Go from the last position to the first.

    Returns:
        ``y`` in the dtype of ``u_BLE``, shape ``(B, L, E)``.
    """
    by_position = (u_BLE, raw_step_BLE, gate_BLE, B_BLN, C_BLN)
    parameters = (A_NE.float(), skip_E.float())
    chunk, num_rows = _tile(A_NE)
    keeps_graph = torch.is_grad_enabled() and any(t.requires_grad for t in (*by_position, *parameters))
    y_BLE = torch.empty_like(u_BLE, memory_format=torch.contiguous_format)
    # used by chunk after chunk: to allocate them anew takes longer than to fill them
    room = torch.empty((2, min(num_rows, len(u_BLE)), chunk, *A_NE.shape), device=A_NE.device)
    starts = range(0, u_BLE.shape[1], chunk)
    found = []
    for row in range(0, len(u_BLE), num_rows):
        rows = slice(row, row + num_rows)
        state = torch.zeros_like(room[0, : len(u_BLE[rows]), 0])
        pieces = []
        for start in reversed(starts) if reverse else starts:
            span = slice(start, start + chunk)
            inputs = [tensor[rows, span] for tensor in by_position]
            if reverse:
                inputs = [tensor.flip(1) for tensor in inputs]
            if keeps_graph:
                y, state = checkpoint(
                    _scan_chunk, *inputs, *parameters, state, use_reentrant=False, preserve_rng_state=False
                )
                pieces.append(y.flip(1) if reverse else y)
            else:
                y, state = _scan_chunk(*(*inputs, *parameters, state), room=room)
                y_BLE[rows, span] = y.flip(1) if reverse else y
        if keeps_graph:
            found.append(torch.cat(pieces[::-1] if reverse else pieces, dim=1))
    return torch.cat(found) if keeps_graph else y_BLE


def _tile(A_NE: Tensor) -> tuple[int, int]:
    """Choose how many positions and rows a chunk has.

    On a CPU its states stay in the cache. Positions do not depend on the number of rows, so that a row gives
    the same in any batch.
    """
    num_values, most = (2**19, 128) if A_NE.device.type == "cpu" else (2**25, 1024)
    chunk = 16
    while chunk < most and 2 * chunk * A_NE.numel() <= num_values:
        chunk *= 2
    return chunk, max(1, num_values // (chunk * A_NE.numel()))


def _scan_chunk(
    u_BTE: Tensor,
    raw_step_BTE: Tensor,
    gate_BTE: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    A_NE: Tensor,
    skip_E: Tensor,
    state_BNE: Tensor,
    *,
    room: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a chunk from the state before it; return its outputs and the state after it.

    Where no gradients are wanted, ``room`` is for its decays and states.
    """
    dtype = u_BTE.dtype
    u_BTE, step_BTE = u_BTE.float(), F.softplus(raw_step_BTE.float())
    decays, inflows = (None, None) if room is None else room[:, : u_BTE.shape[0], : u_BTE.shape[1]]
    decay_BTNE = torch.mul(step_BTE[:, :, None], A_NE, out=decays).exp_()
    inflow_BTNE = torch.mul((step_BTE * u_BTE)[:, :, None], B_BTN.float()[..., None], out=inflows)
    if room is None:
        states_BTNE = _LinearRecurrence.apply(decay_BTNE, inflow_BTNE, state_BNE)
    else:
        states_BTNE = _recur(decay_BTNE, inflow_BTNE, state_BNE, inflow_BTNE)
    y_BTE = (C_BTN.float()[:, :, None] @ states_BTNE)[:, :, 0] + u_BTE * skip_E
    # cloned: the next chunk writes over the states, or would hold all of them
    return (y_BTE * F.silu(gate_BTE.float())).to(dtype), states_BTNE[:, -1].clone()


class _LinearRecurrence(torch.autograd.Function):
    """``h[t] = decay[t] h[t-1] + inflow[t]``; the gradient is the same recurrence from right to left."""

    @staticmethod
    def forward(ctx: Any, decay_BTNE: Tensor, inflow_BTNE: Tensor, start_BNE: Tensor) -> Tensor:
        states_BTNE = _recur(decay_BTNE, inflow_BTNE, start_BNE, torch.empty_like(decay_BTNE))
        ctx.save_for_backward(decay_BTNE, states_BTNE, start_BNE)
        return states_BTNE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTNE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay_BTNE, states_BTNE, start_BNE = ctx.saved_tensors
        # a state acts on the next one by the decay of the next position
        next_decay_BTNE = torch.cat((decay_BTNE[:, 1:], torch.zeros_like(decay_BTNE[:, :1])), dim=1)
        grad_BTNE = grad_BTNE.flip(1)
        flow_BTNE = _recur(next_decay_BTNE.flip(1), grad_BTNE, torch.zeros_like(start_BNE), grad_BTNE).flip(1)
        before_BTNE = torch.cat((start_BNE[:, None], states_BTNE[:, :-1]), dim=1)
        return flow_BTNE * before_BTNE, flow_BTNE, decay_BTNE[:, 0] * flow_BTNE[:, 0]


def _recur(decay_BTNE: Tensor, inflow_BTNE: Tensor, start_BNE: Tensor, out_BTNE: Tensor) -> Tensor:
    """Fill ``out`` (which may be ``inflow``) with the states of a linear recurrence.

    Nothing is divided and no exponential of a sum is taken, so that no decay, however fast, overflows. Step
    after step on a CPU, where a step costs what its values cost. Elsewhere a step costs a launch: there,
    blocks of positions run in parallel from zero, and then each gets what is left of the state before it.
    """
    length = decay_BTNE.shape[1]
    block = length if decay_BTNE.device.type == "cpu" else math.isqrt(length - 1) + 1
    return _recur_in_blocks(decay_BTNE, inflow_BTNE, start_BNE, out_BTNE, block=block)


def _recur_in_blocks(
    decay_BTNE: Tensor, inflow_BTNE: Tensor, start_BNE: Tensor, out_BTNE: Tensor, *, block: int
) -> Tensor:
    length = decay_BTNE.shape[1]
    in_blocks = length - length % block if block < length else 0
    state_BNE = start_BNE
    if in_blocks:
        decays, inflows, outs = (
            tensor[:, :in_blocks].unflatten(1, (-1, block)) for tensor in (decay_BTNE, inflow_BTNE, out_BTNE)
        )
        left = decays.clone()  # of the state before the block
        outs[:, :, 0] = inflows[:, :, 0]
        for t in range(1, block):
            torch.addcmul(inflows[:, :, t], decays[:, :, t], outs[:, :, t - 1], out=outs[:, :, t])
            left[:, :, t] *= left[:, :, t - 1]
        for index in range(in_blocks // block):
            outs[:, index].addcmul_(left[:, index], state_BNE[:, None])
            state_BNE = outs[:, index, -1]
    steps = (tensor[:, in_blocks:].unbind(1) for tensor in (decay_BTNE, inflow_BTNE, out_BTNE))
    for decay_BNE, inflow_BNE, out_BNE in zip(*steps, strict=True):
        state_BNE = torch.addcmul(inflow_BNE, decay_BNE, state_BNE, out=out_BNE)
    return out_BTNE
