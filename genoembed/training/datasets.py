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
    """Rows of packed documents for causal training, one byte or two a token in memory.

    Args:
        documents: Token ids of one document each, as bytes.
        window: Tokens of a row.
        eod_token_id: Ends each document.
        pad_token_id: Fills the last row.

    Raises:
        ConfigError: If there is no document.

    Example:
        >>> corpus = PackedCorpus([b"ACG", b"TT"], window=4)
        >>> len(corpus), corpus[1]["input_ids"].tolist(), corpus[1]["labels"].tolist()
        (2, [84, 84, 0, 1], [-100, 84, 0, -100])
    """

    def __init__(
        self, documents: Iterable[bytes], *, window: int, eod_token_id: int = 0, pad_token_id: int = 1
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
            rows.append(batch.input_ids.numpy().astype(np.uint16))
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

    Example:
        >>> sorted(cut_documents([b"ACGTA", b"GG"], max_length=3, seed=0))
        [b'ACG', b'GG', b'TA']
    """
    pieces = [
        sequence[start : start + max_length]
        for sequence in sequences
        for start in range(0, len(sequence), max_length)
    ]
    order = np.random.default_rng(seed).permutation(len(pieces))
    return [pieces[index] for index in order]
