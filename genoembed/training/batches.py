"""Rows, views and groups as a trainer draws them: by number and epoch, then padded to batches.

In: cleaned sequences with labels, or retrieval examples. Out: map-style datasets and the collators that go
with them. Promised: what a row gives depends on seed, epoch and row alone, so workers, order and a resumed
run change nothing. Labels of bases are encoded after their bases were cropped and turned.

B rows (queries), G passages of a query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from genoembed.errors import SequenceLengthError
from genoembed.training.augment import Augmented, augment, augmentation_rng
from genoembed.training.candidates import UNKNOWN, sequence_identity
from genoembed.training.encode import EncodedExample, encode_example, encode_token_example
from genoembed.training.kmer_terms import KmerTerms, collate_terms
from genoembed.training.negatives import FILLER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from genoembed.tokenization.hf import SequenceEncoder
    from genoembed.training.augment import AugmentConfig
    from genoembed.training.collate import PaddedCollator
    from genoembed.training.encode import BaseLabels
    from genoembed.training.labelled import LabelledSequence
    from genoembed.training.labels import LabelSpace
    from genoembed.training.negatives import GroupSampler
    from genoembed.training.pairs import RetrievalExample

_SECOND_VIEW = 1 << 20
"""Added to the epoch: the second view of a sequence draws other numbers than the first."""


class RowEncoder(Protocol):
    """Makes token ids of a view of a sequence."""

    @property
    def per_base(self) -> bool:
        """Whether a label is a name a base, which follows its base."""

    def __call__(self, view: Augmented, row: LabelledSequence) -> EncodedExample:
        """Encode a view of a row.

        Args:
            view: The sequence as it is to be seen, and labels of its bases.
            row: Where it comes from.

        Returns:
            The row of a batch.
        """


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
        """Encode a view of a row.

        Args:
            view: The sequence as it is to be seen, and labels of its bases.
            row: Where it comes from.

        Returns:
            The row of a batch.

        Raises:
            SequenceLengthError: If it has more tokens than the context.
            ShapeError: If a token has several labelled bases and that is refused.
            LabelError: If a class is none of the space's.
        """
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
    """Refuse sequences that do not fit the context, before the first step.

    Args:
        sequences: All that will be trained on.
        encoder: Of the model.
        max_tokens: Its context; None is no limit.
        max_crop_bp: Longer sequences will be cropped to this.

    Raises:
        SequenceLengthError: If one does not fit; ``max_crop_bp`` is the remedy.
    """
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


class EpochDataset(Dataset[Any]):
    """A dataset that knows which epoch it is."""

    epoch = 0

    def __len__(self) -> int:
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0.

        Args:
            epoch: Its number.
        """
        self.epoch = epoch


class RowDataset(EpochDataset):
    """Labelled rows, each epoch in another view.

    Args:
        rows: At least one.
        encode: Makes token ids of a view.
        augment: Which views.
        seed: Of the run.
    """

    def __init__(
        self, rows: Sequence[LabelledSequence], encode: RowEncoder, *, augment: AugmentConfig, seed: int
    ) -> None:
        self.rows, self._encode, self._augment, self._seed = rows, encode, augment, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> EncodedExample:
        row = self.rows[index]
        rng = augmentation_rng(seed=self._seed, epoch=self.epoch, row=index)
        view = _view(row, per_base=self._encode.per_base)
        return self._encode(augment(view, rng, config=self._augment), row)


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewPair:
    """Two views of one sequence."""

    first: EncodedExample
    second: EncodedExample
    identity: int


class ViewDataset(EpochDataset):
    """Two views of each sequence: the first as ``augment`` says, the second as ``other`` says.

    Args:
        rows: At least one.
        encode: Makes token ids of a view.
        augment: The first view.
        other: The second.
        seed: Of the run.
    """

    def __init__(
        self,
        rows: Sequence[LabelledSequence],
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A query and the passages that one epoch gives it, the positive first."""

    query: EncodedExample
    passages: tuple[EncodedExample, ...]
    sequences: tuple[bytes, ...]
    """Of the query and of the passages, as the model sees them."""
    ids: tuple[int, ...]
    """Identities of the query and of the passages."""
    label: int
    """Number of the query's group of rows, or -1."""
    is_real: tuple[bool, ...]
    """False for a passage that only fills up."""
    teacher_scores: tuple[float, ...] | None


class GroupDataset(EpochDataset):
    """Retrieval examples, each epoch with another draw of passages.

    Args:
        rows: At least one.
        sampler: Draws passages.
        encoder: Of the model.
        max_tokens: Its context; None is no limit.
        skip_first: Bases that pooling leaves out.
        augment: Views of queries and passages.
        seed: Of the run.
    """

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
    """Number the groups that rows name.

    Args:
        rows: Retrieval examples.

    Returns:
        A number a row, -1 for a row without group.
    """
    numbers: dict[str, int] = {}
    return [UNKNOWN if row.group is None else numbers.setdefault(row.group, len(numbers)) for row in rows]


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewCollator:
    """Pads pairs of views, one after the other: first and second of the first pair, and so on."""

    rows: PaddedCollator

    def __call__(self, pairs: Sequence[ViewPair]) -> dict[str, Tensor]:
        """Pad pairs to one batch.

        Args:
            pairs: At least one.

        Returns:
            ``input_ids``, ``attention_mask``, ``pool_mask`` of ``2 B`` rows, and ``ids``, int64, ``(B,)``.
        """
        batch = self.rows([view for pair in pairs for view in (pair.first, pair.second)])
        return {**batch, "ids": torch.tensor([pair.identity for pair in pairs])}


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupCollator:
    """Pads queries and passages, with the terms of their k-mers where the sparse head wants them."""

    rows: PaddedCollator
    terms: KmerTerms | None = None

    def __call__(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """Pad groups to one batch.

        Args:
            groups: At least one, all of one size.

        Returns:
            ``query_`` and ``passage_`` with ``input_ids``, ``attention_mask``, ``pool_mask``, ``ids``,
            ``labels`` and, with terms, ``term_ids`` and ``term_positions``; ``passage_mask`` and, with a
            teacher, ``teacher_scores``, ``(B, G)``.
        """
        size = len(groups[0].passages)
        batch = self.side(
            [group.query for group in groups], [group.sequences[0] for group in groups], "query_"
        )
        batch |= self.side(
            [passage for group in groups for passage in group.passages],
            [sequence for group in groups for sequence in group.sequences[1:]],
            "passage_",
        )
        labels = torch.tensor([group.label for group in groups])
        passage_labels = torch.full((len(groups), size), UNKNOWN)
        passage_labels[:, 0] = labels
        batch |= {
            "query_ids": torch.tensor([group.ids[0] for group in groups]),
            "passage_ids": torch.tensor([number for group in groups for number in group.ids[1:]]),
            "query_labels": labels,
            "passage_labels": passage_labels.flatten(),
            "passage_mask": torch.tensor([is_real for group in groups for is_real in group.is_real]),
        }
        if groups[0].teacher_scores is not None:
            batch["teacher_scores"] = torch.tensor([group.teacher_scores for group in groups])
        return batch

    def side(
        self, examples: Sequence[EncodedExample], sequences: Sequence[bytes], prefix: str
    ) -> dict[str, Tensor]:
        """Pad one side.

        Args:
            examples: Its rows.
            sequences: Their bases.
            prefix: Of the names.

        Returns:
            Tensors by name.
        """
        found = {f"{prefix}{name}": value for name, value in self.rows(examples).items()}
        if self.terms is not None:
            starts = [example.encoded.base_start for example in examples]
            terms = collate_terms(sequences, self.terms, base_starts=starts)
            found |= {f"{prefix}term_ids": terms.ids, f"{prefix}term_positions": terms.positions}
        return found


def split_batch(batch: dict[str, Tensor], *, rows: int) -> list[dict[str, Tensor]]:
    """Cut a contrastive batch into pieces that are encoded one at a time.

    Args:
        batch: Of a collator of this module, or labelled rows.
        rows: Queries, pairs or rows of a piece.

    Returns:
        Pieces in order, with what encoding needs and nothing else.
    """
    count = len(
        batch["query_input_ids"] if "query_input_ids" in batch else batch.get("ids", batch["input_ids"])
    )
    inputs = {name: value for name, value in batch.items() if name.endswith(_ENCODED)}
    pieces = []
    for start in range(0, count, rows):
        piece = {}
        for name, value in inputs.items():
            each = len(value) // count
            piece[name] = value[start * each : (start + rows) * each]
        pieces.append(piece)
    return pieces


_ENCODED = ("input_ids", "attention_mask", "pool_mask", "term_ids", "term_positions")


def _view(row: LabelledSequence, *, per_base: bool) -> Augmented:
    if not per_base:
        return Augmented(row.sequence)
    assert isinstance(row.label, tuple), "labels of bases are a row of names"
    names = tuple(name for name in row.label if name is None or isinstance(name, str))
    return Augmented(row.sequence, names)


def _score(scores: Sequence[float], place: int) -> float:
    return 0.0 if place == FILLER else scores[place]
