"""HyenaDNA (Nguyen et al. 2023) as it is published: Hyena operators and MLPs, causal, letter by letter.

A Hyena operator multiplies gates with a convolution over the whole past. The filter of that convolution is
implicit: a small network with sine activations computes it from positions, which lie in the checkpoint up to
the context of the model. Convolutions go through FFT in float32, a group of channels at a time, and MLPs a
stretch of positions at a time. What is held of all positions are about ``hyena_order + 5`` values per channel
and ``filter_order`` more: a million bases take 1.2 GB at a width of 32, 7.5 GB at a width of 256.

The filter and its positions stay float32 in every dtype of the model: in bfloat16, positions further than a
few hundred could not be told apart. The residual stream is float32, too, as in the published code.

B sequences, L positions, D hidden size, P projections (``hyena_order + 1`` times D), C channels of a group,
F width of the filter's network, N positions of an FFT, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from genoembed.contracts import embed_inputs
from genoembed.errors import ConfigError, ShapeError
from genoembed.models.fft import fft_convolution, fft_length
from genoembed.models.precision import without_autocast
from genoembed.models.striped_hyena2.blocks import is_watched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

_MOST_VALUES = 1 << 23
"""Values of the padded rows that are transformed at a time, and of an MLP's inner states: 32 MiB."""


class HyenaDNAConfig(PreTrainedConfig):
    """Shape and constants of a HyenaDNA model; the names are those of the published files.

    Args:
        vocab_size: Tokens; the embedding has more rows, up to a multiple of ``pad_vocab_size_multiple``.
        d_model: Width of the residual stream.
        n_layer: Blocks.
        d_inner: Inner width of the MLPs; None is four times the width.
        max_seq_len: Context in tokens, special ones included; the filters know no later position.
        hyena_order: Gates of an operator; one less is the number of its long filters.
        short_filter_order: Taps of the short filter on the projections. The published code starts it two
            positions back, so that a filter of more than three taps sees later positions.
        filter_order: Width of the filter's network.
        emb_dim: Features of a position; odd.
        num_inner_mlps: Inner layers of the filter's network.
        activation_freq: Frequency of its sines, at the beginning if it is trained.
        train_freq: Whether the frequencies are weights.
        hyena_dropout: Share of gated values dropped in training.
        layer_norm_epsilon: Of the last norm; those in the blocks have 1e-5.
        initializer_range: Standard deviation of weights at initialization.
        pad_vocab_size_multiple: What the rows of the embedding are a multiple of.
        **kwargs: Anything a transformers configuration takes.

    Raises:
        ConfigError: If the fields do not describe a model; all problems at once.
    """

    model_type = "hyenadna"
    attribute_map: ClassVar[dict[str, str]] = {"hidden_size": "d_model", "num_hidden_layers": "n_layer"}

    def __init__(  # noqa: PLR0913 - a configuration is a list of fields
        self,
        *,
        vocab_size: int = 12,
        d_model: int = 256,
        n_layer: int = 12,
        d_inner: int | None = None,
        max_seq_len: int = 1024,
        hyena_order: int = 2,
        short_filter_order: int = 3,
        filter_order: int = 64,
        emb_dim: int = 3,
        num_inner_mlps: int = 2,
        activation_freq: float = 1,
        train_freq: bool = True,
        hyena_dropout: float = 0.0,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        pad_vocab_size_multiple: int = 8,
        **kwargs: object,
    ) -> None:
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.n_layer = n_layer
        self.d_inner = 4 * d_model if d_inner is None else d_inner
        self.max_seq_len = max_seq_len
        self.hyena_order = hyena_order
        self.short_filter_order = short_filter_order
        self.filter_order = filter_order
        self.emb_dim = emb_dim
        self.num_inner_mlps = num_inner_mlps
        self.activation_freq = activation_freq
        self.train_freq = train_freq
        self.hyena_dropout = hyena_dropout
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.pad_vocab_size_multiple = pad_vocab_size_multiple
        kwargs.setdefault("tie_word_embeddings", False)
        kwargs.setdefault("pad_token_id", 4)
        kwargs.setdefault("eos_token_id", 1)
        # nothing is carried from token to token: generation runs the whole sequence each time
        kwargs.setdefault("use_cache", False)
        super().__init__(**kwargs)
        problems = self._problems()
        if problems:
            raise ConfigError(*problems)

    @property
    def num_embeddings(self) -> int:
        """Rows of the embedding and of the head."""
        return math.ceil(self.vocab_size / self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    def _problems(self) -> list[str]:
        problems = []
        if self.hyena_order < 2:
            problems.append(f"hyena_order is {self.hyena_order}, expected 2 or more")
        if not 1 <= self.short_filter_order <= 5:
            problems.append(f"short_filter_order is {self.short_filter_order}, expected 1 to 5")
        if self.emb_dim < 3 or not self.emb_dim % 2:
            problems.append(f"emb_dim is {self.emb_dim}, expected an odd number from 3 on")
        return problems


class HyenaSin(nn.Module):
    """The sine that all layers of a filter's network share; its frequencies are stored with the first."""

    def __init__(self, config: HyenaDNAConfig) -> None:
        super().__init__()
        self.initial = float(config.activation_freq)
        if config.train_freq:
            self.freq = nn.Parameter(torch.full((1, config.filter_order), self.initial))

    def forward(self, x_LF: Tensor) -> Tensor:
        """Apply the sine."""
        return torch.sin(getattr(self, "freq", self.initial) * x_LF)


class HyenaPositions(nn.Module):
    """Features of all positions: time and waves; of the longest input, whatever the length of this one."""

    z: Tensor
    t: Tensor

    def __init__(self, config: HyenaDNAConfig) -> None:
        super().__init__()
        self.register_buffer("z", torch.zeros(1, config.max_seq_len, config.emb_dim))
        self.register_buffer("t", torch.zeros(1, config.max_seq_len, 1))


class HyenaModulation(nn.Module):
    """How fast each channel of a filter fades."""

    deltas: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("deltas", torch.zeros(1, 1, width))


class ImplicitFilter(nn.Module):
    """A long filter, computed from positions; float32 whatever the dtype of the model."""

    def __init__(self, config: HyenaDNAConfig) -> None:
        super().__init__()
        width = config.d_model * (config.hyena_order - 1)
        self.bias = nn.Parameter(torch.zeros(width))
        self.pos_emb = HyenaPositions(config)
        layers: list[nn.Module] = [nn.Linear(config.emb_dim, config.filter_order), HyenaSin(config)]
        for _ in range(config.num_inner_mlps):
            # the places of the other sines are taken, so that the numbers are the published ones
            layers += [nn.Linear(config.filter_order, config.filter_order), nn.Identity()]
        self.implicit_filter = nn.Sequential(*layers, nn.Linear(config.filter_order, width, bias=False))
        self.modulation = HyenaModulation(width)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.bfloat16, torch.float16) else moved

        return super()._apply(keep, recurse)

    def features(self, length: int) -> Tensor:
        """Run the network up to its last layer; ``(L, F)``."""
        *linears, _ = list(self.implicit_filter)[::2]
        sine = self.implicit_filter[1]
        width = self.implicit_filter[-1].in_features
        assert isinstance(width, int)
        z_LE = self.pos_emb.z[0, :length]

        def run(x_LF: Tensor) -> Tensor:
            for linear in linears:
                x_LF = sine(linear(x_LF))
            return x_LF

        return _by_stretches(run, z_LE, step=_MOST_VALUES // width)

    def taps(self, features_LF: Tensor, channels: slice) -> Tensor:
        """Compute the filters of some channels, first tap first; ``(C, L)``."""
        last = self.implicit_filter[-1]
        if type(last) is nn.Linear:
            taps_CL = last.weight[channels] @ features_LF.T
        else:  # an adapter in its place must run as a whole
            taps_CL = last(features_LF).T[channels]
        deltas_C1 = self.modulation.deltas[0, 0, channels, None]
        fading_CL = torch.exp(-deltas_C1.abs() * self.pos_emb.t[0, : len(features_LF), 0])
        return taps_CL * (fading_CL + _SHIFT)


_SHIFT = 0.05
"""What is left of a filter that has faded."""


class HyenaOperator(nn.Module):
    """Projections, their short filter, and gates with long convolutions between them."""

    def __init__(self, config: HyenaDNAConfig) -> None:
        super().__init__()
        self.order = config.hyena_order
        self.width = config.d_model
        num_projections = (self.order + 1) * self.width
        self.dropout = nn.Dropout(config.hyena_dropout)
        self.in_proj = nn.Linear(self.width, num_projections)
        self.out_proj = nn.Linear(self.width, self.width)
        # two positions back, whatever the number of taps, as in the published code
        self.short_filter: nn.Module = nn.Conv1d(
            num_projections, num_projections, config.short_filter_order, padding=2, groups=num_projections
        )
        self.filter_fn = ImplicitFilter(config)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Mix positions."""
        batch, length, _ = x_BLD.shape
        z_BPL = self.in_proj(x_BLD).transpose(1, 2)
        groups = list(_spans(self.width, _MOST_VALUES // (batch * fft_length(length))))
        # filtered group by group if there is much of it; an adapter must see all channels
        is_filtered = len(groups) == 1 or type(self.short_filter) is not nn.Conv1d
        if is_filtered:
            z_BPL = self.short_filter(z_BPL)[..., :length]
        with without_autocast(x_BLD.device):
            features_LF = self.filter_fn.features(length)
        mixed = [self._mix(z_BPL, features_LF, group, is_filtered=is_filtered) for group in groups]
        del z_BPL, features_LF
        y_BDL = torch.cat(mixed, dim=1) if len(mixed) > 1 else mixed[0]
        del mixed
        y_BLD: Tensor = self.out_proj(y_BDL.transpose(1, 2))
        return y_BLD

    def _mix(self, z_BPL: Tensor, features_LF: Tensor, channels: slice, *, is_filtered: bool) -> Tensor:
        """Compute the result in some channels, ``(B, C, L)``: each depends on its own projections alone."""
        rows = [_shifted(channels, part * self.width) for part in range(self.order + 1)]
        parts = [z_BPL[:, row] if is_filtered else self._filter_shortly(z_BPL, row) for row in rows]
        first, *gates, value_BCL = parts
        for index, gate_BCL in enumerate(reversed(gates)):
            value_BCL = self.dropout(value_BCL * gate_BCL)
            own = _shifted(channels, index * self.width)
            with without_autocast(value_BCL.device):
                taps_CL = self.filter_fn.taps(features_LF, own)
                value_BCL = fft_convolution(value_BCL, taps_CL, self.filter_fn.bias[own])
        return value_BCL * first

    def _filter_shortly(self, z_BPL: Tensor, rows: slice) -> Tensor:
        conv = self.short_filter
        assert isinstance(conv, nn.Conv1d)
        part_BCL = z_BPL[:, rows]
        bias = None if conv.bias is None else conv.bias[rows]
        filtered = F.conv1d(part_BCL, conv.weight[rows], bias, padding=2, groups=part_BCL.shape[1])
        return filtered[..., : part_BCL.shape[2]]


def _spans(total: int, step: int) -> Iterator[slice]:
    """Cut a range into spans of at most ``step``, and of one at least."""
    step = max(1, step)
    return (slice(start, min(total, start + step)) for start in range(0, total, step))


def _by_stretches(run: Callable[[Tensor], Tensor], x: Tensor, *, step: int) -> Tensor:
    """Run what is the same at each position, so that what is between is never held for all of them."""
    length = x.shape[-2]
    # gradients need all of it anyway
    if length <= step or torch.is_grad_enabled():
        return run(x)
    y: Tensor | None = None
    for span in _spans(length, step):
        part = run(x[..., span, :])
        y = part.new_empty(*x.shape[:-1], part.shape[-1]) if y is None else y
        y[..., span, :] = part
    assert y is not None
    return y


def _shifted(span: slice, by: int) -> slice:
    return slice(span.start + by, span.stop + by)


class HyenaMlp(nn.Module):
    """``fc2(gelu(fc1 x))`` with the tanh approximation of GELU."""

    def __init__(self, config: HyenaDNAConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, config.d_inner)
        self.fc2 = nn.Linear(config.d_inner, config.d_model)
        self.inner = config.d_inner

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Mix channels."""
        step = _MOST_VALUES // (self.inner * x_BLD.shape[0])
        # a hook expects one call
        is_seen = is_watched(self.fc1) or is_watched(self.fc2)
        return self._run(x_BLD) if is_seen else _by_stretches(self._run, x_BLD, step=step)

    def _run(self, x_BLD: Tensor) -> Tensor:
        y_BLD: Tensor = self.fc2(F.gelu(self.fc1(x_BLD), approximate="tanh"))
        return y_BLD


class HyenaDNABlock(GradientCheckpointingLayer):
    """Pre-norm operator and MLP, each with its residual."""

    def __init__(self, config: HyenaDNAConfig) -> None:
        super().__init__()
        self.mixer = HyenaOperator(config)
        self.norm1 = nn.LayerNorm(config.d_model)
        self.mlp = HyenaMlp(config)
        self.norm2 = nn.LayerNorm(config.d_model)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Mix positions, then channels."""
        x_BLD = x_BLD + self.mixer(self.norm1(x_BLD.to(self.norm1.weight.dtype)))
        return x_BLD + self.mlp(self.norm2(x_BLD.to(self.norm2.weight.dtype)))


class HyenaBackbone(nn.Module):
    """Embedding, blocks and last norm."""

    def __init__(self, config: HyenaDNAConfig) -> None:
        super().__init__()
        words = nn.Embedding(config.num_embeddings, config.d_model)
        self.embeddings = nn.ModuleDict({"word_embeddings": words})
        self.layers = nn.ModuleList(HyenaDNABlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, x_BLD: Tensor, take: Callable[[Tensor], object]) -> Tensor:
        """Run the blocks; ``take`` gets the residual stream before and after each."""
        take(x_BLD)
        # float32 as in the published code: in bfloat16 a sum over many blocks would lose small steps
        if x_BLD.dtype in (torch.bfloat16, torch.float16):
            x_BLD = x_BLD.float()
        for layer in self.layers:
            x_BLD = layer(x_BLD)
            take(x_BLD)
        return self.ln_f(x_BLD.to(self.ln_f.weight.dtype))


class HyenaDNAPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the family, and initialization."""

    config_class = HyenaDNAConfig
    config: HyenaDNAConfig
    base_model_prefix = "hyena"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["HyenaDNABlock"]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["filter_fn"]
    # torch's own files have the shared frequencies once for each layer
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"implicit_filter\.\d+\.freq$"]
    final_layer_path = "backbone.ln_f"

    @property
    def is_causal_by_construction(self) -> bool:
        """Whether no position sees a later one: with more than three taps, the short filter does."""
        return self.config.short_filter_order <= 3

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of tokens."""
        module: nn.Module = self.base_model.backbone.embeddings["word_embeddings"]
        return module

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of tokens."""
        self.base_model.backbone.embeddings["word_embeddings"] = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d)):
            init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, HyenaSin) and hasattr(module, "freq"):
            init.constant_(module.freq, module.initial)
        elif isinstance(module, ImplicitFilter):
            init.normal_(module.bias)
        elif isinstance(module, HyenaPositions):
            z, t = position_features(module.z.shape[1], module.z.shape[2])
            init.copy_(module.z, z)
            init.copy_(module.t, t)
        elif isinstance(module, HyenaModulation):
            # channels fade to a hundredth within 0.3 to 1.5 times the context
            slow, fast = math.log(1e-2) / 1.5, math.log(1e-2) / 0.3
            init.copy_(module.deltas, torch.linspace(slow, fast, module.deltas.shape[2])[None, None])


def position_features(length: int, num: int) -> tuple[Tensor, Tensor]:
    """Compute what new models start with: time from 0 to 1 and ``(num - 1) / 2`` waves over the context."""
    t = torch.linspace(0, 1, length)[None, :, None]
    bands = (num - 1) // 2
    turns = 2 * math.pi * torch.arange(length, dtype=torch.float32)[None, :, None] / length
    angles = torch.linspace(1e-4, bands - 1, bands)[None, None] * turns
    return torch.cat((t, angles.cos(), -angles.sin()), dim=-1), t


class HyenaDNAModel(HyenaDNAPreTrainedModel):
    """HyenaDNA without a head.

    Args:
        config: Shape of the model.
    """

    def __init__(self, config: HyenaDNAConfig) -> None:
        super().__init__(config)
        self.backbone = HyenaBackbone(config)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """Run the blocks.

        Args:
            input_ids: Token ids. int64, shape ``(B, L)``.
            inputs_embeds: Embedded tokens instead of ids. Floating, shape ``(B, L, D)``.
            output_hidden_states: Whether to return the residual stream before each block and after the last,
                and the normed end: ``n_layer + 2`` tensors. None asks the configuration.
            **others: An ``attention_mask`` must mark no padding before a token: it would be seen. Padding on
                the right changes nothing and needs no mask. Other arguments do nothing.

        Returns:
            ``last_hidden_state`` (after the last norm), shape ``(B, L, D)``; ``hidden_states`` if requested.

        Raises:
            ShapeError: If not exactly one of ``input_ids`` and ``inputs_embeds`` is given, if there are more
                than ``max_seq_len`` tokens, or padding on the left.
        """
        x_BLD = embed_inputs(self.get_input_embeddings(), input_ids, inputs_embeds)
        if x_BLD.shape[1] > self.config.max_seq_len:
            message = (
                f"input has {x_BLD.shape[1]} tokens, expected at most {self.config.max_seq_len}, for the "
                "filters know no later position (max_seq_len); cut it into windows"
            )
            raise ShapeError(message)
        mask_BL = others.get("attention_mask")
        if mask_BL is not None and bool((mask_BL[:, 1:] > mask_BL[:, :-1]).any()):
            message = (
                "attention_mask marks padding before a token, which would be read as bases; pad on the right "
                "(tokenizer.padding_side = 'right')"
            )
            raise ShapeError(message)
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        streams: list[Tensor] = []
        x_BLD = self.backbone(x_BLD, streams.append if output_hidden_states else id)
        output = BaseModelOutputWithPast(
            last_hidden_state=x_BLD, hidden_states=(*streams, x_BLD) if output_hidden_states else None
        )
        return output


class HyenaDNAForCausalLM(HyenaDNAPreTrainedModel, GenerationMixin):
    """HyenaDNA with next-token logits.

    Args:
        config: Shape of the model.
    """

    def __init__(self, config: HyenaDNAConfig) -> None:
        super().__init__(config)
        self.hyena = HyenaDNAModel(config)
        self.lm_head = nn.Linear(config.d_model, config.num_embeddings, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Score the next token at every position.

        Args:
            input_ids: Token ids. int64, shape ``(B, L)``.
            inputs_embeds: Embedded tokens instead of ids. Floating, shape ``(B, L, D)``.
            labels: Aligned with the input (the loss shifts them); -100 takes no part. int64, ``(B, L)``.
            output_hidden_states: Whether to return the residual streams; None asks the configuration.
            logits_to_keep: Score only this many last positions; 0 scores all.
            num_items_in_batch: Divide the summed loss by this instead of by the labels counted here.
            **others: As in :meth:`HyenaDNAModel.forward`.

        Returns:
            ``logits`` in float32, shape ``(B, L, V)``, ``loss`` in nats where labels are given, and
            ``hidden_states`` if requested.

        Raises:
            ShapeError: As in :meth:`HyenaDNAModel.forward`.
        """
        found = self.hyena(
            input_ids, inputs_embeds, output_hidden_states=output_hidden_states, return_dict=True, **others
        )
        logits = self.lm_head(found.last_hidden_state[:, -logits_to_keep:]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch
            )
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=found.hidden_states)
        return output

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **_: object,
    ) -> dict[str, Any]:
        """Pass the whole sequence at each step of ``generate``, which keeps no state, whatever it is told.

        Args:
            input_ids: The sequences so far; behind an embedded prompt, what came after it. int64, ``(B, L)``.
            attention_mask: 1 where a token is real.
            inputs_embeds: Embedded prompt.

        Returns:
            Arguments of :meth:`forward`.
        """
        if inputs_embeds is None:
            return {"input_ids": input_ids, "attention_mask": attention_mask}
        added = self.get_input_embeddings()(input_ids).to(inputs_embeds.dtype)
        return {"inputs_embeds": torch.cat((inputs_embeds, added), dim=1), "attention_mask": attention_mask}


class HyenaDNAForSequenceClassification(GenericForSequenceClassification, HyenaDNAPreTrainedModel):
    """HyenaDNA with a linear layer on the last token that is no padding."""

    # transformers.Trainer divides accumulated losses only if told that the model does not
    accepts_loss_kwargs = False
    base_model_prefix = "hyena"


class HyenaDNAForTokenClassification(GenericForTokenClassification, HyenaDNAPreTrainedModel):
    """HyenaDNA with a linear layer on each token."""

    accepts_loss_kwargs = False
    base_model_prefix = "hyena"


AUTO_CLASSES: dict[str, type[Any]] = {
    "AutoConfig": HyenaDNAConfig,
    "AutoModel": HyenaDNAModel,
    "AutoModelForCausalLM": HyenaDNAForCausalLM,
    "AutoModelForSequenceClassification": HyenaDNAForSequenceClassification,
    "AutoModelForTokenClassification": HyenaDNAForTokenClassification,
}
