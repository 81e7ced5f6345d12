"""StripedHyena 2 in plain PyTorch, as transformers models.

Module names and stored tensors are those of the original, so that ``blocks.28.mlp.l3`` resolves and original
checkpoints load by name. Everything is trainable; attention runs through scaled_dot_product_attention.

B sequences, L positions, D hidden size, I inner size, H heads, E head size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from genoembed.errors import ShapeError
from genoembed.models.striped_hyena2.configuration import StripedHyena2Config
from genoembed.models.striped_hyena2.operators import causal_convolution, causal_fir, modal_convolution

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

_IGNORE_INDEX = -100


class StreamLinear(nn.Linear):
    """Linear that writes to the residual stream; told apart because it starts small, by depth."""


class Float32Keeper(nn.Module):
    """Module of which some tensors stay float32 when the model is cast to half precision."""

    float32_names: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = set()
        for name in self.float32_names:
            tensor = getattr(self, name, None)
            if tensor is not None:
                kept |= {id(tensor), id(tensor.grad)}

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            is_rounded = id(tensor) in kept and moved.dtype in (torch.bfloat16, torch.float16)
            return tensor.to(moved.device) if is_rounded else moved

        return super()._apply(keep, recurse)


class RMSNorm(nn.Module):
    """Divide by the root mean square; eps is added outside the root, each step rounds to the input's dtype.

    Args:
        config: Gives ``hidden_size`` and ``rms_norm_eps``.
    """

    def __init__(self, config: StripedHyena2Config) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.scale = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Normalise the last axis.

        Args:
            x_BLD: Floating, shape ``(B, L, D)``.

        Returns:
            Shape ``(B, L, D)``, dtype of the input.
        """
        norm_BL1 = torch.linalg.vector_norm(x_BLD, dim=-1, keepdim=True)
        rms_BL1 = norm_BL1.to(x_BLD.dtype) * x_BLD.shape[-1] ** -0.5
        return x_BLD / (rms_BL1 + self.eps) * self.scale.to(x_BLD.dtype)


class GatedMLP(nn.Module):
    """``l3(act(l1 x) * l2 x)``; Evo 2 has GELU in block 0 and no activation elsewhere.

    Args:
        config: Gives the widths and the activation.
        layer_idx: Block number; decides about the activation.
    """

    def __init__(self, config: StripedHyena2Config, layer_idx: int) -> None:
        super().__init__()
        self.l1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.l2 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.l3 = StreamLinear(config.intermediate_size, config.hidden_size, bias=False)
        is_linear = config.evo2_style_activations and layer_idx > 0
        self.act: Callable[[Tensor], Tensor] | None = (
            None if is_linear else _ACTIVATIONS[config.mlp_activation]
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Apply the gated product.

        Args:
            x_BLD: Floating, shape ``(B, L, D)``.

        Returns:
            Shape ``(B, L, D)``.
        """
        gate_BLI = self.l1(x_BLD)
        if self.act is not None:
            gate_BLI = self.act(gate_BLI)
        return self.l3(gate_BLI * self.l2(x_BLD))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}


class RotaryEmbedding(Float32Keeper):
    """Half-split rotary positions whose frequencies come from the checkpoint.

    Released Evo 2 files hold bfloat16-rounded frequencies in a buffer; recomputing them gives other
    phases. The fallback, where a checkpoint has none, is rounded the same way.

    Args:
        config: Gives the head size, the base and the interpolation factor.
    """

    inv_freq: Tensor
    float32_names = ("inv_freq",)

    def __init__(self, config: StripedHyena2Config) -> None:
        super().__init__()
        self.factor = config.rotary_emb_scaling_factor
        self.base = config.rotary_emb_base
        head_size = config.hidden_size // config.num_attention_heads
        self.register_buffer("inv_freq", self.default_frequencies(head_size), persistent=True)

    def default_frequencies(self, head_size: int) -> Tensor:
        """Frequencies for a model without a checkpoint.

        Args:
            head_size: Channels of a head; even.

        Returns:
            float32, shape ``(head_size / 2,)``, values representable in bfloat16.
        """
        exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
        return (self.base**-exponents).to(torch.bfloat16).float()

    def forward(self, x_BLHE: Tensor, position_ids_BL: Tensor) -> Tensor:
        """Rotate queries or keys to their positions.

        Args:
            x_BLHE: Floating, shape ``(B, L, H, E)``.
            position_ids_BL: int64, shape ``(B, L)`` or ``(1, L)``.

        Returns:
            Shape ``(B, L, H, E)``, dtype of the input; rotated in float32, rounded once.
        """
        angles_BLF = (position_ids_BL.float() / self.factor)[..., None] * self.inv_freq.float()
        cos = angles_BLF.cos().to(x_BLHE.dtype).float()[:, :, None, :]
        sin = angles_BLF.sin().to(x_BLHE.dtype).float()[:, :, None, :]
        first, second = x_BLHE.float().chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
        return rotated.to(x_BLHE.dtype)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions.

    ``Wqkv`` keeps the stored order of rows: query, key and value head by head.

    Args:
        config: Gives the widths, heads and biases.
    """

    def __init__(self, config: StripedHyena2Config) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_proj_bias)
        self.out_proj = StreamLinear(config.hidden_size, config.hidden_size, bias=config.mha_out_proj_bias)
        self.rotary_emb = RotaryEmbedding(config)

    def forward(self, x_BLD: Tensor, position_ids_BL: Tensor, key_mask_BL: Tensor | None = None) -> Tensor:
        """Attend to this and earlier positions.

        Args:
            x_BLD: Floating, shape ``(B, L, D)``.
            position_ids_BL: int64, shape ``(B, L)`` or ``(1, L)``.
            key_mask_BL: False where a key is padding. Bool, shape ``(B, L)``; None where all count.

        Returns:
            Shape ``(B, L, D)``.
        """
        batch, length, width = x_BLD.shape
        qkv = self.Wqkv(x_BLD).view(batch, length, self.num_heads, 3, width // self.num_heads)
        query, key, value = qkv.unbind(dim=3)
        query = self.rotary_emb(query, position_ids_BL).transpose(1, 2)
        key = self.rotary_emb(key, position_ids_BL).transpose(1, 2)
        attention_mask = None
        if key_mask_BL is not None:
            square = torch.ones(length, length, dtype=torch.bool, device=x_BLD.device)
            # the diagonal stays, so that a padded query has something to attend to
            itself = torch.eye(length, dtype=torch.bool, device=x_BLD.device)
            attention_mask = square.tril() & (key_mask_BL[:, None, None, :] | itself)
        mixed = F.scaled_dot_product_attention(
            query, key, value.transpose(1, 2), attn_mask=attention_mask, is_causal=attention_mask is None
        )
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))


class HyenaFilter(Float32Keeper):
    """Short filter on the projections, gate, inner filter, gate.

    Args:
        config: Gives the widths, lengths and groups.
        kind: Which inner filter: ``hcs`` (correlation), ``hcm`` (convolution, skip) or ``hcl`` (modal, skip).
    """

    float32_names = ("log_poles", "residues")

    def __init__(self, config: StripedHyena2Config, kind: str) -> None:
        super().__init__()
        width = config.hidden_size
        self.kind = kind
        self.interleave = config.interleave
        self.short_filter_weight = nn.Parameter(torch.empty(3 * width, 1, config.short_filter_length))
        if kind == "hcs":
            self.h = nn.Parameter(torch.empty(config.hcs_filter_groups, 1, config.hcs_filter_length))
            return
        self.D = nn.Parameter(torch.empty(width))
        if kind == "hcm":
            self.h = nn.Parameter(torch.empty(config.hcm_filter_groups, 1, config.hcm_filter_length))
        else:
            self.log_poles = nn.Parameter(torch.empty(width, config.state_size, 1, dtype=torch.float32))
            self.residues = nn.Parameter(torch.empty(width, config.state_size, dtype=torch.float32))

    def forward(self, z_BLP: Tensor) -> Tensor:
        """Filter projected tokens.

        Args:
            z_BLP: Output of the input projections. Floating, shape ``(B, L, 3 D)``.

        Returns:
            Shape ``(B, L, D)``, dtype of the input.
        """
        z_BLP = causal_fir(z_BLP, self.short_filter_weight[:, 0])
        if self.interleave:
            post_gate, pre_gate, value = z_BLP.unflatten(-1, (-1, 3)).unbind(-1)
        else:
            post_gate, pre_gate, value = z_BLP.chunk(3, dim=-1)
        return post_gate * self._inner(pre_gate * value)

    def _inner(self, u_BLD: Tensor) -> Tensor:
        if self.kind == "hcs":
            return causal_fir(u_BLD, self.h[:, 0])
        if self.kind == "hcm":
            return causal_convolution(u_BLD, self.h[:, 0], self.D)
        return modal_convolution(u_BLD, self.log_poles[..., 0], self.residues, self.D)


class OutFilterDense(StreamLinear):
    """Linear whose product is rounded before the bias is added.

    The original multiplies a transposed view here, which PyTorch does not fuse with the bias. In bfloat16 a
    fused bias changes about 40 % of the block's output values, in float32 only the last bit.
    """

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Multiply, round, add.

        Args:
            x_BLD: Floating, shape ``(B, L, D)``.

        Returns:
            Shape ``(B, L, D)``.
        """
        product_BLD = F.linear(x_BLD, self.weight)
        return product_BLD if self.bias is None else product_BLD + self.bias.to(product_BLD.dtype)


class HyenaBlock(GradientCheckpointingLayer):
    """Pre-norm Hyena mixer and gated MLP, each with its residual.

    Args:
        config: Shape of the model.
        layer_idx: Block number.
    """

    def __init__(self, config: StripedHyena2Config, layer_idx: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.pre_norm = RMSNorm(config)
        self.projections = nn.Linear(width, 3 * width, bias=config.qkv_proj_bias)
        self.filter = HyenaFilter(config, config.block_kind(layer_idx))
        self.out_filter_dense = OutFilterDense(width, width, bias=config.hyena_out_proj_bias)
        self.post_norm = RMSNorm(config)
        self.mlp = GatedMLP(config, layer_idx)

    def forward(self, x_BLD: Tensor, position_ids_BL: Tensor, key_mask_BL: Tensor | None = None) -> Tensor:
        """Mix positions, then channels.

        Args:
            x_BLD: Residual stream. Floating, shape ``(B, L, D)``.
            position_ids_BL: Unused; blocks share one signature.
            key_mask_BL: False where a position is padding on the left. Bool, shape ``(B, L)``.

        Returns:
            Residual stream, shape ``(B, L, D)``.
        """
        z_BLP = self.projections(self.pre_norm(x_BLD))
        if key_mask_BL is not None:
            # filters have no bias: a zero that goes in adds nothing anywhere
            z_BLP = z_BLP.masked_fill(~key_mask_BL[..., None], 0)
        x_BLD = x_BLD + self.out_filter_dense(self.filter(z_BLP))
        return x_BLD + self.mlp(self.post_norm(x_BLD))


class AttentionBlock(GradientCheckpointingLayer):
    """Pre-norm attention and gated MLP, each with its residual.

    Args:
        config: Shape of the model.
        layer_idx: Block number.
    """

    def __init__(self, config: StripedHyena2Config, layer_idx: int) -> None:
        super().__init__()
        self.pre_norm = RMSNorm(config)
        self.inner_mha_cls = Attention(config)
        self.post_norm = RMSNorm(config)
        self.mlp = GatedMLP(config, layer_idx)

    def forward(self, x_BLD: Tensor, position_ids_BL: Tensor, key_mask_BL: Tensor | None = None) -> Tensor:
        """Mix positions, then channels.

        Args:
            x_BLD: Residual stream. Floating, shape ``(B, L, D)``.
            position_ids_BL: int64, shape ``(B, L)`` or ``(1, L)``.
            key_mask_BL: False where a position is padding on the left. Bool, shape ``(B, L)``.

        Returns:
            Residual stream, shape ``(B, L, D)``.
        """
        x_BLD = x_BLD + self.inner_mha_cls(self.pre_norm(x_BLD), position_ids_BL, key_mask_BL)
        return x_BLD + self.mlp(self.post_norm(x_BLD))


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

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers' own initialisers leave alone what a checkpoint has filled already; it calls this for
        # modules only that hold tensors themselves, so for no block
        if isinstance(module, nn.Linear):
            is_last = isinstance(module, StreamLinear)
            depth = 2 * self.config.num_hidden_layers if is_last else 1
            init.normal_(module.weight, std=(depth * module.in_features) ** -0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, RMSNorm):
            init.ones_(module.scale)
        elif isinstance(module, HyenaFilter):
            _init_filter(module)
        elif isinstance(module, RotaryEmbedding):
            init.copy_(module.inv_freq, module.default_frequencies(2 * module.inv_freq.shape[0]))


def _init_filter(module: HyenaFilter) -> None:
    """Initialise as Evo 2's training did: decaying modes, small residues; short filters near the identity."""
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
            output_hidden_states: Whether to return the residual stream before each block and the normed end;
                None asks the configuration.
            return_dict: False returns a plain tuple; None asks the configuration.

        Returns:
            ``last_hidden_state`` (after the final norm), shape ``(B, L, D)``; ``hidden_states`` if asked for.

        Raises:
            ShapeError: If not exactly one of ``input_ids`` and ``inputs_embeds`` is given, or
                ``attention_mask`` is not ``(B, L)``.
        """
        x_BLD, streams = self._run_blocks(
            input_ids, attention_mask, position_ids, inputs_embeds, output_hidden_states
        )
        output = BaseModelOutput(last_hidden_state=x_BLD, hidden_states=streams)
        return self._as_asked(output, return_dict)

    def _run_blocks(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        keep_hidden_states: bool | None,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        if (input_ids is None) == (inputs_embeds is None):
            message = "give exactly one of input_ids and inputs_embeds"
            raise ShapeError(message)
        if keep_hidden_states is None:
            keep_hidden_states = bool(self.config.output_hidden_states)
        x_BLD = self.embedding_layer(input_ids) if inputs_embeds is None else inputs_embeds
        key_mask = _left_padding(attention_mask, x_BLD)
        if position_ids is None:
            position_ids = _count_from_first_token(x_BLD, key_mask)
        streams = [x_BLD]
        for block in self.blocks:
            x_BLD = block(x_BLD, position_ids, key_mask)
            if keep_hidden_states:
                streams.append(x_BLD)
        x_BLD = self.norm(x_BLD)
        return x_BLD, (*streams[:-1], x_BLD) if keep_hidden_states else None

    def _as_asked(self, output: Any, return_dict: bool | None) -> Any:
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()


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
            output_hidden_states: Whether to return the residual streams; None asks the configuration.
            logits_to_keep: Score only this many last positions; 0 scores all.
            num_items_in_batch: Divide the summed loss by this instead of by the labels counted here.
            return_dict: False returns a plain tuple; None asks the configuration.

        Returns:
            ``logits`` of shape ``(B, L, V)``, ``loss`` in nats where labels are given, ``hidden_states`` if
            asked for.

        Raises:
            ShapeError: If not exactly one of ``input_ids`` and ``inputs_embeds`` is given, or
                ``attention_mask`` is not ``(B, L)``.
        """
        x_BLD, streams = self._run_blocks(
            input_ids, attention_mask, position_ids, inputs_embeds, output_hidden_states
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
