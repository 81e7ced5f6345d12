"""One labelled sequence as token ids, for the padded collator.

In: a sequence, its label, and the model's encoder. Out: :class:`EncodedExample`. Nothing is cut: a sequence
that does not fit is an error that names the way out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from genoembed.batching.pad import pool_mask
from genoembed.contracts import EncodedSequence
from genoembed.errors import SequenceLengthError, ShapeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from genoembed.tokenization.hf import SequenceEncoder

BaseLabels: TypeAlias = Literal["error", "first"]
"""Labels of bases where a token has several bases: refuse, or take that of its first base."""

IGNORE_INDEX = -100
"""Label that losses leave out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedExample:
    """One row of a batch, before padding."""

    encoded: EncodedSequence
    pool_mask: NDArray[np.bool_]
    """True where a token counts in pooling. Shape ``(L,)``."""
    label: NDArray[np.int64] | NDArray[np.float32] | None = None
    """Of the sequence, shape ``()`` or ``(C,)``; or of its tokens, int64, shape ``(L,)``."""

    def __len__(self) -> int:
        return len(self.encoded.input_ids)


def encode_example(
    sequence: bytes,
    encoder: SequenceEncoder,
    *,
    label: NDArray[np.int64] | NDArray[np.float32] | None = None,
    max_tokens: int | None = None,
    eos_token_id: int | None = None,
    skip_first: int = 0,
    record_id: str | None = None,
) -> EncodedExample:
    """Encode a sequence whose label is one of the whole, or none.

    Example:
        >>> from genoembed.tokenization.char import CharTokenizer
        >>> from genoembed.tokenization.hf import build_encoder
        >>> row = encode_example(b"ACG", build_encoder(CharTokenizer()), eos_token_id=0)
        >>> row.encoded.input_ids.tolist(), row.pool_mask.tolist()
        ([65, 67, 71, 0], [True, True, True, False])
    """
    if not sequence:
        problem = "no bases, expected at least one; leave empty sequences out"
        raise SequenceLengthError(problem, record_id=record_id)
    encoded = encoder.encode(sequence)
    if eos_token_id is not None:
        encoded = _with_eos(encoded, eos_token_id)
    num_tokens = len(encoded.input_ids)
    if max_tokens is not None and num_tokens > max_tokens:
        problem = (
            f"{num_tokens} tokens ({len(sequence)} bases), but the model's context is {max_tokens}; set "
            "max_crop_bp to crop, or cut the sequences"
        )
        raise SequenceLengthError(problem, record_id=record_id)
    mask = pool_mask(encoded, core_start=0, core_end=len(sequence), skip_first=skip_first)
    return EncodedExample(encoded=encoded, pool_mask=mask, label=label)


def encode_token_example(
    sequence: bytes,
    encoder: SequenceEncoder,
    *,
    base_labels: NDArray[np.int64],
    several_bases: BaseLabels = "error",
    ignore_index: int = IGNORE_INDEX,
    max_tokens: int | None = None,
    record_id: str | None = None,
) -> EncodedExample:
    """Encode a sequence with a label a base: each token takes that of the base it starts at."""
    name = f"record {record_id!r}: " if record_id is not None else ""
    if base_labels.shape != (len(sequence),):
        message = f"{name}labels of shape {base_labels.shape}, expected ({len(sequence)},), one a base"
        raise ShapeError(message)
    row = encode_example(sequence, encoder, max_tokens=max_tokens, record_id=record_id)
    starts = row.encoded.base_start
    if starts is None:
        return EncodedExample(encoded=row.encoded, pool_mask=row.pool_mask, label=base_labels)
    has_base = starts >= 0
    if int(has_base.sum()) != len(sequence) and several_bases == "error":
        message = (
            f"{name}{int(has_base.sum())} tokens for {len(sequence)} labelled bases, expected one a base; "
            "take a model with one token a base, or set several_bases='first' to learn the label of each "
            "token's first base"
        )
        raise ShapeError(message)
    labels = np.full(len(starts), ignore_index, dtype=np.int64)
    labels[has_base] = base_labels[starts[has_base]]
    return EncodedExample(encoded=row.encoded, pool_mask=row.pool_mask, label=labels)


def _with_eos(encoded: EncodedSequence, eos_token_id: int) -> EncodedSequence:
    ids = np.append(encoded.input_ids.astype(np.int64), eos_token_id)
    starts = encoded.base_start
    if starts is None:
        starts = np.arange(len(ids) - 1, dtype=np.int64)
    return EncodedSequence(input_ids=ids, base_start=np.append(starts, -1))
