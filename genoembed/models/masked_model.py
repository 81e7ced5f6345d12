"""A masked model with its head: how likely hidden tokens are, given all others.

In: a loaded model, rows of tokens, and which of them to hide. Out: natural logarithms of probabilities,
computed in float32. Promised: a hidden token is replaced by the tokenizer's mask token, and nothing else is
changed; a head that the checkpoint does not hold is refused, never left random.

B rows, L padded length, V vocabulary, M hidden tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from genoembed.errors import ModelError
from genoembed.models.behavior import evaluating, forward_arguments
from genoembed.models.language_model import target_log_probs

if TYPE_CHECKING:
    from torch import Tensor

    from genoembed.models.genomic_model import GenomicModel


class MaskedModel:
    """A :class:`~genoembed.models.genomic_model.GenomicModel` that fills masks in, and its head."""

    def __init__(self, model: GenomicModel) -> None:
        mask_id = getattr(model.tokens, "mask_token_id", None)
        if mask_id is None:
            message = (
                f"model {model.name!r}: its tokens see what follows them, and its tokenizer has no mask "
                "token to hide one with, so it gives no probability of a sequence; set model to a causal one "
                "such as genoembed-mini or evo2_7b, or to a masked one, or compare embeddings (extract)"
            )
            raise ModelError(message)
        self.model = model
        self._mask_id = int(mask_id)
        from genoembed.models.pretrained import load_whole

        self._whole, _ = load_whole(model, "AutoModelForMaskedLM", head="masked-language head")

    def log_probs(self, ids_BL: Tensor, attention_BL: Tensor, hidden_BL: Tensor) -> Tensor:
        """Score the hidden tokens of each row, all hidden at the same time.

        Args:
            ids_BL: Token ids, none hidden. int64, shape ``(B, L)``.
            attention_BL: 1 where a token is real. int64, shape ``(B, L)``.
            hidden_BL: True where a token is hidden from the model. bool, shape ``(B, L)``.

        Returns:
            Of each hidden token, row by row. float32, shape ``(M,)``, on the CPU.
        """
        logits_MV, targets_M = self._hidden_logits(ids_BL, attention_BL, hidden_BL)
        return target_log_probs(logits_MV[None], targets_M[None])[0]

    def word_log_probs(self, ids_BL: Tensor, attention_BL: Tensor, hidden_BL: Tensor) -> Tensor:
        """Score all words of the vocabulary in the place of the hidden tokens of each row.

        Args:
            ids_BL: Token ids, none hidden. int64, shape ``(B, L)``.
            attention_BL: 1 where a token is real. int64, shape ``(B, L)``.
            hidden_BL: True where a token is hidden from the model. bool, shape ``(B, L)``.

        Returns:
            Of each hidden token, row by row. float32, shape ``(M, V)``, on the CPU.
        """
        return self._hidden_logits(ids_BL, attention_BL, hidden_BL)[0].float().log_softmax(dim=-1).cpu()

    def _hidden_logits(
        self, ids_BL: Tensor, attention_BL: Tensor, hidden_BL: Tensor
    ) -> tuple[Tensor, Tensor]:
        device = self.model.device
        ids_BL, hidden_BL = ids_BL.to(device), hidden_BL.to(device)
        mask_BL = attention_BL.to(device) if self.model.accepts_attention_mask else None
        arguments = forward_arguments(self._whole, mask_BL)
        with torch.inference_mode(), evaluating(self._whole):
            logits_BLV = self._whole(ids_BL.masked_fill(hidden_BL, self._mask_id), **arguments).logits
            return logits_BLV[hidden_BL], ids_BL[hidden_BL]
