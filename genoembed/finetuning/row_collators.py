"""Collators for loops that are not ours: rows as users have them in, batches for any model out.

In: rows as mappings (of ``datasets``, of a list) or as pairs. Out: tensors for ``transformers.Trainer``, a
``DataLoader`` or a loop of one's own. Promised, as in our own training: nothing is cut, a label is ignored by
its position and never by its token id, packed neighbors can be kept apart.

B rows, L padded length, C labels of a row, R packed rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch

from genoembed.batching.pack import pack_bins, pack_stream
from genoembed.contracts import IGNORE_INDEX
from genoembed.errors import ConfigError, InputError, SequenceLengthError
from genoembed.finetuning.collate import (
    EncodedExample,
    Group,
    GroupCollator,
    PaddedCollator,
    encode_example,
    encode_token_example,
)
from genoembed.retrieval.candidates import UNKNOWN, sequence_identity
from genoembed.tokenization.hf import build_encoder
from genoembed.training.start import token_rules

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from genoembed.config.choices import BaseLabels, Packing
    from genoembed.finetuning.collate import LabelTarget
    from genoembed.retrieval.terms import KmerTerms


Row: TypeAlias = "Mapping[str, Any] | Sequence[Any]"
"""A mapping with named values, or the values in order: (sequence, label), or (query, positive, negatives)."""


class _Rows(NamedTuple):
    """How values are found in rows."""

    sequence: str
    label: str | None
    keep_case: bool

    def bases(self, value: object, number: int) -> bytes:
        """Return letters as bytes, in upper case unless case is to be kept."""
        if not isinstance(value, (str, bytes)):
            message = f"row {number}: {type(value).__name__} for a sequence, expected text"
            raise InputError(message)
        found = value.encode() if isinstance(value, str) else value
        return found if self.keep_case else found.upper()

    def value(self, row: Row, key: str, place: int, number: int) -> Any:
        """Return one value of a row."""
        if isinstance(row, Mapping):
            if key in row:
                return row[key]
            message = (
                f"row {number}: no {key!r} among {', '.join(map(repr, row)) or 'no keys at all'}; name the "
                "key, and have transformers.Trainer leave columns alone: remove_unused_columns=False"
            )
            raise InputError(message)
        if not isinstance(row, (str, bytes)) and len(row) > place:
            return row[place]
        message = f"row {number}: {row!r:.60} has no value {place + 1} ({key}); give a pair, or a mapping"
        raise InputError(message)

    def sequence_of(self, row: Row, number: int) -> bytes:
        """Return the letters of a row; a row without a label may be the text alone."""
        whole = row if isinstance(row, (str, bytes)) else self.value(row, self.sequence, 0, number)
        return self.bases(whole, number)


class RowCollator:
    """Pads rows of sequences, with or without labels, to one batch.

    A row is a mapping (``{"sequence": "ACGT", "label": 1}``; other keys are not looked at), a pair
    (``("ACGT", 1)``), or for ``target`` ``none`` and ``causal`` the text alone. ``transformers.Trainer``
    needs ``remove_unused_columns=False``: it would take ``sequence`` out of rows before they come here.

    Args:
        tokenizer: Of the model.
        target: What labels are of: ``sequence`` (a class, or fractions), ``numbers`` (of a sequence: float32
            however they are written, as heads for numbers and for labels on or off take them), ``token``
            (one class per base), ``causal`` (the next token; labels are the ids, each row ends with EOS), or
            ``none``.
        classes: Names of the classes, in the order of their numbers, where labels are names; None where they
            are numbers already.
        sequence: Key of the sequence in mappings.
        label: Key of the label in mappings.
        ignore_label: For ``token``: name of a base without a class; -100 always is one.
        several_bases: For ``token``, where a token stands for several bases: ``error``, or ``first``.
        max_tokens: Longest row of the model; longer ones raise, none is cut. None knows no limit.
        skip_first: Bases at the start that ``pool_mask`` leaves out.
        add_pool_mask: Also return ``pool_mask``, which heads of ours take and other models do not.
        pad_to_multiple_of: Padded lengths are multiples of this.
        keep_case: Keep lower case, which soft-masks genomes; else letters become upper case.

    Raises:
        ModelError: For ``causal``, if the tokenizer has no token that ends a document.

    Example:
        >>> from genoembed import CharTokenizer
        >>> collate = RowCollator(CharTokenizer(), classes=("other", "promoter"))
        >>> batch = collate([{"sequence": "ACG", "label": "promoter"}, {"sequence": "T", "label": "other"}])
        >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist()
        ([[65, 67, 71], [84, 1, 1]], [[1, 1, 1], [1, 0, 0]], [1, 0])
        >>> RowCollator(CharTokenizer(), target="causal")(["AC", "T"])["labels"].tolist()
        [[65, 67, 0], [84, 0, -100]]
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        target: LabelTarget | Literal["numbers"] = "sequence",
        classes: Sequence[str] | None = None,
        sequence: str = "sequence",
        label: str = "label",
        ignore_label: str | None = None,
        several_bases: BaseLabels = "error",
        max_tokens: int | None = None,
        skip_first: int = 0,
        add_pool_mask: bool = False,
        pad_to_multiple_of: int = 1,
        keep_case: bool = False,
    ) -> None:
        self._rows = _Rows(sequence, label, keep_case)
        self._encoder = build_encoder(tokenizer)
        self._document = token_rules(tokenizer, name="tokenizer") if target == "causal" else None
        self._codes: dict[object, int] | None = (
            None if classes is None else {name: code for code, name in enumerate(classes)}
        )
        self._ignore, self._several_bases = ignore_label, several_bases
        self._are_numbers = target == "numbers"
        self._max_tokens, self._skip_first = max_tokens, skip_first
        self._adds_pool_mask = add_pool_mask
        self._padded = PaddedCollator(
            pad_token_id=self._encoder.pad_token_id,
            target="sequence" if target == "numbers" else target,
            pad_to_multiple_of=pad_to_multiple_of,
        )

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Pad rows to one batch.

        Args:
            rows: At least one; mappings, or pairs of sequence and label.

        Returns:
            ``input_ids`` and ``attention_mask`` (int64, ``(B, L)``); ``labels`` unless ``target`` is
            ``none``: of sequences ``(B,)`` int64 for whole numbers and float32 for others, ``(B, C)`` float32
            for lists, and always float32 for ``numbers``; of tokens int64, ``(B, L)``, -100 where there is
            none; and ``pool_mask`` if requested (``(B, L)``: bool, or float32 where tokens
            count for several bases).

        Raises:
            InputError: If a row has no such key, a label is none of ``classes`` or no number, or labels of
                one batch are whole in some rows only and ``target`` is not ``numbers``.
            SequenceLengthError: If a row holds no base, or more tokens than ``max_tokens``.
            ShapeError: If labels of one batch differ in shape, or are not one per base.
        """
        examples = [self._encoded(row, number) for number, row in enumerate(rows)]
        if self._padded.target == "sequence":
            _check_one_kind(examples)
        batch = self._padded(examples)
        if not self._adds_pool_mask:
            del batch["pool_mask"]
        return batch

    def _encoded(self, row: Row, number: int) -> EncodedExample:
        bases, name = self._rows.sequence_of(row, number), f"row {number}"
        if self._document is not None:
            ids = self._document.encode_document(bases)
            if self._max_tokens is not None and len(ids) > self._max_tokens:
                problem = f"{len(ids)} tokens with the end token, expected {self._max_tokens} at most"
                raise SequenceLengthError(problem, record_id=name)
            return EncodedExample.of_ids(ids)
        if self._padded.target == "token":
            return encode_token_example(
                bases,
                self._encoder,
                base_labels=self._base_labels(row, number),
                several_bases=self._several_bases,
                max_tokens=self._max_tokens,
                record_id=name,
            )
        return encode_example(
            bases,
            self._encoder,
            label=None if self._padded.target == "none" else self._label(row, number),
            max_tokens=self._max_tokens,
            skip_first=self._skip_first,
            record_id=name,
        )

    def _value(self, row: Row, number: int) -> Any:
        return self._rows.value(row, str(self._rows.label), 1, number)

    def _label(self, row: Row, number: int) -> NDArray[np.int64] | NDArray[np.float32]:
        value = self._value(row, number)
        found = _as_array(value) if self._codes is None else np.asarray(self._code(value, number))
        if found is None or found.dtype.kind not in "biuf":
            message = (
                f"row {number}: label {value!r:.60} is not a number; name the classes with classes=(...)"
            )
            raise InputError(message)
        # by what a row looks like alone: a batch must not decide about the dtype of its labels
        is_class = found.ndim == 0 and found.dtype.kind != "f" and not self._are_numbers
        return found.astype(np.int64) if is_class else found.astype(np.float32)

    def _base_labels(self, row: Row, number: int) -> NDArray[np.int64]:
        value = self._value(row, number)
        if self._codes is not None and isinstance(value, Iterable):
            return np.array([self._code(one, number) for one in value], dtype=np.int64)
        found = _as_array(value)
        is_whole = found is not None and (
            found.dtype.kind in "biu" or (found.dtype.kind == "f" and bool((found % 1 == 0).all()))
        )
        if found is None or not is_whole:
            message = (
                f"row {number}: labels {value!r:.60}, expected a whole number for each base; "
                "name the classes with classes=(...)"
            )
            raise InputError(message)
        return found.astype(np.int64)

    def _code(self, value: object, number: int) -> int:
        assert self._codes is not None, "callers look"
        if np.isscalar(value):  # lists and arrays are no keys
            if value == IGNORE_INDEX or (self._ignore is not None and value == self._ignore):
                return IGNORE_INDEX
            if value in self._codes:
                return self._codes[value]
        message = f"row {number}: label {value!r:.60} is none of {', '.join(map(str, self._codes))}"
        raise InputError(message)


def _as_array(value: object) -> NDArray[Any] | None:
    """Return a label as an array, or None for lists of several lengths."""
    try:
        return np.asarray(value)
    except ValueError:
        return None


def _check_one_kind(examples: Sequence[EncodedExample]) -> None:
    kinds = [None if example.label is None else example.label.dtype.kind for example in examples]
    if len(set(kinds)) > 1:
        message = (
            f"row {kinds.index('i')} has a whole number as its label and row {kinds.index('f')} has none; "
            'set target="numbers" where labels are no classes'
        )
        raise InputError(message)


class PairCollator:
    """Pads queries and their passages, the positive first in each group, as contrastive losses take them.

    A row is a mapping with a query, a positive and negatives (each a text or a list of texts; of several
    positives the first counts), or a tuple ``(query, positive, negative, ...)``. Rows with fewer negatives
    than the group holds are filled up, and ``passage_mask`` says where. Negatives are taken in their order:
    draw them with :class:`~genoembed.finetuning.sampling.GroupSampler` for others in each epoch.

    Args:
        tokenizer: Of the model.
        group_size: Passages of a query: 1 positive and negatives; with 1, the rest of the batch is negative.
        query: Key of the query in mappings.
        positive: Key of the positive.
        negative: Key of the negatives; may be missing in a row.
        terms: Also return the k-mers of each side, for a sparse head.
        max_tokens: Longest row of the model; longer ones raise. None knows no limit.
        skip_first: Bases at the start that the pool masks leave out.
        pad_to_multiple_of: Padded lengths are multiples of this.
        keep_case: Keep lower case; else letters become upper case.

    Raises:
        ConfigError: If ``group_size`` is below 1.

    Example:
        >>> from genoembed import CharTokenizer
        >>> collate = PairCollator(CharTokenizer(), group_size=2)
        >>> batch = collate([{"query": "AC", "pos": "ACC", "neg": ["GT"]}, ("TT", "TTA")])
        >>> batch["query_input_ids"].shape, batch["passage_input_ids"].shape
        (torch.Size([2, 2]), torch.Size([4, 3]))
        >>> batch["passage_mask"].tolist()
        [True, True, True, False]
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        group_size: int = 1,
        query: str = "query",
        positive: str = "pos",
        negative: str = "neg",
        terms: KmerTerms | None = None,
        max_tokens: int | None = None,
        skip_first: int = 0,
        pad_to_multiple_of: int = 1,
        keep_case: bool = False,
    ) -> None:
        if group_size < 1:
            message = f"group_size is {group_size}; set it to 1 or more"
            raise ConfigError(message)
        self._rows = _Rows(query, None, keep_case)
        self._positive, self._negative, self._size = positive, negative, group_size
        self._encoder = build_encoder(tokenizer)
        self._max_tokens, self._skip_first = max_tokens, skip_first
        rows = PaddedCollator(
            pad_token_id=self._encoder.pad_token_id, target="none", pad_to_multiple_of=pad_to_multiple_of
        )
        self._groups = GroupCollator(rows=rows, terms=terms)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Pad rows to one batch.

        Args:
            rows: At least one.

        Returns:
            ``query_input_ids``, ``query_attention_mask``, ``query_pool_mask`` of ``(B, L)``, the same of
            passages with ``B * group_size`` rows, group by group; ``query_ids``, ``passage_ids``,
            ``query_labels``, ``passage_labels`` (int64) and ``passage_mask`` (bool), as
            :class:`~genoembed.retrieval.candidates.PairIds` takes them; with ``terms`` also
            ``query_term_ids``, ``query_term_positions`` and those of passages.

        Raises:
            InputError: If a row has no query or no positive.
            SequenceLengthError: If a sequence is empty, or has more tokens than ``max_tokens``.
        """
        return self._groups([self._group(row, number) for number, row in enumerate(rows)])

    def _group(self, row: Row, number: int) -> Group:
        query = self._rows.sequence_of(row, number)
        positives = _listed(self._rows.value(row, self._positive, 1, number))
        if not positives:
            message = f"row {number}: no positive, expected one; leave rows without out"
            raise InputError(message)
        others = [row.get(self._negative)] if isinstance(row, Mapping) else row[2:]
        negatives = [one for value in others for one in _listed(value)]
        given = [positives[0], *negatives][: self._size]
        real = [self._rows.bases(value, number) for value in given]
        # a filler repeats the positive, so that all groups have one size; is_real masks it
        passages = [*real, *real[:1] * (self._size - len(real))]
        encoded = [
            encode_example(
                bases,
                self._encoder,
                max_tokens=self._max_tokens,
                skip_first=self._skip_first,
                record_id=f"row {number}",
            )
            for bases in (query, *passages)
        ]
        filled = [UNKNOWN] * (self._size - len(real))
        return Group(
            query=encoded[0],
            passages=tuple(encoded[1:]),
            sequences=(query, *passages),
            ids=(sequence_identity(query), *map(sequence_identity, real), *filled),
            label=UNKNOWN,
            is_real=tuple(place < len(real) for place in range(self._size)),
            teacher_scores=None,
        )


def _listed(value: object) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        return [value]
    return list(value)


Isolation: TypeAlias = Literal["segment_ids", "position_ids", "none"]
"""What keeps packed neighbors apart: StripedHyena 2 takes segments, attention models of transformers take
positions that start again; with none, neighbors see each other."""


class PackedCollator:
    """Packs the sequences of a batch into rows of one length, for causal training without padding.

    Args:
        tokenizer: Of the model; each sequence is followed by its end token.
        window: Tokens of a packed row, at least 2.
        packing: ``bins`` puts whole sequences where they fit best and pads the ends of rows; ``stream``
            concatenates them and cuts at the window.
        isolate: Which input keeps neighbors apart; see :data:`Isolation`.
        sequence: Key of the sequence in mappings; a row may also be a pair or the text alone.
        keep_case: Keep lower case; else letters become upper case.
        seed: Decides about the order within rows of ``bins``.

    Raises:
        ModelError: If the tokenizer has no token that ends a document.

    Example:
        >>> from genoembed import CharTokenizer
        >>> batch = PackedCollator(CharTokenizer(), window=6, packing="stream")([{"sequence": "ACG"}, "T"])
        >>> batch["input_ids"].tolist(), batch["labels"].tolist(), batch["segment_ids"].tolist()
        ([[65, 67, 71, 0, 84, 0]], [[-100, 67, 71, 0, -100, 0]], [[0, 0, 0, 0, 1, 1]])
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        window: int,
        packing: Packing = "bins",
        isolate: Isolation = "segment_ids",
        sequence: str = "sequence",
        keep_case: bool = False,
        seed: int = 0,
    ) -> None:
        self._rows = _Rows(sequence, None, keep_case)
        self._rules = token_rules(tokenizer, name="tokenizer")
        self._window, self._packing, self._isolate, self._seed = window, packing, isolate, seed

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Pack rows; their number and that of packed rows differ.

        Args:
            rows: At least one.

        Returns:
            ``input_ids`` and ``labels`` (int64, ``(R, window)``; a label is -100 at the first token of a
            sequence and in padding), and ``segment_ids`` or ``position_ids`` (int64, ``(R, window)``), or
            with ``isolate`` ``none`` the ``attention_mask``.

        Raises:
            ConfigError: If ``window`` is too small.
            InputError: If a row has no such key.
            SequenceLengthError: If a sequence is empty.
        """
        documents = [
            self._rules.encode(self._rows.sequence_of(row, number)) for number, row in enumerate(rows)
        ]
        shape: dict[str, Any] = {
            "window": self._window,
            "eod_token_id": self._rules.eod_token_id,
            "pad_token_id": self._rules.pad_token_id,
        }
        if self._packing == "bins":
            packed = list(pack_bins(documents, seed=self._seed, **shape))
        else:
            packed = list(pack_stream(documents, **shape))
        names = ("input_ids", "labels", "segment_ids", "position_ids")
        found = {name: torch.cat([getattr(row, name) for row in packed]) for name in names}
        batch = {"input_ids": found["input_ids"], "labels": found["labels"]}
        if self._isolate == "none":
            return batch | {"attention_mask": (found["segment_ids"] >= 0).long()}
        return batch | {self._isolate: found[self._isolate]}
