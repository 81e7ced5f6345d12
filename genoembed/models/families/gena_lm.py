"""GENA-LM: BERT with norms before attention and feed-forward, and rotary positions in its long variants.

In: the configuration of a published GENA-LM folder, which calls itself ``bert``. Out: transformers' BERT with
GENA-LM's blocks, under the names of the published weights. The long variants were trained with block-sparse
attention of DeepSpeed, whose random blocks differ from process to process; here, every token attends to all.

B rows, H heads, L positions, R rotated part of a head.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import (
    BertEmbeddings,
    BertEncoder,
    BertLayer,
    BertOnlyMLMHead,
    BertPooler,
    BertPreTrainedModel,
    BertSelfAttention,
    eager_attention_forward,
)

if TYPE_CHECKING:
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

_LOG = logging.getLogger(__name__)

_ROTARY_BASE = 10000


class GenaLMConfig(BertConfig):
    """Configuration of BERT, and what GENA-LM adds to it."""

    model_type = "gena_lm"

    pre_layer_norm: bool = False
    """Whether norms come before attention and feed-forward, instead of after them."""
    last_layer_norm: bool | None = None
    """Whether a norm follows the last block; None is as ``pre_layer_norm``."""
    position_embedding_type: str = "absolute"
    """``absolute`` for learned positions in the embeddings, ``rotary`` for rotated queries and keys."""
    rotary_dim: int | None = None
    """How much of each head is rotated; None is all of it."""
    rotary_base: float | int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.last_layer_norm is None:
            self.last_layer_norm = self.pre_layer_norm
        if self.last_layer_norm and not self.pre_layer_norm:
            message = "last_layer_norm is true, expected pre_layer_norm with it: plain BERT has no last norm"
            raise ValueError(message)
        if self.position_embedding_type not in ("absolute", "rotary"):
            found = self.position_embedding_type
            message = f"position_embedding_type is {found!r}, expected 'absolute' or 'rotary'"
            raise ValueError(message)


class _RotarySelfAttention(BertSelfAttention):
    """Rotates the first part of each query and key by its position."""

    def __init__(self, config: GenaLMConfig, *, is_causal: bool, layer_idx: int) -> None:
        super().__init__(config, is_causal=is_causal, layer_idx=layer_idx)
        self.rotary_dim = config.rotary_dim or self.attention_head_size
        self.rotary_base = config.rotary_base or _ROTARY_BASE

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: object | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        query_BHLD, key_BHLD, value_BHLD = (
            project(hidden_states).view(shape).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        if position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        cos_BLR, sin_BLR = self._angles(position_ids)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            self._rotated(query_BHLD, cos_BLR, sin_BLR),
            self._rotated(key_BHLD, cos_BLR, sin_BLR),
            value_BHLD,
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return output.reshape(*hidden_states.shape[:-1], -1).contiguous(), weights

    def _angles(self, position_ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Compute cosines and sines in float32; both halves of the rotated part have the same."""
        # not a buffer: the published files hold these frequencies, but they follow from the settings
        exponents = torch.arange(0, self.rotary_dim, 2, device=position_ids_BL.device).float()
        frequencies = 1.0 / self.rotary_base ** (exponents / self.rotary_dim)
        angles_BLR = (position_ids_BL[..., None].float() * frequencies).repeat(1, 1, 2)
        return angles_BLR.cos()[:, None], angles_BLR.sin()[:, None]

    def _rotated(self, states_BHLD: Tensor, cos_BLR: Tensor, sin_BLR: Tensor) -> Tensor:
        turned, kept = states_BHLD.tensor_split([self.rotary_dim], dim=-1)
        first, second = turned.chunk(2, dim=-1)
        cos, sin = cos_BLR.to(turned.dtype), sin_BLR.to(turned.dtype)
        return torch.cat((turned * cos + torch.cat((-second, first), dim=-1) * sin, kept), dim=-1)


class _PlainOutput(nn.Module):
    """The end of attention or feed-forward, where the block adds the residual stream itself."""

    def __init__(self, in_features: int, config: GenaLMConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return self.dropout(self.dense(hidden_states))


class GenaLMLayer(BertLayer):
    """A block: that of BERT, or the one with norms at its start."""

    def __init__(self, config: GenaLMConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.pre_layer_norm = config.pre_layer_norm
        if config.position_embedding_type == "rotary":
            self.attention.self = _RotarySelfAttention(
                config, is_causal=config.is_decoder, layer_idx=layer_idx
            )
        if config.pre_layer_norm:
            self.pre_attention_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.post_attention_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.attention.output = _PlainOutput(config.hidden_size, config)
            self.output = _PlainOutput(config.intermediate_size, config)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *inputs: Any, **kwargs: Any
    ) -> Tensor:
        if not self.pre_layer_norm:
            plain: Tensor = super().forward(hidden_states, attention_mask, *inputs, **kwargs)
            return plain
        kwargs.pop("encoder_attention_mask", None)
        attended, _ = self.attention(self.pre_attention_ln(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + attended
        inner = self.intermediate(self.post_attention_ln(hidden_states))
        return hidden_states + self.output(inner, hidden_states)


class GenaLMEncoder(BertEncoder):
    """The blocks, and the norm after them where there is one."""

    def __init__(self, config: GenaLMConfig) -> None:
        nn.Module.__init__(self)  # BERT's would build its own blocks
        self.config = config
        self.layer = nn.ModuleList([GenaLMLayer(config, index) for index in range(config.num_hidden_layers)])
        self.last_layer_ln = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.last_layer_norm else None
        )

    def forward(
        self, hidden_states: Tensor, *inputs: Any, **kwargs: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        output = super().forward(hidden_states, *inputs, **kwargs)
        if self.last_layer_ln is not None:
            output.last_hidden_state = self.last_layer_ln(output.last_hidden_state)
        return output


class _RotaryEmbeddings(BertEmbeddings):
    """Adds no positions."""

    def __init__(self, config: GenaLMConfig) -> None:
        super().__init__(config)
        del self.position_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        words_BLD = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            token_type_ids = torch.zeros(words_BLD.shape[:2], dtype=torch.long, device=words_BLD.device)
        embedded: Tensor = self.LayerNorm(words_BLD + self.token_type_embeddings(token_type_ids))
        return self.dropout(embedded)


class GenaLMPreTrainedModel(BertPreTrainedModel):
    """What the models of this family share."""

    # transformers.Trainer divides accumulated losses only if told that the model does not
    accepts_loss_kwargs = False
    config_class = GenaLMConfig
    _no_split_modules = ("BertEmbeddings", "_RotaryEmbeddings", "GenaLMLayer")


# BERT's own constructors would build its blocks first: each class below calls the one above them


class GenaLMModel(GenaLMPreTrainedModel, BertModel):
    """The encoder."""

    def __init__(self, config: GenaLMConfig, add_pooling_layer: bool = True) -> None:
        BertPreTrainedModel.__init__(self, config)
        if getattr(config, "sparse_config_cls", None):
            _LOG.warning(
                "this GENA-LM was trained with block-sparse attention, whose random blocks differ between "
                "runs; here, all tokens attend to all, which gives other numbers beyond a few blocks"
            )
        self.gradient_checkpointing = False
        is_rotary = config.position_embedding_type == "rotary"
        self.embeddings = _RotaryEmbeddings(config) if is_rotary else BertEmbeddings(config)
        self.encoder = GenaLMEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()


class GenaLMForMaskedLM(GenaLMPreTrainedModel, BertForMaskedLM):
    """The encoder and the head that it was trained with, tied to the embedding."""

    def __init__(self, config: GenaLMConfig) -> None:
        BertPreTrainedModel.__init__(self, config)
        self.bert = GenaLMModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.post_init()


class GenaLMForSequenceClassification(GenaLMPreTrainedModel, BertForSequenceClassification):
    """The encoder and a class, or a number, for each sequence."""

    def __init__(self, config: GenaLMConfig) -> None:
        BertPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.bert = GenaLMModel(config)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class GenaLMForTokenClassification(GenaLMPreTrainedModel, BertForTokenClassification):
    """The encoder and a class for each token."""

    def __init__(self, config: GenaLMConfig) -> None:
        BertPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.bert = GenaLMModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


def _classifier_dropout(config: GenaLMConfig) -> float:
    given = config.classifier_dropout
    return config.hidden_dropout_prob if given is None else given


AUTO_CLASSES = {
    "AutoConfig": GenaLMConfig,
    "AutoModel": GenaLMModel,
    "AutoModelForMaskedLM": GenaLMForMaskedLM,
    "AutoModelForSequenceClassification": GenaLMForSequenceClassification,
    "AutoModelForTokenClassification": GenaLMForTokenClassification,
}
