"""Code of model folders that was written for transformers 4, run with transformers 5, once it is trusted.

In: nothing but the permission to run such code. Out: what transformers 5 has removed is there again for
classes of model folders, and for no other: names to import, methods, settings that every configuration had,
ties in the old words, and construction with values: tensors that a constructor computes would be lost, since
transformers 5 builds models without. What still fails is said with file and line, and who it was written for.

B rows, L positions, H heads, N layers.
"""

from __future__ import annotations

import importlib
import inspect
from contextlib import contextmanager
from functools import wraps
from importlib.metadata import version
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, pytorch_utils

from genoembed.errors import ForeignCodeError, GenoembedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

_REMOTE = "transformers_modules"
"""Package that transformers imports the code of model folders into."""
_AUTO_CLASSES: tuple[Any, ...] = (
    transformers.AutoModel,
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForMaskedLM,
    transformers.AutoModelForSequenceClassification,
    transformers.AutoModelForTokenClassification,
)
_SETTINGS: Mapping[str, Any] = {
    "add_cross_attention": False,
    "bos_token_id": None,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "eos_token_id": None,
    "finetuning_task": None,
    "is_decoder": False,
    "pad_token_id": None,
    "prefix": None,
    "pruned_heads": {},
    "sep_token_id": None,
    "task_specific_params": None,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
    "tokenizer_class": None,
    "torchscript": False,
    "use_bfloat16": False,
}
"""What every configuration had."""


def allow_old_code() -> None:
    """Give classes of model folders what transformers 4 had. Calling it again changes nothing."""
    for place, names in _NAMES.items():
        module = importlib.import_module(place)
        for name, found in names.items():
            if not hasattr(module, name):
                setattr(module, name, found)
    for base, adapt in ((PreTrainedModel, _adapt_model), (PreTrainedConfig, _adapt_config)):
        if not getattr(base.__init_subclass__, "adapts", False):
            _adapt_subclasses(base, adapt)


def fill_settings(config: PreTrainedConfig) -> None:
    """Give a configuration of transformers' own the settings that code of a model folder may ask for."""
    for name, value in _SETTINGS.items():
        if not hasattr(config, name):
            setattr(config, name, dict(value) if isinstance(value, dict) else value)


def forget_classes(config: PreTrainedConfig) -> None:
    """Have a folder take its own classes, not those of one whose configuration has the same code."""
    for auto in _AUTO_CLASSES:
        known = auto._model_mapping._extra_content
        if getattr(known.get(type(config)), "__module__", "").partition(".")[0] == _REMOTE:
            del known[type(config)]


@contextmanager
def named_failures(name: str, values: Mapping[str, Any]) -> Iterator[None]:
    """Say of what code of a model folder raises that it is that code, where, and what it was written for."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, GenoembedError) else error
        place = None if cause is None or _lacks_package(cause) else _remote_place(cause)
        if cause is None or place is None:
            raise
        path, line = place
        written = str(values.get("transformers_version") or "")
        text = " ".join(str(cause).split()) or "no more is said"
        whose = "this model's code"
        if written.startswith("4"):
            whose += " was written for transformers 4 and"
        problem = (
            f"model {name!r}: {whose} fails at {path}:{line} ({type(cause).__name__}: {text[:300]}), with "
            f"transformers {version('transformers')}; name a model that runs here without such code "
            "(published_models), or run this one where the transformers is installed that it was written for"
        )
        raise ForeignCodeError(problem, path=path, line=line) from cause


def _lacks_package(error: BaseException) -> bool:
    """Tell a package that is not installed from a part of transformers that is gone."""
    return isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("transformers")


def _remote_place(error: BaseException) -> tuple[str, int] | None:
    places = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    return next((place for place in reversed(places) if f"/{_REMOTE}/" in place[0].replace("\\", "/")), None)


# --- classes --------------------------------------------------------------------------------------


def _adapt_subclasses(base: type, adapt: Callable[[Any], None]) -> None:
    """Adapt each class of a model folder when it is defined."""
    original = base.__init_subclass__.__func__  # type: ignore[attr-defined]

    def define(cls: type, *arguments: Any, **options: Any) -> None:
        original(cls, *arguments, **options)
        if cls.__module__.partition(".")[0] == _REMOTE:
            adapt(cls)

    define.adapts = True  # type: ignore[attr-defined]
    base.__init_subclass__ = classmethod(define)  # type: ignore[assignment]


def _adapt_config(cls: type[PreTrainedConfig]) -> None:
    for name, value in _SETTINGS.items():
        if not hasattr(cls, name):
            setattr(cls, name, value)


def _adapt_model(cls: type[PreTrainedModel]) -> None:
    for name, method in _METHODS.items():
        if not hasattr(cls, name):
            setattr(cls, name, method)
    own = cls.__dict__
    if isinstance(own.get("_tied_weights_keys"), list | tuple):
        cls._tied_weights_keys = None
        if "tie_weights" not in own:
            cls.tie_weights = _tie_embeddings
    if "tie_weights" in own and "missing_keys" not in inspect.signature(own["tie_weights"]).parameters:
        cls.tie_weights = _with_new_arguments(own["tie_weights"])
    cls.all_tied_weights_keys = own.get("all_tied_weights_keys", {})  # set by post_init, which not all call
    cls.get_init_context = classmethod(_context_with_values)
    cls._move_missing_keys_from_meta_to_device = _keep_values


def _context_with_values(cls: type[PreTrainedModel], *arguments: Any, **options: Any) -> list[Any]:
    """Build a model on the CPU: on the meta device, what its constructor computes would be lost."""
    contexts = PreTrainedModel.get_init_context.__func__(cls, *arguments, **options)
    return [context for context in contexts if not isinstance(context, torch.device)]


def _keep_values(self: PreTrainedModel, *_arguments: Any, **_options: Any) -> None:
    """Leave weights that were not loaded, and buffers, as the constructor made them."""


def _with_new_arguments(tie: Callable[[Any], Any]) -> Callable[..., None]:
    """Let a ``tie_weights`` without arguments be called with those of transformers 5."""

    @wraps(tie)
    def tie_weights(
        self: PreTrainedModel, missing_keys: set[str] | None = None, recompute_mapping: bool = True
    ) -> None:
        tie(self)
        _forget_tied(self, missing_keys)

    return tie_weights


def _tie_embeddings(
    self: PreTrainedModel, missing_keys: set[str] | None = None, recompute_mapping: bool = True
) -> None:
    """Tie the output embeddings to the input embeddings, and what modules tie themselves."""
    if getattr(self.config, "tie_word_embeddings", True):
        outputs = self.get_output_embeddings()
        if outputs is not None:
            outputs.weight = self.get_input_embeddings().weight
    for module in self.modules():
        if hasattr(module, "_tie_weights"):
            module._tie_weights()
    _forget_tied(self, missing_keys)


def _forget_tied(model: nn.Module, missing_keys: set[str] | None) -> None:
    """Take names off the missing ones whose tensor was loaded under another name."""
    if not missing_keys:
        return
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for shared in names.values():
        if not missing_keys.issuperset(shared):
            missing_keys.difference_update(shared)


# --- names and methods that are gone --------------------------------------------------------------


def _find_pruneable_heads_and_indices(
    heads: list[int], n_heads: int, head_size: int, already_pruned_heads: set[int]
) -> tuple[set[int], Tensor]:
    """Return the heads that are still there to prune, and the indices of features that stay."""
    new = set(heads) - already_pruned_heads
    keep = torch.ones(n_heads, head_size, dtype=torch.bool)
    for head in new:  # counted among those that are left
        keep[head - sum(gone < head for gone in already_pruned_heads)] = False
    return new, keep.flatten().nonzero().flatten()


def _get_head_mask(
    self: PreTrainedModel,
    head_mask: Tensor | None,
    num_hidden_layers: int,
    is_attention_chunked: bool = False,
) -> list[None] | Tensor:
    """Bring a mask of heads, ``(H)`` or ``(N, H)``, to one that scores of each layer can be multiplied by."""
    if head_mask is None:
        return [None] * num_hidden_layers
    if head_mask.dim() == 1:
        head_mask = head_mask.expand(num_hidden_layers, -1)
    mask = head_mask[:, None, :, None, None].to(self.dtype)
    return mask[..., None] if is_attention_chunked else mask


def _invert_attention_mask(self: PreTrainedModel, encoder_attention_mask: Tensor) -> Tensor:
    """Make 0 of what counts and the lowest number of what does not, ``(B, 1, 1, L)`` or ``(B, 1, L, L)``."""
    shown = encoder_attention_mask[:, None, None, :]
    if encoder_attention_mask.dim() == 3:
        shown = encoder_attention_mask[:, None]
    return (1.0 - shown.to(self.dtype)) * torch.finfo(self.dtype).min


def _get_extended_attention_mask(
    self: PreTrainedModel,
    attention_mask: Tensor,
    input_shape: tuple[int, ...],
    *_arguments: Any,
    **_options: Any,
) -> Tensor:
    """Do the same for the model's own input; a decoder's tokens do not see later ones."""
    if attention_mask.dim() == 2 and getattr(self.config, "is_decoder", False):
        length = attention_mask.shape[1]
        causal = torch.ones(length, length, device=attention_mask.device).tril()[-input_shape[1] :]
        attention_mask = causal[None] * attention_mask[:, None, :]
    return _invert_attention_mask(self, attention_mask)


_METHODS: Mapping[str, Callable[..., Any]] = {
    "get_head_mask": _get_head_mask,
    "invert_attention_mask": _invert_attention_mask,
    "get_extended_attention_mask": _get_extended_attention_mask,
}
_PRUNING = {
    "find_pruneable_heads_and_indices": _find_pruneable_heads_and_indices,
    "prune_linear_layer": pytorch_utils.prune_linear_layer,
}
_NAMES: Mapping[str, Mapping[str, Any]] = {
    "transformers.pytorch_utils": _PRUNING,
    "transformers.modeling_utils": {
        **_PRUNING,
        "apply_chunking_to_forward": pytorch_utils.apply_chunking_to_forward,
        "Conv1D": pytorch_utils.Conv1D,
    },
    "transformers.utils": {"is_torch_fx_available": lambda: False},
    "transformers.utils.import_utils": {"is_torch_fx_available": lambda: False},
}
