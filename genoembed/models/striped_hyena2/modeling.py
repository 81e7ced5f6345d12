"""StripedHyena 2 in plain PyTorch, as transformers models.

Module names and stored tensors are those of the original, so that ``blocks.28.mlp.l3`` resolves and original
checkpoints load by name. Everything is trainable; attention runs through scaled_dot_product_attention.

B sequences, L positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from genoembed.errors import ShapeError
from genoembed.models.striped_hyena2.blocks import AttentionBlock, BlockContext, HyenaBlock, RMSNorm
from genoembed.models.striped_hyena2.configuration import StripedHyena2Config
from genoembed.models.striped_hyena2.initialization import initialize_module
from genoembed.models.striped_hyena2.segments import lay_out_segments

_IGNORE_INDEX = -100


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
    """What transformers needs to know about the family, and initialisation."""

    config_class = StripedHyena2Config
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["HyenaBlock", "AttentionBlock"]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["log_poles", "residues", "inv_freq"]
    embedding_layer_template = "blocks.{index}.mlp.l3"
    """What a layer given as an integer means, as in Evo 2's own example."""
    is_causal_by_construction = True

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
            (AttentionBlock if config.block_kind(index) == "attention" else HyenaBlock)(config, index)
            for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Give the embedding.

        Returns:
            The embedding module.
        """
        return self.embedding_layer

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding.

        Args:
            value: The new embedding module.
        """
        self.embedding_layer = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        segment_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: object,
    ) -> BaseModelOutput:
        """Run the blocks.

        Args:
            input_ids: Token ids. int64, shape ``(B, L)``.
            attention_mask: 1 where a token is real. Padding on the right changes nothing before it and
                needs no mask; padding on the left is masked exactly. Shape ``(B, L)``.
            position_ids: Rotary positions. int64, shape ``(B, L)``; None counts from 0, padding on the left
                left out.
            inputs_embeds: Embedded tokens instead of ids. Floating, shape ``(B, L, D)``.
            segment_ids: Number of the packed segment that a token belongs to, negative at padding. With it no
                segment sees another, exactly. Integer, shape ``(B, L)``.
            output_hidden_states: Whether to return the residual stream before each block and the normed end;
                None asks the configuration.
            return_dict: False returns a plain tuple; None asks the configuration.

        Returns:
            ``last_hidden_state`` (after the final norm), shape ``(B, L, D)``; ``hidden_states`` if asked for.

        Raises:
            ShapeError: If not exactly one of ``input_ids`` and ``inputs_embeds`` is given, or
                ``attention_mask`` or ``segment_ids`` is not ``(B, L)``.
        """
        x_BLD, streams = self._run_blocks(
            input_ids, attention_mask, position_ids, inputs_embeds, segment_ids, output_hidden_states
        )
        output = BaseModelOutput(last_hidden_state=x_BLD, hidden_states=streams)
        return self._as_asked(output, return_dict)

    def _run_blocks(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        segment_ids: Tensor | None,
        keep_hidden_states: bool | None,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        if (input_ids is None) == (inputs_embeds is None):
            message = "give exactly one of input_ids and inputs_embeds"
            raise ShapeError(message)
        if keep_hidden_states is None:
            keep_hidden_states = bool(self.config.output_hidden_states)
        x_BLD = self.embedding_layer(input_ids) if inputs_embeds is None else inputs_embeds
        context = _build_context(x_BLD, attention_mask, position_ids, segment_ids)
        if context.segments is not None:
            x_BLD = context.segments.spread(x_BLD)
        streams = [x_BLD]
        for block in self.blocks:
            x_BLD = block(x_BLD, context)
            if keep_hidden_states:
                streams.append(x_BLD)
        x_BLD = self.norm(x_BLD)
        streams = [*streams[:-1], x_BLD] if keep_hidden_states else []
        if context.segments is not None:
            x_BLD = context.segments.collect(x_BLD)
            streams = [context.segments.collect(stream) for stream in streams]
        return x_BLD, tuple(streams) or None

    def _as_asked(self, output: Any, return_dict: bool | None) -> Any:
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()


def _build_context(
    x_BLD: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, segment_ids: Tensor | None
) -> BlockContext:
    """Say what the blocks must know about the rows; the positions of segments always count from 0."""
    if segment_ids is not None:
        if segment_ids.shape != x_BLD.shape[:2]:
            message = (
                f"segment_ids has shape {tuple(segment_ids.shape)}, expected {tuple(x_BLD.shape[:2])}; "
                "give each token the number of its segment"
            )
            raise ShapeError(message)
        segments = lay_out_segments(segment_ids.to(x_BLD.device))
        return BlockContext(position_ids_BL=segments.position_ids_1N, segments=segments)
    key_mask = _left_padding(attention_mask, x_BLD)
    if position_ids is None:
        position_ids = _count_from_first_token(x_BLD, key_mask)
    return BlockContext(position_ids_BL=position_ids, key_mask_BL=key_mask)


def _left_padding(attention_mask: Tensor | None, x_BLD: Tensor) -> Tensor | None:
    """Mask of real tokens where padding precedes one of them; None where causality hides it already."""
    if attention_mask is None:
        return None
    if attention_mask.shape != x_BLD.shape[:2]:
        message = (
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected {tuple(x_BLD.shape[:2])}; "
            "give 1 where a token is real and 0 where it is padding"
        )
        raise ShapeError(message)
    mask = attention_mask.to(x_BLD.device).bool()
    return mask if bool((~mask[:, :-1] & mask[:, 1:]).any()) else None


def _count_from_first_token(x_BLD: Tensor, key_mask_BL: Tensor | None) -> Tensor:
    """Positions; attention sees differences only, but cos and sin are rounded by absolute position."""
    positions_1L = torch.arange(x_BLD.shape[1], device=x_BLD.device)[None]
    if key_mask_BL is None:
        return positions_1L
    first_B1 = key_mask_BL.int().argmax(dim=1, keepdim=True)
    return (positions_1L - first_B1).clamp(min=0)


class StripedHyena2ForCausalLM(StripedHyena2Model, GenerationMixin):
    """StripedHyena 2 with next-token logits (a product with the embedding).

    Args:
        config: Shape of the model.
    """

    def __init__(self, config: StripedHyena2Config) -> None:
        super().__init__(config)
        self.unembed = Unembedding()

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        segment_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **_: object,
    ) -> CausalLMOutput:
        """Score the next token at every position.

        Args:
            input_ids: Token ids. int64, shape ``(B, L)``.
            attention_mask: 1 where a token is real. Shape ``(B, L)``.
            position_ids: Rotary positions. int64, shape ``(B, L)``; None counts from 0, padding on the left
                left out.
            inputs_embeds: Embedded tokens instead of ids. Floating, shape ``(B, L, D)``.
            labels: Aligned with the input (the loss shifts them); -100 takes no part. int64, ``(B, L)``.
            segment_ids: Number of the packed segment that a token belongs to, negative at padding. With it no
                segment sees another, exactly. Integer, shape ``(B, L)``.
            output_hidden_states: Whether to return the residual streams; None asks the configuration.
            logits_to_keep: Score only this many last positions; 0 scores all.
            num_items_in_batch: Divide the summed loss by this instead of by the labels counted here.
            return_dict: False returns a plain tuple; None asks the configuration.

        Returns:
            ``logits`` of shape ``(B, L, V)``, ``loss`` in nats where labels are given, ``hidden_states`` if
            asked for.

        Raises:
            ShapeError: If not exactly one of ``input_ids`` and ``inputs_embeds`` is given, or
                ``attention_mask`` or ``segment_ids`` is not ``(B, L)``.
        """
        x_BLD, streams = self._run_blocks(
            input_ids, attention_mask, position_ids, inputs_embeds, segment_ids, output_hidden_states
        )
        if logits_to_keep:
            x_BLD = x_BLD[:, -logits_to_keep:]
        logits = self.unembed(x_BLD, self.embedding_layer.weight)
        loss = None if labels is None else _next_token_loss(logits, labels, num_items_in_batch)
        return self._as_asked(CausalLMOutput(loss=loss, logits=logits, hidden_states=streams), return_dict)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object
    ) -> dict[str, Tensor | None]:
        """Hand the whole sequence to each step.

        Args:
            input_ids: int64, shape ``(B, L)``.
            attention_mask: Shape ``(B, L)``.

        Returns:
            Arguments of :meth:`forward`.
        """
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def _next_token_loss(logits_BLV: Tensor, labels_BL: Tensor, num_items: Tensor | int | None) -> Tensor:
    targets = F.pad(labels_BL[:, 1:], (0, 1), value=_IGNORE_INDEX).reshape(-1)
    total = F.cross_entropy(
        logits_BLV.flatten(0, 1).float(), targets, ignore_index=_IGNORE_INDEX, reduction="sum"
    )
    counted = (targets != _IGNORE_INDEX).sum().clamp(min=1) if num_items is None else num_items
    return total / counted
