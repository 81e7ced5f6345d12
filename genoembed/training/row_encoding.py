"""From a view of a row to the token ids, masks and label that a batch holds of it.

In: bases and labels of bases as they are to be seen, and the row that they come from. Out:
:class:`~genoembed.training.encode.EncodedExample`. Promised: labels of bases are encoded after their bases
were cropped and turned; nothing is cut to fit the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from genoembed.errors import SequenceLengthError
from genoembed.training.encode import EncodedExample, encode_example, encode_token_example

if TYPE_CHECKING:
    from collections.abc import Sequence

    from genoembed.tokenization.hf import SequenceEncoder
    from genoembed.training.augment import Augmented
    from genoembed.training.encode import BaseLabels
    from genoembed.training.labelled import LabelledSequence
    from genoembed.training.labels import LabelSpace


class RowEncoder(Protocol):
    """Makes token ids of a view of a sequence."""

    @property
    def per_base(self) -> bool:
        """Whether a label is a name a base, which follows its base."""

    def __call__(self, view: Augmented, row: LabelledSequence) -> EncodedExample:
        """Encode a view, as it is to be seen, of a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelEncoder:
    """Encodes a view with the label of its row."""

    encoder: SequenceEncoder
    max_tokens: int | None
    space: LabelSpace | None = None
    """What labels mean; None for rows without."""
    skip_first: int = 0
    several_bases: BaseLabels = "error"

    @property
    def per_base(self) -> bool:
        """Whether a label is a name a base."""
        return self.space is not None and self.space.kind == "token"

    def __call__(self, view: Augmented, row: LabelledSequence) -> EncodedExample:
        """Encode a view of a row."""
        if self.space is not None and self.per_base:
            assert view.token_labels is not None, "rows of this kind have labels of bases"
            labels = self.space.encode(view.token_labels)
            return encode_token_example(
                view.sequence,
                self.encoder,
                base_labels=labels.astype(np.int64),
                several_bases=self.several_bases,
                max_tokens=self.max_tokens,
                record_id=row.id,
            )
        return encode_example(
            view.sequence,
            self.encoder,
            label=None if self.space is None else self.space.encode(row.label),
            max_tokens=self.max_tokens,
            skip_first=self.skip_first,
            record_id=row.id,
        )


def check_lengths(
    sequences: Sequence[bytes], encoder: SequenceEncoder, *, max_tokens: int | None, max_crop_bp: int | None
) -> None:
    """Refuse sequences that do not fit the context, before the first step."""
    if max_tokens is None:
        return
    bases = encoder.max_bases(max_tokens)
    for number, sequence in enumerate(sequences, start=1):
        seen = len(sequence) if max_crop_bp is None else min(len(sequence), max_crop_bp)
        if seen <= bases:
            continue
        if max_crop_bp is not None:
            problem = (
                f"max_crop_bp is {max_crop_bp}, but the model's context is sure to hold {bases} bases; set "
                f"max_crop_bp to {bases} or less"
            )
            raise SequenceLengthError(problem)
        encode_example(sequence, encoder, max_tokens=max_tokens, record_id=f"row {number}")
