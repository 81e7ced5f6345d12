"""What a StripedHyena 2 model carries from one block of a sequence to the next.

A Hyena block carries a fixed amount: the last inputs of its short filters, and of its inner filter the last
inputs or the state of its modes. An attention block carries the keys and values of every position so far, the
only part that grows with the sequence: two numbers per channel, position and attention block.

B sequences, L positions of a block, T positions before it, D channels, H heads, E head size, S modes, K taps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class HyenaState:
    """Where the filters of a Hyena block stand."""

    short: tuple[Tensor, Tensor, Tensor]
    """Last inputs of the short filters of both gates and the value. Each ``(B, K - 1, D)``."""
    inner: Tensor
    """Last inputs of the inner filter, ``(B, K - 1, D)``, or the state of its modes, ``(B, D, S)``."""


@dataclass(slots=True)
class AttentionState:
    """Keys and values of the positions so far, in buffers that double when they are full."""

    length: int = 0
    """Positions held."""
    _keys: Tensor | None = None
    _values: Tensor | None = None

    def append(self, keys_BHLE: Tensor, values_BHLE: Tensor) -> tuple[Tensor, Tensor]:
        """Add a block's keys and values."""
        start, self.length = self.length, self.length + keys_BHLE.shape[2]
        self._keys = _with_room(self._keys, keys_BHLE, used=start, needed=self.length)
        self._values = _with_room(self._values, values_BHLE, used=start, needed=self.length)
        self._keys[:, :, start : self.length] = keys_BHLE
        self._values[:, :, start : self.length] = values_BHLE
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order."""
        if self._keys is not None and self._values is not None:
            self._keys = self._keys.index_select(0, rows.to(self._keys.device))
            self._values = self._values.index_select(0, rows.to(self._values.device))


def _with_room(buffer: Tensor | None, like_BHLE: Tensor, *, used: int, needed: int) -> Tensor:
    if buffer is not None and buffer.shape[2] >= needed:
        return buffer
    batch, heads, _, size = like_BHLE.shape
    # exactly what is asked for at first: a sequence may come as one block
    capacity = needed if buffer is None else max(needed, 2 * buffer.shape[2])
    larger = like_BHLE.new_empty(batch, heads, capacity, size)
    if buffer is not None:
        larger[:, :, :used] = buffer[:, :, :used]
    return larger


@dataclass(slots=True)
class StripedHyena2Cache:
    """State of a forward pass that goes on; made empty, filled by the model, block by block."""

    length: int = 0
    """Tokens seen by each sequence, padding included."""
    hyena: dict[int, HyenaState] = field(default_factory=dict)
    """State of each Hyena block, by block number."""
    attention: dict[int, AttentionState] = field(default_factory=dict)
    """State of each attention block, by block number."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Say how many tokens were seen; transformers asks by this name."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these sequences, in this order; transformers' beam search calls it by this name."""
        for state in self.attention.values():
            state.select(beam_idx)
        for index, hyena in self.hyena.items():
            rows = beam_idx.to(hyena.inner.device)
            first, second, third = (each.index_select(0, rows) for each in hyena.short)
            inner = hyena.inner.index_select(0, rows)
            self.hyena[index] = replace(hyena, short=(first, second, third), inner=inner)


def last_positions(history_BTD: Tensor | None, x_BLD: Tensor, *, count: int) -> Tensor:
    """Give the last positions of a block and what came before it.

    Example:
        >>> last_positions(None, torch.tensor([[[1.0], [2.0]]]), count=3).flatten()
        tensor([0., 1., 2.])
    """
    joined = x_BLD[:, max(0, x_BLD.shape[1] - count) :]
    if history_BTD is not None:
        joined = torch.cat((history_BTD.to(joined.dtype), joined), dim=1)
    missing = max(0, count - joined.shape[1])
    return F.pad(joined[:, joined.shape[1] - count + missing :], (0, 0, missing, 0)).clone()
