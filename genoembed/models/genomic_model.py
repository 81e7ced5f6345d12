"""A loaded model as the other stages see it.

In: padded batches and module paths. Out: activations by module path, as far as the deepest one. Properties of
the model are computed on first access, some by running it on a few tokens.

B rows, L padded length, D hidden size.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from genoembed.contracts import ByteTokens
from genoembed.errors import LayerError, ModelError, ShapeError, foreign_code
from genoembed.models.behavior import (
    PaddingPolicy,
    Probe,
    context_length,
    evaluating,
    forward_arguments,
    padding_policy,
)
from genoembed.models.layers import FINAL, LayerSpec, as_rows, capture, list_layers, resolve_layers
from genoembed.models.provenance import (
    CONFIG,
    WEIGHTS,
    code_content,
    code_statement,
    config_digest,
    content_digest,
    folder_content,
    read_license,
    read_revision,
)
from genoembed.models.striped_hyena2.network import PlainStripedHyena2
from genoembed.models.striped_hyena2.state import iter_spans

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from genoembed.contracts import Batch, LayerInfo
    from genoembed.models.families import Family
    from genoembed.models.geneb import PublishedModel
    from genoembed.models.registry import Adapter, KnownModel
    from genoembed.models.striped_hyena2.shape import StripedHyena2Shape
    from genoembed.models.striped_hyena2.state import AttentionWindows


class GenomicModel:
    """A base model in eval mode, its tokenizer, and what other stages must know about it.

    Properties are computed on first access, some by running the model on a few tokens. StripedHyena 2 runs
    without transformers; `module` and `tokenizer` import it when they are asked for.

    Args:
        module: The base model (no language-model head), weights in place.
        tokenizer: Its Hugging Face tokenizer, or what stands for one.
        name: The name it was loaded by.
        location: Folder that holds its files, for the provenance; None for a model that was never on disk.
        entry: The registry's entry of the checkpoint, if it is in the registry.
        family: The published family that it belongs to, if one of ours.
        published: The model of the GENEB benchmark that it was named as, if it is one.
        adapter: What was merged into the weights of its folder, if it was loaded by the name of an adapter.
        untrained: Top-level modules whose weights the checkpoint does not hold; they cannot be captured.
        open_tokenizer: Opens the Hugging Face tokenizer, where something else stands for it.
    """

    def __init__(
        self,
        module: PreTrainedModel | PlainStripedHyena2,
        tokenizer: PreTrainedTokenizerBase | ByteTokens,
        *,
        name: str,
        location: Path | None = None,
        entry: KnownModel | None = None,
        family: Family | None = None,
        published: PublishedModel | None = None,
        adapter: Adapter | None = None,
        untrained: Iterable[str] = (),
        open_tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None,
    ) -> None:
        self.network: PreTrainedModel | PlainStripedHyena2 = module.eval()
        """What runs: `module`, or a plain network until that is asked for."""
        self.tokens = tokenizer
        """What says how bases are encoded: `tokenizer`, or what stands for it until that is asked for."""
        self._open_tokenizer = open_tokenizer
        self.name = name
        self.location = location
        self.entry = entry
        self.family = family
        self.published = published
        self.adapter = adapter
        self.untrained = tuple(untrained)
        self._as_loaded = None if location is None else self._state()

    @property
    def module(self) -> PreTrainedModel:
        """The base model as a model of transformers."""
        if isinstance(self.network, PlainStripedHyena2):
            from genoembed.models.striped_hyena2.modeling import StripedHyena2Model

            before = config_digest(self.network.config.to_dict())
            self.network = StripedHyena2Model.of_network(self.network, folder=str(self.location or ""))
            if self._as_loaded is not None and before == self._as_loaded[1]:
                # the same settings, and those that transformers adds
                self._as_loaded = (self._as_loaded[0], config_digest(self.network.config.to_dict()))
            self.__dict__.pop("_probe", None)
        return self.network

    @module.setter
    def module(self, module: PreTrainedModel) -> None:
        self.network = module

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The Hugging Face tokenizer."""
        if isinstance(self.tokens, ByteTokens):
            assert self._open_tokenizer is not None
            self.tokens = self._open_tokenizer()
        return self.tokens

    @property
    def class_name(self) -> str:
        """Name of the model's class in transformers."""
        return getattr(self.network, "pretrained_name", type(self.network).__name__)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer's class."""
        return "CharTokenizer" if isinstance(self.tokens, ByteTokens) else type(self.tokens).__name__

    @property
    def device(self) -> torch.device:
        """Where the inputs go: where the first weights are, or run, if these wait elsewhere till then."""
        first = next(self.network.parameters()).device
        return _execution_device(self.network) if first.type == "meta" else first

    @property
    def dtype(self) -> torch.dtype:
        """Type of the activations."""
        return next(values.dtype for values in self.network.parameters() if values.is_floating_point())

    @property
    def fp8(self) -> str | None:
        """How FP8 projections run: ``native``, ``emulated`` or ``off``; None for a model without them."""
        form: str | None = getattr(self.network, "fp8_form", None)
        return form

    @property
    def fp8_numbers(self) -> str:
        """Whether numbers are those of FP8, ``on`` or ``off``: hardware and emulation give the same."""
        return "off" if self.fp8 in (None, "off") else "on"

    @cached_property
    def max_length(self) -> int | None:
        """Longest input in tokens, special tokens included; None where there is no stated limit."""
        return context_length(self.network, self.tokens)

    @cached_property
    def is_causal(self) -> bool:
        """Whether no token sees a later one."""
        with foreign_code(f"a trial pass of model {self.name!r}"):
            return self._probe.is_causal()

    @cached_property
    def accepts_attention_mask(self) -> bool:
        """Whether the model takes an attention mask and honours it."""
        with foreign_code(f"a trial pass of model {self.name!r}"):
            return self._probe.accepts_attention_mask()

    @property
    def special_tokens(self) -> bool:
        """Whether sequences are embedded with the special tokens that the tokenizer adds."""
        return self.family is None or self.family.special_tokens

    @property
    def padding(self) -> PaddingPolicy:
        """How sequences of different lengths may share a batch."""
        return padding_policy(accepts_attention_mask=self.accepts_attention_mask, is_causal=self.is_causal)

    @cached_property
    def layers(self) -> tuple[LayerInfo, ...]:
        """Every module that can be captured, in the model's order."""
        return tuple(info for info in list_layers(self.network) if not self._is_untrained(info.path))

    @property
    def content(self) -> dict[str, str]:
        """Digest of each thing that outputs depend on, by name of the file; of what is in memory now.

        A model whose weights or configuration were changed after it was loaded is another one than its
        folder.
        """
        if self.location is None:
            parts = _memory_content(self.network, self.network.config, self.tokenizer)
        else:
            parts = dict(self._folder_content)
            checksum, config = self._state()
            assert self._as_loaded is not None
            if checksum != self._as_loaded[0]:
                parts[WEIGHTS] = _parameters_digest(self.network)
            if config != self._as_loaded[1]:
                parts[CONFIG] = config
        return parts | code_content(self.network, self.tokens)

    @cached_property
    def _folder_content(self) -> dict[str, str]:
        assert self.location is not None
        files = getattr(self.tokens, "vocab_files_names", {})
        content = folder_content(self.location, more=files.values())
        return content if self.adapter is None else self.adapter.content(content)

    def _state(self) -> tuple[tuple[float, ...], str]:
        return _weights_checksum(self.network), config_digest(self.network.config.to_dict())

    def _dtypes(self) -> dict[str, int]:
        """Count the parameters of each type: models keep some in a type of their own, whatever is asked."""
        counts: dict[str, int] = {}
        for parameter in self.network.parameters():
            name = str(parameter.dtype).removeprefix("torch.")
            counts[name] = counts.get(name, 0) + parameter.numel()
        return counts

    def _stated_license(self) -> str:
        """Return what the registry, the folder's model card, or else the table of published models says."""
        if self.entry is not None:
            return self.entry.license
        stated = "unknown" if self.location is None else read_license(self.location)
        return self.published.license if stated == "unknown" and self.published is not None else stated

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What an output file says about the model; reads its files once, for their digests."""
        folder, content = self.location, self.content
        return {
            "id": self.name,
            "class": self.class_name,
            "checkpoint": self.entry.name if self.entry is not None else None,
            "revision": None if folder is None else read_revision(folder),
            "weights_sha256": content[WEIGHTS],
            "content_sha256": content_digest(content),
            "content": content,
            "license": self._stated_license(),
            "dtype": str(self.dtype).removeprefix("torch."),
            **({} if len(dtypes := self._dtypes()) < 2 else {"dtypes": dtypes}),
            "fp8": self.fp8,
            "device": str(self.device),
            "num_parameters": sum(values.numel() for values in self.network.parameters()),
            "max_length": self.max_length,
            "padding": self.padding,
            "is_causal": self.is_causal,
            "special_tokens": self.special_tokens,
            "accepts_attention_mask": self.accepts_attention_mask,
            **({} if self.published is None else {"published": _statement(self.published)}),
            **({} if self.adapter is None else {"adapter": self.adapter.statement}),
            **({} if (code := code_statement(self.network)) is None else {"code": code}),
        }

    def resolve(self, specs: LayerSpec | Sequence[LayerSpec]) -> tuple[LayerInfo, ...]:
        """Turn layer specs into module paths.

        Args:
            specs: Block numbers, module paths, globs, ``final`` or ``all``; one or several.

        Returns:
            The layers in the requested order, each once.

        Raises:
            LayerError: If a spec names nothing, or something whose weights the checkpoint does not hold.
        """
        asked = [specs] if isinstance(specs, (int, str)) else list(specs)
        final_path = self._final_path if FINAL in asked else None
        layers = resolve_layers(self.network, asked, final_path=final_path, name=self.name)
        for layer in layers:
            if self._is_untrained(layer.path):
                message = (
                    f"layer {layer.path!r} of {self.name}: the checkpoint holds no weights for it, so its "
                    "output would be random; name another layer"
                )
                raise LayerError(message, spec=layer.path)
        return layers

    @property
    def trial_ids(self) -> Tensor:
        """Some ordinary tokens, to see how the model behaves. int64, shape ``(L,)``."""
        return self._probe.ids

    @property
    def carries_state(self) -> bool:
        """Whether a sequence may run in blocks, each going on from the state that the one before has left."""
        return bool(getattr(self.network, "carries_state", False))

    def forward(
        self,
        batch: Batch,
        layers: Sequence[str],
        reduce: Callable[[str, Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Run one batch as far as the deepest requested layer.

        Args:
            batch: Padded rows; moved to the model's device.
            layers: Module paths, as `resolve` gives them.
            reduce: Called with each path and its activations, ``(B, L, D)`` in the model's dtype, as soon as
                they are there; what it returns is kept instead.

        Returns:
            One tensor per path, in the order of ``layers``.

        Raises:
            ShapeError: If rows are padded for a model that takes equal lengths only.
            LayerError: If a layer does not run, or gives something else than one vector per token.
        """
        if self.padding == "equal" and not bool(batch.attention_mask.all()):
            message = (
                f"batch: rows of different lengths, but {self.name} sees padding (it is neither causal nor "
                "takes a mask); put only rows of one length into a batch"
            )
            raise ShapeError(message)
        mask_BL = batch.attention_mask.to(self.device)
        arguments = forward_arguments(self.network, mask_BL if self.accepts_attention_mask else None)

        def take(path: str, activations: Tensor) -> Tensor:
            rows_BLD = as_rows(activations, mask_BL, path=path)
            return rows_BLD if reduce is None else reduce(path, rows_BLD)

        with (
            torch.inference_mode(),
            evaluating(self.network),
            capture(self.network, layers, reduce=take) as outputs,
        ):
            self.network(batch.input_ids.to(self.device), **arguments)
        return outputs

    def forward_in_blocks(
        self,
        batch: Batch,
        layers: Sequence[str],
        take: Callable[[str, Tensor, slice], None],
        *,
        block_tokens: int,
        windows: AttentionWindows | None = None,
    ) -> None:
        """Run one batch block by block of its positions, so that memory holds the activations of one block.

        Args:
            batch: Padded rows; moved to the model's device.
            layers: Module paths, as `resolve` gives them.
            take: Called with each path, its activations of a block, ``(B, C, D)`` in the model's dtype, and
                the block's positions, as soon as they are there; from left to right.
            block_tokens: Positions of a block at most.
            windows: What attention sees of the positions before; None is all.

        Raises:
            ModelError: If the model carries no state from block to block.
            LayerError: If a layer does not run, or gives something else than one vector per token.
        """
        if not self.carries_state:
            message = f"{self.name} carries no state from block to block; set window to cut long sequences"
            raise ModelError(message)
        mask_BL = batch.attention_mask.to(self.device)
        state = self.network.new_cache(windows)
        spans = iter_spans(batch.input_ids.shape[1], block=block_tokens, windows=windows)
        with torch.inference_mode(), evaluating(self.network):
            for span in spans:

                def keep_none(path: str, activations: Tensor, span: slice = span) -> Tensor:
                    take(path, as_rows(activations, mask_BL[:, span], path=path), span)
                    return activations[:0]

                # with windows, padding is on the right only, where no token sees it
                seen_BL = mask_BL[:, : span.stop] if windows is None else None
                arguments = forward_arguments(self.network, seen_BL)
                with capture(self.network, layers, reduce=keep_none):
                    self.network(batch.input_ids[:, span].to(self.device), past_key_values=state, **arguments)

    @cached_property
    def _probe(self) -> Probe:
        return Probe(
            self.network,
            special_ids=self.tokens.all_special_ids,
            pad_token_id=self.tokens.pad_token_id,
        )

    @cached_property
    def _final_path(self) -> str | None:
        with foreign_code(f"a trial pass of model {self.name!r}"):
            return self._probe.final_path()

    def _is_untrained(self, path: str) -> bool:
        return path.partition(".")[0] in self.untrained


def _statement(published: PublishedModel) -> dict[str, Any]:
    """State which published model it is, and how the GENEB benchmark makes its vectors."""
    return {
        "name": published.title,
        "repository": published.repo_id,
        "revision_of_known_answers": published.revision,
        "geneb": published.rules,
    }


def _execution_device(module: nn.Module) -> torch.device:
    """Find where a module runs whose weights accelerate fetches when they are needed."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    found = next((device for device in devices if device is not None), "cpu")
    return torch.device(found)


def _parameters_digest(module: nn.Module) -> str:
    """Compute one SHA-256 for the weights of a model in memory, for one that came from no folder."""
    digest = hashlib.sha256()
    for name, values in sorted(module.state_dict().items()):
        if isinstance(values, torch.Tensor):
            digest.update(f"{name} {values.dtype} {tuple(values.shape)};".encode())
            digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _memory_content(
    module: nn.Module, config: PreTrainedConfig | StripedHyena2Shape, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    """Compute the digests for a model that came from no folder."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words: Any = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    told = json.dumps([type(tokenizer).__name__, words, tokenizer.all_special_ids], default=str)
    return {
        WEIGHTS: _parameters_digest(module),
        CONFIG: config_digest(config.to_dict()),
        "tokenizer": hashlib.sha256(told.encode()).hexdigest(),
    }


def _weights_checksum(module: nn.Module) -> tuple[float, ...]:
    """Sum up each tensor, to notice quickly whether weights were changed in memory."""
    with torch.inference_mode():
        return tuple(
            float(values.sum(dtype=torch.float64 if values.device.type == "cpu" else torch.float32))
            for _, values in sorted(module.state_dict().items())
            if isinstance(values, torch.Tensor) and values.device.type != "meta"
        )
