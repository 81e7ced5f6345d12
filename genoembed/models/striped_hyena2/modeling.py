"""StripedHyena 2 as transformers has it: a shell around the plain network, and initialization.

The mathematics is in :mod:`genoembed.models.striped_hyena2.network`; here are the interface of transformers,
next-token logits and how training begins. Everything is trainable.

B sequences, L positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from genoembed.contracts import IGNORE_INDEX
from genoembed.models.striped_hyena2.blocks import (
    HyenaFilter,
    PlainAttentionBlock,
    PlainHyenaBlock,
    Projections,
    RMSNorm,
    RotaryEmbedding,
    StreamLinear,
    rotary_frequencies,
)
from genoembed.models.striped_hyena2.configuration import StripedHyena2Config
from genoembed.models.striped_hyena2.network import StripedHyena2Network

if TYPE_CHECKING:
    from genoembed.models.striped_hyena2.network import PlainStripedHyena2
    from genoembed.models.striped_hyena2.shape import StripedHyena2Fields
    from genoembed.models.striped_hyena2.state import StripedHyena2Cache


class HyenaBlock(GradientCheckpointingLayer, PlainHyenaBlock):
    """Hyena mixer and gated MLP, with gradient checkpointing."""


class AttentionBlock(GradientCheckpointingLayer, PlainAttentionBlock):
    """Attention and gated MLP, with gradient checkpointing."""


class Unembedding(nn.Module):
    """Product with the embedding; holds no weights, so that none can be left untied."""

    def forward(self, x_BLD: Tensor, embedding_VD: Tensor) -> Tensor:
        """Score every token.

        Args:
            x_BLD: Floating, shape ``(B, L, D)``.
            embedding_VD: The embedding's weight.

        Returns:
            Logits, shape ``(B, L, V)``.
        """
        # a model spread over devices has its embedding on the first and its norm on the last
        return F.linear(x_BLD.to(embedding_VD.device), embedding_VD)


class StripedHyena2PreTrainedModel(StripedHyena2Network, PreTrainedModel):
    """What transformers needs to know about the family, and initialization."""

    config_class: type[PreTrainedConfig] = StripedHyena2Config
    attention_block, hyena_block = AttentionBlock, HyenaBlock
    # of models with a head beside this one; with its weights, a file may name them so
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _input_embed_layer = "embedding_layer"
    _no_split_modules: ClassVar[list[str]] = ["HyenaBlock", "AttentionBlock"]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["log_poles", "residues", "inv_freq", "fp8_scales"]
    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # filters carry more than keys and values; generate starts without a cache and takes the model's own
        return False

    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for modules only that hold tensors themselves, so for no block
        initialize_module(module, self.config)


class StripedHyena2Model(StripedHyena2PreTrainedModel):
    """Embedding, blocks and final norm.

    Args:
        config: Shape of the model.
    """

    def __init__(self, config: StripedHyena2Config) -> None:
        super().__init__(config)
        self.build_layers(config)
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def of_network(cls, network: PlainStripedHyena2, *, folder: str) -> StripedHyena2Model:
        """Make a model that shares the weights of a plain network.

        Args:
            network: What is to have the interface of transformers.
            folder: Where it was loaded from.

        Returns:
            The model, in eval mode.
        """
        config: StripedHyena2Config = StripedHyena2Config.from_dict(network.config.to_dict())
        config.name_or_path, config.dtype = folder, network.embedding_layer.weight.dtype
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(network.state_dict(keep_vars=True), assign=True)
        for mine, theirs in zip(model.blocks.modules(), network.blocks.modules(), strict=True):
            if isinstance(mine, Projections) and isinstance(theirs, Projections):
                mine.fp8 = theirs.fp8
        return model.eval()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        segment_ids: Tensor | None = None,
        past_key_values: StripedHyena2Cache | None = None,
        use_cache: bool = False,
        output_hidden_states: bool | None = None,
        **_: object,
    ) -> BaseModelOutputWithPast:
        """Run the blocks.

        A long sequence may come in blocks of any length: with ``use_cache`` the output has
        ``past_key_values``, which the call for the next block takes. What comes out is what the whole
        sequence gives at once.

        Args:
            input_ids: Token ids. int64, shape ``(B, L)``.
            attention_mask: 1 where a token is real. Padding on the right changes nothing before it and
                needs no mask; padding on the left is masked exactly. Shape ``(B, L)``, or ``(B, T + L)``
                after T tokens of earlier blocks; sequences that began with padding need it with every block.
            position_ids: Rotary positions. int64, shape ``(B, L)``; None counts from 0, padding on the left
                left out.
            inputs_embeds: Embedded tokens instead of ids. Floating, shape ``(B, L, D)``.
            segment_ids: Number of the packed segment that a token belongs to, negative at padding. With it no
                segment sees another, exactly. Integer, shape ``(B, L)``; not together with a cache.
            past_key_values: State after the earlier blocks of the sequences; brought up to date.
            use_cache: Start such a state if none is given.
            output_hidden_states: Whether to return the residual stream before each block and the normed end;
                None asks the configuration.

        Returns:
            ``last_hidden_state`` (after the final norm), shape ``(B, L, D)``; ``hidden_states`` and
            ``past_key_values`` if requested.

        Raises:
            ShapeError: If not exactly one of ``input_ids`` and ``inputs_embeds`` is given, or
                ``attention_mask`` or ``segment_ids`` does not fit them, or segments come with a cache.
        """
        found = self.run_blocks(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            segment_ids,
            past_key_values,
            use_cache=use_cache,
            keep_hidden_states=self._keeps_hidden_states(output_hidden_states),
        )
        return BaseModelOutputWithPast(**found._asdict())

    def _keeps_hidden_states(self, asked: bool | None) -> bool:
        return bool(self.config.output_hidden_states if asked is None else asked)


class StripedHyena2ForCausalLM(StripedHyena2Model, GenerationMixin):
    """StripedHyena 2 with next-token logits (a product with the embedding).

    Args:
        config: Shape of the model.
    """

    def __init__(self, config: StripedHyena2Config) -> None:
        super().__init__(config)
        self.unembed = Unembedding()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        segment_ids: Tensor | None = None,
        past_key_values: StripedHyena2Cache | None = None,
        use_cache: bool = False,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        **_: object,
    ) -> CausalLMOutputWithPast:
        """Score the next token at every position.

        Args:
            input_ids: Token ids. int64, shape ``(B, L)``.
            attention_mask: 1 where a token is real. Shape ``(B, L)``, or ``(B, T + L)`` after T tokens of
                earlier blocks.
            position_ids: Rotary positions. int64, shape ``(B, L)``; None counts from 0, padding on the left
                left out.
            inputs_embeds: Embedded tokens instead of ids. Floating, shape ``(B, L, D)``.
            labels: Aligned with the input (the loss shifts them); -100 takes no part. int64, ``(B, L)``.
            segment_ids: Number of the packed segment that a token belongs to, negative at padding. With it no
                segment sees another, exactly. Integer, shape ``(B, L)``; not together with a cache.
            past_key_values: State after the earlier blocks of the sequences; brought up to date.
            use_cache: Start such a state if none is given.
            output_hidden_states: Whether to return the residual streams; None asks the configuration.
            logits_to_keep: Score only this many last positions; 0 scores all.
            num_items_in_batch: Divide the summed loss by this instead of by the labels counted here.

        Returns:
            ``logits`` of shape ``(B, L, V)``, ``loss`` in nats where labels are given, ``hidden_states`` and
            ``past_key_values`` if requested.

        Raises:
            ShapeError: If not exactly one of ``input_ids`` and ``inputs_embeds`` is given, or
                ``attention_mask`` or ``segment_ids`` does not fit them, or segments come with a cache.
        """
        found = self.run_blocks(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            segment_ids,
            past_key_values,
            use_cache=use_cache,
            keep_hidden_states=self._keeps_hidden_states(output_hidden_states),
        )
        x_BLD = found.last_hidden_state
        if logits_to_keep:
            x_BLD = x_BLD[:, -logits_to_keep:]
        logits = self.unembed(x_BLD, self.embedding_layer.weight)
        return CausalLMOutputWithPast(
            loss=None if labels is None else _next_token_loss(logits, labels, num_items_in_batch),
            logits=logits,
            hidden_states=found.hidden_states,
            past_key_values=found.past_key_values,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: StripedHyena2Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = True,
        **_: object,
    ) -> dict[str, Any]:
        """Select for each step of ``generate`` the tokens that the cache has not seen.

        Args:
            input_ids: The whole sequences so far. int64, shape ``(B, T + L)``.
            past_key_values: State after the first T tokens.
            attention_mask: Shape ``(B, T + L)``.
            inputs_embeds: Embedded prompt, for the first step only. Shape ``(B, T + L, D)``.
            use_cache: Whether to keep a state; without one each step runs everything again.

        Returns:
            Arguments of :meth:`forward`.
        """
        seen = 0 if past_key_values is None else past_key_values.length
        inputs: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": use_cache}
        if use_cache:
            inputs["past_key_values"] = past_key_values
        if inputs_embeds is not None and not seen:
            return {**inputs, "inputs_embeds": inputs_embeds}
        # after an embedded prompt the ids hold new tokens only
        new = 1 if inputs_embeds is not None else input_ids.shape[1] - (seen if use_cache else 0)
        return {**inputs, "input_ids": input_ids[:, input_ids.shape[1] - new :]}


def _next_token_loss(logits_BLV: Tensor, labels_BL: Tensor, num_items: Tensor | int | None) -> Tensor:
    # by position: the last position has no next token, whatever its label
    targets = F.pad(labels_BL[:, 1:], (0, 1), value=IGNORE_INDEX).reshape(-1)
    total = F.cross_entropy(
        logits_BLV.flatten(0, 1).float(), targets, ignore_index=IGNORE_INDEX, reduction="sum"
    )
    counted = (targets != IGNORE_INDEX).sum().clamp(min=1) if num_items is None else num_items
    return total / counted


@torch.no_grad()
def initialize_module(module: nn.Module, config: StripedHyena2Fields) -> None:
    """Initialize the tensors that a module holds itself.

    What writes to the residual stream starts smaller, by the square root of twice the depth.
    """
    if isinstance(module, nn.Linear):
        depth = 2 * config.num_hidden_layers if isinstance(module, StreamLinear) else 1
        init.normal_(module.weight, std=(depth * module.in_features) ** -0.5)
        if module.bias is not None:
            init.zeros_(module.bias)
        if isinstance(module, Projections) and "fp8_scales" in module._buffers:
            init.ones_(module.fp8_scales)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight, std=config.initializer_range)
    elif isinstance(module, RMSNorm):
        init.ones_(module.scale)
    elif isinstance(module, HyenaFilter):
        _initialize_filter(module)
    elif isinstance(module, RotaryEmbedding):
        init.copy_(module.inv_freq, rotary_frequencies(2 * module.inv_freq.shape[0], module.base))


def _initialize_filter(module: HyenaFilter) -> None:
    """Initialize as Evo 2's training did: decaying modes, small residues; short filters near the identity."""
    init.copy_(module.short_filter_weight, _near_identity(module.short_filter_weight))
    if module.kind == "hcs":
        init.copy_(module.h, _near_identity(module.h))
        return
    init.ones_(module.D)
    if module.kind == "hcl":
        # log_poles = -exp(p) exp(gamma), p = -1, exp(gamma) uniform in (0.01, 0.1)
        init.uniform_(module.log_poles, -math.exp(-1) * 0.1, -math.exp(-1) * 0.01)
        init.normal_(module.residues, std=0.1 * module.residues.shape[1] ** -0.5)
        return
    groups, _, num_taps = module.h.shape
    # each group forgets at its own rate, from 4 taps to the whole filter
    rates = torch.logspace(math.log10(4), math.log10(num_taps), groups, device=module.h.device)
    fading = torch.exp(-torch.arange(num_taps, device=module.h.device) / rates[:, None])
    init.copy_(module.h, 0.2 * torch.randn_like(module.h) * fading[:, None, :])


def _near_identity(taps: Tensor) -> Tensor:
    """Random taps, the last one (the current position) about one."""
    values = 0.2 * torch.randn_like(taps)
    values[..., -1] += 1.0
    return values
