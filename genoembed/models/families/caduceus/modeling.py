"""Caduceus in plain torch, as transformers models; names of modules are those of the published weights.

B rows, L positions, D hidden size, E inner channels, N states of a channel, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GenericForTokenClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple, logging

from genoembed.contracts import embed_inputs
from genoembed.errors import ConfigError
from genoembed.models.families.caduceus.configuration import CaduceusConfig
from genoembed.models.families.caduceus.scan import selective_scan

logger = logging.get_logger(__name__)


class CaduceusStepLinear(nn.Linear):
    """The linear layer of the step sizes, in float32: rounded to bfloat16, they would be off by a percent."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias)


class CaduceusConvolution(nn.Conv1d):
    """Weighs each position and those before it (from right to left: behind it), channels last."""

    def forward(self, x_BLE: Tensor, reverse: bool) -> Tensor:  # type: ignore[override]
        taps_KE = self.weight[:, 0].t()
        before = len(taps_KE) - 1
        padded = F.pad(x_BLE, (0, 0, 0, before) if reverse else (0, 0, before, 0))
        if reverse:
            taps_KE = taps_KE.flip(0)
        y_BLE = padded[:, : x_BLE.shape[1]] * taps_KE[0]
        for shift in range(1, len(taps_KE)):
            y_BLE.addcmul_(padded[:, shift : shift + x_BLE.shape[1]], taps_KE[shift])
        return y_BLE if self.bias is None else y_BLE.add_(self.bias)


class CaduceusMixer(nn.Module):
    """Mamba in one direction; from right to left, it gives each position its output just the same."""

    def __init__(self, config: CaduceusConfig, *, reverse: bool) -> None:
        super().__init__()
        inner, bias = config.inner_size, config.mamba("bias")
        self.sizes = (config.mamba("dt_rank"), config.mamba("d_state"), config.mamba("d_state"))
        self.reverse = reverse
        self.in_proj = nn.Linear(config.d_model, 2 * inner, bias=bias)
        self.conv1d = CaduceusConvolution(
            inner, inner, config.mamba("d_conv"), groups=inner, bias=config.mamba("conv_bias")
        )
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = CaduceusStepLinear(self.sizes[0], inner)
        self.A_log = nn.Parameter(torch.empty(inner, config.mamba("d_state")))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, config.d_model, bias=bias)

    def forward(self, projected: Tensor) -> Tensor:
        """Mix what an input projection gives; the output projection is for the caller."""
        inner_BLE, gate_BLE = projected.chunk(2, dim=-1)
        u_BLE = F.silu(self.conv1d(inner_BLE, self.reverse))
        low, B_BLN, C_BLN = self.x_proj(u_BLE).split(self.sizes, dim=-1)
        # both in float32, also where the caller computes in another type
        with torch.autocast(projected.device.type, enabled=False):
            raw_step_BLE = self.dt_proj(low)
            A_NE = -self.A_log.float().exp().t()
            return selective_scan(
                u_BLE, raw_step_BLE, gate_BLE, A_NE, B_BLN, C_BLN, self.D, reverse=self.reverse
            )


class CaduceusBothDirections(nn.Module):
    """A mixer from left to right and, if the model has one, another from right to left.

    Where the two share projections, those of the first run for both: an adapter on them acts on both
    directions, so that merging it into the one weight changes nothing.
    """

    def __init__(self, config: CaduceusConfig) -> None:
        super().__init__()
        self.multiplies = config.bidirectional_strategy == "ew_multiply"
        self.mamba_fwd = CaduceusMixer(config, reverse=False)
        self.mamba_rev = CaduceusMixer(config, reverse=True) if config.bidirectional else None

    def forward(self, x_BLD: Tensor) -> Tensor:
        fwd, rev = self.mamba_fwd, self.mamba_rev
        projected = fwd.in_proj(x_BLD)
        forward_BLD = fwd.out_proj(fwd(projected))
        if rev is None:
            return forward_BLD
        if rev.in_proj.weight is not fwd.in_proj.weight:
            projected = rev.in_proj(x_BLD)
        is_tied = rev.out_proj.weight is fwd.out_proj.weight
        reverse_BLD = (fwd if is_tied else rev).out_proj(rev(projected))
        return forward_BLD * reverse_BLD if self.multiplies else forward_BLD + reverse_BLD


class CaduceusBothStrands(nn.Module):
    """The same mixers on each strand, read in its own direction."""

    def __init__(self, submodule: nn.Module) -> None:
        super().__init__()
        self.submodule = submodule

    def forward(self, x_BLD: Tensor) -> Tensor:
        first, second = x_BLD.chunk(2, dim=-1)
        both = self.submodule(torch.cat((first, second.flip(1, 2))))
        first, second = both.chunk(2)
        return torch.cat((first, second.flip(1, 2)), dim=-1)


class CaduceusAffine(nn.Module):
    """The weights of a norm."""

    bias: nn.Parameter | None

    def __init__(self, width: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_parameter("bias", nn.Parameter(torch.zeros(width)) if bias else None)

    def forward(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias


class CaduceusNorm(CaduceusAffine):
    """Add to the residual stream and norm each strand of it; returns both."""

    def __init__(self, config: CaduceusConfig, *, swaps: bool) -> None:
        if config.rcps and not config.fused_add_norm:
            nn.Module.__init__(self)
            self.submodule = CaduceusAffine(config.d_model, bias=not config.rms_norm)
        else:
            super().__init__(config.d_model, bias=not config.rms_norm)
        self.config = config
        self.swaps = swaps and config.rcps and config.fused_add_norm
        self.output_width = config.hidden_size

    def forward(  # type: ignore[override]
        self, hidden_BLD: Tensor, residual_BLD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        width = self.config.d_model
        total_BLD = hidden_BLD.float() if residual_BLD is None else hidden_BLD.float() + residual_BLD.float()
        if self.swaps:
            total_BLD = total_BLD.roll(width, dims=-1)
        # called, not read: weights that wait elsewhere are fetched for a call
        weight, bias = self.submodule() if hasattr(self, "submodule") else super().forward()
        strands = total_BLD.unflatten(-1, (-1, width))
        centered = strands if self.config.rms_norm else strands - strands.mean(-1, keepdim=True)
        normed = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + self.config.norm_epsilon)
        normed_BLD = normed.flatten(-2) * self._by_strand(weight)
        if bias is not None:
            normed_BLD = normed_BLD + self._by_strand(bias)
        dtype = torch.float32 if self.config.residual_in_fp32 else hidden_BLD.dtype
        return normed_BLD.to(hidden_BLD.dtype), total_BLD.to(dtype)

    def _by_strand(self, weights: Tensor) -> Tensor:
        """Lay out weights for the halves; the channels of the second are reversed."""
        row = weights.float()
        return torch.cat((row, row.flip(0))) if self.config.rcps else row


class CaduceusBlock(GradientCheckpointingLayer):
    """Add, norm, mix: returns what the mixer gives, and the stream before that is added."""

    def __init__(self, config: CaduceusConfig) -> None:
        super().__init__()
        mixer: nn.Module = CaduceusBothDirections(config)
        self.mixer = CaduceusBothStrands(mixer) if config.rcps else mixer
        self.norm = CaduceusNorm(config, swaps=True)

    def forward(self, hidden_BLD: Tensor, residual_BLD: Tensor | None) -> tuple[Tensor, Tensor]:
        normed_BLD, residual_BLD = self.norm(hidden_BLD, residual_BLD)
        return self.mixer(normed_BLD), residual_BLD


class CaduceusStrandEmbedding(nn.Module):
    """Embedding of each token and of its complement, with the channels of the latter reversed."""

    complement_map: Tensor

    def __init__(self, config: CaduceusConfig) -> None:
        super().__init__()
        self.register_buffer("complement_map", torch.arange(config.vocab_size))
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.output_width = config.hidden_size

    @property
    def weight(self) -> Tensor:
        """The embedding's weights, of one strand."""
        return self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        first, second = self.embedding(torch.stack((input_ids, self.complement_map[input_ids])))
        return torch.cat((first, second.flip(-1)), dim=-1)


class CaduceusEmbeddings(nn.Module):
    """Holds the embedding under its published name."""

    def __init__(self, config: CaduceusConfig) -> None:
        super().__init__()
        self.word_embeddings: nn.Module = (
            CaduceusStrandEmbedding(config)
            if config.rcps
            else nn.Embedding(config.vocab_size, config.d_model)
        )
        self.output_width = config.hidden_size

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.word_embeddings(input_ids)


class CaduceusBackbone(nn.Module):
    """Embedding, blocks and final norm; returns the final states, and those before each block."""

    def __init__(self, config: CaduceusConfig) -> None:
        super().__init__()
        self.embeddings = CaduceusEmbeddings(config)
        self.layers = nn.ModuleList(CaduceusBlock(config) for _ in range(config.n_layer))
        self.norm_f = CaduceusNorm(config, swaps=False)

    def forward(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        hidden_BLD = embed_inputs(self.embeddings, input_ids, inputs_embeds)
        before, residual_BLD = [], None
        for layer in self.layers:
            before.append(hidden_BLD)
            hidden_BLD, residual_BLD = layer(hidden_BLD, residual_BLD)
        return self.norm_f(hidden_BLD, residual_BLD)[0], before


class CaduceusStrandHead(nn.Module):
    """Logits from both strands, each with its own letters."""

    def __init__(self, config: CaduceusConfig) -> None:
        super().__init__()
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    @property
    def weight(self) -> Tensor:
        """The head's weights, of one strand."""
        return self.lm_head.weight

    def forward(self, hidden_BLD: Tensor, complement_map: Tensor) -> Tensor:
        first, second = hidden_BLD.chunk(2, dim=-1)
        return self.lm_head(first) + self.lm_head(second.flip(-1))[..., complement_map]


_EMBEDDING = "caduceus.backbone.embeddings.word_embeddings"
"""Path of the embedding in a model with a head."""


class CaduceusPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the family: ties, initialization."""

    config_class = CaduceusConfig
    base_model_prefix = "caduceus"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["CaduceusBlock"]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["A_log", "D"]
    # the head takes the embedding's; the embedding's own follows from the configuration where a file lacks it
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"lm_head\.complement_map$"]
    _keys_to_ignore_on_load_missing: ClassVar[list[str]] = [r"complement_map$"]

    def post_init(self) -> None:
        """Name the tied weights, initialize and tie."""
        tied = {}
        if self.config.bidirectional and self.config.bidirectional_weight_tie:
            for name, module in self.named_modules():
                if isinstance(module, CaduceusBothDirections):
                    for path, _ in module.mamba_fwd.named_parameters():
                        if path.startswith(("in_proj.", "out_proj.")):
                            tied[f"{name}.mamba_rev.{path}"] = f"{name}.mamba_fwd.{path}"
        if hasattr(self, "lm_head") and self.config.rcps:
            tied["lm_head.lm_head.weight"] = f"{_EMBEDDING}.embedding.weight"
        elif hasattr(self, "lm_head") and self.config.tie_word_embeddings:
            tied["lm_head.weight"] = f"{_EMBEDDING}.weight"
        self._tied_weights_keys = tied
        super().post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Map each tied weight to the one that it is.

        Files lack the tied ones, and transformers ties what this says after it has loaded the others. The
        base method would say nothing where ``tie_word_embeddings`` is false, which is about the head alone.
        """
        return dict(self._tied_weights_keys)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding; it has a ``weight`` whatever its kind."""
        return self.base_model.backbone.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.base_model.backbone.embeddings.word_embeddings = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Change the vocabulary of a model of one strand."""
        if self.config.rcps:
            message = "the vocabulary of a model with rcps is fixed: it holds the complement of each token"
            raise NotImplementedError(message)
        return super().resize_token_embeddings(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        config = self.config
        if isinstance(module, CaduceusStepLinear):
            self._init_steps(module)
        elif isinstance(module, nn.Linear | nn.Conv1d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=config.initializer("initializer_range"))
        elif isinstance(module, CaduceusAffine) and hasattr(module, "weight"):
            init.ones_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, CaduceusStrandEmbedding):
            if config.complement_map is None:
                if getattr(module.complement_map, "_is_hf_initialized", False):
                    return
                message = "rcps needs complement_map, the id of the complement of each token"
                raise ConfigError(message)
            init.copy_(module.complement_map, torch.tensor(list(config.complement_map.values())))
        elif isinstance(module, CaduceusMixer):
            states = torch.arange(1, module.A_log.shape[1] + 1, dtype=torch.float32)
            init.copy_(module.A_log, states.log().expand_as(module.A_log))
            init.ones_(module.D)
            if config.initializer("rescale_prenorm_residual"):
                # each block adds to the stream: they start smaller the more there are
                width = module.out_proj.in_features
                bound = (width * config.initializer("n_residuals_per_layer") * config.n_layer) ** -0.5
                init.uniform_(module.out_proj.weight, -bound, bound)

    def _init_steps(self, module: nn.Linear) -> None:
        """Begin with steps between ``dt_min`` and ``dt_max``, evenly on a logarithmic scale."""
        bound = module.in_features**-0.5 * self.config.mamba("dt_scale")
        if self.config.mamba("dt_init") == "constant":
            init.constant_(module.weight, bound)
        else:
            init.uniform_(module.weight, -bound, bound)
        low, high = math.log(self.config.mamba("dt_min")), math.log(self.config.mamba("dt_max"))
        step = torch.exp(torch.rand(module.out_features) * (high - low) + low)
        step = step.clamp(min=self.config.mamba("dt_init_floor"))
        init.copy_(module.bias, step + torch.log(-torch.expm1(-step)))  # the inverse of a softplus


class Caduceus(CaduceusPreTrainedModel):
    """Embedding, blocks and final norm.

    Args:
        config: Shape of the model.
    """

    final_layer_path = "backbone.norm_f"

    def __init__(self, config: CaduceusConfig) -> None:
        super().__init__(config)
        self.backbone = CaduceusBackbone(config)
        self.post_init()

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
            output_hidden_states: Whether to return the embedding, what each block but the last gives, and
                the final states; None asks the configuration. (Official code leaves out the final states of
                models without ``fused_add_norm``.)
            **kwargs: What heads and trainers pass to any model; a mask is not used, and warned about if it
                masks.

        Returns:
            ``last_hidden_state`` (after the final norm), shape ``(B, L, D)``; ``hidden_states`` if requested.

        Raises:
            ShapeError: If not exactly one of ``input_ids`` and ``inputs_embeds`` is given.
        """
        mask = kwargs.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            logger.warning_once(
                "Caduceus takes no attention mask and reads padding as sequence, which changes what all "
                "positions give; put sequences of one length into a batch"
            )
        hidden_BLD, before = self.backbone(input_ids, inputs_embeds)
        wants_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        states = (*before, hidden_BLD) if wants_states else None
        output = BaseModelOutput(last_hidden_state=hidden_BLD, hidden_states=states)
        return output


class CaduceusForMaskedLM(CaduceusPreTrainedModel):
    """Caduceus with logits of masked tokens (a product with the embedding).

    Args:
        config: Shape of the model.
    """

    def __init__(self, config: CaduceusConfig) -> None:
        super().__init__(config)
        self.caduceus = Caduceus(config)
        self.lm_head: nn.Module = (
            CaduceusStrandHead(config)
            if config.rcps
            else nn.Linear(config.d_model, config.vocab_size, bias=False)
        )
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the head; it has a ``weight`` whatever its kind."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings

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
            output_hidden_states: As for :class:`Caduceus`.
            **kwargs: As for :class:`Caduceus`; ``num_items_in_batch`` divides the summed loss.

        Returns:
            ``logits`` of shape ``(B, L, V)`` in float32, ``loss`` where labels are given, ``hidden_states``
            if requested.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        output = self.caduceus(
            input_ids, inputs_embeds, output_hidden_states=output_hidden_states, return_dict=True, **kwargs
        )
        if self.config.rcps:
            embedding = self.caduceus.backbone.embeddings.word_embeddings
            logits = self.lm_head(output.last_hidden_state, embedding.complement_map)
        else:
            logits = self.lm_head(output.last_hidden_state)
        logits = logits.float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items)
        output = MaskedLMOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)
        return output


class CaduceusForSequenceClassification(CaduceusPreTrainedModel):
    """Caduceus with a class of each sequence, from the mean of its states.

    With ``rcps`` the scores of both strands are averaged, so that a sequence and its reverse complement get
    the same.

    Args:
        config: Shape of the model, with ``num_labels`` and ``problem_type``.
    """

    # transformers.Trainer divides accumulated losses only if told that the model does not
    accepts_loss_kwargs = False

    def __init__(self, config: CaduceusConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.caduceus = Caduceus(config)
        self.score = nn.Linear(config.d_model, config.num_labels, bias=False)
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
            output_hidden_states: As for :class:`Caduceus`.
            **kwargs: As for :class:`Caduceus`.

        Returns:
            ``logits`` of shape ``(B, num_labels)``, ``loss`` where labels are given, ``hidden_states`` if
            requested.
        """
        kwargs.pop("num_items_in_batch", None)
        output = self.caduceus(
            input_ids, inputs_embeds, output_hidden_states=output_hidden_states, return_dict=True, **kwargs
        )
        pooled_BD = output.last_hidden_state.mean(dim=1)
        if self.config.rcps:
            first, second = pooled_BD.chunk(2, dim=-1)
            logits = (self.score(first) + self.score(second.flip(-1))) / 2
        else:
            logits = self.score(pooled_BD)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)
        return output


class CaduceusForTokenClassification(GenericForTokenClassification, CaduceusPreTrainedModel):
    """Caduceus with a class of each token."""

    accepts_loss_kwargs = False
    base_model_prefix = "caduceus"
