"""Rows of unequal length as one padded batch, with labels that know padding by its place.

In: :class:`~genoembed.training.encode.EncodedExample` rows. Out: ``input_ids``, ``attention_mask``,
``pool_mask`` and ``labels``. Promised: a label is ignored because its position is padding, never because of
an id, so a genuine EOS counts even where the padding id is the same; padding is on the right, and only up to
the smallest multiple asked for. Also here: what padding costs. B rows, L padded length, C classes or targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch

from genoembed.batching.pad import pad_batch
from genoembed.errors import ConfigError, ShapeError
from genoembed.training.encode import IGNORE_INDEX, EncodedExample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

LabelTarget: TypeAlias = Literal["none", "sequence", "token", "causal"]
"""What is predicted: nothing, something of the sequence, of each token, or the next token."""

_TARGETS = ("none", "sequence", "token", "causal")


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedCollator:
    """Pads rows on the right to the longest of their batch.

    Example:
        >>> from genoembed.tokenization.char import CharTokenizer
        >>> from genoembed.tokenization.hf import build_encoder
        >>> from genoembed.training.encode import encode_example
        >>> encoder = build_encoder(CharTokenizer())
        >>> rows = [encode_example(bases, encoder, eos_token_id=0) for bases in (b"ACG", b"T")]
        >>> batch = PaddedCollator(pad_token_id=0, target="causal")(rows)
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[65, 67, 71, 0], [84, 0, 0, 0]], [[65, 67, 71, 0], [84, 0, -100, -100]])
    """

    pad_token_id: int
    """Fills padded slots; may be the id of EOS."""
    target: LabelTarget
    """What labels are of."""
    pad_to_multiple_of: int = 1
    """Padded lengths are multiples of this."""
    ignore_index: int = IGNORE_INDEX
    """Label of padding."""

    def __post_init__(self) -> None:
        problems = []
        if self.target not in _TARGETS:
            problems.append(f"target is {self.target!r}; set target to one of {', '.join(_TARGETS)}")
        if self.pad_to_multiple_of < 1:
            problems.append(
                f"pad_to_multiple_of is {self.pad_to_multiple_of}; set pad_to_multiple_of to 1 or more"
            )
        if self.ignore_index >= 0:
            problems.append(
                f"ignore_index is {self.ignore_index}, which a class or token may have; set it below 0"
            )
        if problems:
            raise ConfigError(*problems)

    def __call__(self, examples: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """Pad rows to one batch."""
        batch = pad_batch(
            [example.encoded for example in examples],
            pool_masks=[example.pool_mask for example in examples],
            rows=range(len(examples)),
            pad_token_id=self.pad_token_id,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )
        collated = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "pool_mask": batch.pool_mask,
        }
        if self.target == "causal":
            is_padding = batch.attention_mask == 0
            collated["labels"] = batch.input_ids.masked_fill(is_padding, self.ignore_index)
        elif self.target == "token":
            collated["labels"] = self._token_labels(examples, batch.input_ids.shape[1])
        elif self.target == "sequence":
            collated["labels"] = _sequence_labels(examples)
        return collated

    def _token_labels(self, examples: Sequence[EncodedExample], length: int) -> Tensor:
        labels_BL = np.full((len(examples), length), self.ignore_index, dtype=np.int64)
        for row, example in enumerate(examples):
            label = example.label
            if label is None or label.shape != (len(example),):
                found = "no label" if label is None else f"labels of shape {label.shape}"
                message = f"row {row}: {found}, expected ({len(example)},), one a token"
                raise ShapeError(message)
            labels_BL[row, : len(example)] = label
        return torch.from_numpy(labels_BL)


def _sequence_labels(examples: Sequence[EncodedExample]) -> Tensor:
    labels = [example.label for example in examples]
    shapes = {None if label is None else label.shape for label in labels}
    if None in shapes or len(shapes) > 1:
        message = (
            f"labels of shapes {sorted(map(str, shapes))} in one batch, expected one label a row, all alike"
        )
        raise ShapeError(message)
    return torch.from_numpy(np.stack([label for label in labels if label is not None]))


@dataclass(kw_only=True, slots=True)
class PaddingMeter:
    """Counts what padding costs.

    The training loop adds each batch that it really runs: what workers have prepared ahead is not counted.

    Example:
        >>> meter = PaddingMeter()
        >>> meter.add(torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
        >>> meter.slots, meter.tokens, meter.padding_share
        (8, 6, 0.25)
    """

    batches: int = 0
    rows: int = 0
    slots: int = 0
    """Padding included."""
    tokens: int = 0
    """Real ones."""
    longest: int = 0
    """Slots of the longest row."""

    def add(self, attention_mask: Tensor) -> None:
        """Count a batch.

        Args:
            attention_mask: 1 where a token is real. Shape ``(B, L)``.
        """
        rows, length = attention_mask.shape
        self.batches += 1
        self.rows += rows
        self.slots += rows * length
        self.tokens += int(attention_mask.sum())
        self.longest = max(self.longest, length)

    @classmethod
    def joined(cls, meters: Sequence[PaddingMeter]) -> PaddingMeter:
        """Add up what several processes have counted.

        Args:
            meters: At least one.

        Returns:
            Their sum.
        """
        sums = {
            name: sum(getattr(m, name) for m in meters) for name in ("batches", "rows", "slots", "tokens")
        }
        return cls(**sums, longest=max(meter.longest for meter in meters))

    @property
    def padding_share(self) -> float:
        """Share of the slots that is padding."""
        return 1 - self.tokens / self.slots if self.slots else 0.0

    @property
    def packed_slots(self) -> int:
        """Slots of the same sequences laid end to end, one end token after each, in rows of the longest."""
        if not self.longest:
            return 0
        return -(-(self.tokens + self.rows) // self.longest) * self.longest

    @property
    def packed_padding_share(self) -> float:
        """Share of the packed slots that holds no token of a sequence: end tokens and the last row's rest."""
        return 1 - self.tokens / self.packed_slots if self.packed_slots else 0.0

    def metrics(self, seconds: float) -> dict[str, float]:
        """Give the numbers for a log.

        Args:
            seconds: Time that the counted batches took; above 0.

        Returns:
            ``padding_percent``, ``packed_padding_percent``, ``padded_cost`` (slots over packed slots),
            ``tokens_per_second`` (real ones) and ``slots_per_second``.
        """
        return {
            "padding_percent": 100 * self.padding_share,
            "packed_padding_percent": 100 * self.packed_padding_share,
            "padded_cost": self.slots / self.packed_slots if self.packed_slots else 1.0,
            "tokens_per_second": self.tokens / seconds,
            "slots_per_second": self.slots / seconds,
        }
