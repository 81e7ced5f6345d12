"""Evo 1 (Nguyen et al. 2024, StripedHyena 1) as it is published: long convolutions and attention, bytes.

Built from the parts of StripedHyena 2, which came after it. What is different: the poles of the long filters
are complex, the short filter has a bias, both gates and the value lie head by head, query, key and value one
after the other, and integer layers mean the output of a block. As with StripedHyena 2, a sequence may come in
blocks and rows may be packed, and long inputs need no memory for filters of their length. Padding on the left
is masked exactly, which the published code does not do.

Poles and residues stay float32 in every dtype of the model, and the long convolution is computed in float32.
Rotary frequencies are computed, not read: published files hold them rounded to bfloat16, and the published
code does not use these either.

B sequences, L positions, M chunks, D hidden size, P projections (three times D), H heads, E head size.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from genoembed.errors import ConfigError
from genoembed.models.fft import fft_convolution
from genoembed.models.precision import without_autocast
from genoembed.models.striped_hyena2.blocks import (
    Attention,
    Float32Keeper,
    GatedMLP,
    OutFilterDense,
    RMSNorm,
    rotate,
)
from genoembed.models.striped_hyena2.modeling import (
    AttentionBlock,
    StripedHyena2ForCausalLM,
    StripedHyena2Model,
    StripedHyena2PreTrainedModel,
    initialize_module,
)
from genoembed.models.striped_hyena2.operators import (
    FilterCache,
    causal_fir,
    modal_convolution,
    modal_convolution_from,
)
from genoembed.models.striped_hyena2.state import HyenaState, last_positions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from genoembed.models.striped_hyena2.configuration import StripedHyena2Config
    from genoembed.models.striped_hyena2.state import BlockContext, StripedHyena2Cache


class Evo1Config(PreTrainedConfig):
    """Shape and constants of a StripedHyena 1 model; the names are those of the published files.

    The two lists of block numbers together name every block exactly once.

    Args:
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        num_layers: Blocks.
        num_attention_heads: Heads of an attention block, and groups of the gates' channels.
        attn_layer_idxs: Blocks with attention.
        hyena_layer_idxs: Blocks with a long filter.
        inner_mlp_size: Inner width of the gated MLP; None is 8/3 of the width, up to a multiple of
            ``inner_size_multiple_of``.
        inner_size_multiple_of: See there.
        mlp_activation: ``gelu`` (exact) or ``silu``.
        state_size: Complex poles of a long filter, per channel.
        hyena_filter_groups: Neighboring channels that share a long filter.
        column_split_hyena: Whether gates and value lie head by head, else one after the other.
        short_filter_length: Taps of the filter on the projections.
        short_filter_bias: Whether it has a bias.
        proj_groups: Heads that share a key and a value.
        smeared_gqa: Must be False where they are shared.
        qkv_proj_bias: Whether the projections of attention have a bias.
        mha_out_proj_bias: Whether the output projection of attention has a bias.
        rotary_emb_base: Base of the rotary frequencies.
        use_interpolated_rotary_pos_emb: Whether positions are divided by ``rotary_emb_scaling_factor``.
        rotary_emb_scaling_factor: See there.
        max_seqlen: Context in tokens; not enforced by the forward pass.
        eps: Added to the root mean square, outside the root.
        final_norm: Whether there is a norm after the blocks.
        tie_embeddings: Whether the logits are a product with the embedding.
        initializer_range: Standard deviation of the embedding at initialization.
        **kwargs: Anything a transformers configuration takes.

    Raises:
        ConfigError: If the fields do not describe a model; all problems at once.
    """

    model_type = "stripedhyena"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_mlp_size",
        "max_position_embeddings": "max_seqlen",
        "rms_norm_eps": "eps",
        "tie_word_embeddings": "tie_embeddings",
    }
    evo2_style_activations = False

    def __init__(  # noqa: PLR0913 - a configuration is a list of fields
        self,
        *,
        vocab_size: int = 512,
        hidden_size: int = 4096,
        num_layers: int = 32,
        num_attention_heads: int = 32,
        attn_layer_idxs: Sequence[int] = (8, 16, 24),
        hyena_layer_idxs: Sequence[int] | None = None,
        inner_mlp_size: int | None = None,
        inner_size_multiple_of: int = 64,
        mlp_activation: str = "silu",
        state_size: int = 8,
        hyena_filter_groups: int = 1,
        column_split_hyena: bool = True,
        short_filter_length: int = 3,
        short_filter_bias: bool = True,
        proj_groups: int = 1,
        smeared_gqa: bool = False,
        qkv_proj_bias: bool = True,
        mha_out_proj_bias: bool = True,
        rotary_emb_base: float = 10000.0,
        use_interpolated_rotary_pos_emb: bool = False,
        rotary_emb_scaling_factor: float = 1.0,
        max_seqlen: int = 8192,
        eps: float = 1e-6,
        final_norm: bool = True,
        tie_embeddings: bool = True,
        initializer_range: float = 0.02,
        **kwargs: object,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_attention_heads = num_attention_heads
        self.attn_layer_idxs = list(attn_layer_idxs)
        others = [index for index in range(num_layers) if index not in self.attn_layer_idxs]
        self.hyena_layer_idxs = others if hyena_layer_idxs is None else list(hyena_layer_idxs)
        self.inner_size_multiple_of = inner_size_multiple_of
        if inner_mlp_size is None:
            inner_mlp_size = -(-int(8 * hidden_size / 3) // inner_size_multiple_of) * inner_size_multiple_of
        self.inner_mlp_size = inner_mlp_size
        self.mlp_activation = mlp_activation
        self.state_size = state_size
        self.hyena_filter_groups = hyena_filter_groups
        self.column_split_hyena = column_split_hyena
        self.short_filter_length = short_filter_length
        self.short_filter_bias = short_filter_bias
        self.proj_groups = proj_groups
        self.smeared_gqa = smeared_gqa
        self.qkv_proj_bias = qkv_proj_bias
        self.mha_out_proj_bias = mha_out_proj_bias
        self.rotary_emb_base = rotary_emb_base
        self.use_interpolated_rotary_pos_emb = use_interpolated_rotary_pos_emb
        self.rotary_emb_scaling_factor = rotary_emb_scaling_factor
        self.max_seqlen = max_seqlen
        self.eps = eps
        self.final_norm = final_norm
        self.initializer_range = initializer_range
        kwargs["tie_word_embeddings"] = tie_embeddings
        kwargs.setdefault("pad_token_id", 1)
        kwargs.setdefault("eos_token_id", 0)
        super().__init__(**kwargs)
        problems = self._problems()
        if problems:
            raise ConfigError(*problems)

    def _problems(self) -> list[str]:
        problems = []
        named = Counter((*self.attn_layer_idxs, *self.hyena_layer_idxs))
        if sorted(named.elements()) != list(range(self.num_layers)):
            problems.append(
                f"attn_layer_idxs and hyena_layer_idxs must name each of the {self.num_layers} blocks "
                f"(num_layers) exactly once; they name {sorted(named.elements())}"
            )
        if self.hidden_size % (2 * self.num_attention_heads):
            problems.append(
                f"hidden_size {self.hidden_size} is not an even multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        for name, whole in (("proj_groups", "num_attention_heads"), ("hyena_filter_groups", "hidden_size")):
            if getattr(self, whole) % getattr(self, name):
                problems.append(
                    f"{whole} {getattr(self, whole)} is not a multiple of {name} {getattr(self, name)}"
                )
        if self.mlp_activation not in ("gelu", "silu"):
            problems.append(f"mlp_activation is {self.mlp_activation!r}; it must be 'gelu' or 'silu'")
        if self.smeared_gqa and self.proj_groups > 1:
            problems.append("smeared_gqa must be False: the published code runs no model that has it")
        return problems


def _shared(config: Evo1Config) -> StripedHyena2Config:
    """Pass a configuration to the parts of StripedHyena 2: it has every field that they read."""
    return cast("StripedHyena2Config", config)


_WRITTEN_OUT = 1024
"""Filters of inputs up to this length are written out, as in the published code, whose rounded powers of the
poles are most of its distance from exact values. Longer ones go chunk by chunk, in less memory."""


class Evo1Filter(Float32Keeper):
    """Short filter on the projections, gate, long filter, gate."""

    float32_names = ("poles", "residues")
    short_filter_bias: nn.Parameter | None

    def __init__(self, config: Evo1Config) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads if config.column_split_hyena else 1
        self.num_shared = config.hyena_filter_groups
        self._cache = FilterCache()
        self.D = nn.Parameter(torch.empty(width))
        self.short_filter_weight = nn.Parameter(torch.empty(3 * width, 1, config.short_filter_length))
        bias = nn.Parameter(torch.empty(3 * width)) if config.short_filter_bias else None
        self.register_parameter("short_filter_bias", bias)
        # real and imaginary parts on the last axis
        shape = (width // self.num_shared, config.state_size, 1, 2)
        self.poles = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        self.residues = nn.Parameter(torch.empty(shape, dtype=torch.float32))

    def forward(
        self, z_BLP: Tensor, *, starts_BM: Tensor | None = None, is_padding_BL1: Tensor | None = None
    ) -> Tensor:
        """Filter projected tokens."""
        gate, gated = self._gates(causal_fir(z_BLP, self._short_taps(), starts_BM=starts_BM), is_padding_BL1)
        with without_autocast(gated.device):
            if starts_BM is None and not self.training and gated.shape[1] <= _WRITTEN_OUT:
                taps_DL = self._long_taps(gated)
                filtered = fft_convolution(gated.transpose(1, 2), taps_DL, self.D.to(taps_DL.dtype))
                return filtered.transpose(1, 2) * gate
            wide, modes = self._widened(gated)
            # chunks of packed rows have a length of their own: no matrix worth keeping
            kept = self._kept(wide) if starts_BM is None else None
            filtered = modal_convolution(wide, *modes, starts_BM=starts_BM, kept=kept)
            return filtered.to(gated.dtype) * gate

    def go_on(
        self, z_BLP: Tensor, state: HyenaState | None, is_padding_BL1: Tensor | None
    ) -> tuple[Tensor, HyenaState]:
        """Filter the next block of a sequence."""
        history = None if state is None else torch.cat(state.short, dim=-1)
        taps = self._short_taps()
        gate, gated = self._gates(causal_fir(z_BLP, taps, history=history), is_padding_BL1)
        first, second, third = last_positions(history, z_BLP, count=taps.shape[1] - 1).chunk(3, dim=-1)
        wide, modes = self._widened(gated)
        with without_autocast(wide.device):
            found = modal_convolution_from(
                wide, *modes, state_BDS=None if state is None else state.inner, kept=self._kept(wide)
            )
        after = HyenaState(short=(first, second, third), inner=found.state_BDS)
        return found.output.to(gated.dtype) * gate, after

    def _short_taps(self) -> Tensor:
        return self.short_filter_weight[:, 0]

    def _gates(self, z_BLP: Tensor, is_padding_BL1: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the gate behind the long filter, and its input: the other gate times the value."""
        if self.short_filter_bias is not None:
            z_BLP = z_BLP + self.short_filter_bias.to(z_BLP.dtype)
        parts = z_BLP.unflatten(-1, (self.num_heads, 3, -1)).unbind(-2)
        post_gate, pre_gate, value = (part.flatten(-2) for part in parts)
        gated = pre_gate * value
        # the bias makes something of the zeros that padding on the left is
        return post_gate, gated if is_padding_BL1 is None else gated.masked_fill(is_padding_BL1, 0)

    def _modes(self) -> tuple[Tensor, Tensor]:
        """Return logarithms of the poles, and residues; complex, ``(D, S)``."""
        poles, residues = (
            torch.view_as_complex(each)[..., 0].repeat_interleave(self.num_shared, dim=0)
            for each in (self.poles, self.residues)
        )
        # in float32, as in the published code: a more exact logarithm makes other filters, steps later
        return poles.log(), residues

    def _long_taps(self, x_BLD: Tensor) -> Tensor:
        """Write the long filter out, ``(D, L)``, with the roundings of the published code."""
        log_poles, residues = modes = self._modes()
        # a power of two serves other lengths, too
        num_taps = 1 << (x_BLD.shape[1] - 1).bit_length()

        def build() -> Tensor:
            steps = torch.arange(num_taps, device=x_BLD.device)
            return (residues[..., None] * (log_poles[..., None] * steps).exp()).real.sum(dim=1)

        kept = self._kept(x_BLD)
        taps_DL = build() if kept is None else kept.get(build, modes, ("taps", num_taps))
        return taps_DL[:, : x_BLD.shape[1]]

    def _widened(self, gated_BLD: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return the input of the long filter, logarithms of its poles, residues and skip."""
        wide = gated_BLD.to(torch.float64 if gated_BLD.dtype == torch.float64 else torch.float32)
        # powers in float64, where there is: no more errors that grow with the steps
        precise = torch.complex64 if wide.device.type == "mps" else torch.complex128
        log_poles, residues = self._modes()
        return wide, (log_poles.to(precise), residues.to(precise), self.D.to(wide.dtype))

    def _kept(self, x_BLD: Tensor) -> FilterCache | None:
        return self._cache if x_BLD.device.type == "cpu" and not torch.is_grad_enabled() else None


class Evo1HyenaBlock(GradientCheckpointingLayer):
    """Pre-norm gated long convolution and gated MLP, each with its residual."""

    def __init__(self, config: Evo1Config, layer_idx: int) -> None:
        super().__init__()
        width, shared = config.hidden_size, _shared(config)
        self.layer_idx = layer_idx
        self.pre_norm = RMSNorm(shared)
        self.projections = nn.Linear(width, 3 * width)
        self.filter = Evo1Filter(config)
        self.out_filter_dense = OutFilterDense(width, width)
        self.post_norm = RMSNorm(shared)
        self.mlp = GatedMLP(shared, layer_idx)

    def forward(self, x_BLD: Tensor, context: BlockContext) -> Tensor:
        """Mix positions, then channels."""
        z_BLP = self.projections(self.pre_norm(x_BLD))
        is_padding_BL1 = None
        if context.key_mask_BT is not None:
            is_padding_BL1 = ~context.key_mask_BT[:, -x_BLD.shape[1] :, None]
            z_BLP = z_BLP.masked_fill(is_padding_BL1, 0)
        x_BLD = x_BLD + self.out_filter_dense(self._filter(z_BLP, context, is_padding_BL1))
        return x_BLD + self.mlp(self.post_norm(x_BLD))

    def _filter(self, z_BLP: Tensor, context: BlockContext, is_padding_BL1: Tensor | None) -> Tensor:
        if context.cache is None:
            starts_BM = None if context.segments is None else context.segments.starts_1M
            filtered: Tensor = self.filter(z_BLP, starts_BM=starts_BM, is_padding_BL1=is_padding_BL1)
            return filtered
        states = context.cache.hyena
        before = states.get(self.layer_idx)
        filtered, states[self.layer_idx] = self.filter.go_on(z_BLP, before, is_padding_BL1)
        return filtered


class Evo1Rotary(nn.Module):
    """Half-split rotary positions with exact frequencies."""

    def __init__(self, config: Evo1Config) -> None:
        super().__init__()
        self.base = config.rotary_emb_base
        self.factor = config.rotary_emb_scaling_factor if config.use_interpolated_rotary_pos_emb else 1.0

    def forward(self, x_BLHE: Tensor, position_ids_BL: Tensor) -> Tensor:
        """Rotate queries or keys to their positions."""
        size = x_BLHE.shape[-1]
        exponents = torch.arange(0, size, 2, device=x_BLHE.device, dtype=torch.float32) / size
        # inverted before it is multiplied: at 100,000 positions, another order gives other angles
        inv_freq_F = 1.0 / self.base**exponents
        return rotate(x_BLHE, (position_ids_BL.float() / self.factor)[..., None] * inv_freq_F)


class Evo1Attention(Attention):
    """Causal attention; the rows of ``Wqkv`` are all queries, then all keys, then all values."""

    def __init__(self, config: Evo1Config, layer_idx: int) -> None:
        super().__init__(_shared(config), layer_idx)
        width = config.hidden_size
        self.num_shared = config.proj_groups
        if self.num_shared > 1:
            num_rows = width + 2 * width // self.num_shared
            self.Wqkv = nn.Linear(width, num_rows, bias=config.qkv_proj_bias)
        self.rotary_emb = Evo1Rotary(config)

    def split_heads(self, qkv_BLP: Tensor) -> tuple[Tensor, ...]:
        """Split a projection; keys and values come once for each query that shares them."""
        num_keys = self.num_heads // self.num_shared
        heads = qkv_BLP.unflatten(-1, (self.num_heads + 2 * num_keys, -1))
        query, key, value = heads.split((self.num_heads, num_keys, num_keys), dim=2)
        if self.num_shared > 1:
            key, value = (each.repeat_interleave(self.num_shared, dim=2) for each in (key, value))
        return query, key, value


class Evo1AttentionBlock(AttentionBlock):
    """Pre-norm attention and gated MLP, each with its residual."""

    def __init__(self, config: Evo1Config, layer_idx: int) -> None:
        super().__init__(_shared(config), layer_idx)
        self.inner_mha_cls = Evo1Attention(config, layer_idx)


class Evo1PreTrainedModel(StripedHyena2PreTrainedModel):
    """What transformers needs to know about the family, and initialization."""

    config_class = Evo1Config
    config: Evo1Config
    base_model_prefix = "backbone"
    _no_split_modules: ClassVar[list[str]] = ["Evo1HyenaBlock", "Evo1AttentionBlock"]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["poles", "residues"]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_emb\.inv_freq$"]
    embedding_layer_template = None
    """An integer layer is the output of a block, as with most models."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, Evo1Filter):
            initialize_module(module, _shared(self.config))
            return
        init.ones_(module.D)
        taps = 0.2 * torch.randn_like(module.short_filter_weight)
        taps[..., -1] += 1.0
        init.copy_(module.short_filter_weight, taps)
        if module.short_filter_bias is not None:
            init.zeros_(module.short_filter_bias)
        # modes that fade within tens to hundreds of positions, and turn as slowly
        fading = torch.rand_like(module.poles[..., 0]) * 0.09 + 0.01
        angles = torch.randn_like(fading) * fading
        poles = torch.polar(torch.exp(-fading), angles)
        init.copy_(module.poles, torch.view_as_real(poles))
        init.normal_(module.residues, std=0.1 * module.residues.shape[1] ** -0.5)


class Evo1Model(Evo1PreTrainedModel, StripedHyena2Model):
    """Embedding, blocks and last norm.

    Args:
        config: Shape of the model.
    """

    def __init__(self, config: Evo1Config) -> None:
        super().__init__(_shared(config))
        if not config.final_norm:
            self.norm = nn.Identity()
        if not config.tie_embeddings:
            self.unembed = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

    def unembed_tokens(self, x_BLD: Tensor) -> Tensor:
        """Score every token of the vocabulary."""
        weight_VD = (self.embedding_layer if self.config.tie_embeddings else self.unembed).weight
        assert isinstance(weight_VD, Tensor)
        # a model spread over devices has its embedding on the first and its norm on the last
        return F.linear(x_BLD.to(weight_VD.device), weight_VD)

    def _build_block(self, config: Any, index: int) -> nn.Module:
        kind = Evo1AttentionBlock if index in config.attn_layer_idxs else Evo1HyenaBlock
        return kind(config, index)


class Evo1ForCausalLM(Evo1PreTrainedModel, GenerationMixin):
    """Evo 1 with next-token logits: a product with the embedding, or with weights of its own.

    Args:
        config: Shape of the model.
    """

    def __init__(self, config: Evo1Config) -> None:
        super().__init__(config)
        self.backbone = Evo1Model(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of tokens."""
        return self.backbone.embedding_layer

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of tokens."""
        self.backbone.embedding_layer = value

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
            input_ids: As in :meth:`StripedHyena2Model.forward`, and so are all that are not named here.
            attention_mask: See there.
            position_ids: See there.
            inputs_embeds: See there.
            labels: Aligned with the input (the loss shifts them); -100 takes no part. int64, ``(B, L)``.
            segment_ids: See there.
            past_key_values: See there.
            use_cache: See there.
            output_hidden_states: See there.
            logits_to_keep: Score only this many last positions; 0 scores all.
            num_items_in_batch: Divide the summed loss by this instead of by the labels counted here.

        Returns:
            ``logits`` of shape ``(B, L, V)``, ``loss`` in nats where labels are given, ``hidden_states`` and
            ``past_key_values`` if requested.

        Raises:
            ShapeError: As in :meth:`StripedHyena2Model.forward`.
        """
        found = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            segment_ids=segment_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.backbone.unembed_tokens(found.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=found.hidden_states,
            past_key_values=found.past_key_values,
        )
        return output

    prepare_inputs_for_generation = StripedHyena2ForCausalLM.prepare_inputs_for_generation


class Evo1ForSequenceClassification(GenericForSequenceClassification, Evo1PreTrainedModel):
    """Evo 1 with a linear layer on the last token that is no padding."""

    # transformers.Trainer divides accumulated losses only if told that the model does not
    accepts_loss_kwargs = False
    base_model_prefix = "backbone"


class Evo1ForTokenClassification(GenericForTokenClassification, Evo1PreTrainedModel):
    """Evo 1 with a linear layer on each token."""

    accepts_loss_kwargs = False
    base_model_prefix = "backbone"


AUTO_CLASSES: dict[str, type[Any]] = {
    "AutoConfig": Evo1Config,
    "AutoModel": Evo1Model,
    "AutoModelForCausalLM": Evo1ForCausalLM,
    "AutoModelForSequenceClassification": Evo1ForSequenceClassification,
    "AutoModelForTokenClassification": Evo1ForTokenClassification,
}
