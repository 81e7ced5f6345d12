"""From where a model is to what it is: its configuration, the class that loads it, its base module.

Nothing here reads weights. Shared by loading a model and by describing one.

A configuration is data, but transformers acts on it: it fetches kernels that an attention is named after,
picks quantizers, opens tokenizer files by name, and builds as many layers as it is told. What a stranger's
folder says is looked at here, before transformers sees it, unless the model's code is trusted anyway: it
names no code, no other files, and is as large as its weights.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from genoembed.errors import (
    CheckpointError,
    ForeignCodeError,
    GenoembedError,
    ModelError,
    ModelNotFoundError,
    first_line,
)
from genoembed.models.families import Family, Published, family_of
from genoembed.models.names import suggestion
from genoembed.models.provenance import weight_sizes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from genoembed.models.registry import ModelSource


_LOG = logging.getLogger(__name__)

_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "use_kernels")
_LAYERS = re.compile(r"(^|_)(num|n)_?(\w+_)?(layers?|blocks?)$|^depths?$|^(num|n)_layer")
_NUMBERS = re.compile(r"(^|_)(num|n)_(?!positions|ctx|embd|vocab)")
_MOST_LAYERS, _MOST = 10_000, 1_000_000
# parts and values of a model as built, against those of its weights: loading registers each again
_TIMES, _MORE_PARTS, _MORE_VALUES = 40, 20_000, 100_000_000


def check_config(values: Mapping[str, Any], source: ModelSource, *, family: Family | None = None) -> None:
    """Refuse what a ``config.json`` must not say, and say what of it is not taken."""
    if values.get("quantization_config") is not None:
        problem = (
            "its weights are quantized (quantization_config), which other code has to undo and which "
            "changes vectors; name the model with its full weights, or set trust_remote_code=True"
        )
        raise _bad(source, problem)
    sizes = weight_sizes(source.folder)
    known = None if sizes is None else sizes.num_tensors
    for key, value in _items(values):
        most = _most(key, known)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if most is not None and is_number and value > most:
            problem = (
                f"its config.json has {key} {value:.6g}, expected at most {most}, for the weights that "
                "it has; check that config.json belongs to them"
            )
            raise _bad(source, problem)
    for key in ("dtype", "torch_dtype"):
        dtype = values.get(key)  # one, or one for each part of the model
        for name in dtype.values() if isinstance(dtype, dict) else [dtype]:
            found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
            if name not in (None, "auto") and not isinstance(found, torch.dtype):
                problem = (
                    f"its config.json has {key} {name!r}, expected one such as float32; remove that line"
                )
                raise _bad(source, problem)
    if values.get("auto_map") and family is None and values.get("model_type") in CONFIG_MAPPING:
        _LOG.warning(
            "model %r brings its own code (auto_map), which is not run: it is built by transformers' own "
            "code for %s; set trust_remote_code=True to run it, once you have read it",
            source.name,
            values["model_type"],
        )
    if named := [key for key, _ in _items(values) if key in _IMPLEMENTATIONS]:
        _LOG.warning(
            "model %r: %s of its config.json is not taken", source.name, ", ".join(sorted(set(named)))
        )


def forget_implementations(config: PreTrainedConfig) -> None:
    """Have the model computed by what is installed, whatever its configuration names."""
    config._attn_implementation = None
    config._experts_implementation = None


def check_tokenizer_config(path: Path | None, source: ModelSource) -> None:
    """Refuse a ``tokenizer_config.json`` that names files elsewhere, and say that its code is not run."""
    if path is None:
        return
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # said by the tokenizer's loader
        return
    if not isinstance(values, dict):
        return
    for key, value in values.items():
        if key.endswith(("_file", "_files")) and isinstance(value, str) and leads_outside(value):
            problem = f"it names {value!r} as {key}, expected files in its own folder; remove that line"
            raise CheckpointError(problem, path=str(path))
    if values.get("auto_map"):
        _LOG.warning("model %r: the code that its tokenizer_config.json names is not run", source.name)


def leads_outside(name: str) -> bool:
    """Tell whether a file name leads out of the folder that it is said in."""
    path = PureWindowsPath(name)  # knows both kinds of slash, and drives
    return bool(path.drive or path.root) or ".." in path.parts or not path.parts


@contextmanager
def bounded_build(source: ModelSource) -> Iterator[None]:
    """Stop the building of a model that grows far beyond its weights, whatever setting makes it grow."""
    sizes = weight_sizes(source.folder)
    num_tensors = 0 if sizes is None else sizes.num_tensors or 0
    most_parts = _TIMES * max(num_tensors, _MOST_LAYERS) + _MORE_PARTS
    most_values = None if sizes is None else _TIMES * sizes.num_values + _MORE_VALUES
    parts = num_values = 0

    def count(_: torch.nn.Module, name: str, part: object) -> None:
        nonlocal parts, num_values
        parts += 1
        num_values += part.numel() if isinstance(part, torch.Tensor) else 0
        if parts > most_parts or (most_values is not None and num_values > most_values):
            problem = (
                "its config.json describes a model far larger than its weights; check that config.json "
                "belongs to them"
            )
            raise _bad(source, problem)

    hooks = [
        register(count)
        for register in (
            register_module_parameter_registration_hook,
            register_module_buffer_registration_hook,
            register_module_module_registration_hook,
        )
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _items(values: object, key: str = "") -> Iterator[tuple[str, Any]]:
    """Go through nested values; what is in a list has the key of the list."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield str(name), value
            yield from _items(value, str(name))
    elif isinstance(values, list):
        for value in values:
            yield key, value
            yield from _items(value, key)


def _most(key: str, num_tensors: int | None) -> int | None:
    """Return the largest number that a setting may have; None for no limit."""
    if _LAYERS.search(key):
        return _MOST_LAYERS if num_tensors is None else max(num_tensors, 1)
    return _MOST if _NUMBERS.search(key) else None


def _bad(source: ModelSource, problem: str) -> ModelError:
    return ModelError(f"model {source.name!r}: {problem}")


_AUTO_CLASSES = {
    "AutoModel": AutoModel,
    "AutoModelForCausalLM": AutoModelForCausalLM,
    "AutoModelForMaskedLM": AutoModelForMaskedLM,
    "AutoModelForSequenceClassification": AutoModelForSequenceClassification,
}
NAMES_SHOWN = 5
# what constructors and configurations raise on values that do not belong together
NONSENSE = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    StrictDataclassError,
)


def find_family(source: ModelSource, values: Mapping[str, Any]) -> Family | None:
    """Recognize a model's family by its ``config.json``, and by its weights where these are here."""
    return family_of(Published(values, Path(source.location) if source.is_local else None))


def read_config(source: ModelSource, options: Mapping[str, Any]) -> tuple[PreTrainedConfig, Family | None]:
    """Read a model's configuration; of a Hugging Face id, only ``config.json`` is fetched."""
    is_trusted = bool(options.get("trust_remote_code"))
    try:
        values, _ = PreTrainedConfig.get_config_dict(source.location, revision=options.get("revision"))
        family = find_family(source, values)
        if not is_trusted:
            check_config(values, source, family=family)
        if family is not None:
            config = family.read_config(values)
        else:
            with trusted_code(source, values, is_trusted=is_trusted):
                config = AutoConfig.from_pretrained(source.location, **options)
        if not is_trusted:
            forget_implementations(config)
    except ForeignCodeError:
        raise
    except GenoembedError as error:
        error.add_note(f"in the config.json of model {source.name!r}")
        raise
    except OSError as error:
        if source.is_local:
            message = (
                f"model {source.name!r}: its config.json cannot be read ({first_line(error)}); write it anew"
            )
            raise ModelError(message) from error
        message = (
            f"model {source.name!r}: no such model here, and Hugging Face gives none ({first_line(error)}); "
            f"{suggestion(source.name)}"
        )
        raise ModelNotFoundError(message) from error
    except ImportError as error:
        raise unbuildable(source, error) from error
    except NONSENSE as error:
        if "trust_remote_code" in str(error):
            raise needs_trust(source) from error
        message = (
            f"model {source.name!r}: its config.json is of no kind that transformers reads "
            f"({first_line(error)}); check its model_type, import the package that registers it, or name "
            "another model"
        )
        raise ModelError(message) from error
    return config, family


@contextmanager
def trusted_code(
    source: ModelSource, config: PreTrainedConfig | Mapping[str, Any], *, is_trusted: bool
) -> Iterator[None]:
    """Let a model's own code run, if it is trusted; what fails in it is said to be that code."""
    # not to_dict(), which says the release that is installed
    values = vars(config) if isinstance(config, PreTrainedConfig) else config
    if not (is_trusted and values.get("auto_map")):
        yield
        return
    from genoembed.models.remote_code import allow_old_code, fill_settings, forget_classes, named_failures

    allow_old_code()
    if isinstance(config, PreTrainedConfig):
        fill_settings(config)
        forget_classes(config)
    with named_failures(source.name, values):
        yield


def needs_trust(source: ModelSource) -> ModelError:
    """Phrase the refusal of code that is not trusted."""
    message = (
        f"model {source.name!r}: it brings its own Python code, which runs only if trusted; read the code, "
        "then set trust_remote_code=True"
    )
    return ModelError(message)


def auto_class(config: PreTrainedConfig, *, trust_remote_code: bool) -> type[Any]:
    """Choose the loader: repositories with code of their own do not always offer the bare model."""
    auto_map = getattr(config, "auto_map", None) or {}
    if trust_remote_code:
        for name, found in _AUTO_CLASSES.items():
            if name in auto_map:
                return found
    return _encoder_class(config) or AutoModel


def _encoder_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Find the class of an encoder alone: one saved without a decoder, or the part that is taken of both.

    Such a folder has the type of the whole model; of what it holds, only ``architectures`` speaks.
    """
    whole = MODEL_MAPPING.get(type(config), None)
    if whole is None:
        return None
    home = sys.modules[(whole[0] if isinstance(whole, tuple) else whole).__module__]
    names = [
        name for name in config.architectures or () if name.endswith(("Encoder", "EncoderModel", "Stack"))
    ]
    # a configuration that an encoder was made with before says of the whole model that it is none
    if config.is_encoder_decoder or any(
        name.endswith("ForConditionalGeneration") for name in config.architectures or ()
    ):
        names += [name for name in vars(home) if name.endswith("EncoderModel")]
    found = (getattr(home, name, None) for name in names)
    return next(
        (kind for kind in found if isinstance(kind, type) and issubclass(kind, PreTrainedModel)), None
    )


def base_of(whole: PreTrainedModel) -> PreTrainedModel:
    """Take the base model out of one with a head, and the encoder out of an encoder-decoder."""
    base = whole.base_model
    # a model that is an encoder with its embedding says that it is no encoder-decoder
    is_wrapped = type(base).__name__.endswith("EncoderModel")
    if getattr(base.config, "is_encoder_decoder", False) or is_wrapped:
        base = base.get_encoder()
    return base


def build_without_weights(
    source: ModelSource, config: PreTrainedConfig, *, trust_remote_code: bool
) -> PreTrainedModel:
    """Build a base model on the meta device: every module and shape, no memory."""
    loader = auto_class(config, trust_remote_code=trust_remote_code)

    def build() -> PreTrainedModel:
        if issubclass(loader, PreTrainedModel):
            return base_of(loader(config))
        return base_of(loader.from_config(config, trust_remote_code=trust_remote_code))

    bound = nullcontext() if trust_remote_code else bounded_build(source)
    try:
        with trusted_code(source, config, is_trusted=trust_remote_code), bound:
            try:
                with torch.device("meta"):
                    return build()
            except NONSENSE:
                if not trust_remote_code:
                    raise
                return build()  # code that asks for values, which take memory
    except GenoembedError:
        raise
    except (*NONSENSE, ImportError) as error:
        raise unbuildable(source, error) from error


def unbuildable(source: ModelSource, error: Exception) -> ModelError:
    """Phrase that transformers cannot build a model."""
    if "trust_remote_code" in str(error):
        return needs_trust(source)
    if isinstance(error, ImportError):
        problem, remedy = "its code needs packages that are not here", "install them"
    else:
        problem, remedy = "its config.json describes no model that transformers builds", "check config.json"
    return ModelError(f"model {source.name!r}: {problem} ({first_line(error)}); {remedy}")


def listing(names: Sequence[str]) -> str:
    """Join names, the first few of many."""
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"
