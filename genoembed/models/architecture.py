"""From where a model is to what it is: its configuration, the class that loads it, its base module.

Nothing here reads weights. Shared by loading a model and by describing one.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from genoembed.errors import GenoembedError, ModelError, ModelNotFoundError
from genoembed.models.registry import suggestion
from genoembed.models.untrusted import bounded_build, check_config, forget_implementations

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from genoembed.models.registry import ModelSource

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


def read_config(source: ModelSource, options: Mapping[str, Any]) -> PreTrainedConfig:
    """Read a model's configuration; of a Hugging Face id, only ``config.json`` is fetched."""
    is_trusted = bool(options.get("trust_remote_code"))
    try:
        if not is_trusted:
            values, _ = PreTrainedConfig.get_config_dict(source.location, revision=options.get("revision"))
            check_config(values, source)
        config = AutoConfig.from_pretrained(source.location, **options)
        if not is_trusted:
            forget_implementations(config)
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
            f"({first_line(error)}); check its model_type, or name another model"
        )
        raise ModelError(message) from error
    return config


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
    return AutoModel


def base_of(whole: PreTrainedModel) -> PreTrainedModel:
    """Take the base model out of one with a head, and the encoder out of an encoder-decoder."""
    base = whole.base_model
    if getattr(base.config, "is_encoder_decoder", False):
        base = base.get_encoder()
    return base


def build_without_weights(
    source: ModelSource, config: PreTrainedConfig, *, trust_remote_code: bool
) -> PreTrainedModel:
    """Build a base model on the meta device: every module and shape, no memory."""
    loader = auto_class(config, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"), nullcontext() if trust_remote_code else bounded_build(source):
            return base_of(loader.from_config(config, trust_remote_code=trust_remote_code))
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


def first_line(error: BaseException) -> str:
    """Shorten another library's error to a line.

    Example:
        >>> first_line(ValueError("field 'depth':\\n  is text\\nsee above")), first_line(KeyError())
        ("field 'depth': is text", 'KeyError')
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
