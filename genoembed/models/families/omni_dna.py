"""Omni-DNA: OLMo under the names that the ai2-olmo package gives settings and weights.

In: a published folder's configuration (``olmo-gfm``). Out: a causal network under the names of the published
weights, which transformers' Olmo does not have. The sizes of the family differ in their norms: some normalize
without weights, others by the root mean square with weights; all is as the configuration says. Settings that
no published model has, such as ALiBi, are refused.

B rows, H heads, L positions, D hidden size, E size of a head, I width of the feed-forward network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.olmo.modeling_olmo import eager_attention_forward, rotate_half
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from genoembed.contracts import embed_inputs

if TYPE_CHECKING:
    from collections.abc import Callable

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}
"""Other than ``swiglu``, in which half of the product gates the other half."""


class OmniDnaConfig(PreTrainedConfig):
    """Shape and constants, under the names of the ai2-olmo package."""

    model_type = "omni_dna"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    }

    vocab_size: int = 4096
    embedding_size: int | None = None
    """Rows of the embedding; None is the vocabulary."""
    d_model: int = 1024
    n_layers: int = 16
    n_heads: int = 16
    n_kv_heads: int | None = None
    """None is one per head, or a single one with ``multi_query_attention``."""
    multi_query_attention: bool | None = None
    mlp_ratio: int = 8
    mlp_hidden_size: int | None = None
    """Rows of the first feed-forward product; None is ``mlp_ratio`` times the hidden size."""
    activation_type: str = "swiglu"
    layer_norm_type: str = "default"
    layer_norm_with_affine: bool = True
    layer_norm_eps: float = 1e-5
    bias_for_layer_norm: bool | None = None
    """None is as ``include_bias``."""
    include_bias: bool = False
    attention_layer_norm: bool = False
    attention_layer_norm_with_affine: bool = True
    embedding_layer_norm: bool = False
    norm_after: bool = False
    clip_qkv: float | None = None
    rope: bool = True
    rope_theta: float = 10000.0
    rope_full_precision: bool = True
    alibi: bool = False
    block_type: str = "sequential"
    block_group_size: int = 1
    scale_logits: bool = False
    weight_tying: bool = True
    max_sequence_length: int = 250
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.n_kv_heads is None:
            self.n_kv_heads = 1 if self.multi_query_attention else self.n_heads
        super().__post_init__(**kwargs)
        expected = {
            "alibi": (False,),
            "rope": (True,),
            "block_type": ("sequential",),
            "block_group_size": (1,),
            "layer_norm_type": ("default", "low_precision", "rms"),
            "activation_type": ("swiglu", *_ACTIVATIONS),
        }
        for key, values in expected.items():
            if getattr(self, key) not in values:
                message = f"{key} is {getattr(self, key)!r}, expected {' or '.join(map(repr, values))}"
                raise ValueError(message)
        if self.d_model % self.n_heads or self.n_heads % self.n_kv_heads:
            message = (
                f"n_heads is {self.n_heads}, expected a divisor of d_model, {self.d_model}, and a multiple "
                f"of n_kv_heads, {self.n_kv_heads}"
            )
            raise ValueError(message)


class OmniDnaNorm(nn.Module):
    """A norm of either kind, with or without weights."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, config: OmniDnaConfig, size: int, *, has_weight: bool) -> None:
        super().__init__()
        has_bias = config.include_bias if config.bias_for_layer_norm is None else config.bias_for_layer_norm
        self.register_parameter("weight", nn.Parameter(torch.ones(size)) if has_weight else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(size)) if has_weight and has_bias else None)
        self.size, self.eps, self.is_rms = size, config.layer_norm_eps, config.layer_norm_type == "rms"

    def forward(self, x_BLD: Tensor) -> Tensor:
        if not self.is_rms:
            return F.layer_norm(x_BLD, (self.size,), self.weight, self.bias, self.eps)
        x = x_BLD.float()
        normed_BLD = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)).to(x_BLD.dtype)
        if self.weight is not None:
            normed_BLD = self.weight * normed_BLD
        return normed_BLD if self.bias is None else normed_BLD + self.bias


class OmniDnaBlock(GradientCheckpointingLayer):
    """A block: attention and feed-forward, with norms before them, or after them with ``norm_after``."""

    is_causal = True

    def __init__(self, config: OmniDnaConfig, layer_idx: int) -> None:
        super().__init__()
        width, bias = config.d_model, config.include_bias
        assert config.n_kv_heads is not None
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = width // config.n_heads
        self.num_key_value_groups = config.n_heads // config.n_kv_heads
        self.widths = (width, config.n_kv_heads * self.head_dim, config.n_kv_heads * self.head_dim)
        inner = config.mlp_hidden_size or config.mlp_ratio * width
        self.k_norm = self.q_norm = None
        if config.attention_layer_norm:
            has_weight = config.attention_layer_norm_with_affine
            self.k_norm = OmniDnaNorm(config, self.widths[1], has_weight=has_weight)
            self.q_norm = OmniDnaNorm(config, width, has_weight=has_weight)
        self.attn_out = nn.Linear(width, width, bias=bias)
        self.ff_out = nn.Linear(inner // 2 if config.activation_type == "swiglu" else inner, width, bias=bias)
        self.att_proj = nn.Linear(width, sum(self.widths), bias=bias)
        self.ff_proj = nn.Linear(width, inner, bias=bias)
        self.attn_norm = OmniDnaNorm(config, width, has_weight=config.layer_norm_with_affine)
        self.ff_norm = OmniDnaNorm(config, width, has_weight=config.layer_norm_with_affine)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        x_BLD: Tensor,
        mask: Tensor | None,
        turns: tuple[Tensor, Tensor],
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        for part, norm in ((self._attend, self.attn_norm), (self._feed_forward, self.ff_norm)):
            y_BLD = x_BLD if self.config.norm_after else norm(x_BLD)
            y_BLD = part(y_BLD, mask=mask, turns=turns, past_key_values=past_key_values, **kwargs)
            x_BLD = x_BLD + self.dropout(norm(y_BLD) if self.config.norm_after else y_BLD)
        return x_BLD

    def _attend(
        self,
        x_BLD: Tensor,
        *,
        mask: Tensor | None,
        turns: tuple[Tensor, Tensor],
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        projected = self.att_proj(x_BLD)
        if self.config.clip_qkv is not None:
            projected = projected.clamp(-self.config.clip_qkv, self.config.clip_qkv)
        query, key, value = projected.split(self.widths, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (query, key, value)
        )
        query, key = (self._turn(part, *turns) for part in (query, key))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        scaling = self.head_dim**-0.5
        attended_BLHE, _ = attend(self, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
        return self.attn_out(attended_BLHE.flatten(2))

    def _turn(self, x_BHLE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate by position, in float32 unless the configuration says otherwise."""
        x = x_BHLE.float() if self.config.rope_full_precision else x_BHLE
        return (x * cos.to(x.dtype) + rotate_half(x) * sin.to(x.dtype)).to(x_BHLE.dtype)

    def _feed_forward(self, x_BLD: Tensor, **_: Any) -> Tensor:
        y_BLI = self.ff_proj(x_BLD)
        if self.config.activation_type == "swiglu":
            values_BLI, gate_BLI = y_BLI.chunk(2, dim=-1)
            return self.ff_out(F.silu(gate_BLI) * values_BLI)
        return self.ff_out(_ACTIVATIONS[self.config.activation_type](y_BLI))


class OmniDnaPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the family."""

    config_class = OmniDnaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("OmniDnaBlock",)
    _skip_keys_device_placement = ("past_key_values",)
    _can_record_outputs = {"hidden_states": OmniDnaBlock}  # noqa: RUF012


class OmniDnaModel(OmniDnaPreTrainedModel):
    """Embedding, blocks and the last norm, in one dictionary of modules as published.

    Args:
        config: Shape and constants.
    """

    def __init__(self, config: OmniDnaConfig) -> None:
        super().__init__(config)
        rows, has_weight = config.embedding_size or config.vocab_size, config.layer_norm_with_affine
        parts = {
            "wte": nn.Embedding(rows, config.d_model),
            "emb_drop": nn.Dropout(config.embedding_dropout),
            "ln_f": OmniDnaNorm(config, config.d_model, has_weight=has_weight),
            "blocks": nn.ModuleList(OmniDnaBlock(config, index) for index in range(config.n_layers)),
        }
        if config.embedding_layer_norm:
            parts["emb_norm"] = OmniDnaNorm(config, config.d_model, has_weight=has_weight)
        if not config.weight_tying:
            parts["ff_out"] = nn.Linear(config.d_model, rows, bias=config.include_bias)
        self.transformer = nn.ModuleDict(parts)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        embedding = self.transformer["wte"]
        assert isinstance(embedding, nn.Embedding)
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer["wte"] = value

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the model.

        Args:
            input_ids: Token ids. int64, shape ``(B, L)``.
            attention_mask: Nonzero where a token counts, shape ``(B, L)``; None if all do.
            position_ids: Place of each token, shape ``(B, L)`` or ``(1, L)``; None counts from what is past.
            past_key_values: Keys and values of earlier tokens.
            inputs_embeds: Embedded tokens instead of ids, shape ``(B, L, D)``.
            use_cache: Return keys and values.
            **kwargs: ``output_hidden_states``, ``return_dict``.

        Returns:
            Hidden states after the last norm, and keys and values if requested.

        Raises:
            ShapeError: If not exactly one of ``input_ids`` and ``inputs_embeds`` is given.
        """
        x_BLD = embed_inputs(self.transformer["wte"], input_ids, inputs_embeds)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            start = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(x_BLD.shape[1], device=x_BLD.device)[None] + start
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BLD,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if "emb_norm" in self.transformer:
            x_BLD = self.transformer["emb_norm"](x_BLD)
        x_BLD = self.transformer["emb_drop"](x_BLD)
        turns = self._turns(position_ids)
        for block in self.transformer["blocks"].children():
            x_BLD = block(x_BLD, mask, turns, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.transformer["ln_f"](x_BLD), past_key_values=past_key_values
        )

    def _turns(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the cosine and sine of each position and pair of channels, float32, ``(B, 1, L, E)``."""
        size = self.config.d_model // self.config.n_heads
        # computed anew: a buffer would be rounded with the weights of a half-precision model
        powers = torch.arange(0, size, 2, device=position_ids.device, dtype=torch.float32) / size
        angles = position_ids[:, None, :, None].float() * (1.0 / self.config.rope_theta**powers)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


class OmniDnaForCausalLM(OmniDnaPreTrainedModel, GenerationMixin):
    """The model and the probabilities of the next token.

    Args:
        config: Shape and constants.
    """

    def __init__(self, config: OmniDnaConfig) -> None:
        super().__init__(config)
        self.model = OmniDnaModel(config)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model and its head.

        Args:
            input_ids: Token ids. int64, shape ``(B, L)``.
            labels: Tokens to predict, aligned with the input, -100 where none is; shape ``(B, L)``.
            logits_to_keep: Only the last of the positions, as many as this; 0 keeps all.
            num_items_in_batch: Divide the summed loss by this instead of by the labels counted here.
            **kwargs: As `OmniDnaModel` takes them.

        Returns:
            Logits, and the loss if there are labels.
        """
        outputs = self.model(input_ids, return_dict=True, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_BLD = outputs.last_hidden_state[:, kept]
        parts = self.model.transformer
        if "ff_out" in parts:
            logits = parts["ff_out"](hidden_BLD)
        else:
            logits = hidden_BLD @ self.model.get_input_embeddings().weight.t()
        if self.config.scale_logits:
            logits = logits * self.config.d_model**-0.5
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


class OmniDnaForSequenceClassification(GenericForSequenceClassification, OmniDnaPreTrainedModel):
    """The model and a class for each sequence, from its last token."""

    # transformers.Trainer divides accumulated losses only if told that the model does not
    accepts_loss_kwargs = False


class OmniDnaForTokenClassification(GenericForTokenClassification, OmniDnaPreTrainedModel):
    """The model and a class for each token."""

    accepts_loss_kwargs = False


AUTO_CLASSES: dict[str, type[Any]] = {
    "AutoConfig": OmniDnaConfig,
    "AutoModel": OmniDnaModel,
    "AutoModelForCausalLM": OmniDnaForCausalLM,
    "AutoModelForSequenceClassification": OmniDnaForSequenceClassification,
    "AutoModelForTokenClassification": OmniDnaForTokenClassification,
}
