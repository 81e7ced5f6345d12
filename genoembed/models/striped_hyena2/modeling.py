"""StripedHyena 2 in plain PyTorch, as transformers models.

Module names and stored tensors are those of the original, so that ``blocks.28.mlp.l3`` resolves and original
checkpoints load by name. Everything is trainable; attention runs through scaled_dot_product_attention.

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
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from genoembed.contracts import IGNORE_INDEX, embed_inputs
from genoembed.errors import ModelError, ShapeError
from genoembed.models.striped_hyena2.blocks import (
    AttentionBlock,
    HyenaBlock,
    HyenaFilter,
    Projections,
    RMSNorm,
    RotaryEmbedding,
    StreamLinear,
    rotary_frequencies,
)
from genoembed.models.striped_hyena2.configuration import StripedHyena2Config
from genoembed.models.striped_hyena2.state import BlockContext, StripedHyena2Cache, lay_out_segments

if TYPE_CHECKING:
    from genoembed.config.choices import Fp8Choice
    from genoembed.models.striped_hyena2.configuration import Fp8Need
    from genoembed.models.striped_hyena2.fp8 import Fp8Form


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


class StripedHyena2PreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the family, and initialization."""

    config_class: type[PreTrainedConfig] = StripedHyena2Config
    # of models with a head beside this one; with its weights, a file may name them so
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _input_embed_layer = "embedding_layer"
    _no_split_modules: ClassVar[list[str]] = ["HyenaBlock", "AttentionBlock"]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["log_poles", "residues", "inv_freq", "fp8_scales"]
    embedding_layer_template: str | None = "blocks.{index}.mlp.l3"
    """What a layer given as an integer means, as in Evo 2's own example."""
    final_layer_path = "norm"
    is_causal_by_construction = True
    carries_state = True
    """Whether a sequence may come in blocks, each with the ``past_key_values`` of the one before."""
    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # filters carry more than keys and values; generate starts without a cache and takes the model's own
        return False

    def new_cache(self) -> StripedHyena2Cache:
        """Start the state of a pass that takes sequences block by block.

        Returns:
            An empty state, for ``past_key_values`` of the first block and all after it.
        """
        return StripedHyena2Cache()

    def set_fp8(self, choice: Fp8Choice) -> None:
        """Choose whether the projections of Hyena blocks run in FP8; the configuration decided before.

        Args:
            choice: ``auto`` as the configuration says, ``emulate`` (on GPUs with FP8 sums of their own, too),
                or ``off``.

        Raises:
            ModelError: If the projections are to be emulated but have no scales.
        """
        need = self._fp8_need
        if choice == "emulate" and need == "none":
            message = (
                "the model has no FP8 scales, so there is nothing to emulate; leave fp8 out, or convert a "
                "checkpoint that has them"
            )
            raise ModelError(message)
        is_off = choice == "off" or (choice == "auto" and need != "needed")
        for module in self.modules():
            if isinstance(module, Projections):
                module.fp8 = "off" if is_off else choice

    @property
    def _fp8_need(self) -> Fp8Need:
        # other families take this class with configurations of their own
        need: Fp8Need = getattr(self.config, "fp8_projections", "none")
        return need

    @property
    def fp8_form(self) -> Fp8Form | None:
        """How the projections of Hyena blocks run; None where they have no scales."""
        if self._fp8_need == "none":
            return None
        found = next((module for module in self.modules() if isinstance(module, Projections)), None)
        return None if found is None else found.fp8_form

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
        self.embedding_layer: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            self._build_block(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm: nn.Module = RMSNorm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def _build_block(self, config: StripedHyena2Config, index: int) -> nn.Module:
        kind = AttentionBlock if config.block_kind(index) == "attention" else HyenaBlock
        return kind(config, index)

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
        cache = StripedHyena2Cache() if use_cache and past_key_values is None else past_key_values
        x_BLD = self._embed(input_ids, inputs_embeds)
        context = _build_context(x_BLD, attention_mask, position_ids, segment_ids, cache)
        x_BLD, streams = self._run_blocks(x_BLD, context, output_hidden_states)
        output = BaseModelOutputWithPast(
            last_hidden_state=x_BLD, hidden_states=streams, past_key_values=cache
        )
        return output

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        return embed_inputs(self.embedding_layer, input_ids, inputs_embeds)

    def _run_blocks(
        self, x_BLD: Tensor, context: BlockContext, keep_hidden_states: bool | None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        if keep_hidden_states is None:
            keep_hidden_states = bool(self.config.output_hidden_states)
        if context.segments is not None:
            x_BLD = context.segments.spread(x_BLD)
        if context.cache is not None:
            # before the blocks, for a pass may end early at the deepest requested block
            context.cache.length += x_BLD.shape[1]
        streams = [x_BLD]
        for block in self.blocks:
            x_BLD = block(x_BLD, context)
            if keep_hidden_states:
                streams.append(x_BLD)
        x_BLD = self.norm(x_BLD)
        # as transformers does: the last of the hidden states is the normed one
        streams = [*streams[:-1], x_BLD] if keep_hidden_states else []
        if context.segments is not None:
            x_BLD = context.segments.collect(x_BLD)
            streams = [context.segments.collect(stream) for stream in streams]
        return x_BLD, tuple(streams) or None


def _build_context(
    x_BLD: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    segment_ids: Tensor | None,
    cache: StripedHyena2Cache | None,
) -> BlockContext:
    """Build what the blocks must know about the rows; the positions of segments always count from 0."""
    if segment_ids is not None:
        if cache is not None:
            message = (
                "segment_ids together with past_key_values or use_cache; run packed rows without a cache"
            )
            raise ShapeError(message)
        if segment_ids.shape != x_BLD.shape[:2]:
            message = (
                f"segment_ids has shape {tuple(segment_ids.shape)}, expected {tuple(x_BLD.shape[:2])}; "
                "give each token the number of its segment"
            )
            raise ShapeError(message)
        segments = lay_out_segments(segment_ids.to(x_BLD.device))
        return BlockContext(position_ids_BL=segments.position_ids_1N, segments=segments)
    before = 0 if cache is None else cache.length
    key_mask = _hidden_keys(attention_mask, x_BLD, before=before, goes_on=cache is not None)
    if position_ids is None:
        position_ids = _count_from_first_token(x_BLD, key_mask, before=before)
    return BlockContext(position_ids_BL=position_ids, key_mask_BT=key_mask, cache=cache)


def _hidden_keys(
    attention_mask: Tensor | None, x_BLD: Tensor, *, before: int, goes_on: bool
) -> Tensor | None:
    """Mask of real tokens if padding precedes one of them, here or later; None where causality hides it."""
    if attention_mask is None:
        return None
    batch, length = x_BLD.shape[:2]
    if attention_mask.shape != (batch, before + length):
        message = (
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected {(batch, before + length)}; "
            "give 1 where a token is real and 0 where it is padding, tokens of earlier blocks included"
        )
        raise ShapeError(message)
    mask = attention_mask.to(x_BLD.device).bool()
    # Padding on the right is behind every real token, where causality hides it. With a cache, real tokens
    # of a later block may come behind it, so any padding counts.
    is_felt = ~mask if goes_on else ~mask[:, :-1] & mask[:, 1:]
    return mask if bool(is_felt.any()) else None


def _count_from_first_token(x_BLD: Tensor, key_mask_BT: Tensor | None, *, before: int) -> Tensor:
    """Positions; attention sees differences only, but cos and sin are rounded by absolute position."""
    positions_1L = torch.arange(before, before + x_BLD.shape[1], device=x_BLD.device)[None]
    if key_mask_BT is None:
        return positions_1L
    first_B1 = key_mask_BT.int().argmax(dim=1, keepdim=True)
    return (positions_1L - first_B1).clamp(min=0)


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
        cache = StripedHyena2Cache() if use_cache and past_key_values is None else past_key_values
        x_BLD = self._embed(input_ids, inputs_embeds)
        context = _build_context(x_BLD, attention_mask, position_ids, segment_ids, cache)
        x_BLD, streams = self._run_blocks(x_BLD, context, output_hidden_states)
        if logits_to_keep:
            x_BLD = x_BLD[:, -logits_to_keep:]
        logits = self.unembed(x_BLD, self.embedding_layer.weight)
        loss = None if labels is None else _next_token_loss(logits, labels, num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=streams, past_key_values=cache
        )
        return output

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
def initialize_module(module: nn.Module, config: StripedHyena2Config) -> None:
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
