"""The StripedHyena 2 network in plain PyTorch: embedding, blocks, last norm.

:class:`StripedHyena2Network` is the mathematics. :class:`PlainStripedHyena2` runs it as an ordinary module,
so that vectors need no transformers; :mod:`genoembed.models.striped_hyena2.modeling` gives it their
interface. Module names and stored tensors are those of the original, so that ``blocks.28.mlp.l3`` resolves
and original checkpoints load by name.

B sequences, L positions, T positions with those of earlier blocks, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from genoembed.contracts import embed_inputs
from genoembed.errors import ModelError, ShapeError
from genoembed.models.striped_hyena2.blocks import (
    PlainAttentionBlock,
    PlainHyenaBlock,
    Projections,
    RMSNorm,
)
from genoembed.models.striped_hyena2.state import (
    AttentionWindows,
    BlockContext,
    StripedHyena2Cache,
    lay_out_segments,
)

if TYPE_CHECKING:
    from genoembed.config.choices import Fp8Choice
    from genoembed.models.striped_hyena2.fp8 import Fp8Form
    from genoembed.models.striped_hyena2.shape import Fp8Need, StripedHyena2Fields, StripedHyena2Shape


class NetworkOutput(NamedTuple):
    """What a pass through the blocks gives."""

    last_hidden_state: Tensor
    """After the last norm. Floating, ``(B, L, D)``."""
    hidden_states: tuple[Tensor, ...] | None
    """The residual stream before each block, and the last state; None unless they are kept."""
    past_key_values: StripedHyena2Cache | None
    """State for the next block of the sequences."""


class StripedHyena2Network:
    """Layers and forward pass, for a class that is a module as well."""

    attention_block: type[nn.Module] = PlainAttentionBlock
    hyena_block: type[nn.Module] = PlainHyenaBlock
    embedding_layer_template: str | None = "blocks.{index}.mlp.l3"
    """What a layer given as an integer means, as in Evo 2's own example."""
    final_layer_path = "norm"
    is_causal_by_construction = True
    carries_state = True
    """Whether a sequence may come in blocks, each with the ``past_key_values`` of the one before."""
    embedding_layer: nn.Module
    blocks: nn.ModuleList
    norm: nn.Module

    def build_layers(self, config: StripedHyena2Fields) -> None:
        """Make the layers; their weights are the caller's to load or initialize."""
        self.embedding_layer = self._build_embedding(config)
        self.blocks = nn.ModuleList(
            self._build_block(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config)

    def _build_embedding(self, config: StripedHyena2Fields) -> nn.Module:
        return nn.Embedding(config.vocab_size, config.hidden_size)

    def _build_block(self, config: StripedHyena2Fields, index: int) -> nn.Module:
        is_attention = config.block_kind(index) == "attention"
        return (self.attention_block if is_attention else self.hyena_block)(config, index)

    def run_blocks(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        segment_ids: Tensor | None = None,
        past_key_values: StripedHyena2Cache | None = None,
        *,
        use_cache: bool = False,
        keep_hidden_states: bool = False,
    ) -> NetworkOutput:
        """Run embedding, blocks and last norm; the arguments are those of ``StripedHyena2Model``."""
        cache = StripedHyena2Cache() if use_cache and past_key_values is None else past_key_values
        x_BLD = embed_inputs(self.embedding_layer, input_ids, inputs_embeds)
        context = _build_context(x_BLD, attention_mask, position_ids, segment_ids, cache)
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
        return NetworkOutput(x_BLD, tuple(streams) or None, cache)

    def new_cache(self, windows: AttentionWindows | None = None) -> StripedHyena2Cache:
        """Start the state of a pass that takes sequences block by block.

        Args:
            windows: What attention sees of sequences longer than the context. Each block must then lie in one
                window, and rows are padded on the right only, without a mask. None: all that came before.

        Returns:
            An empty state, for ``past_key_values`` of the first block and all after it.
        """
        return StripedHyena2Cache(windows=windows)

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
        if need == "none":
            return
        is_off = choice == "off" or (choice == "auto" and need != "needed")
        for module in self.blocks.modules():
            if isinstance(module, Projections):
                module.fp8 = "off" if is_off else choice

    @property
    def _fp8_need(self) -> Fp8Need:
        # other families take this class with configurations of their own
        need: Fp8Need = getattr(getattr(self, "config", None), "fp8_projections", "none")
        return need

    @property
    def fp8_form(self) -> Fp8Form | None:
        """How the projections of Hyena blocks run; None where they have no scales."""
        if self._fp8_need == "none":
            return None
        found = next((module for module in self.blocks.modules() if isinstance(module, Projections)), None)
        return None if found is None else found.fp8_form


class PlainStripedHyena2(StripedHyena2Network, nn.Module):
    """StripedHyena 2 as an ordinary module, for inference without transformers."""

    pretrained_name = "StripedHyena2Model"
    """Name of the class of transformers that gives the same numbers: what files say."""

    def __init__(self, config: StripedHyena2Shape) -> None:
        super().__init__()
        self.config = config
        self.build_layers(config)

    def _build_embedding(self, config: StripedHyena2Fields) -> nn.Module:
        # on the meta device, to fill it with random numbers would import torch's compiler: more than a second
        return nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: StripedHyena2Cache | None = None,
        use_cache: bool = False,
    ) -> NetworkOutput:
        """Run the blocks, as ``StripedHyena2Model`` does."""
        return self.run_blocks(
            input_ids, attention_mask, past_key_values=past_key_values, use_cache=use_cache
        )


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
    if cache is not None and cache.windows is not None:
        return _windowed_context(x_BLD, cache, cache.windows, attention_mask)
    before = 0 if cache is None else cache.length
    key_mask = _hidden_keys(attention_mask, x_BLD, before=before, goes_on=cache is not None)
    if position_ids is None:
        position_ids = _count_from_first_token(x_BLD, key_mask, before=before)
    return BlockContext(position_ids_BL=position_ids, key_mask_BT=key_mask, cache=cache)


def _windowed_context(
    x_BLD: Tensor, cache: StripedHyena2Cache, windows: AttentionWindows, attention_mask: Tensor | None
) -> BlockContext:
    """Build the context of a block whose attention goes back to the start of its window."""
    first, last = cache.length, cache.length + x_BLD.shape[1]
    start = windows.start(first)
    if attention_mask is not None or last > start + windows.window:
        found = "an attention_mask" if attention_mask is not None else f"positions {first} to {last - 1}"
        message = (
            f"a state with windows got {found}; give blocks that lie in one window each (iter_spans), "
            "of rows padded on the right, without a mask"
        )
        raise ShapeError(message)
    # counted from the window's start: never beyond the positions that the model was trained at
    positions_1L = torch.arange(first - start, last - start, device=x_BLD.device)[None]
    return BlockContext(position_ids_BL=positions_1L, cache=cache, num_kept=first - start)


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
