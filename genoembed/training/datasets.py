"""Training data: a corpus packed once into equal rows of tokens, held compactly and read row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from genoembed.batching.pack import pack_stream
from genoembed.errors import ConfigError
from genoembed.sequences.alphabet import reverse_complement

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

_ROWS_PER_PACK = 64


class PackedCorpus(Dataset[dict[str, "Tensor"]]):
    """Rows of packed documents for causal training, two bytes and a bit a token in memory.

    Args:
        documents: Token ids of one document each, as bytes or integers.
        window: Tokens of a row.
        eod_token_id: Ends each document.
        pad_token_id: Fills the last row.

    Raises:
        ConfigError: If there is no document, ``window`` is too small, or a token id is above 65535.
        SequenceLengthError: If a document is empty.
        ShapeError: If a document is not a row of integers.

    Example:
        >>> corpus = PackedCorpus([b"ACG", b"TT"], window=4)
        >>> len(corpus), corpus[1]["input_ids"].tolist(), corpus[1]["labels"].tolist()
        (2, [84, 84, 0, 1], [-100, 84, 0, -100])
    """

    def __init__(
        self,
        documents: Iterable[bytes | NDArray[np.integer] | Sequence[int]],
        *,
        window: int,
        eod_token_id: int = 0,
        pad_token_id: int = 1,
    ) -> None:
        rows: list[NDArray[np.uint16]] = []
        ignored: list[NDArray[np.bool_]] = []
        for batch in pack_stream(
            documents,
            window=window,
            eod_token_id=eod_token_id,
            pad_token_id=pad_token_id,
            batch_size=_ROWS_PER_PACK,
        ):
            rows.append(_as_uint16(batch.input_ids.numpy()))
            ignored.append((batch.labels < 0).numpy())
        if not rows:
            message = "documents: none were given; give at least one sequence to train on"
            raise ConfigError(message)
        self._rows = np.concatenate(rows)
        self._ignored = np.packbits(np.concatenate(ignored), axis=1)
        self.window = window

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        input_ids = torch.from_numpy(self._rows[index].astype(np.int64))
        ignored = np.unpackbits(self._ignored[index], count=self.window).astype(np.bool_)
        labels = input_ids.masked_fill(torch.from_numpy(ignored), -100)
        return {"input_ids": input_ids, "labels": labels}


def _as_uint16(ids: NDArray[np.int64]) -> NDArray[np.uint16]:
    for bad_id in (int(ids.min()), int(ids.max())):
        if not 0 <= bad_id <= np.iinfo(np.uint16).max:
            message = f"documents: token id {bad_id}, expected 0 to 65535; train with another tokenizer"
            raise ConfigError(message)
    return ids.astype(np.uint16)


def random_strands(sequences: Iterable[bytes], *, seed: int) -> Iterable[bytes]:
    """Replace each sequence by its reverse complement with probability one half.

    Args:
        sequences: DNA.
        seed: Decides which; the same seed gives the same choice.

    Yields:
        As many sequences, in the same order.
    """
    generator = np.random.default_rng(seed)
    for sequence in sequences:
        yield reverse_complement(sequence) if generator.random() < 0.5 else sequence


def cut_documents(sequences: Sequence[bytes], *, max_length: int, seed: int) -> list[bytes]:
    """Cut long sequences into pieces and shuffle the pieces: neighbours in a row should not be kin.

    Args:
        sequences: DNA.
        max_length: Bases of a piece at most; nothing is dropped.
        seed: Decides about the order.

    Returns:
        All bases, each in one piece.

    Raises:
        ConfigError: If ``max_length`` is below 1.

    Example:
        >>> sorted(cut_documents([b"ACGTA", b"GG"], max_length=3, seed=0))
        [b'ACG', b'GG', b'TA']
    """
    if max_length < 1:
        message = f"max_length: {max_length}, expected 1 or more; set max_length to a multiple of the window"
        raise ConfigError(message)
    pieces = [
        sequence[start : start + max_length]
        for sequence in sequences
        for start in range(0, len(sequence), max_length)
    ]
    order = np.random.default_rng(seed).permutation(len(pieces))
    return [pieces[index] for index in order]
