"""A causal model with its next-token head: how likely each token of a batch is, given those before it.

In: a loaded model and padded batches. Out: natural logarithms of probabilities, computed in float32, and on
the way the activations of any layer. Promised: nothing is reported for a row's first token, which no token
precedes, nor for padding; a head that the checkpoint does not hold is refused, never left random.

B rows, L padded length, C positions of a block, D hidden size, V vocabulary.
"""

from __future__ import annotations

from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from genoembed.errors import CheckpointError, GenoembedError, ModelError
from genoembed.models.architecture import NONSENSE, base_of, first_line
from genoembed.models.behavior import evaluating, forward_arguments
from genoembed.models.layers import first_tensor, hooked
from genoembed.models.load import without_progress_bars
from genoembed.models.striped_hyena2.modeling import StripedHyena2Model
from genoembed.models.trained_folder import find_facts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from genoembed.contracts import Batch
    from genoembed.models.genomic_model import GenomicModel

Take: TypeAlias = "Callable[[str, Tensor, slice], None]"
"""Gets a module path, its activations of some positions, ``(B, C, D)``, and which positions these are."""

_CHUNK_VALUES = 1 << 24
"""Logits that are float32 at a time: 64 MiB."""


def check_has_head(model: str | PathLike[str] | GenomicModel) -> None:
    """Raise if a model was trained for something else than the next token; reads no weights."""
    name = fspath(model) if isinstance(model, str | PathLike) else model
    if find_facts(name) is not None:
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
        self._whole = None if isinstance(model.module, StripedHyena2Model) else _load_whole(model)
        self._base = model.module if self._whole is None else base_of(self._whole)

    def log_probs(self, batch: Batch, *, layers: Sequence[str], take: Take, block_tokens: int) -> Tensor:
        """Run one batch."""
        found_BL = torch.full(batch.input_ids.shape, torch.nan)
        ids_BL = batch.input_ids.to(self.model.device)
        with torch.inference_mode(), evaluating(self._whole or self._base):
            for span, logits_BCV in self._logits(ids_BL, batch, layers, take, block_tokens):
                targets_BC = ids_BL[:, span.start + 1 : span.stop + 1]
                found_BL[:, span.start + 1 : span.stop + 1] = _target_log_probs(
                    logits_BCV[:, : targets_BC.shape[1]], targets_BC
                )
        return found_BL.masked_fill(batch.attention_mask == 0, torch.nan)

    def _logits(
        self, ids_BL: Tensor, batch: Batch, layers: Sequence[str], take: Take, block_tokens: int
    ) -> Iterator[tuple[slice, Tensor]]:
        """Run block by block where the state can be carried, else all at once."""
        mask_BL = batch.attention_mask.to(ids_BL.device)
        length = ids_BL.shape[1]
        in_blocks = self._whole is None and self.model.carries_state and length > block_tokens
        state: dict[str, Any] = {"past_key_values": self._base.new_cache()} if in_blocks else {}
        step = block_tokens if in_blocks else length
        for start in range(0, length, step):
            span = slice(start, min(length, start + step))
            mask = mask_BL[:, : span.stop] if self.model.accepts_attention_mask else None
            arguments = forward_arguments(self._whole or self._base, mask) | state

            def pass_on(path: str, output: object, span: slice = span) -> None:
                take(path, first_tensor(output, path=path), span)

            with hooked(self._base, layers, pass_on):
                yield span, self._forward(ids_BL[:, span], arguments)

    def _forward(self, ids_BL: Tensor, arguments: dict[str, Any]) -> Tensor:
        if self._whole is not None:
            logits: Tensor = self._whole(ids_BL, **arguments).logits
            return logits
        hidden_BLD = self._base(ids_BL, **arguments).last_hidden_state
        embedding_VD = self._base.get_input_embeddings().weight  # StripedHyena 2 is tied to it
        return F.linear(hidden_BLD.to(embedding_VD.device), embedding_VD)


def _load_whole(model: GenomicModel) -> PreTrainedModel:
    """Load the class with the head; the base that is loaded already takes the place of its own."""
    if model.location is None:
        message = (
            f"model {model.name!r} was loaded without its next-token head, and is in no folder to fetch it "
            "from; give the model by name"
        )
        raise ModelError(message)
    # weights are mapped from their file, so those of the second base are never read
    try:
        with without_progress_bars():
            whole, info = AutoModelForCausalLM.from_pretrained(
                model.location,
                config=model.module.config,
                dtype=model.dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                trust_remote_code=type(model.module).__module__.startswith("transformers_modules"),
            )
    except GenoembedError:
        raise
    except (OSError, ImportError, *NONSENSE) as error:
        message = (
            f"model {model.name!r}: it has no next-token head ({first_line(error)}); set model to a causal "
            "language model"
        )
        raise ModelError(message) from error
    lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if lacking:
        message = (
            f"the checkpoint holds no next-token head ({lacking[0]} is missing or of another shape), so "
            "probabilities would be random; save the model with its head (AutoModelForCausalLM)"
        )
        raise CheckpointError(message, path=str(model.location))
    prefix = whole.base_model_prefix
    if type(getattr(whole, prefix, None)) is type(model.module):
        setattr(whole, prefix, model.module)
    return whole.to(model.device).eval()


def _target_log_probs(logits_BCV: Tensor, targets_BC: Tensor) -> Tensor:
    """Take the log-softmax at the targets, in float32 and in parts; on the CPU."""
    rows, targets = logits_BCV.reshape(-1, logits_BCV.shape[-1]), targets_BC.reshape(-1).to(logits_BCV.device)
    step = max(1, _CHUNK_VALUES // rows.shape[1])
    parts = [
        -F.cross_entropy(rows[start : start + step].float(), targets[start : start + step], reduction="none")
        for start in range(0, len(rows), step)
    ]
    found = torch.cat(parts) if parts else logits_BCV.new_empty(0, dtype=torch.float32)
    return found.reshape(targets_BC.shape).cpu()
