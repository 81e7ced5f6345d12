"""What pretraining may learn beside the next token: mean-pooled states that tell sequences apart.

In: packed rows of documents. Out: the same rows and some of mutated copies of pieces of them, for one forward
pass; of what the chosen layers gave in it, a contrastive loss on pooled pieces and copies, and a loss on the
states of tokens against codes of k-mers. Promised: what is drawn for a batch depends on the batch alone, so a
run that goes on learns the same; a piece lies within one document, and its copy is no longer than it.

B rows, L slots of a row, G pieces and copies, P pairs of them, D width of a layer, W width of the codes.
"""

from __future__ import annotations

import zlib
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from genoembed.config.pretrain import JOIN
from genoembed.contracts import IGNORE_INDEX
from genoembed.errors import ConfigError, LayerError, Problem, Remedy
from genoembed.models.behavior import Probe
from genoembed.models.layers import FINAL, first_tensor, hooked, resolve_layers
from genoembed.training.augment import mutated_copy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from genoembed.config.pretrain import VectorLossConfig
    from genoembed.pretraining.kmer_codes import KmerCodes
    from genoembed.training.start import Start, TokenRules


PAIR_FIELDS = ("group_ids", "num_pairs")
"""Fields of a batch that are no input of the model."""
LOGGED = ("contrast_loss", "mean_cosine", "kmer_loss")
"""How the names of numbers for the log begin; the layer follows."""
TEMPERATURE = 0.07
"""Of the cosines in the contrastive loss."""
_LEAST_TOKENS, _MOST_TOKENS = 100, 300
"""Of a piece; in narrow rows a quarter and a half of the window."""


class RowSpan(NamedTuple):
    """Neighboring tokens of one document in a row."""

    row: int
    start: int
    end: int


class ViewRows:
    """Adds rows of mutated copies to a batch, and numbers the tokens of pieces and copies.

    Of ``group_ids`` (int64, ``(B, L)``), copy i has number ``2 i + 1`` and its piece ``2 i``; pieces without
    a copy have the numbers after those, and all other tokens -1.
    """

    def __init__(
        self, rules: TokenRules, decode: Callable[[Sequence[int]], bytes], *, rows: int, seed: int
    ) -> None:
        self._rules, self._decode, self._rows, self._seed = rules, decode, rows, seed

    def add(self, batch: dict[str, Tensor], segment_ids_BL: Tensor) -> dict[str, Tensor]:
        """Return the batch with further rows, which take no next-token loss, and ``group_ids``."""
        ids_BL = batch["input_ids"].numpy()
        # of the batch, not of its number: a run that goes on needs no count, and no order of calls matters
        rng = np.random.default_rng([self._seed, zlib.crc32(ids_BL.tobytes())])
        segments_BL = segment_ids_BL.numpy()
        pieces = [
            piece
            for row in range(len(ids_BL))
            for piece in self._pieces(row, segments_BL[row], ids_BL[row] == self._rules.eod_token_id, rng)
        ]
        pieces = [pieces[index] for index in rng.permutation(len(pieces))]
        window = ids_BL.shape[1]
        copies_BL = np.full((self._rows, window), self._rules.pad_token_id, dtype=np.int64)
        groups_BL = np.full((len(ids_BL) + self._rows, window), -1, dtype=np.int64)
        row, at, pairs = 0, 0, 0
        for piece in pieces:
            bases = self._decode(ids_BL[piece.row, piece.start : piece.end].tolist())
            copy = np.asarray(self._rules.encode_document(mutated_copy(bases, rng)))
            if at + len(copy) > window:
                row, at = row + 1, 0
            if row == self._rows or len(copy) > window:
                break
            copies_BL[row, at : at + len(copy)] = copy
            groups_BL[len(ids_BL) + row, at : at + len(copy) - 1] = 2 * pairs + 1
            groups_BL[piece.row, piece.start : piece.end] = 2 * pairs
            at, pairs = at + len(copy), pairs + 1
        for number, piece in enumerate(pieces[pairs:]):
            groups_BL[piece.row, piece.start : piece.end] = 2 * pairs + number
        ids = torch.cat([batch["input_ids"], torch.from_numpy(copies_BL)])
        no_loss = torch.full((self._rows, window), IGNORE_INDEX)
        return {
            "input_ids": ids,
            "labels": torch.cat([batch["labels"], no_loss]),
            "group_ids": torch.from_numpy(groups_BL),
            "num_pairs": torch.tensor([pairs]),
        }

    @staticmethod
    def _pieces(
        row: int, numbers_L: NDArray[np.int64], is_end_L: NDArray[np.bool_], rng: np.random.Generator
    ) -> Iterator[RowSpan]:
        """Cut the documents of a row; the token that ends a document is of no piece."""
        least, most = min(_LEAST_TOKENS, len(numbers_L) // 4), min(_MOST_TOKENS, len(numbers_L) // 2)
        ends = [*np.flatnonzero(np.diff(numbers_L)) + 1, len(numbers_L)]
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            at = start
            while numbers_L[start] >= 0:
                size = int(rng.integers(least, most + 1))
                # a document may go on in the next row, and has no end in this one
                last = end - bool(is_end_L[end - 1])
                if min(at + size, last) - at < max(least, 1):
                    break
                yield RowSpan(row, at, min(at + size, last))
                at += size


class VectorLoss:
    """The losses on what layers give, and the hooks that keep it."""

    def __init__(self, start: Start, config: VectorLossConfig, *, codes: KmerCodes | None, seed: int) -> None:
        self._config, self._codes = config, codes
        base = start.model.base_model
        final = None
        if any(FINAL in _joined(spec) for spec in config.contrast_layers):
            final = Probe(base, special_ids=(), pad_token_id=start.rules.pad_token_id).final_path()
        groups: list[tuple[str, ...]] = []
        for spec in config.contrast_layers:
            found = resolve_layers(base, _joined(spec), final_path=final)
            paths = tuple(layer.path for layer in found)
            # one spec may stand for several layers, each by itself
            groups += [paths] if len(_joined(spec)) > 1 else [(path,) for path in paths]
        self.groups = tuple(dict.fromkeys(groups))
        """Paths of the layers whose states are concatenated."""
        self.layers = tuple(dict.fromkeys(path for group in self.groups for path in group))
        self._states: dict[str, Tensor] = {}
        self._hooks = ExitStack()
        self._hooks.enter_context(hooked(base, self.layers, self._take))
        self.views = None
        if config.contrast:
            self.views = ViewRows(start.rules, _decoder(start), rows=config.contrast_rows, seed=seed)

    def _take(self, path: str, output: object) -> None:
        self._states[path] = first_tensor(output, path=path)

    def close(self) -> None:
        """Take the hooks off."""
        self._hooks.close()

    def __call__(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Return the weighted loss of the forward pass that was made last, and numbers for the log."""
        ids_BL = inputs["input_ids"]
        num_documents = len(ids_BL) - (self._config.contrast_rows if "group_ids" in inputs else 0)
        states = {path: self._states_of(path, ids_BL) for path in self.layers}
        losses, numbers = [], {}
        for group in self.groups:
            states_BLD = torch.cat([states[path] for path in group], dim=-1)
            name = JOIN.join(group)
            if self._codes is not None:
                # of documents alone, so that the loss is the same with and without rows of copies
                loss = self._codes.loss(states_BLD[:num_documents], ids_BL[:num_documents])
                losses.append(self._config.kmer_codes * loss)
                numbers[f"kmer_loss_{name}"] = float(loss.detach())
            if "group_ids" in inputs:
                found = pooled_contrast(states_BLD, inputs["group_ids"], int(inputs["num_pairs"][0]))
                losses.append(self._config.contrast * found.loss)
                numbers |= {
                    f"contrast_loss_{name}": float(found.loss.detach()),
                    f"mean_cosine_{name}": found.mean_cosine,
                }
        return torch.stack(losses).sum() / len(self.groups), numbers

    def _states_of(self, path: str, ids_BL: Tensor) -> Tensor:
        states_BLD = self._states.pop(path).float()
        if states_BLD.shape[:2] != ids_BL.shape:
            message = (
                f"layer {path!r} gives shape {tuple(states_BLD.shape)}, expected one vector for each of "
                f"{tuple(ids_BL.shape)} tokens; name a block, a norm or an MLP"
            )
            raise LayerError(message, spec=path)
        return states_BLD


def _joined(spec: str) -> list[str]:
    return spec.split(JOIN)


class PooledContrast(NamedTuple):
    """A contrastive loss, and how alike the vectors are that should not be."""

    loss: Tensor
    mean_cosine: float


def pooled_contrast(states_BLD: Tensor, group_ids_BL: Tensor, num_pairs: int) -> PooledContrast:
    """Take the cross-entropy of each piece and copy finding the other among all others of the batch.

    Vectors are means over tokens, compared by the cosine of what differs from their mean over the batch. The
    states of language models are nearly constant: a loss of plain cosines would have no gradient. So that
    plain cosines tell vectors apart in the end, the length of that mean is added, in deviations.

    Args:
        states_BLD: Floating, shape ``(B, L, D)``.
        group_ids_BL: As :class:`ViewRows` numbers them.
        num_pairs: Pairs of a piece and its copy.

    Returns:
        The loss, and the mean plain cosine of those that are no pair. With less than two pairs, 0 and NaN.

    Example:
        >>> states = torch.tensor([[[1.0, 1]], [[1, 1]], [[-1, 1]], [[-1, 1]]])
        >>> found = pooled_contrast(states, torch.tensor([[0], [1], [2], [3]]), 2)
        >>> round(float(found.loss), 3), found.mean_cosine
        (1.0, 0.0)
    """
    if num_pairs < 2:
        return PooledContrast(states_BLD.sum() * 0, float("nan"))
    flat_N = group_ids_BL.flatten() + 1
    sums_GD = states_BLD.new_zeros(int(flat_N.max()) + 1, states_BLD.shape[-1])
    sums_GD = sums_GD.index_add(0, flat_N, states_BLD.flatten(0, 1))
    vectors_GD = (sums_GD / flat_N.bincount()[:, None])[1:]
    mean_D = vectors_GD.mean(dim=0)
    varying_GD = vectors_GD - mean_D
    # without a gradient of the deviation, which would rather grow without end than let the mean go
    deviation = varying_GD.detach().square().sum(dim=1).mean().sqrt()
    constant = mean_D.norm() / deviation.clamp(min=1e-12)
    index_G = torch.arange(2 * num_pairs, device=flat_N.device)
    itself_GG = torch.eye(len(vectors_GD), dtype=torch.bool, device=flat_N.device)
    unit_GD = F.normalize(varying_GD, dim=1)
    scores_GG = (unit_GD @ unit_GD.T / TEMPERATURE).masked_fill(itself_GG, -torch.inf)
    loss = F.cross_entropy(scores_GG[: 2 * num_pairs], index_G ^ 1) + constant
    plain_GD = F.normalize(vectors_GD.detach(), dim=1)
    others_GG = ~itself_GG
    others_GG[index_G, index_G ^ 1] = False
    return PooledContrast(loss, float((plain_GD @ plain_GD.T)[others_GG].mean()))


_SENTENCE = b"ACGTTGCAAGTCCGTAGGATCCATT" * 4


def _decoder(start: Start) -> Callable[[Sequence[int]], bytes]:
    """Return how token ids become bases again; raise where they do not."""

    def decode(ids: Sequence[int]) -> bytes:
        text = start.tokenizer.decode(ids, skip_special_tokens=True)
        return "".join(text.split()).encode()

    if decode([int(i) for i in start.rules.encode(_SENTENCE)]).upper() != _SENTENCE:
        message = "contrast: the tokenizer does not give back the bases that it encoded"
        raise ConfigError(Problem(message, Remedy("contrast", 0), ", or go on from another model"))
    return decode
