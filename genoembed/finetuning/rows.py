"""Rows as a trainer draws them: by number and epoch, as token ids, masks and labels.

In: labeled sequences or retrieval examples. Out: what collators pad. Promised: labels of bases are encoded
after their bases were cropped and reversed; nothing is cut to fit the context; the same seed, epoch and row
give the same view.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from torch.utils.data import Dataset

from genoembed.batching.pad import count_unread, is_mostly_unread
from genoembed.errors import SequenceLengthError, UnreadError
from genoembed.finetuning.collate import EncodedExample, Group, ViewPair, encode_example, encode_token_example
from genoembed.finetuning.sampling import FILLER
from genoembed.retrieval.candidates import UNKNOWN, sequence_identity
from genoembed.tokenization.hf import unread_problem
from genoembed.training.augment import Augmented, augment, augmentation_rng

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from genoembed.config.choices import BaseLabels
    from genoembed.config.labeled import AugmentConfig
    from genoembed.finetuning.labeled import LabeledSequence
    from genoembed.finetuning.labels import LabelSpace
    from genoembed.finetuning.pairs import RetrievalExample
    from genoembed.finetuning.sampling import GroupSampler
    from genoembed.tokenization.hf import SequenceEncoder
    from genoembed.training.start import TokenRules


RowEncoder: TypeAlias = "Callable[[Augmented, Any], EncodedExample]"
"""Encodes a view of a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelEncoder:
    """Encodes a view with the label of its row."""

    encoder: SequenceEncoder
    max_tokens: int | None
    space: LabelSpace | None = None
    """What labels mean; None for rows without."""
    skip_first: int = 0
    several_bases: BaseLabels = "error"

    def __call__(self, view: Augmented, row: LabeledSequence | RetrievalExample) -> EncodedExample:
        """Encode a view of a row."""
        if self.space is not None and self.space.kind == "token":
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
            label=None if self.space is None else self.space.encode(row.label),  # type: ignore[union-attr]
            max_tokens=self.max_tokens,
            skip_first=self.skip_first,
            record_id=row.id,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentEncoder:
    """Encodes a view and the token that ends it, for a causal model."""

    rules: TokenRules
    max_tokens: int | None

    def __call__(self, view: Augmented, row: LabeledSequence) -> EncodedExample:
        """Encode a view of a row."""
        ids = self.rules.encode_document(view.sequence)
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            problem = (
                f"{len(ids)} tokens with the end token, but the model's context is {self.max_tokens}; set "
                "max_crop_bp to crop, or cut the sequences"
            )
            raise SequenceLengthError(problem, record_id=row.id)
        return EncodedExample.of_ids(ids)


def check_sequences(
    sequences: Sequence[bytes], encoder: SequenceEncoder, *, max_tokens: int | None, max_crop_bp: int | None
) -> None:
    """Raise if a sequence does not fit the context or cannot be read, before the first step."""
    bases = None if max_tokens is None else encoder.max_bases(max_tokens)
    for number, sequence in enumerate(sequences, start=1):
        _check_read(sequence, encoder, number)
        if bases is None:
            continue
        seen = len(sequence) if max_crop_bp is None else min(len(sequence), max_crop_bp)
        if seen <= bases:
            continue
        if max_crop_bp is not None:
            # which bases a crop holds changes with the epoch, and so does its number of tokens
            problem = (
                f"max_crop_bp is {max_crop_bp}, but the model's context is sure to hold {bases} bases; set "
                f"max_crop_bp to {bases} or less"
            )
            raise SequenceLengthError(problem)
        # max_bases is a safe bound: a tokenizer of several bases may still fit a longer one, so encode it
        encode_example(sequence, encoder, max_tokens=max_tokens, record_id=f"row {number}")


def _check_read(sequence: bytes, encoder: SequenceEncoder, number: int) -> None:
    if encoder.aligned:
        return
    num_unread = count_unread(encoder.encode(sequence), core_start=0, core_end=len(sequence))
    if is_mostly_unread(num_unread, len(sequence)):
        problem = unread_problem(encoder, sequence, num_unread=num_unread, num_bases=len(sequence))
        raise UnreadError(problem, record_id=f"row {number}")


_SECOND_VIEW = 1 << 20
"""Added to the epoch: the second view of a sequence draws other numbers than the first."""


@dataclass(kw_only=True, eq=False)
class EpochDataset(Dataset[Any]):
    """Rows that give other views or draws in each epoch."""

    rows: Sequence[Any]
    augment: AugmentConfig
    seed: int
    epoch: int = field(default=0, init=False)

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0."""
        self.epoch = epoch


@dataclass(kw_only=True, eq=False)
class RowDataset(EpochDataset):
    """Labeled rows, in another view in each epoch."""

    encode: RowEncoder
    per_base: bool = False
    """Whether labels are of bases, and turn and are cropped with them."""

    def __getitem__(self, index: int) -> EncodedExample:
        row = self.rows[index]
        rng = augmentation_rng(seed=self.seed, epoch=self.epoch, row=index)
        view = Augmented(row.sequence, row.label if self.per_base else None)
        return self.encode(augment(view, rng, config=self.augment), row)


@dataclass(kw_only=True, eq=False)
class ViewDataset(EpochDataset):
    """Two views of each sequence: the first as ``augment`` says, the second as ``other`` says."""

    encode: RowEncoder
    other: AugmentConfig

    def __getitem__(self, index: int) -> ViewPair:
        row = self.rows[index]
        views = []
        for number, config in enumerate((self.augment, self.other)):
            epoch = self.epoch + number * _SECOND_VIEW
            rng = augmentation_rng(seed=self.seed, epoch=epoch, row=index)
            views.append(self.encode(augment(Augmented(row.sequence), rng, config=config), row))
        # of the sequence, not of its views: a copy of it elsewhere in the batch is no negative
        return ViewPair(first=views[0], second=views[1], identity=sequence_identity(row.sequence))


@dataclass(kw_only=True, eq=False)
class GroupDataset(EpochDataset):
    """Retrieval examples, each epoch with another draw of passages."""

    sampler: GroupSampler
    encoder: LabelEncoder

    def __post_init__(self) -> None:
        self._labels = group_numbers(self.rows)

    def __getitem__(self, index: int) -> Group:
        row = self.rows[index]
        draw = self.sampler.draw(index, epoch=self.epoch)
        # positives and negatives in one list: the order that teacher_scores has
        listed = (*row.pos, *row.neg)
        places = [draw.positive, *(n if n == FILLER else len(row.pos) + n for n in draw.negatives)]
        # a filler repeats the positive, so that all groups have one size; is_real masks it
        passages = [listed[draw.positive if place == FILLER else place] for place in places]
        # one generator for the whole group: query and passages are augmented each in its own way
        rng = augmentation_rng(seed=self.seed, epoch=self.epoch, row=index)
        views = [augment(Augmented(s), rng, config=self.augment) for s in (row.query, *passages)]
        query, *rest = (self.encoder(view, row) for view in views)
        scores = row.teacher_scores
        return Group(
            query=query,
            passages=tuple(rest),
            sequences=tuple(view.sequence for view in views),
            ids=(
                sequence_identity(row.query),
                *(
                    UNKNOWN if place == FILLER else sequence_identity(sequence)
                    for place, sequence in zip(places, passages, strict=True)
                ),
            ),
            label=self._labels[index],
            is_real=tuple(place != FILLER for place in places),
            teacher_scores=scores and tuple(0.0 if place == FILLER else scores[place] for place in places),
        )


def group_numbers(rows: Sequence[RetrievalExample]) -> list[int]:
    """Number the groups that rows name; rows without a group are ``UNKNOWN``."""
    numbers: dict[str, int] = {}
    return [UNKNOWN if row.group is None else numbers.setdefault(row.group, len(numbers)) for row in rows]
