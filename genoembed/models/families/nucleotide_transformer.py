"""Nucleotide Transformer v2: transformers' ESM with gated feed-forward networks, and its rotary frequencies.

Parts and weights are named as published. What else a configuration can say (absolute positions, a norm after
the embedding, dropped mask tokens) is transformers' own code of ESM, as it is for version 1.

B rows, L positions, D hidden size, I width of the feed-forward network.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import EsmConfig, EsmForMaskedLM, EsmForSequenceClassification, EsmForTokenClassification
from transformers import initialization as init
from transformers.models.esm.modeling_esm import (
    EsmClassificationHead,
    EsmLMHead,
    EsmModel,
    EsmPreTrainedModel,
    EsmRotaryEmbedding,
    EsmSelfAttention,
)


@strict
class NucleotideTransformerConfig(EsmConfig):
    """Configuration of ESM, and whether the feed-forward networks have biases."""

    model_type = "nucleotide_transformer"
    add_bias_fnn: bool = True
    """A file that does not say so means True, as in the published code; the published models say False."""


class GatedFeedForward(nn.Module):
    """First half of a feed-forward network: one product, half of which gates the other half."""

    def __init__(self, config: NucleotideTransformerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.add_bias_fnn)

    def forward(self, x_BLD: Tensor) -> Tensor:
        gate_BLI, values_BLI = self.dense(x_BLD).chunk(2, dim=-1)
        return F.silu(gate_BLI) * values_BLI


class RotarySelfAttention(EsmSelfAttention):
    """Attention that holds its rotary frequencies: the published weights have them in each block."""

    def __init__(self, config: NucleotideTransformerConfig) -> None:
        super().__init__(config)
        self.rotary_embeddings = EsmRotaryEmbedding(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; what ESM passes as embeddings of positions are the positions here."""
        return super().forward(
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            self.rotary_embeddings(hidden_states, position_embeddings),
            **kwargs,
        )


class Positions(nn.Module):
    """Stands where ESM turns positions into angles for all blocks: each block does so itself."""

    def forward(self, x_BLD: Tensor, position_ids: Tensor) -> Tensor:
        return position_ids


class NucleotideTransformerPreTrainedModel(EsmPreTrainedModel):
    """What transformers needs to know about the family."""

    config_class = NucleotideTransformerConfig
    # rounded to bfloat16, they turn positions of thousands by whole radians
    _keep_in_fp32_modules_strict = ("rotary_embeddings",)
    # files written by newer code leave them out
    _keys_to_ignore_on_load_missing = (r"rotary_embeddings\.inv_freq",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, EsmRotaryEmbedding):
            init.copy_(module.inv_freq, module.compute_default_rope_parameters(module.config)[0])


class NucleotideTransformerModel(NucleotideTransformerPreTrainedModel, EsmModel):
    """Embedding, blocks and final norm. No pooler: the published weights have none."""

    def __init__(self, config: NucleotideTransformerConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        is_rotary = config.position_embedding_type == "rotary"
        for layer in self.encoder.layer:
            layer.intermediate = GatedFeedForward(config)
            layer.output.dense = nn.Linear(
                config.intermediate_size, config.hidden_size, bias=config.add_bias_fnn
            )
            if is_rotary:
                layer.attention.self = RotarySelfAttention(config)
        if is_rotary:
            self.rotary_embeddings = Positions()
        self.post_init()


class NucleotideTransformerForMaskedLM(NucleotideTransformerPreTrainedModel, EsmForMaskedLM):
    """The model with its language-model head."""

    def __init__(self, config: NucleotideTransformerConfig) -> None:
        EsmPreTrainedModel.__init__(self, config)  # that of the head would build an ungated model first
        self.esm = NucleotideTransformerModel(config)
        self.lm_head = EsmLMHead(config)
        self.post_init()


class NucleotideTransformerForSequenceClassification(
    NucleotideTransformerPreTrainedModel, EsmForSequenceClassification
):
    """The model with a class for each sequence, from its first token."""

    def __init__(self, config: NucleotideTransformerConfig) -> None:
        EsmPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.esm = NucleotideTransformerModel(config)
        self.classifier = EsmClassificationHead(config)
        self.post_init()


class NucleotideTransformerForTokenClassification(
    NucleotideTransformerPreTrainedModel, EsmForTokenClassification
):
    """The model with a class for each token."""

    def __init__(self, config: NucleotideTransformerConfig) -> None:
        EsmPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.esm = NucleotideTransformerModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


AUTO_CLASSES = {
    "AutoConfig": NucleotideTransformerConfig,
    "AutoModel": NucleotideTransformerModel,
    "AutoModelForMaskedLM": NucleotideTransformerForMaskedLM,
    "AutoModelForSequenceClassification": NucleotideTransformerForSequenceClassification,
    "AutoModelForTokenClassification": NucleotideTransformerForTokenClassification,
}
