"""The encoder that is fine-tuned: a model cut at a layer, pooling, and fusion of several layers.

In: padded batches. Out: pooled vectors or hidden states, with gradient. Promised: blocks behind the deepest
layer never run; pooling and fusion are those of ``extract``, so a saved encoder embeds as it was trained.
From a saved folder: the encoder that was trained, and the weights of its heads.

B rows, L padded length, D hidden size, K layers.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from genoembed.config.finetune import EncoderConfig
from genoembed.errors import CheckpointError, ConfigError, LayerError, foreign_code
from genoembed.models.behavior import forward_arguments
from genoembed.models.layers import FINAL, as_rows, capture
from genoembed.models.trained_folder import HEADS_FILE, read_heads
from genoembed.pooling.fuse import fuse
from genoembed.pooling.reduce import check_pooling, pool, pooled_width
from genoembed.tokenization.hf import build_encoder
from genoembed.training.tuning import Tuned, set_up_tuning

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from genoembed.config.choices import Fusion, TokenPooling
    from genoembed.contracts import EncodedSequence
    from genoembed.models.behavior import PaddingPolicy
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.models.trained_folder import FinetunedFacts


Want: TypeAlias = Literal["loss", "layers", "hidden", "predict"]
"""What a forward pass of a model around an encoder gives."""

_PROBE = b"ACGT" * 6
"""Shows widths, and what runs and learns: a few tokens of any tokenizer, 6-mers too."""


class LayerEncoder(nn.Module):
    """How the layers of a model become vectors, and the passes that give them."""

    backbone: nn.Module
    """Set by the subclass: its own module, or one that another module holds."""
    fusion_logits: nn.Parameter | None

    def __init__(
        self,
        layers: tuple[str, ...],
        *,
        pooling: TokenPooling,
        fusion: Fusion,
        padding: PaddingPolicy,
        takes_mask: bool,
        weights: tuple[float, ...] = (),
    ) -> None:
        super().__init__()
        self.weights = weights
        """Of the layers, for ``weighted``, where they are not learned."""
        self.layers, self.pooling, self.fusion = layers, pooling, fusion
        self.padding, self.takes_mask = padding, takes_mask
        self.register_parameter("fusion_logits", None)

    @property
    def is_frozen(self) -> bool:
        """Whether nothing of the backbone learns."""
        return not any(parameter.requires_grad for parameter in self.backbone.parameters())

    def pooled_layers(
        self, input_ids: Tensor, attention_mask: Tensor, pool_mask: Tensor
    ) -> dict[str, Tensor]:
        """Pool each layer."""

        def reduce(hidden_BLD: Tensor) -> Tensor:
            return pool(hidden_BLD, pool_mask, method=self.pooling, attention_mask_BL=attention_mask)

        return self._run(input_ids, attention_mask, reduce)

    def fuse(self, layers: Mapping[str, Tensor]) -> Tensor:
        """Make one vector of those of several layers."""
        values = list(layers.values())
        if len(values) == 1:
            return values[0]
        if self.fusion_logits is not None:
            weights_K = torch.softmax(self.fusion_logits, dim=0)
            stacked = torch.stack(values, dim=-1)
            return (stacked.to(torch.promote_types(stacked.dtype, weights_K.dtype)) * weights_K).sum(dim=-1)
        flat = {path: value.flatten(end_dim=-2) for path, value in layers.items()}
        (fused,) = fuse(flat, method=self.fusion, weights=self.weights or None).values()
        return fused.unflatten(0, values[0].shape[:-1])

    def pooled(self, input_ids: Tensor, attention_mask: Tensor, pool_mask: Tensor) -> Tensor:
        """Return one vector per row: the layers of :meth:`pooled_layers`, fused."""
        return self.fuse(self.pooled_layers(input_ids, attention_mask, pool_mask))

    def layer_states(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Return the hidden states of each layer, without a graph."""
        with torch.no_grad():
            return self._run(input_ids, attention_mask, Tensor.clone)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the fused hidden states."""
        keeps_graph = torch.is_grad_enabled() and not self.is_frozen

        def reduce(hidden_BLD: Tensor) -> Tensor:
            # without a graph a later block may write into what an earlier one gave
            return hidden_BLD if keeps_graph or len(self.layers) == 1 else hidden_BLD.clone()

        return self.fuse(self._run(input_ids, attention_mask, reduce))

    def _run(
        self, input_ids: Tensor, attention_mask: Tensor, reduce: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        if not self._sees_padding(attention_mask):
            return self._run_batch(input_ids, attention_mask, reduce)
        # the model would read padding as sequence: a pass for the rows of each length, without any
        is_real = attention_mask.bool()
        lengths = is_real.sum(dim=1)
        found: dict[str, Tensor] = {}
        for length in lengths.unique().tolist():
            here = is_real & (lengths == length)[:, None]
            ids = input_ids[here].view(-1, length)
            # cloned: without a graph a later block may write into what an earlier one gave
            for path, hidden in self._run_batch(ids, torch.ones_like(ids), Tensor.clone).items():
                rows = found.get(path)
                if rows is None:
                    rows = hidden.new_zeros(*is_real.shape, hidden.shape[-1])
                found[path] = rows.masked_scatter(here[..., None], hidden)
        return {path: reduce(hidden) for path, hidden in found.items()}

    def _run_batch(
        self, input_ids: Tensor, attention_mask: Tensor, reduce: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        arguments: dict[str, Any] = forward_arguments(
            self.backbone, attention_mask if self.takes_mask else None
        )

        def take(path: str, activations: Tensor) -> Tensor:
            return reduce(as_rows(activations, attention_mask, path=path))

        # a graph of a frozen backbone would take memory, and nothing would flow through it
        with torch.no_grad() if self.is_frozen else nullcontext():
            with capture(self.backbone, self.layers, reduce=take) as outputs:
                self.backbone(input_ids, **arguments)
        return outputs

    def _sees_padding(self, attention_mask: Tensor) -> bool:
        if self.padding == "right":  # hidden by causality, unless it is before a token
            return bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any())
        return self.padding == "equal" and not bool(attention_mask.all())


class Encoder(LayerEncoder):
    """A backbone, where it is cut, and how its layers become vectors."""

    def __init__(
        self,
        model: GenomicModel,
        config: EncoderConfig,
        *,
        seed: int = 0,
        fusion_weights: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__(
            tuple(info.path for info in model.resolve(config.layers)),
            pooling=config.pooling,
            fusion=config.fusion,
            padding=model.padding,
            takes_mask=model.accepts_attention_mask,
        )
        self.backbone: nn.Module = model.module
        self.is_causal, self.name = model.is_causal, model.name
        self.special_tokens, self.max_tokens = model.special_tokens, model.max_length
        self.final_path: str | None = None
        """Module that returns the model's last hidden states; None where none does."""
        with suppress(LayerError):
            self.final_path = model.resolve(FINAL)[0].path
        self._check()
        if self.fusion == "weighted":
            # the softmax of logarithms gives the weights back; a weight of 0 would be -inf, and never learn
            start = torch.tensor(fusion_weights or (1.0,) * len(self.layers)).clamp(min=1e-12).log()
            self.fusion_logits = nn.Parameter(start)
        self.probe_batch = _probe(model)
        self.widths = self._find_widths()
        self.width = self._fused_width()
        self.tuned: Tuned = set_up_tuning(self.backbone, self._run_probe, config=config, seed=seed)

    @property
    def pooled_width(self) -> int:
        """Numbers of a vector; ``width`` is that of a state."""
        return pooled_width(self.width, self.pooling)

    @property
    def fusion_weights(self) -> tuple[float, ...]:
        """Weights of the layers, as ``extract`` takes them; empty unless they are learned."""
        if self.fusion_logits is None:
            return ()
        return tuple(torch.softmax(self.fusion_logits.detach().double(), dim=0).tolist())

    def train(self, mode: bool = True) -> Encoder:
        """Set the mode; a backbone that does not learn stays without dropout."""
        super().train(mode)
        if self.is_frozen:
            self.backbone.eval()
        return self

    def _check(self) -> None:
        check_pooling(self.pooling, is_causal=self.is_causal)
        several = len(self.layers) > 1
        if several == (self.fusion == "none"):
            message = (
                f"fusion is {self.fusion!r} for {len(self.layers)} layers ({', '.join(self.layers)}); "
                + (
                    "set fusion to 'concat', 'mean', 'max' or 'weighted'"
                    if several
                    else "set fusion to 'none'"
                )
            )
            raise ConfigError(message)

    def _run_probe(self) -> Tensor:
        device = next(self.backbone.parameters()).device
        ids, mask = (tensor.to(device) for tensor in self.probe_batch)
        found = self._run(ids, mask, lambda hidden: hidden.float())
        return torch.stack([value.square().mean() for value in found.values()])

    def _find_widths(self) -> dict[str, int]:
        device = next(self.backbone.parameters()).device
        ids, mask = (tensor.to(device) for tensor in self.probe_batch)
        self.backbone.eval()
        with torch.no_grad(), foreign_code("a trial pass of the model"):
            found = self._run(ids, mask, lambda hidden: hidden)
        return {path: int(value.shape[-1]) for path, value in found.items()}

    def _fused_width(self) -> int:
        flat = {path: torch.zeros(1, width) for path, width in self.widths.items()}
        weights = [1.0] * len(flat) if self.fusion == "weighted" else None
        return int(next(iter(fuse(flat, method=self.fusion, weights=weights).values())).shape[-1])


def _probe(model: GenomicModel) -> tuple[Tensor, Tensor]:
    encoder = build_encoder(model.tokenizer, add_special_tokens=model.special_tokens)
    limit = len(_PROBE) if model.max_length is None else min(len(_PROBE), encoder.max_bases(model.max_length))
    encoded: EncodedSequence = encoder.encode(_PROBE[:limit])
    ids = torch.from_numpy(np.array(encoded.input_ids, dtype=np.int64))[None]
    return ids, torch.ones_like(ids)


def load_encoder(facts: FinetunedFacts, genomic: GenomicModel) -> Encoder:
    """Cut and pool a model as it was fine-tuned."""
    config = EncoderConfig(
        model=genomic.name,
        layers=facts.layers,
        pooling=facts.pooling,  # type: ignore[arg-type]
        skip_first=facts.skip_first,
        fusion=facts.fusion,  # type: ignore[arg-type]
        tuning="frozen",
    )
    return Encoder(genomic, config, fusion_weights=facts.fusion_weights or None)


def load_heads(model: nn.Module, facts: FinetunedFacts) -> None:
    """Load saved weights into everything but the backbone."""
    saved = read_heads(facts.folder, pooler=facts.pooler)
    expected = {name for name in model.state_dict() if not name.startswith("encoder.backbone.")}
    # folders may hold class weights, which only the loss of training needs
    saved = {
        name: value for name, value in saved.items() if name in expected or not name.endswith("class_weights")
    }
    if set(saved) != expected:
        names = sorted(set(saved) ^ expected)
        message = f"weights {', '.join(names[:3])} are missing or have no place; fine-tune again"
        raise CheckpointError(message, path=str(facts.folder / HEADS_FILE))
    try:
        model.load_state_dict(saved, strict=False)
    except RuntimeError as error:
        message = f"weights have another shape ({str(error).splitlines()[-1].strip()}); fine-tune again"
        raise CheckpointError(message, path=str(facts.folder / HEADS_FILE)) from error
