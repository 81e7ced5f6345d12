"""A causal model with its next-token head: how likely each token of a batch is, and which may come next.

In: a loaded model and padded batches, or rows that grow token by token. Out: natural logarithms of
probabilities, computed in float32, and on the way the activations of any layer; or logits of the next token.
Promised: nothing is reported for a row's first token, which no token precedes, nor for padding; a head that
the checkpoint does not hold is refused, never left random; a state is carried from token to token only where
what comes of it was seen to equal a pass over the whole row.

B rows, L padded length, C positions of a block, D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from functools import cached_property
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F

from genoembed.errors import ModelError, first_line
from genoembed.models.behavior import evaluating, forward_arguments, takes_argument
from genoembed.models.layers import first_tensor, hooked
from genoembed.models.striped_hyena2.network import StripedHyena2Network
from genoembed.models.striped_hyena2.state import iter_spans
from genoembed.models.trained_folder import NEXT_TOKEN_HEAD, find_facts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from genoembed.contracts import Batch
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.models.striped_hyena2.state import AttentionWindows

logger = logging.getLogger(__name__)

Take: TypeAlias = "Callable[[str, Tensor, slice], None]"
"""Gets a module path, its activations of some positions, ``(B, C, D)``, and which positions these are."""

_STATE_ARGUMENTS = ("past_key_values", "cache_params")
"""Under which names models of transformers take and return the state after the tokens so far."""
_TRIAL_ERRORS = (
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, AssertionError),
    MemoryError,
)
_TRIAL_TOKENS = 8
"""Tokens of a trial of such a state; as many follow one by one, and two rows come of one."""
_CHUNK_VALUES = 1 << 24
"""Logits that are float32 at a time: 64 MiB."""


def check_has_head(model: str | PathLike[str] | GenomicModel) -> None:
    """Raise if a model was trained for something else than the next token; reads no weights."""
    name = fspath(model) if isinstance(model, str | PathLike) else model
    facts = find_facts(name)
    if facts is not None and not facts.values.get(NEXT_TOKEN_HEAD):
        shown = name if isinstance(name, str) else name.name
        message = (
            f"model {shown!r} was fine-tuned for vectors or labels, so "
            "its next-token head is no longer of use; set model to the one that it was trained from"
        )
        raise ModelError(message)


class LanguageModel:
    """A causal :class:`~genoembed.models.genomic_model.GenomicModel` and its head."""

    def __init__(self, model: GenomicModel) -> None:
        if not model.is_causal:
            message = (
                f"model {model.name!r}: its tokens see what follows them (a masked or bidirectional model), "
                "so it gives no probability of a sequence, expected a causal model; set model to one such as "
                "genoembed-mini or evo2_7b, or compare embeddings (extract) instead"
            )
            raise ModelError(message)
        self.model = model
        self._whole: Any = None
        self._base: Any = model.network
        is_striped = isinstance(model.network, StripedHyena2Network)
        if not (is_striped and model.network.config.tie_word_embeddings):
            from genoembed.models.pretrained import load_whole

            self._whole, self._base = load_whole(model, "AutoModelForCausalLM", head="next-token head")

    @property
    def carries_state(self) -> bool:
        """Whether a long row is scored block by block, each going on from the one before."""
        return self._whole is None and self.model.carries_state

    def log_probs(
        self,
        batch: Batch,
        *,
        layers: Sequence[str],
        take: Take,
        block_tokens: int,
        windows: AttentionWindows | None = None,
    ) -> Tensor:
        """Run one batch; with ``windows``, attention sees no more than these of the positions before."""
        found_BL = torch.full(batch.input_ids.shape, torch.nan)
        ids_BL = batch.input_ids.to(self.model.device)
        with torch.inference_mode(), evaluating(self._whole or self._base):
            for span, logits_BCV in self._logits(ids_BL, batch, layers, take, block_tokens, windows):
                targets_BC = ids_BL[:, span.start + 1 : span.stop + 1]
                found_BL[:, span.start + 1 : span.stop + 1] = target_log_probs(
                    logits_BCV[:, : targets_BC.shape[1]], targets_BC
                )
        return found_BL.masked_fill(batch.attention_mask == 0, torch.nan)

    def next_logits(self, ids_BL: Tensor, *, block_tokens: int) -> Tensor:
        """Score the token after each row in a pass over the whole rows; float32, ``(B, V)``, on the CPU."""
        return Continuation(self, ids_BL, block_tokens=block_tokens, state_argument=None).logits_BV

    def start(self, ids_BL: Tensor, *, block_tokens: int, use_cache: bool = True) -> Continuation:
        """Read rows of one length, to go on with them token by token.

        Args:
            ids_BL: Token ids without padding. int64, shape ``(B, L)``.
            block_tokens: Positions of a pass, where the model reads block by block; tokens of a pass, where
                it has to read whole rows for each token.
            use_cache: False reads the whole rows for each token, even if the model carries a state.
        """
        state_argument = self.state_argument if use_cache else None
        return Continuation(self, ids_BL, block_tokens=block_tokens, state_argument=state_argument)

    @cached_property
    def state_argument(self) -> str | None:
        """The argument that hands the state after some tokens to the next pass; None where none does.

        Found by a trial: rows that go on from a state must score as whole rows do.
        """
        if self._whole is None:
            return _STATE_ARGUMENTS[0]
        name = next((name for name in _STATE_ARGUMENTS if takes_argument(self._whole, name)), None)
        if name is None:
            return None
        try:
            difference = self._trial_of_state(name)
        except _TRIAL_ERRORS as error:
            logger.debug(
                "%s: no state is carried from token to token (%s)", self.model.name, first_line(error)
            )
            return None
        limit = 1e-4 if self.model.dtype == torch.float32 else 5e-2
        if not difference <= limit:  # not a number is no agreement either
            logger.warning(
                "%s: its state gives other probabilities than the whole sequence (by %.2g), so each token "
                "takes a pass over all before it",
                self.model.name,
                difference,
            )
            return None
        return name

    def _trial_of_state(self, name: str) -> float:
        """Return how far log-probabilities with a state are from those without, relative to the largest."""
        ids_L = self.model.trial_ids.cpu()
        half = min(_TRIAL_TOKENS, len(ids_L) // 2)
        rows_BL = torch.stack((ids_L, torch.cat((ids_L[:half], ids_L[half:].flip(0)))))
        grown = Continuation(self, rows_BL[:1, :half], block_tokens=len(ids_L), state_argument=name)
        grown.select([0, 0])
        differences = []
        for position in range(half, len(ids_L)):
            grown.append(rows_BL[:, position])
            found = grown.logits_BV.log_softmax(-1)
            whole = self.next_logits(rows_BL[:, : position + 1], block_tokens=len(ids_L)).log_softmax(-1)
            differences.append(float((found - whole).abs().max() / whole.abs().max()))
        return max(differences)

    def _logits(
        self,
        ids_BL: Tensor,
        batch: Batch,
        layers: Sequence[str],
        take: Take,
        block_tokens: int,
        windows: AttentionWindows | None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Run block by block where the state can be carried, else all at once."""
        mask_BL = batch.attention_mask.to(ids_BL.device)
        length = ids_BL.shape[1]
        if windows is not None and length <= windows.window:
            windows = None  # one window is the row as it is
        in_blocks = windows is not None or (self.carries_state and length > block_tokens)
        state: dict[str, Any] = {"past_key_values": self._base.new_cache(windows)} if in_blocks else {}
        for span in iter_spans(length, block=block_tokens if in_blocks else length, windows=windows):
            has_mask = self.model.accepts_attention_mask and windows is None
            mask = mask_BL[:, : span.stop] if has_mask else None
            arguments = forward_arguments(self._whole or self._base, mask) | state

            def pass_on(path: str, output: object, span: slice = span) -> None:
                take(path, first_tensor(output, path=path), span)

            with hooked(self._base, layers, pass_on):
                yield span, self._forward(ids_BL[:, span], arguments)

    def _forward(self, ids_BL: Tensor, arguments: dict[str, Any]) -> Tensor:
        if self._whole is not None:
            logits: Tensor = self._whole(ids_BL, **arguments).logits
            return logits
        return self._unembed(self._base(ids_BL, **arguments).last_hidden_state)

    def _unembed(self, hidden_BLD: Tensor) -> Tensor:
        """Score every token, as StripedHyena does."""
        embedding_VD = self._base.embedding_layer.weight  # StripedHyena is tied to it
        return F.linear(hidden_BLD.to(embedding_VD.device), embedding_VD)


class Continuation:
    """Rows of one length that grow token by token.

    Args:
        model: What scores the tokens.
        ids_BL: The rows so far. int64, shape ``(B, L)``.
        block_tokens: Positions or tokens of a pass, as for :meth:`LanguageModel.start`.
        state_argument: How a step hands its state to the next; None has each read the rows again.
    """

    def __init__(
        self, model: LanguageModel, ids_BL: Tensor, *, block_tokens: int, state_argument: str | None
    ) -> None:
        self._model = model
        self._module = model._whole or model._base
        self._ids_BL = ids_BL
        self._block_tokens = block_tokens
        self._state_argument = state_argument
        self._state: Any = None
        self.logits_BV: Tensor = self._read(ids_BL)
        """Logits of the token after each row. float32, shape ``(B, V)``, on the CPU."""

    def append(self, ids_B: Tensor) -> None:
        """Add a token to each row."""
        self._ids_BL = torch.cat((self._ids_BL, ids_B[:, None]), dim=1)
        self.logits_BV = self._read(ids_B[:, None] if self._state_argument else self._ids_BL)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; one may be kept several times."""
        index = torch.tensor(rows)
        self._ids_BL, self.logits_BV = self._ids_BL[index], self.logits_BV[index]
        if self._state is not None:
            self._state.reorder_cache(index.to(self._model.model.device))

    def _read(self, ids_BL: Tensor) -> Tensor:
        """Run new tokens: in blocks from the state before, or some whole rows at a time."""
        with torch.inference_mode(), evaluating(self._module):
            if self._model._whole is None:
                return self._read_in_blocks(ids_BL)
            step = len(ids_BL)
            if self._state_argument is None:
                step = max(1, self._block_tokens // ids_BL.shape[1])
            parts = [self._last_logits(ids_BL[first : first + step]) for first in range(0, len(ids_BL), step)]
        return torch.cat(parts)

    def _read_in_blocks(self, ids_BL: Tensor) -> Tensor:
        """Run a model that carries a state through a long row, even where none is kept for the next token."""
        state, length = self._state, ids_BL.shape[1]
        if state is None and (self._state_argument or length > self._block_tokens):
            state = self._model._base.new_cache()
        arguments: dict[str, Any] = {} if state is None else {_STATE_ARGUMENTS[0]: state}
        for start in range(0, length, self._block_tokens):
            block = ids_BL[:, start : start + self._block_tokens].to(self._model.model.device)
            hidden_BCD = self._model._base(block, **arguments).last_hidden_state
        self._state = state if self._state_argument else None
        return self._model._unembed(hidden_BCD[:, -1]).float().cpu()

    def _last_logits(self, ids_BL: Tensor) -> Tensor:
        """Run tokens of a model of transformers."""
        ids_BL, name = ids_BL.to(self._model.model.device), self._state_argument
        # nothing is padded; with a state, some models (Mamba) take a mask for one of the new tokens alone
        has_mask = name is None and self._model.model.accepts_attention_mask
        arguments = forward_arguments(self._module, torch.ones_like(ids_BL) if has_mask else None)
        if takes_argument(self._module, "logits_to_keep"):
            arguments["logits_to_keep"] = 1
        if name is not None:
            arguments["use_cache"] = True
            if self._state is not None:
                arguments[name] = self._state
        output = self._module(ids_BL, **arguments)
        if name is not None:
            self._state = output[name]
        logits_BV: Tensor = output.logits[:, -1].float().cpu()
        return logits_BV


def target_log_probs(logits_BCV: Tensor, targets_BC: Tensor) -> Tensor:
    """Take the log-softmax at the targets, in float32 and in parts; on the CPU."""
    rows, targets = logits_BCV.reshape(-1, logits_BCV.shape[-1]), targets_BC.reshape(-1).to(logits_BCV.device)
    step = max(1, _CHUNK_VALUES // rows.shape[1])
    parts = [
        -F.cross_entropy(rows[start : start + step].float(), targets[start : start + step], reduction="none")
        for start in range(0, len(rows), step)
    ]
    found = torch.cat(parts) if parts else logits_BCV.new_empty(0, dtype=torch.float32)
    return found.reshape(targets_BC.shape).cpu()
