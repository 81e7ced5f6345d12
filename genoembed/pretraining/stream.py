"""The training stream: documents of a corpus, epoch after epoch, as packed rows of tokens.

In: files, a corpus config, a way to encode. Out: rows for causal training, without end. Promised: the rows
depend on files, configs and rank only, so that a run goes on exactly by leaving out the rows it has used;
what was read before is read and packed again, which costs time and no memory. L tokens of a row (the window).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from genoembed.batching.pack import PackCounts, pack_bins, pack_stream
from genoembed.errors import ConfigError
from genoembed.pretraining.corpus import DocumentStream

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from genoembed.batching.pack import Document
    from genoembed.config.choices import Packing
    from genoembed.config.pretrain import CorpusConfig
    from genoembed.contracts import PackedBatch
    from genoembed.training.start import TokenRules


_ROW_FIELDS = ("input_ids", "labels", "position_ids", "segment_ids")


@dataclass(frozen=True, kw_only=True, slots=True)
class RowShape:
    """How documents are packed into rows."""

    packing: Packing
    window: int
    seed: int
    rows_per_batch: int
    """Documents that a padded batch would hold, for the comparison."""


@dataclass(kw_only=True, slots=True)
class PaddedCounts:
    """What the same documents would cost if each were a padded row of a batch."""

    rows_per_batch: int
    tokens: int = 0
    """Tokens of the documents, EOD counted."""
    slots: int = 0
    """Slots of the batches: rows times the longest of each batch."""
    _sizes: list[int] | None = None

    def add(self, num_tokens: int, window: int) -> None:
        """Write a document into the next free rows; what is longer than a window takes several."""
        waiting = self._sizes or []
        self._sizes = waiting
        for start in range(0, num_tokens, window):
            waiting.append(min(window, num_tokens - start))
            if len(waiting) == self.rows_per_batch:
                self.tokens += sum(waiting)
                self.slots += len(waiting) * max(waiting)
                waiting.clear()

    @property
    def slots_per_token(self) -> float:
        """Slots for each real token; 1 before the first batch is full."""
        return self.slots / self.tokens if self.tokens else 1.0


class PackedStream(IterableDataset[dict[str, "Tensor"]]):
    """Rows of packed documents without end; each pass over the corpus has another order."""

    def __init__(
        self,
        paths: Sequence[str],
        *,
        corpus: CorpusConfig,
        rules: TokenRules,
        rows: RowShape,
        skip_rows: int = 0,
    ) -> None:
        self.files_sha256 = DocumentStream(paths, config=corpus).state.files_sha256
        self.skip_rows = skip_rows
        self.epoch = 0
        """Pass over the corpus that the newest row is from."""
        self._paths, self._corpus, self._rules, self._rows = paths, corpus, rules, rows
        self._restart_counts()

    def _restart_counts(self) -> None:
        self.packed = PackCounts()
        self.padded = PaddedCounts(rows_per_batch=self._rows.rows_per_batch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self._restart_counts()
        return itertools.islice(self._endless(), self.skip_rows, None)

    def _endless(self) -> Iterator[dict[str, Tensor]]:
        for self.epoch in itertools.count():
            documents = self._watched(DocumentStream(self._paths, config=self._corpus, epoch=self.epoch))
            seed = np.random.SeedSequence([self._rows.seed, self.epoch, self._corpus.shard])
            for batch in _pack(
                documents, self._rules, self._rows, seed=int(seed.generate_state(1)[0]), counts=self.packed
            ):
                yield {name: getattr(batch, name)[0] for name in _ROW_FIELDS}

    def _watched(self, documents: Iterable[bytes]) -> Iterator[Document]:
        for document in documents:
            ids = self._rules.encode(document)
            self.padded.add(len(ids) + 1, self._rows.window)
            yield ids

    @property
    def padded_cost(self) -> float:
        """Slots that padded batches would take, over the slots that packing takes, for the same tokens."""
        return self.padded.slots_per_token * self.packed.efficiency


def _pack(
    documents: Iterable[Document], rules: TokenRules, rows: RowShape, *, seed: int, counts: PackCounts
) -> Iterator[PackedBatch]:
    ids: dict[str, Any] = {"eod_token_id": rules.eod_token_id, "pad_token_id": rules.pad_token_id}
    if rows.packing == "bins":
        return pack_bins(documents, window=rows.window, seed=seed, counts=counts, **ids)
    return pack_stream(documents, window=rows.window, counts=counts, **ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldoutRows:
    """Rows to measure on. int64, shape ``(N, L)`` each."""

    tensors: dict[str, Tensor]
    tokens_per_base: float
    """Tokens, without EOD, for each base of all documents that are held out."""
    eod_token_id: int
    documents: int
    """Documents they were drawn from."""

    def __len__(self) -> int:
        return len(self.tensors["input_ids"])


def read_heldout(
    paths: Sequence[str], *, corpus: CorpusConfig, rules: TokenRules, rows: RowShape, num_rows: int
) -> HeldoutRows:
    """Pack what is held out, and keep rows of it spread evenly."""
    config = corpus.changed(both_strands=False, shuffle_documents=1, shard=0, num_shards=1, seed=0)
    stream = DocumentStream(paths, config=config)
    num_tokens = 0

    def encoded() -> Iterator[Document]:
        nonlocal num_tokens
        for document in stream:
            ids = rules.encode(document)
            num_tokens += len(ids)
            yield ids

    plain = replace(rows, packing="stream")
    try:
        batches = list(_pack(encoded(), rules, plain, seed=0, counts=PackCounts()))
    except ConfigError as error:
        if stream.counts.documents:
            raise
        share = f"a share of {corpus.heldout_fraction} of " if corpus.heldout else ""
        message = (
            f"held out: no document in {share}{stream.counts.read.records} records; set a larger "
            "heldout_fraction, or heldout to a file"
        )
        raise ConfigError(message) from error
    kept = np.unique(np.linspace(0, len(batches) - 1, num_rows).round().astype(int))
    return HeldoutRows(
        tensors={name: torch.cat([getattr(batches[i], name) for i in kept]) for name in _ROW_FIELDS},
        tokens_per_base=num_tokens / stream.counts.bases,
        eod_token_id=rules.eod_token_id,
        documents=stream.counts.documents,
    )
