"""Rows as a trainer draws them: by number and epoch, as token ids, masks and labels.

In: labeled sequences or retrieval examples. Out: what collators pad. Promised: labels of bases are encoded
after their bases were cropped and reversed; nothing is cut to fit the context; the same seed, epoch and row
give the same view.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from torch.utils.data import Dataset

from genoembed.errors import SequenceLengthError
from genoembed.finetuning.augment import Augmented, augment, augmentation_rng
from genoembed.finetuning.collate import EncodedExample, Group, ViewPair, encode_example, encode_token_example
from genoembed.finetuning.sampling import FILLER
from genoembed.retrieval.candidates import UNKNOWN, sequence_identity

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


RowEncoder: TypeAlias = "Callable[[Augmented, LabeledSequence], EncodedExample]"
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

    def __call__(self, view: Augmented, row: LabeledSequence) -> EncodedExample:
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
            label=None if self.space is None else self.space.encode(row.label),
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


def check_lengths(
    sequences: Sequence[bytes], encoder: SequenceEncoder, *, max_tokens: int | None, max_crop_bp: int | None
) -> None:
    """Raise if a sequence does not fit the context, before the first step."""
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


_SECOND_VIEW = 1 << 20
"""Added to the epoch: the second view of a sequence draws other numbers than the first."""


class EpochDataset(Dataset[Any]):
    """A dataset that gives other views or draws in each epoch."""

    epoch = 0

    def __len__(self) -> int:
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0."""
        self.epoch = epoch


class RowDataset(EpochDataset):
    """Labeled rows, in another view in each epoch."""

    def __init__(
        self,
        rows: Sequence[LabeledSequence],
        encode: RowEncoder,
        *,
        augment: AugmentConfig,
        seed: int,
        per_base: bool = False,
    ) -> None:
        self.rows, self._encode, self._augment, self._seed = rows, encode, augment, seed
        self._per_base = per_base

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> EncodedExample:
        row = self.rows[index]
        rng = augmentation_rng(seed=self._seed, epoch=self.epoch, row=index)
        view = _view(row, per_base=self._per_base)
        return self._encode(augment(view, rng, config=self._augment), row)


class ViewDataset(EpochDataset):
    """Two views of each sequence: the first as ``augment`` says, the second as ``other`` says."""

    def __init__(
        self,
        rows: Sequence[LabeledSequence],
        encode: RowEncoder,
        *,
        augment: AugmentConfig,
        other: AugmentConfig,
        seed: int,
    ) -> None:
        self.rows, self._encode, self._seed = rows, encode, seed
        self._configs = (augment, other)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> ViewPair:
        row = self.rows[index]
        views = []
        for number, config in enumerate(self._configs):
            epoch = self.epoch + number * _SECOND_VIEW
            rng = augmentation_rng(seed=self._seed, epoch=epoch, row=index)
            views.append(self._encode(augment(Augmented(row.sequence), rng, config=config), row))
        return ViewPair(first=views[0], second=views[1], identity=sequence_identity(row.sequence))


class GroupDataset(EpochDataset):
    """Retrieval examples, each epoch with another draw of passages."""

    def __init__(
        self,
        rows: Sequence[RetrievalExample],
        sampler: GroupSampler,
        *,
        encoder: SequenceEncoder,
        max_tokens: int | None,
        skip_first: int,
        augment: AugmentConfig,
        seed: int,
    ) -> None:
        self.rows, self._sampler, self._encoder = rows, sampler, encoder
        self._max_tokens, self._skip_first = max_tokens, skip_first
        self._augment, self._seed = augment, seed
        self._labels = group_numbers(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Group:
        row = self.rows[index]
        draw = self._sampler.draw(index, epoch=self.epoch)
        chosen = [FILLER if n == FILLER else len(row.pos) + n for n in draw.negatives]
        places = [draw.positive, *chosen]
        listed = (*row.pos, *row.neg)
        # a filler repeats the positive, so that all groups have one size; is_real masks it
        passages = [listed[draw.positive if place == FILLER else place] for place in places]
        rng = augmentation_rng(seed=self._seed, epoch=self.epoch, row=index)
        views = [
            augment(Augmented(sequence), rng, config=self._augment).sequence
            for sequence in (row.query, *passages)
        ]
        examples = [
            encode_example(
                view,
                self._encoder,
                max_tokens=self._max_tokens,
                skip_first=self._skip_first,
                record_id=row.id,
            )
            for view in views
        ]
        scores = row.teacher_scores
        return Group(
            query=examples[0],
            passages=tuple(examples[1:]),
            sequences=tuple(views),
            ids=(
                sequence_identity(row.query),
                *(
                    UNKNOWN if place == FILLER else sequence_identity(sequence)
                    for place, sequence in zip(places, passages, strict=True)
                ),
            ),
            label=self._labels[index],
            is_real=tuple(place != FILLER for place in places),
            teacher_scores=None if scores is None else tuple(_score(scores, place) for place in places),
        )


def group_numbers(rows: Sequence[RetrievalExample]) -> list[int]:
    """Number the groups that rows name; rows without a group are ``UNKNOWN``."""
    numbers: dict[str, int] = {}
    return [UNKNOWN if row.group is None else numbers.setdefault(row.group, len(numbers)) for row in rows]


def _view(row: LabeledSequence, *, per_base: bool) -> Augmented:
    if not per_base:
        return Augmented(row.sequence)
    assert isinstance(row.label, tuple), "labels of bases are a row of names"
    names = tuple(name for name in row.label if name is None or isinstance(name, str))
    return Augmented(row.sequence, names)


def _score(scores: Sequence[float], place: int) -> float:
    return 0.0 if place == FILLER else scores[place]
