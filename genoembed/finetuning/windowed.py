"""Run a task's model over sequences of any length, as evaluation and prediction do.

A sequence longer than the context is cut into overlapping windows; each base counts once, in the window that
shows most of its context; pooled windows are merged by the bases they kept, as ``extract`` does. Promised: a
result depends neither on its batch-mates nor on their order, and nothing is truncated.

N sequences, D width, T tokens, C outputs.

Scores of passages that are longer than a context: windows that overlap, and the best of them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from genoembed.batching.pad import pool_mask
from genoembed.contracts import Window
from genoembed.errors import SequenceLengthError, ShapeError
from genoembed.finetuning.collate import EncodedExample, PaddedCollator
from genoembed.pooling.reduce import merge_windows
from genoembed.sequences import iter_windows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from genoembed.contracts import EncodedSequence
    from genoembed.tokenization.hf import SequenceEncoder
    from genoembed.training.encoder import Encoder


class Piece(NamedTuple):
    """A window of a sequence, encoded."""

    sequence: int
    """Which sequence."""
    start: int
    """Its first base in the sequence."""
    example: EncodedExample
    """What the model sees; the pool mask has what counts."""


class TokenOutputs(NamedTuple):
    """What was predicted of the tokens of one sequence."""

    starts: NDArray[np.int64]
    """First base of each token. Shape ``(T,)``."""
    logits: Tensor
    """float32, ``(T, C)``, on the CPU."""
    predictions: Tensor
    """float32, ``(T, C)``, on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowedRunner:
    """How sequences are cut, padded and run."""

    encoder: SequenceEncoder
    max_tokens: int | None
    """Context of the model, special tokens included; None is no limit."""
    is_causal: bool
    equal_lengths: bool = False
    """Batches hold rows of one length: the model would see padding."""
    skip_first: int = 0
    """Bases at the start of each window that pooling leaves out."""
    rows: int = 16
    """Windows of a forward pass."""
    pad_to_multiple_of: int = 1

    @classmethod
    def of(
        cls,
        encoder: Encoder,
        tokens: SequenceEncoder,
        *,
        max_tokens: int | None,
        skip_first: int = 0,
        rows: int = 16,
        pad_to_multiple_of: int = 1,
    ) -> WindowedRunner:
        """Fit to an encoder."""
        is_equal = encoder.padding == "equal"
        return cls(
            encoder=tokens,
            max_tokens=max_tokens,
            is_causal=encoder.is_causal,
            equal_lengths=is_equal,
            skip_first=skip_first,
            rows=rows,
            pad_to_multiple_of=1 if is_equal else pad_to_multiple_of,
        )

    @torch.no_grad()
    def vectors(self, model: nn.Module, encoder: Encoder, sequences: Sequence[bytes]) -> Tensor:
        """Give one fused vector a sequence, before any head."""
        device = _device(encoder)
        pieces = [piece for index, bases in enumerate(sequences) for piece in self._cut(index, bases)]
        found: dict[int, list[tuple[int, int, dict[str, Tensor]]]] = defaultdict(list)
        for batch_pieces, batch in self._batches(pieces):
            layers = model(**{k: v.to(device) for k, v in batch.items()}, want="layers")
            for row, piece in enumerate(batch_pieces):
                mine = {path: values[row] for path, values in layers.items()}
                found[piece.sequence].append((piece.start, int(piece.example.pool_mask.sum()), mine))
        merged = [self._merge(found[index], encoder) for index in range(len(sequences))]
        return encoder.fuse({path: torch.stack([one[path] for one in merged]) for path in merged[0]})

    @torch.no_grad()
    def states(self, encoder: Encoder, sequences: Sequence[bytes]) -> Tensor:
        """Give the fused hidden states of all tokens that count, before any head."""
        device = _device(encoder)
        pieces = [piece for index, bases in enumerate(sequences) for piece in self._cut(index, bases)]
        found = []
        for _, batch in self._batches(pieces):
            ids, mask, kept = (batch[n].to(device) for n in ("input_ids", "attention_mask", "pool_mask"))
            found.append(encoder.hidden(ids, mask)[kept].float())
        return torch.cat(found)

    @torch.no_grad()
    def tokens(self, model: nn.Module, encoder: Encoder, sequences: Sequence[bytes]) -> list[TokenOutputs]:
        """Predict for every token."""
        device = _device(encoder)
        pieces = [piece for index, bases in enumerate(sequences) for piece in self._cut(index, bases)]
        found: dict[int, list[tuple[int, TokenOutputs]]] = defaultdict(list)
        for batch_pieces, batch in self._batches(pieces):
            output = model(**{k: v.to(device) for k, v in batch.items()}, want="predict")
            for row, piece in enumerate(batch_pieces):
                is_kept = piece.example.pool_mask
                kept = torch.from_numpy(np.flatnonzero(is_kept))
                logits, predictions = (
                    output[name][row].float().cpu()[kept] for name in ("logits", "predictions")
                )
                starts = piece.start + _starts(piece.example.encoded)[is_kept]
                found[piece.sequence].append((piece.start, TokenOutputs(starts, logits, predictions)))
        return [_joined(found[index]) for index in range(len(sequences))]

    def _cut(self, index: int, sequence: bytes) -> Iterator[Piece]:
        whole = self._whole(sequence)
        if whole is not None:
            yield Piece(index, 0, self._example(whole, 0, len(sequence)))
            return
        assert self.max_tokens is not None, "without a limit, everything is whole"
        window_bp = self.encoder.max_bases(self.max_tokens)
        for window in iter_windows(len(sequence), window_bp=window_bp, causal=self.is_causal):
            encoded = self.encoder.encode(sequence[window.start : window.end])
            core = (window.core_start - window.start, window.core_end - window.start)
            yield Piece(index, window.start, self._example(encoded, *core))

    def _whole(self, sequence: bytes) -> EncodedSequence | None:
        """Encode a sequence that fits the context as one."""
        if self.max_tokens is not None and len(sequence) > _BASES_PER_TOKEN * self.max_tokens:
            return None
        encoded = self.encoder.encode(sequence)
        fits = self.max_tokens is None or len(encoded.input_ids) <= self.max_tokens
        return encoded if fits else None

    def _example(self, encoded: EncodedSequence, core_start: int, core_end: int) -> EncodedExample:
        mask = pool_mask(encoded, core_start=core_start, core_end=core_end, skip_first=self.skip_first)
        return EncodedExample(encoded=encoded, pool_mask=mask)

    def _batches(self, pieces: Sequence[Piece]) -> Iterator[tuple[list[Piece], dict[str, Tensor]]]:
        """Pad pieces of like length together, the longest first."""
        collate = PaddedCollator(
            pad_token_id=self.encoder.pad_token_id,
            target="none",
            pad_to_multiple_of=self.pad_to_multiple_of,
        )
        order = sorted(pieces, key=lambda piece: -len(piece.example))
        start = 0
        while start < len(order):
            end = min(start + self.rows, len(order))
            if self.equal_lengths:
                length = len(order[start].example)
                end = next((i for i in range(start, end) if len(order[i].example) != length), end)
            batch = order[start:end]
            yield batch, collate([piece.example for piece in batch])
            start = end

    def _merge(
        self, windows: list[tuple[int, int, dict[str, Tensor]]], encoder: Encoder
    ) -> dict[str, Tensor]:
        if len(windows) == 1:
            return windows[0][2]
        windows = sorted(windows, key=lambda window: window[0])
        weights = torch.tensor([weight for _, weight, _ in windows])
        return {
            path: merge_windows(
                torch.stack([layers[path] for _, _, layers in windows]), weights, method=encoder.pooling
            )
            for path in windows[0][2]
        }


_BASES_PER_TOKEN = 16
"""No tokenizer in use joins more bases on average: longer sequences are cut without being tried whole."""


def _starts(encoded: EncodedSequence) -> NDArray[np.int64]:
    if encoded.base_start is not None:
        return encoded.base_start
    return np.arange(len(encoded.input_ids), dtype=np.int64)


def _joined(parts: list[tuple[int, TokenOutputs]]) -> TokenOutputs:
    outputs = [output for _, output in sorted(parts, key=lambda part: part[0])]
    return TokenOutputs(
        np.concatenate([output.starts for output in outputs]),
        torch.cat([output.logits for output in outputs]),
        torch.cat([output.predictions for output in outputs]),
    )


def _device(encoder: Encoder) -> torch.device:
    return next(encoder.backbone.parameters()).device


_MAX_OVERLAP = 80
_OVERLAP_SHARE = 4


def passage_spans(
    length: int, *, context: int, query_tokens: int = 0, special_tokens: int = 0
) -> tuple[Window, ...]:
    """Cut a passage into windows that fit a context together with its query.

    A window has ``context - query_tokens - special_tokens`` tokens and shares with the one before it the
    smaller of 80 tokens and a quarter of its own. The last is shorter. A passage that fits is one window.

    Example:
        >>> spans = passage_spans(1000, context=512, query_tokens=20, special_tokens=2)
        >>> [(span.start, span.end) for span in spans]
        [(0, 490), (410, 900), (820, 1000)]
    """
    window = context - query_tokens - special_tokens
    if length < 1 or window < 1:
        message = (
            f"passage of {length} tokens: {window} of a context of {context} are left for it beside a query "
            f"of {query_tokens} tokens and {special_tokens} special ones, expected 1 or more of each; "
            "shorten the query"
        )
        raise SequenceLengthError(message)
    step = window - min(_MAX_OVERLAP, window // _OVERLAP_SHARE)
    starts = range(0, max(length - window, 0) + step, step)
    spans = []
    for start in starts:
        end = min(start + window, length)
        spans.append(Window(start=start, end=end, core_start=start, core_end=end))
        if end == length:
            break
    return tuple(spans)


def best_window_scores(scores_W: Tensor, passage_W: Tensor, *, num_passages: int) -> Tensor:
    """Give each passage the score of its best window.

    Example:
        >>> best_window_scores(torch.tensor([0.1, 0.7, 0.3]), torch.tensor([0, 0, 1]), num_passages=2)
        tensor([0.7000, 0.3000])
    """
    owners = passage_W.unique().tolist()
    if passage_W.shape != scores_W.shape[-1:] or owners != list(range(num_passages)):
        message = (
            f"windows: shape {tuple(scores_W.shape)} of passages {owners}, expected one or more for each of "
            f"{num_passages} passages"
        )
        raise ShapeError(message)
    start = scores_W.new_full((*scores_W.shape[:-1], num_passages), -torch.inf)
    return start.scatter_reduce(-1, passage_W.to(scores_W.device).expand_as(scores_W), scores_W, "amax")
