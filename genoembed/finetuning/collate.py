"""Examples as token ids, and batches of them: padded rows, pairs of views, and queries with their passages.

In: sequences with labels, and the model's encoder. Out: examples, never cut (one that does not fit is an
error that names the way out), and batches in which padding is known by its place, never by its token id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch

from genoembed.batching.pad import pad_batch, pool_mask
from genoembed.contracts import IGNORE_INDEX, EncodedSequence
from genoembed.errors import SequenceLengthError, ShapeError
from genoembed.retrieval.candidates import UNKNOWN
from genoembed.retrieval.terms import KmerTerms, collate_terms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from genoembed.config.choices import BaseLabels
    from genoembed.contracts import PoolMask
    from genoembed.tokenization.hf import SequenceEncoder


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedExample:
    """One row of a batch, before padding."""

    encoded: EncodedSequence
    pool_mask: PoolMask
    """True where a token counts in pooling. Shape ``(L,)``."""
    label: NDArray[np.int64] | NDArray[np.float32] | None = None
    """Of the sequence, shape ``()`` or ``(C,)``; or of its tokens, int64, shape ``(L,)``."""

    @classmethod
    def of_ids(cls, ids: NDArray[np.int64]) -> EncodedExample:
        """Take token ids of which all count."""
        return cls(encoded=EncodedSequence(input_ids=ids), pool_mask=np.ones(len(ids), dtype=np.bool_))

    def __len__(self) -> int:
        return len(self.encoded.input_ids)


def encode_example(
    sequence: bytes,
    encoder: SequenceEncoder,
    *,
    label: NDArray[np.int64] | NDArray[np.float32] | None = None,
    max_tokens: int | None = None,
    skip_first: int = 0,
    record_id: str | None = None,
) -> EncodedExample:
    """Encode a sequence whose label is one of the whole, or none.

    Args:
        sequence: Letters, one byte a base; at least one.
        encoder: Of the model's tokenizer.
        label: Of the sequence, shape ``()`` or ``(C,)``; None has none.
        max_tokens: Longest input of the model; None knows no limit.
        skip_first: Bases at the start that pooling leaves out.
        record_id: For messages.

    Returns:
        The row, never cut.

    Raises:
        SequenceLengthError: If there is no base, or the sequence does not fit.

    Example:
        >>> from genoembed.tokenization.char import CharTokenizer
        >>> from genoembed.tokenization.hf import build_encoder
        >>> row = encode_example(b"ACG", build_encoder(CharTokenizer()), skip_first=1)
        >>> row.encoded.input_ids.tolist(), row.pool_mask.tolist()
        ([65, 67, 71], [False, True, True])
    """
    if not sequence:
        problem = "no bases, expected at least one; leave empty sequences out"
        raise SequenceLengthError(problem, record_id=record_id)
    encoded = encoder.encode(sequence)
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
    max_tokens: int | None = None,
    record_id: str | None = None,
) -> EncodedExample:
    """Encode a sequence with one label per base: each token takes that of the base it starts at.

    Args:
        sequence: Letters, one byte a base; at least one.
        encoder: Of the model's tokenizer.
        base_labels: Class of each base, or -100 for none. int64, shape ``(len(sequence),)``.
        several_bases: What to do where a token stands for several bases: ``error``, or ``first``.
        max_tokens: Longest input of the model; None knows no limit.
        record_id: For messages.

    Returns:
        The row, never cut, with one label per token, -100 where a token stands for no base.

    Raises:
        SequenceLengthError: If there is no base, or the sequence does not fit.
        ShapeError: If labels and bases, or tokens and bases, are not one for one.
    """
    name = f"record {record_id!r}: " if record_id is not None else ""
    if base_labels.shape != (len(sequence),):
        message = f"{name}labels of shape {base_labels.shape}, expected ({len(sequence)},), one per base"
        raise ShapeError(message)
    row = encode_example(sequence, encoder, max_tokens=max_tokens, record_id=record_id)
    starts = row.encoded.base_start
    if starts is None:  # one token per base and no special tokens
        return EncodedExample(encoded=row.encoded, pool_mask=row.pool_mask, label=base_labels)
    has_base = starts >= 0
    if int(has_base.sum()) != len(sequence) and several_bases == "error":
        message = (
            f"{name}{int(has_base.sum())} tokens for {len(sequence)} labeled bases, expected one per base; "
            "take a model with one token per base, or set several_bases='first' to learn the label of each "
            "token's first base"
        )
        raise ShapeError(message)
    labels = np.full(len(starts), IGNORE_INDEX, dtype=np.int64)
    labels[has_base] = base_labels[starts[has_base]]
    return EncodedExample(encoded=row.encoded, pool_mask=row.pool_mask, label=labels)


LabelTarget: TypeAlias = Literal["none", "sequence", "token", "causal"]
"""What is predicted: nothing, something of the sequence, of each token, or the next token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedCollator:
    """Pad rows on the right to the longest of their batch.

    Example:
        >>> from genoembed.tokenization.char import CharTokenizer
        >>> from genoembed.tokenization.hf import build_encoder
        >>> from genoembed.finetuning.collate import encode_example
        >>> encoder = build_encoder(CharTokenizer())
        >>> rows = [encode_example(bases, encoder) for bases in (b"ACG", b"T")]
        >>> batch = PaddedCollator(pad_token_id=0, target="causal")(rows)
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[65, 67, 71], [84, 0, 0]], [[65, 67, 71], [84, -100, -100]])
    """

    pad_token_id: int
    """Fills padded slots; may be the id of EOS."""
    target: LabelTarget
    """What labels are of."""
    pad_to_multiple_of: int = 1
    """Padded lengths are multiples of this."""

    def __call__(self, examples: Sequence[EncodedExample]) -> dict[str, Tensor]:
        """Pad rows to one batch.

        Args:
            examples: Rows of the batch, at least one.

        Returns:
            ``input_ids`` and ``attention_mask`` (int64, ``(B, L)``), ``pool_mask`` (``(B, L)``: bool, or
            float32 where tokens count for several bases), and unless ``target`` is ``none`` the
            ``labels``: ``(B,)`` or ``(B, C)`` of sequences, int64 ``(B, L)`` of tokens.

        Raises:
            ShapeError: If a row has no label of the kind that ``target`` needs.
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
            # by position: where padding has the id of EOS, a genuine EOS must still be learned
            collated["labels"] = batch.input_ids.masked_fill(is_padding, IGNORE_INDEX)
        elif self.target == "token":
            collated["labels"] = self._token_labels(examples, batch.input_ids.shape[1])
        elif self.target == "sequence":
            collated["labels"] = _sequence_labels(examples)
        return collated

    def _token_labels(self, examples: Sequence[EncodedExample], length: int) -> Tensor:
        labels_BL = np.full((len(examples), length), IGNORE_INDEX, dtype=np.int64)
        for row, example in enumerate(examples):
            label = example.label
            if label is None or label.shape != (len(example),):
                found = "no label" if label is None else f"labels of shape {label.shape}"
                message = f"row {row}: {found}, expected ({len(example)},), one per token"
                raise ShapeError(message)
            labels_BL[row, : len(example)] = label
        return torch.from_numpy(labels_BL)


def _sequence_labels(examples: Sequence[EncodedExample]) -> Tensor:
    labels = [example.label for example in examples]
    shapes = {None if label is None else label.shape for label in labels}
    if None in shapes or len(shapes) > 1:
        message = (
            f"labels of shapes {sorted(map(str, shapes))} in one batch, expected one label per row, all alike"
        )
        raise ShapeError(message)
    return torch.from_numpy(np.stack([label for label in labels if label is not None]))


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewPair:
    """Two views of one sequence."""

    first: EncodedExample
    second: EncodedExample
    identity: int


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


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewCollator:
    """Pads pairs of views, one after the other: first and second of the first pair, and so on."""

    rows: PaddedCollator

    def __call__(self, pairs: Sequence[ViewPair]) -> dict[str, Tensor]:
        """Pad pairs to one batch.

        Args:
            pairs: Pairs of the batch, at least one.

        Returns:
            What :class:`PaddedCollator` gives for the ``2 * len(pairs)`` views, and ``ids``: the identity of
            each sequence, int64, ``(len(pairs),)``.
        """
        batch = self.rows([view for pair in pairs for view in (pair.first, pair.second)])
        return {**batch, "ids": torch.tensor([pair.identity for pair in pairs])}


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupCollator:
    """Pads queries and passages, with the terms of their k-mers where there is a sparse head."""

    rows: PaddedCollator
    terms: KmerTerms | None = None

    def __call__(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """Pad groups to one batch.

        Args:
            groups: Queries with their passages, the same number each, at least one group.

        Returns:
            What :class:`PaddedCollator` gives for queries (``query_input_ids`` ...) and for passages, group
            by group (``passage_input_ids`` ...); with ``terms`` also ``query_term_ids``,
            ``query_term_positions`` and those of the passages; ``query_ids``, ``passage_ids``,
            ``query_labels``, ``passage_labels`` and ``passage_mask`` as
            :class:`~genoembed.retrieval.candidates.PairIds` takes them; and ``teacher_scores``, if there are
            any.
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
        # negatives of a row were given as such, so only positives carry the label of their group
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
        """Pad one side."""
        found = {f"{prefix}{name}": value for name, value in self.rows(examples).items()}
        if self.terms is not None:
            starts = [example.encoded.base_start for example in examples]
            terms = collate_terms(sequences, self.terms, base_starts=starts)
            found |= {f"{prefix}term_ids": terms.ids, f"{prefix}term_positions": terms.positions}
        return found


def split_batch(batch: dict[str, Tensor], *, rows: int) -> list[dict[str, Tensor]]:
    """Cut a contrastive batch into pieces that are encoded one at a time.

    Args:
        batch: What a collator gives.
        rows: Queries, pairs or rows of a piece.

    Returns:
        Inputs of the encoder by name, piece by piece; a query's passages are in its piece.
    """
    count = len(
        batch["query_input_ids"] if "query_input_ids" in batch else batch.get("ids", batch["input_ids"])
    )
    # identities, labels and masks of passages stay whole: the loss compares the whole batch
    inputs = {name: value for name, value in batch.items() if name.endswith(_ENCODED)}
    pieces = []
    for start in range(0, count, rows):
        piece = {}
        for name, value in inputs.items():
            each = len(value) // count  # 2 views of a pair, or the passages of a query
            piece[name] = value[start * each : (start + rows) * each]
        pieces.append(piece)
    return pieces


_ENCODED = ("input_ids", "attention_mask", "pool_mask", "term_ids", "term_positions")
