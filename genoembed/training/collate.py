"""Rows of unequal length as one padded batch, with labels that know padding by its place.

In: :class:`~genoembed.training.encode.EncodedExample` rows. Out: ``input_ids``, ``attention_mask``,
``pool_mask`` and ``labels``. Promised: a label is ignored because its position is padding, never because of
an id, so a genuine EOS counts even where the padding id is the same; padding is on the right, and only up to
the smallest multiple asked for. Also here: which rows share a batch, and what padding costs. B rows, L padded
length, C classes or targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch
from torch.utils.data import Sampler

from genoembed.batching.pad import pad_batch
from genoembed.errors import ConfigError, ShapeError
from genoembed.training.encode import IGNORE_INDEX, EncodedExample

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
        """Pad rows to one batch.

        Args:
            examples: At least one row; not changed.

        Returns:
            ``input_ids`` and ``attention_mask``, int64, ``(B, L)``; ``pool_mask``, bool, ``(B, L)``, False at
            padding and special tokens; and, unless the target is ``none``, ``labels``: int64 ``(B, L)`` for
            tokens (aligned with ``input_ids``; a causal model's loss shifts them), int64 ``(B,)`` for
            classes, float32 ``(B, C)`` for several labels or numbers.

        Raises:
            ShapeError: If there is no row, or a row's label does not fit.
        """
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


class LengthGroupedSampler(Sampler[int]):
    """Orders rows so that those of a batch have like lengths, and batches come in random order.

    Rows are shuffled, sorted by length within pools of ``pool_batches`` batches, cut into batches, and the
    batches shuffled (so lengths do not run down within a pool). The batch with the longest row comes first:
    memory that does not suffice shows at once. Every row is in every epoch once; the order depends on
    lengths, seed and epoch only.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows that one step pads together: rows of a device times devices.
        seed: Decides about the order.
        pool_batches: More make batches more even and less random.

    Raises:
        ConfigError: If there is no row, or a number is out of range.

    Example:
        >>> list(LengthGroupedSampler([5, 1, 5, 1], batch_size=2, seed=0)) in ([0, 2, 1, 3], [2, 0, 3, 1],
        ...     [0, 2, 3, 1], [2, 0, 1, 3])
        True
    """

    def __init__(
        self, lengths: Sequence[int], *, batch_size: int, seed: int = 0, pool_batches: int = 50
    ) -> None:
        numbers = (("batch_size", batch_size, 1), ("seed", seed, 0), ("pool_batches", pool_batches, 1))
        problems = [
            f"{n} is {value}; set {n} to {least} or more" for n, value, least in numbers if value < least
        ]
        if not len(lengths):
            problems.append("lengths: no row to order; give at least one")
        if problems:
            raise ConfigError(*problems)
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._batch_size = batch_size
        self._pool = pool_batches * batch_size
        self._seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0; data loaders of accelerate and transformers call this.

        Args:
            epoch: Its number.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self._seed, self.epoch])
        order = rng.permutation(len(self._lengths))
        batches = []
        for start in range(0, len(order), self._pool):
            pool = order[start : start + self._pool]
            pool = pool[np.argsort(-self._lengths[pool], kind="stable")]
            batches += [pool[at : at + self._batch_size] for at in range(0, len(pool), self._batch_size)]
        # only the last batch may be short, else those after it would be cut elsewhere
        tail = [batches.pop()] if len(batches[-1]) < self._batch_size else []
        batches = [batches[index] for index in rng.permutation(len(batches))]
        longest = max(range(len(batches)), key=lambda index: self._lengths[batches[index]].max(), default=0)
        batches[:1], batches[longest : longest + 1] = batches[longest : longest + 1], batches[:1]
        return iter(np.concatenate(batches + tail).tolist())


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
