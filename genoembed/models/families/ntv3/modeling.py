"""NTv3 in plain torch, as transformers models; names of modules are those of the published weights.

B rows, L positions, D channels, S positions of a shortened sequence.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GenericForTokenClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple

from genoembed.contracts import embed_inputs
from genoembed.models.families.ntv3.configuration import Ntv3Config

_CONV_EPS = 1e-5
"""Of the norms before convolutions; ``layer_norm_eps`` is for the transformer alone."""


class Ntv3LayerNorm(nn.LayerNorm):
    """Layer norm in float32 of whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return normed.to(x.dtype)


def _convolve(x_BLD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve, channels last; the length stays. ``weight`` has the shape ``(out, in, taps)``."""
    num_taps = weight.shape[-1]
    if x_BLD.dtype != torch.float32:
        return F.conv1d(x_BLD.transpose(1, 2), weight, bias, padding=num_taps // 2).transpose(1, 2)
    # as products: on GPUs, convolutions round factors of float32 to the 10 bits of TF32 unless told otherwise
    taps = weight.permute(2, 0, 1).contiguous()
    padded = F.pad(x_BLD, (0, 0, num_taps // 2, num_taps // 2))
    y_BLD = F.linear(padded[:, : x_BLD.shape[1]], taps[0], bias)
    for shift in range(1, num_taps):
        y_BLD = y_BLD.add_(F.linear(padded[:, shift : shift + x_BLD.shape[1]], taps[shift]))
    return y_BLD


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class Ntv3Convolution(nn.Conv1d):
    """Convolution with channels last."""

    def __init__(self, width_in: int, width_out: int, num_taps: int) -> None:
        super().__init__(width_in, width_out, num_taps)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return _convolve(x_BLD, self.weight, self.bias)


class Ntv3TransposedConvolution(nn.ConvTranspose1d):
    """Convolution, channels last, of vectors with zeros between them (``stride`` 2), or without.

    Its weights are those of a plain convolution, with the channels in and out exchanged.
    """

    def __init__(
        self, width_in: int, width_out: int, num_taps: int, *, stride: Literal[1, 2], phase: str = "odd"
    ) -> None:
        super().__init__(width_in, width_out, num_taps, stride=stride)
        self.start = 0 if phase == "even" else 1

    def forward(self, x_BLD: Tensor) -> Tensor:  # type: ignore[override]
        if self.stride[0] == 2:
            apart = x_BLD.new_zeros(x_BLD.shape[0], 2 * x_BLD.shape[1], x_BLD.shape[2])
            apart[:, self.start :: 2] = x_BLD
            x_BLD = apart
        return _convolve(x_BLD, self.weight.transpose(0, 1), self.bias)


class Ntv3ConvBlock(nn.Module):
    """Norm, convolution, GELU."""

    def __init__(self, width_in: int, conv: nn.Module, *, repeats: bool = False) -> None:
        super().__init__()
        self.conv = conv
        self.layer_norm = Ntv3LayerNorm(width_in, eps=_CONV_EPS)
        self.repeats = repeats

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = self.layer_norm(x_BLD)
        if self.repeats:
            x_BLD = x_BLD.repeat_interleave(2, dim=1)
        return _gelu(self.conv(x_BLD))


class Ntv3Residual(nn.Module):
    """Adds a block of its input."""

    def __init__(self, conv_block: Ntv3ConvBlock) -> None:
        super().__init__()
        self.conv_block = conv_block

    def forward(self, x_BLD: Tensor) -> Tensor:
        return x_BLD + self.conv_block(x_BLD)


class _Stage(GradientCheckpointingLayer):
    """A block of which one vector stands for several positions of the input.

    Called with the input's real length as the last argument, which only :meth:`per_position` reads.
    """

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.output_width = width
        self.stride = stride

    def per_position(self, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return a vector of each position, from what the block was called with and gave."""
        length: int = inputs[-1]
        return output.repeat_interleave(self.stride, dim=1)[:, :length]


class Ntv3DownBlock(_Stage):
    """Two convolutions; what they give is pooled after it."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__(width_out, stride)
        self.conv = Ntv3ConvBlock(width_in, Ntv3Convolution(width_in, width_out, 5))
        self.res_conv = Ntv3Residual(Ntv3ConvBlock(width_out, Ntv3Convolution(width_out, width_out, 1)))

    def forward(self, x_BSD: Tensor, length: int) -> Tensor:
        return self.res_conv(self.conv(x_BSD))


class Ntv3UpBlock(_Stage):
    """Doubles the length, and adds what came in at that length on the way down."""

    def __init__(self, config: Ntv3Config, width_in: int, width_out: int, stride: int) -> None:
        super().__init__(width_out, stride)
        repeats = config.deconv_upsample_type == "repeat+conv"
        wide: nn.Module = (
            Ntv3Convolution(width_in, width_out, 5)
            if repeats
            else Ntv3TransposedConvolution(width_in, width_out, 5, stride=2, phase=config.deconv_phase)
        )
        self.conv = Ntv3ConvBlock(width_in, wide, repeats=repeats)
        narrow = Ntv3TransposedConvolution(width_out, width_out, 1, stride=1)
        self.res_conv = Ntv3Residual(Ntv3ConvBlock(width_out, narrow))
        self.adds_skip = config.use_skip_connection

    def forward(self, x_BSD: Tensor, skip_BSD: Tensor, length: int) -> Tensor:
        x_BSD = self.res_conv(self.conv(x_BSD))
        return x_BSD + skip_BSD if self.adds_skip else x_BSD


class Ntv3Projection(nn.Module):
    """Holds a linear layer under its published name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.linear(x_BSD)


class Ntv3Attention(nn.Module):
    """Attention of all positions to all, with rotary positions."""

    def __init__(self, config: Ntv3Config) -> None:
        super().__init__()
        self.num_heads = config.attention_heads
        self.query_head = Ntv3Projection(config.embed_dim)
        self.key_head = Ntv3Projection(config.embed_dim)
        self.value_head = Ntv3Projection(config.embed_dim)
        self.mha_output = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x_BSD: Tensor, rotations: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = (
            head(x_BSD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for head in (self.query_head, self.key_head, self.value_head)
        )
        query, key = (_rotate(tensor, *rotations) for tensor in (query, key))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.mha_output(mixed.transpose(1, 2).flatten(2))


def _rotations(length: int, key_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Compute cosines and sines of each position, in float32: stored frequencies may have been rounded."""
    exponents = torch.arange(0, key_size, 2, device=device, dtype=torch.float32) / key_size
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] / 10000.0**exponents
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs that are made of the first half of the channels and the second."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Ntv3TransformerBlock(_Stage):
    """Attention and a gated MLP, each after a norm and added to its input."""

    def __init__(self, config: Ntv3Config) -> None:
        super().__init__(config.embed_dim, 2**config.num_downsamples)
        self.self_attention_layer_norm = Ntv3LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.sa_layer = Ntv3Attention(config)
        self.final_layer_norm = Ntv3LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.embed_dim, 2 * config.ffn_embed_dim, bias=False)
        self.fc2 = nn.Linear(config.ffn_embed_dim, config.embed_dim, bias=False)

    def forward(self, x_BSD: Tensor, rotations: tuple[Tensor, Tensor], length: int) -> Tensor:
        x_BSD = x_BSD + self.sa_layer(self.self_attention_layer_norm(x_BSD), rotations)
        gate, value = self.fc1(self.final_layer_norm(x_BSD)).chunk(2, dim=-1)
        return x_BSD + self.fc2(F.silu(gate) * value)


class Ntv3Stem(_Stage):
    """The first convolution."""

    def __init__(self, config: Ntv3Config) -> None:
        super().__init__(config.conv_init_embed_dim, 1)
        self.conv = Ntv3Convolution(config.token_embed_dim, config.conv_init_embed_dim, 15)

    def forward(self, x_BLD: Tensor, length: int) -> Tensor:
        return _gelu(self.conv(x_BLD))


class Ntv3Head(nn.Module):
    """Logits of each base."""

    def __init__(self, config: Ntv3Config) -> None:
        super().__init__()
        width = config.embed_dim
        self.hidden_layers = nn.ModuleList(
            nn.Linear(width, width) for _ in range(config.num_hidden_layers_head)
        )
        self.head = nn.Linear(config.conv_init_embed_dim, config.alphabet_size)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = _gelu(x_BLD)
        for layer in self.hidden_layers:
            x_BLD = _gelu(layer(x_BLD))
        return self.head(x_BLD)


class Ntv3Core(nn.Module):
    """Everything but the head, whose weights are here too in models that have one."""

    lm_head: Ntv3Head

    def __init__(self, config: Ntv3Config) -> None:
        super().__init__()
        self.config = config
        widths, strides = config.widths, [2**index for index in range(config.num_downsamples)]
        self.embed_layer = nn.Embedding(config.alphabet_size, config.token_embed_dim)
        self.stem = Ntv3Stem(config)
        steps = list(zip(widths[:-1], widths[1:], strides, strict=True))
        self.conv_tower_blocks = nn.ModuleList(Ntv3DownBlock(*step) for step in steps)
        self.transformer_blocks = nn.ModuleList(
            Ntv3TransformerBlock(config) for _ in range(config.num_layers)
        )
        self.deconv_tower_blocks = nn.ModuleList(
            Ntv3UpBlock(config, wide, narrow, stride) for narrow, wide, stride in reversed(steps)
        )

    def forward(self, embedded_BLD: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run the blocks; return the states of each base, and what the stem and each block give."""
        length = embedded_BLD.shape[1]
        missing = -length % 2**self.config.num_downsamples
        if missing:
            fill = self.embed_layer.weight[self.config.pad_token_id or 0].to(embedded_BLD.dtype)
            shape = (embedded_BLD.shape[0], missing, -1)
            embedded_BLD = torch.cat((embedded_BLD, fill.expand(shape)), dim=1)
        x = self.stem(embedded_BLD, length)
        given, skips = [x], []
        for block in self.conv_tower_blocks:
            skips.append(x)
            given.append(block(x, length))
            x = given[-1].unflatten(1, (-1, 2)).mean(dim=2)
        rotations = _rotations(x.shape[1], self.config.key_size or 0, x.device)
        for block in self.transformer_blocks:
            x = block(x, rotations, length)
            given.append(x)
        for block in self.deconv_tower_blocks:
            x = block(x, skips.pop(), length)
            given.append(x)
        return x[:, :length], given


class Ntv3PreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the family, and initialization."""

    config_class = Ntv3Config
    base_model_prefix = "ntv3"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Ntv3DownBlock", "Ntv3TransformerBlock", "Ntv3UpBlock"]
    # computed from the configuration, and (re-saved after a pass) from the longest input so far
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        r"rotary_embedding\.(inv_freq|cos_cached|sin_cached)$"
    ]

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.base_model.core.embed_layer

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.base_model.core.embed_layer = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv1d | nn.ConvTranspose1d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class Ntv3Model(Ntv3PreTrainedModel):
    """Stem, blocks down, transformer, blocks up.

    Args:
        config: Shape of the model.
    """

    embedding_layer_template = "core.transformer_blocks.{index}"
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        *Ntv3PreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"core\.lm_head\.",
    ]

    def __init__(self, config: Ntv3Config) -> None:
        super().__init__(config)
        self.core = Ntv3Core(config)
        self._add_head()
        self.post_init()

    def _add_head(self) -> None:
        """Add the weights of a head; there is none here."""

    @property
    def final_layer_path(self) -> str:
        """Path of the block that gives the final states."""
        last = self.config.num_downsamples - 1
        name = (
            f"deconv_tower_blocks.{last}" if last >= 0 else f"transformer_blocks.{self.config.num_layers - 1}"
        )
        return f"core.{name}"

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the blocks over sequences of one length: what padding there is, is read as sequence.

        Args:
            input_ids: Token ids. int64, shape ``(B, L)``.
            inputs_embeds: Embedded tokens instead of ids. Floating, shape ``(B, L, D)``.
            output_hidden_states: Whether to return what the stem and each block give, at their own lengths;
                None asks the configuration. (The official ones begin with the first block.)
            **kwargs: What heads and trainers pass to any model; not used.

        Returns:
            ``last_hidden_state``, shape ``(B, L, D)``; ``hidden_states`` if requested.

        Raises:
            ShapeError: If not exactly one of ``input_ids`` and ``inputs_embeds`` is given.
        """
        x_BLD, given = self._run(input_ids, inputs_embeds)
        output = BaseModelOutput(
            last_hidden_state=x_BLD, hidden_states=self._wanted(given, output_hidden_states)
        )
        return output

    def _run(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        return self.core(embed_inputs(self.core.embed_layer, input_ids, inputs_embeds))

    def _wanted(self, given: list[Tensor], output_hidden_states: bool | None) -> tuple[Tensor, ...] | None:
        wants = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return tuple(given) if wants else None


class Ntv3ForMaskedLM(Ntv3Model):
    """NTv3 with logits of masked bases.

    Args:
        config: Shape of the model.
    """

    _keys_to_ignore_on_load_unexpected = Ntv3PreTrainedModel._keys_to_ignore_on_load_unexpected

    def _add_head(self) -> None:
        self.core.lm_head = Ntv3Head(self.config)

    def get_output_embeddings(self) -> nn.Module:
        """Return the last layer of the head."""
        return self.core.lm_head.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the last layer of the head."""
        self.core.lm_head.head = new_embeddings  # type: ignore[assignment]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Score the token at every position.

        Args:
            input_ids: Token ids. int64, shape ``(B, L)``.
            inputs_embeds: Embedded tokens instead of ids. Floating, shape ``(B, L, D)``.
            labels: Tokens to recover; -100 takes no part. int64, shape ``(B, L)``.
            output_hidden_states: As for :class:`Ntv3Model`.
            **kwargs: ``num_items_in_batch`` divides the summed loss; nothing else is used.

        Returns:
            ``logits`` of shape ``(B, L, V)``, ``loss`` where labels are given, ``hidden_states`` if
            requested.

        Raises:
            ShapeError: If not exactly one of ``input_ids`` and ``inputs_embeds`` is given.
        """
        x_BLD, given = self._run(input_ids, inputs_embeds)
        logits = self.core.lm_head(x_BLD)
        loss = None
        if labels is not None:
            num_items = kwargs.get("num_items_in_batch")
            loss = self.loss_function(logits, labels, self.config.alphabet_size, num_items_in_batch=num_items)
        states = self._wanted(given, output_hidden_states)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=states)


class Ntv3ForSequenceClassification(Ntv3PreTrainedModel):
    """NTv3 with a class of each sequence, from the mean of its states where it is not padding.

    Args:
        config: Shape of the model, with ``num_labels`` and ``problem_type``.
    """

    # transformers.Trainer divides accumulated losses only if told that the model does not
    accepts_loss_kwargs = False

    def __init__(self, config: Ntv3Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.ntv3 = Ntv3Model(config)
        self.score = nn.Linear(config.conv_init_embed_dim, config.num_labels)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Score the classes.

        Args:
            input_ids: Token ids. int64, shape ``(B, L)``.
            inputs_embeds: Embedded tokens instead of ids. Floating, shape ``(B, L, D)``.
            labels: Class or values of each sequence, as ``problem_type`` has it.
            output_hidden_states: As for :class:`Ntv3Model`.
            **kwargs: Not used.

        Returns:
            ``logits`` of shape ``(B, num_labels)``, ``loss`` where labels are given, ``hidden_states``
            if requested.
        """
        output = self.ntv3(
            input_ids, inputs_embeds, output_hidden_states=output_hidden_states, return_dict=True
        )
        states_BLD = output.last_hidden_state
        counts_BL = torch.ones(states_BLD.shape[:2], dtype=torch.bool, device=states_BLD.device)
        if input_ids is not None:
            counts_BL = input_ids != self.config.pad_token_id
        total_BD = states_BLD.masked_fill(~counts_BL[..., None], 0).sum(dim=1)
        logits = self.score(total_BD / counts_BL.sum(dim=1, keepdim=True).clamp(min=1))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)
        return output


class Ntv3ForTokenClassification(GenericForTokenClassification, Ntv3PreTrainedModel):
    """NTv3 with a class of each base."""

    accepts_loss_kwargs = False
    base_model_prefix = "ntv3"
