"""Make transformers know StripedHyena 2, without importing transformers before the user does.

The three modules that hold transformers' Auto classes are watched for: when one of them is imported, its
classes learn ours. Where transformers is imported already, that happens at once.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


def _register_config(module: ModuleType) -> None:
    from genoembed.models.striped_hyena2.configuration import StripedHyena2Config

    module.AutoConfig.register(StripedHyena2Config.model_type, StripedHyena2Config, exist_ok=True)


def _register_models(module: ModuleType) -> None:
    from genoembed.models.striped_hyena2.configuration import StripedHyena2Config
    from genoembed.models.striped_hyena2.modeling import StripedHyena2ForCausalLM, StripedHyena2Model

    module.AutoModel.register(StripedHyena2Config, StripedHyena2Model, exist_ok=True)
    module.AutoModelForCausalLM.register(StripedHyena2Config, StripedHyena2ForCausalLM, exist_ok=True)


def _register_tokenizer(module: ModuleType) -> None:
    from genoembed.models.striped_hyena2.configuration import StripedHyena2Config
    from genoembed.tokenization.char import CharTokenizer

    module.AutoTokenizer.register(StripedHyena2Config, CharTokenizer, exist_ok=True)


_REGISTER: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.tokenization_auto": _register_tokenizer,
}


class _AutoClassWatcher(importlib.abc.MetaPathFinder):
    """Finds the watched modules where they are, and has them registered after they ran."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _REGISTER:
            return None
        spec = next(
            (
                found
                for finder in sys.meta_path
                if finder is not self and (found := finder.find_spec(fullname, path, target)) is not None
            ),
            None,
        )
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(importlib.abc.Loader):
    """Runs a module with its own loader, then registers our classes in it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _REGISTER[module.__name__](module)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)


def install() -> None:
    """Register with transformers, now or when it is imported. Calling it again changes nothing."""
    if not any(isinstance(finder, _AutoClassWatcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoClassWatcher())
    for name, register in _REGISTER.items():
        if name in sys.modules:
            register(sys.modules[name])
