"""DNABERT-2 and DNABERT-S: BERT with gated feed-forward, whose attention falls with distance.

In: a published folder's configuration, which does not say what it is. Out: a network under the names of the
published weights, with BERT's heads. Inputs may have any length: distances need no table, and the attention
of long inputs is computed for some of the queries at a time. Rows of padding hold numbers without a meaning
(the published code leaves padding out, and gives zeros there).

B rows, H heads, L positions, R queries of a part, D hidden size, I width of the feed-forward network.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import (
    BertPooler,
    BertPredictionHeadTransform,
    eager_attention_forward,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from genoembed.contracts import embed_inputs

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEAD_EPS = 1e-12
_MOST_SCORES = 1 << 26
"""Attention scores that are held at a time, for all rows and heads together: 256 MiB in float32."""


class DnaBert2Config(PreTrainedConfig):
    """Shape and constants of a DNABERT-2 model."""

    model_type = "dnabert2"

    vocab_size: int = 4096
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    """Of the language-model head; the gates are exact GELUs always."""
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.0
    classifier_dropout: float | None = None
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    alibi_starting_size: int = 512
    """Size of a table that the published code begins with; changes nothing here."""
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        # published files say 512, of a buffer of zeros: to keep it would state a limit that is none
        kwargs.pop("max_position_embeddings", None)
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            message = (
                f"hidden_size is {self.hidden_size}, expected a multiple of num_attention_heads, "
                f"{self.num_attention_heads}"
            )
            raise ValueError(message)


class AttentionBias:
    """What attention adds to its scores: the distance times each head's slope, and no score for padding.

    Args:
        num_heads: Heads of a block.
        states_BLD: The embedding, for its shape, device and type.
        mask_BL: Nonzero where a token counts; None if all do.
    """

    def __init__(self, num_heads: int, states_BLD: Tensor, mask_BL: Tensor | None) -> None:
        num_rows, self.length, _ = states_BLD.shape
        self.dtype = states_BLD.dtype
        self.slopes_H = torch.tensor(head_slopes(num_heads), device=states_BLD.device)
        self.positions_L = torch.arange(self.length, device=states_BLD.device)
        self.is_padding_BL = None if mask_BL is None else mask_BL == 0
        self.step = max(1, _MOST_SCORES // max(1, num_rows * num_heads * self.length))
        self._whole_BHLL = self._of(slice(0, self.length)) if self.step >= self.length else None

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Give the bias of some queries after the other, so that long inputs never need all at once."""
        if self._whole_BHLL is not None:  # the same for every block
            yield slice(0, self.length), self._whole_BHLL
            return
        for start in range(0, self.length, self.step):
            queries = slice(start, min(start + self.step, self.length))
            yield queries, self._of(queries)

    def _of(self, queries: slice) -> Tensor:
        distances_RL = (self.positions_L[queries, None] - self.positions_L).abs()
        bias = (distances_RL * -self.slopes_H[:, None, None]).to(self.dtype)[None]
        if self.is_padding_BL is None:
            return bias
        # not minus infinity: a row without any token would become NaN
        return bias.masked_fill(self.is_padding_BL[:, None, None], torch.finfo(self.dtype).min)


def head_slopes(num_heads: int) -> list[float]:
    """Return how fast the attention of each head falls with distance (ALiBi, Press et al. 2022).

    Example:
        >>> head_slopes(4), [round(slope, 3) for slope in head_slopes(3)]
        ([0.25, 0.0625, 0.015625, 0.00390625], [0.062, 0.004, 0.25])
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (index + 1) / power) for index in range(power)]
    # between powers of two, every second slope of the next one follows
    return slopes + [2.0 ** (-4 * (2 * index + 1) / power) for index in range(num_heads - power)]


class DnaBert2Embeddings(nn.Module):
    """Tokens and their types; no positions."""

    def __init__(self, config: DnaBert2Config) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, input_ids: Tensor | None, token_type_ids: Tensor | None, inputs_embeds: Tensor | None
    ) -> Tensor:
        words_BLD = embed_inputs(self.word_embeddings, input_ids, inputs_embeds)
        types = self.token_type_embeddings
        types_BLD = types.weight[0] if token_type_ids is None else types(token_type_ids)
        embedded: Tensor = self.dropout(self.LayerNorm(words_BLD + types_BLD))
        return embedded


class DnaBert2SelfAttention(nn.Module):
    """Attention whose scores fall with distance; one product gives queries, keys and values."""

    is_causal = False

    def __init__(self, config: DnaBert2Config) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, x_BLD: Tensor, bias: AttentionBias) -> tuple[Tensor, Tensor | None]:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        shape = (*x_BLD.shape[:2], 3, self.num_heads, self.head_dim)
        query, key, value = self.Wqkv(x_BLD).view(shape).permute(2, 0, 3, 1, 4)
        parts = [
            attend(
                self,
                query[:, :, queries],
                key,
                value,
                bias_BHRL.to(query.device),  # a model may be spread over devices
                dropout=self.dropout.p if self.training else 0.0,
                scaling=self.head_dim**-0.5,
            )
            for queries, bias_BHRL in bias.parts()
        ]
        weights = [part for _, part in parts if part is not None]
        output_BLD = torch.cat([part.flatten(2) for part, _ in parts], dim=1)
        return output_BLD, torch.cat(weights, dim=2) if weights else None


class DnaBert2SelfOutput(nn.Module):
    """Projection of what was attended to, and the norm of the sum."""

    def __init__(self, config: DnaBert2Config) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, attended_BLD: Tensor, residual_BLD: Tensor) -> Tensor:
        normed: Tensor = self.LayerNorm(self.dropout(self.dense(attended_BLD)) + residual_BLD)
        return normed


class DnaBert2Attention(nn.Module):
    """Attention and its output."""

    def __init__(self, config: DnaBert2Config) -> None:
        super().__init__()
        self.self = DnaBert2SelfAttention(config)
        self.output = DnaBert2SelfOutput(config)

    def forward(self, x_BLD: Tensor, bias: AttentionBias) -> Tensor:
        attended: Tensor = self.output(self.self(x_BLD, bias)[0], x_BLD)
        return attended


class DnaBert2GatedUnit(nn.Module):
    """Feed-forward: half of the first product gates the other half."""

    def __init__(self, config: DnaBert2Config) -> None:
        super().__init__()
        self.gated_layers = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.wo = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x_BLD: Tensor) -> Tensor:
        gate_BLI, values_BLI = self.gated_layers(x_BLD).chunk(2, dim=-1)
        output: Tensor = self.layernorm(self.wo(self.dropout(F.gelu(gate_BLI) * values_BLI)) + x_BLD)
        return output


class DnaBert2Layer(GradientCheckpointingLayer):
    """A block: attention and feed-forward, each with a norm after its sum."""

    def __init__(self, config: DnaBert2Config) -> None:
        super().__init__()
        self.attention = DnaBert2Attention(config)
        self.mlp = DnaBert2GatedUnit(config)

    def forward(self, x_BLD: Tensor, bias: AttentionBias) -> Tensor:
        output: Tensor = self.mlp(self.attention(x_BLD, bias))
        return output


class DnaBert2Encoder(nn.Module):
    """The blocks. No norm follows them."""

    def __init__(self, config: DnaBert2Config) -> None:
        super().__init__()
        self.layer = nn.ModuleList([DnaBert2Layer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, x_BLD: Tensor, bias: AttentionBias) -> Tensor:
        for layer in self.layer:
            x_BLD = layer(x_BLD, bias)
        return x_BLD


class DnaBert2PreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the family."""

    # transformers.Trainer divides accumulated losses only if told that the model does not
    accepts_loss_kwargs = False
    config_class = DnaBert2Config
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("DnaBert2Embeddings", "DnaBert2Layer")
    _can_record_outputs = {"hidden_states": DnaBert2Layer, "attentions": DnaBert2SelfAttention}  # noqa: RUF012


class DnaBert2Model(DnaBert2PreTrainedModel):
    """Embedding and blocks.

    Args:
        config: Shape and constants.
        add_pooling_layer: Whether the first token's state goes through one more layer, as a sequence
            classifier's does. The published weights hold none, so that its output would be random.
    """

    def __init__(self, config: DnaBert2Config, add_pooling_layer: bool = False) -> None:
        super().__init__(config)
        self.embeddings = DnaBert2Embeddings(config)
        self.encoder = DnaBert2Encoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Run the model.

        Args:
            input_ids: Token ids. int64, shape ``(B, L)``.
            attention_mask: Nonzero where a token counts, shape ``(B, L)``; None if all do.
            token_type_ids: Which of two sequences a token is of, shape ``(B, L)``; None for the first.
            position_ids: Not looked at: only distances count.
            inputs_embeds: Embedded tokens instead of ids, shape ``(B, L, D)``.
            **kwargs: ``output_hidden_states``, ``output_attentions`` (with eager attention),
                ``return_dict``.

        Returns:
            Hidden states, and with a pooler its output.

        Raises:
            ShapeError: If not exactly one of ``input_ids`` and ``inputs_embeds`` is given.
        """
        x_BLD = self.embeddings(input_ids, token_type_ids, inputs_embeds)
        bias = AttentionBias(self.config.num_attention_heads, x_BLD, attention_mask)
        x_BLD = self.encoder(x_BLD, bias)
        pooled = None if self.pooler is None else self.pooler(x_BLD)
        return BaseModelOutputWithPooling(last_hidden_state=x_BLD, pooler_output=pooled)


class DnaBert2PredictionHead(nn.Module):
    """A layer, and a product with the embedding."""

    def __init__(self, config: DnaBert2Config) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.transform.LayerNorm.eps = _HEAD_EPS  # whatever the configuration has for the other norms
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x_BLD: Tensor) -> Tensor:
        logits: Tensor = self.decoder(self.transform(x_BLD))
        return logits


class DnaBert2Head(nn.Module):
    """Holds the head under its published name."""

    def __init__(self, config: DnaBert2Config) -> None:
        super().__init__()
        self.predictions = DnaBert2PredictionHead(config)

    def forward(self, x_BLD: Tensor) -> Tensor:
        logits: Tensor = self.predictions(x_BLD)
        return logits


class DnaBert2ForMaskedLM(DnaBert2PreTrainedModel, BertForMaskedLM):
    """The model and the head that it was trained with, tied to the embedding."""

    _tied_weights_keys = {  # noqa: RUF012
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"
    }

    def __init__(self, config: DnaBert2Config) -> None:
        PreTrainedModel.__init__(self, config)  # not the head's own, which builds BERT
        self.bert = DnaBert2Model(config)
        self.cls = DnaBert2Head(config)
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.cls.predictions.decoder = new_embeddings


class DnaBert2ForSequenceClassification(DnaBert2PreTrainedModel, BertForSequenceClassification):
    """The model with its pooler, and a class, or a number, for each sequence."""

    def __init__(self, config: DnaBert2Config) -> None:
        PreTrainedModel.__init__(self, config)  # not the head's own, which builds BERT
        self.num_labels = config.num_labels
        self.bert = DnaBert2Model(config, add_pooling_layer=True)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class DnaBert2ForTokenClassification(DnaBert2PreTrainedModel, BertForTokenClassification):
    """The model and a class for each token."""

    def __init__(self, config: DnaBert2Config) -> None:
        PreTrainedModel.__init__(self, config)  # not the head's own, which builds BERT
        self.num_labels = config.num_labels
        self.bert = DnaBert2Model(config)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


def _classifier_dropout(config: DnaBert2Config) -> float:
    given = config.classifier_dropout
    return config.hidden_dropout_prob if given is None else given


AUTO_CLASSES = {
    "AutoConfig": DnaBert2Config,
    "AutoModel": DnaBert2Model,
    "AutoModelForMaskedLM": DnaBert2ForMaskedLM,
    "AutoModelForSequenceClassification": DnaBert2ForSequenceClassification,
    "AutoModelForTokenClassification": DnaBert2ForTokenClassification,
}
