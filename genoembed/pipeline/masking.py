"""Masked log-probabilities, by reducers beside those of ``forward``: each token of a row hidden once, or once
all that count, with what the model gives to every word in their place.

Where words overlap (k-mers at every base), a hidden one could be read off its neighbors: there all words that
cover a base are hidden together, and the base gets the mean of their log-probabilities.

B rows, L padded length, P places, V words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from genoembed.pipeline.forward import LOG_PROBS
from genoembed.tokenization.hf import words_per_base

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from genoembed.contracts import Batch
    from genoembed.models.masked_model import MaskedModel
    from genoembed.pipeline.forward import RowValues
    from genoembed.pipeline.units import RunStats
    from genoembed.tokenization.hf import SequenceEncoder

_PROBE = b"ACGT" * 6


class MaskedReducer:
    """Keeps natural logarithms of the probabilities of hidden tokens.

    For each row one value per token that counts; where words overlap, one per base of these tokens, 0 where
    a word that covers the base does not count. 0 as well for a token that stands for nothing readable.
    """

    def __init__(self, model: MaskedModel, encoder: SequenceEncoder) -> None:
        self.pooling_s = 0.0
        self.device = model.model.device
        self.carries_state, self.repeats_rows = False, True
        self._model = model
        tokenizer = model.model.tokens
        self.overlap = words_per_base(tokenizer)
        """Words that cover a base; 1 where each base has one."""
        self._unknown = -1 if tokenizer.unk_token_id is None else int(tokenizer.unk_token_id)
        starts = encoder.encode(_PROBE).base_start
        is_word = np.ones(1, np.bool_) if starts is None else starts >= 0
        self._before, self._after = int(is_word.argmax()), int(is_word[::-1].argmax())
        self._stats: RunStats | None = None
        self._on_batch: Callable[[RunStats], None] | None = None
        self._num_strands = 1

    def count_copies(
        self, stats: RunStats, *, num_strands: int, on_batch: Callable[[RunStats], None] | None
    ) -> None:
        """Count the passes of copies, which the runner does not see; a long row is many passes."""
        self._stats, self._num_strands, self._on_batch = stats, num_strands, on_batch

    def __call__(self, batch: Batch, *, block_tokens: int) -> RowValues:
        """Run a batch, a place of its rows at a time; as many copies of rows in a pass as it may hold."""
        counted = batch.counted.numpy()
        ids, lengths = batch.input_ids.numpy(), batch.attention_mask.sum(dim=1).tolist()
        values = []
        places: list[tuple[int, int, int]] = []
        targets: list[tuple[int, int]] = []
        for row, (mask, length) in enumerate(zip(counted, lengths, strict=True)):
            columns = np.flatnonzero(mask)
            values.append(np.zeros(len(columns) + self.overlap - 1))
            readable = ids[row] != self._unknown
            for index, first, past in self._places(columns, length):
                if readable[first:past].any():
                    places.append((row, first, past))
                    targets.append((row, index))
        step = max(1, block_tokens // ids.shape[1])
        # a row counts as done when the runner has it: until then what its copies have done is under way
        before = 0 if self._stats is None else self._stats.bases_under_way
        num_bases = 0.0
        try:
            for start in range(0, len(places), step):
                part = np.array(places[start : start + step])
                found = self._run(batch, part)
                for (row, index), value in zip(targets[start : start + step], found, strict=True):
                    values[row][index] = value
                if self._stats is not None:
                    num_bases += self._bases_of(batch, part)
                    self._stats.bases_under_way = before + int(num_bases / self._num_strands)
                    self._count(part, lengths, ids.shape[1])
        finally:
            if self._stats is not None:
                self._stats.bases_under_way = before
        return {LOG_PROBS: tuple(map(torch.from_numpy, values))}

    def _count(self, places: NDArray[np.int64], lengths: list[int], length: int) -> None:
        stats = self._stats
        assert stats is not None, "asked only where copies are counted"
        stats.batches += 1
        stats.slots += len(places) * length
        stats.real_tokens += sum(lengths[row] for row in places[:, 0].tolist())
        if self._on_batch is not None:
            self._on_batch(stats)

    def _bases_of(self, batch: Batch, places: NDArray[np.int64]) -> float:
        if self.overlap > 1:
            return len(places)
        return float(batch.pool_mask[places[:, 0], places[:, 1]].sum())

    def _places(self, columns: NDArray[np.int64], length: int) -> Iterator[tuple[int, int, int]]:
        """Yield what is hidden together: number of the value, first column, one past the last."""
        if self.overlap == 1:
            for index, column in enumerate(columns.tolist()):
                yield index, column, column + 1
            return
        first_word, past_word = self._before, length - self._after
        first, past = int(columns[0]), int(columns[-1]) + 1
        # word c covers the bases at columns c, c + 1 ... c + k - 1
        for base in range(first, past + self.overlap - 1):
            start, stop = max(base - self.overlap + 1, first_word), min(base + 1, past_word)
            if start >= first and stop <= past:
                yield base - first, start, stop

    def _run(self, batch: Batch, places: NDArray[np.int64]) -> NDArray[np.float64]:
        """Hide one place in each copy; the mean over the readable tokens of each."""
        rows, firsts, pasts = torch.from_numpy(places).T
        columns_L = torch.arange(batch.input_ids.shape[1])
        hidden_PL = (columns_L >= firsts[:, None]) & (columns_L < pasts[:, None])
        ids_PL = batch.input_ids[rows]
        log_probs = self._model.log_probs(ids_PL, batch.attention_mask[rows], hidden_PL).numpy()
        is_read = (ids_PL[hidden_PL] != self._unknown).numpy()
        owners = hidden_PL.nonzero()[:, 0].numpy()[is_read]
        sums = np.bincount(owners, weights=log_probs[is_read], minlength=len(places))
        return sums / np.bincount(owners, minlength=len(places))


class HiddenWordsReducer:
    """Hides all tokens of a row that count, together, and keeps what the model gives to each word there.

    For each row natural logarithms of probabilities, ``(P, V)``: of a base, those of the words that hold it.
    """

    def __init__(self, model: MaskedModel) -> None:
        self.pooling_s = 0.0
        self.device = model.model.device
        self.carries_state = self.repeats_rows = False
        self._model = model

    def __call__(self, batch: Batch, *, block_tokens: int) -> RowValues:
        """Run a batch once."""
        del block_tokens
        hidden_BL = batch.counted
        found_PV = self._model.word_log_probs(batch.input_ids, batch.attention_mask, hidden_BL)
        # words that a model rules out by an infinite logit are no failure: hardly any of all is asked for
        found_PV.clamp_(min=torch.finfo(found_PV.dtype).min)
        return {LOG_PROBS: torch.split(found_PV, hidden_BL.sum(dim=1).tolist())}
