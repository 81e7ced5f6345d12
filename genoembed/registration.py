"""Make transformers know StripedHyena 2 and our ports, without importing transformers before the user does.

The modules that hold transformers' Auto classes are watched for, and so are ours: as soon as both sides are
there, the Auto class learns ours. Where transformers is imported already, that happens at once. Of a ported
family, only the name is registered: its module is imported when a folder of it is opened.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from transformers import PreTrainedConfig, PreTrainedModel

    from genoembed.models.families import Family


_AUTO = "transformers.models.auto."
_OURS = "genoembed.models.striped_hyena2."
_CONFIGURATION = f"{_OURS}configuration"
_MODELING = f"{_OURS}modeling"
_TOKENIZER = "genoembed.tokenization.char"
_KMERS = "genoembed.tokenization.kmer"

_REGISTRATIONS = (
    (f"{_AUTO}configuration_auto", "AutoConfig", _CONFIGURATION, "StripedHyena2Config"),
    (f"{_AUTO}modeling_auto", "AutoModel", _MODELING, "StripedHyena2Model"),
    (f"{_AUTO}modeling_auto", "AutoModelForCausalLM", _MODELING, "StripedHyena2ForCausalLM"),
    (f"{_AUTO}tokenization_auto", "AutoTokenizer", _TOKENIZER, "CharTokenizer"),
    (f"{_AUTO}tokenization_auto", "AutoTokenizer", _KMERS, "KmerTokenizer"),
)
"""Which Auto class, in which module, learns which of our classes, from which module."""

_TRAINED = "genoembed.training.auto_models"
_TRAINED_KINDS = {
    "AutoModel": "Model",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
    "AutoModelForTokenClassification": "ForTokenClassification",
}
"""How the names of fine-tuned models end, by the Auto class that opens them."""

_NEEDED = ("transformers.modeling_layers", "transformers.modeling_utils", "transformers.generation.utils")
"""What ours are built on. The first of them imports the Auto classes itself: until it ran, ours cannot."""

_WATCHED = frozenset((*_NEEDED, *(name for auto, _, ours, _ in _REGISTRATIONS for name in (auto, ours))))
_running: set[str] = set()
"""Watched modules that are being imported just now."""


class _ClassOnDemand:
    """Stands for the class of fine-tuned models with some configuration until it is used."""

    def __init__(self, config: type[PreTrainedConfig], kind: str, *, is_alone: bool) -> None:
        self._wanted = (config, kind)
        self.__name__ = _trained_name(config, kind, is_alone=is_alone)

    @property
    def _class(self) -> Any:
        return importlib.import_module(_TRAINED).trained_class(*self._wanted, name=self.__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        return self._class(*args, **kwargs)

    def __getattr__(self, name: str) -> object:
        return getattr(self._class, name)


def _trained_name(config: type[PreTrainedConfig], kind: str, *, is_alone: bool) -> str:
    stem = config.__name__.removesuffix("Config")
    return f"{stem}{kind}" if is_alone else f"Genomic{stem}{kind}"


def trained_name(model: type[PreTrainedModel], config: type[PreTrainedConfig], kind: str) -> str | None:
    """Name the class that opens fine-tuned models of a class, if there is one."""
    auto_module = importlib.import_module(f"{_AUTO}modeling_auto")
    auto_name = next(name for name, ending in _TRAINED_KINDS.items() if ending == kind)
    mapping = getattr(auto_module, auto_name)._model_mapping
    if config not in mapping:
        return None
    found = mapping[config]
    whole = getattr(auto_module.AutoModel._model_mapping[config], "plain_class", None)
    # several classes, or an encoder of two: transformers chooses by rules of its own
    if isinstance(found, tuple) or whole is None or not issubclass(model, whole):
        return None
    return _trained_name(config, kind, is_alone=isinstance(found, _ClassOnDemand))


class _Chooser:
    """Stands for the class of a configuration, and opens a folder with our class for it if it is to.

    That is said by ``architectures`` in the folder's ``config.json``; models of others open as ever. (Auto
    classes choose so themselves among several, but fail where the configuration names none.)
    """

    def __init__(self, known: Any, trained: _ClassOnDemand) -> None:
        self.plain_class, self._trained = known, trained
        self.__name__, self.__module__ = known.__name__, known.__module__

    def _of(self, config: PreTrainedConfig | None) -> Any:
        is_trained = self._trained.__name__ in (getattr(config, "architectures", None) or ())
        return self._trained if is_trained else self.plain_class

    def __call__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> object:
        return self._of(config)(config, *args, **kwargs)

    def from_pretrained(self, *args: Any, config: PreTrainedConfig | None = None, **kwargs: Any) -> object:
        return self._of(config).from_pretrained(*args, config=config, **kwargs)

    def _from_config(self, config: PreTrainedConfig, **kwargs: Any) -> object:
        return self._of(config)._from_config(config, **kwargs)

    def __getattr__(self, name: str) -> object:
        return getattr(self.plain_class, name)


class _WithTrained(dict[Any, Any]):
    """What an Auto class has learned, and for each configuration our class for fine-tuned models besides."""

    def __init__(self, mapping: Any, kind: str) -> None:
        super().__init__(mapping._extra_content)
        self._mapping, self._kind = mapping, kind

    def _native(self, key: object) -> tuple[str, str] | None:
        """Name the model type and the class of transformers' own."""
        model_type = self._mapping._reverse_config_mapping.get(getattr(key, "__name__", None))
        name = self._mapping._model_mapping.get(model_type)
        is_theirs = getattr(key, "__module__", "").startswith("transformers.")
        return (model_type, name) if isinstance(name, str) and is_theirs else None

    def __contains__(self, key: object) -> bool:
        is_ours = getattr(key, "__module__", "").startswith("genoembed.models.")
        return super().__contains__(key) or is_ours or self._native(key) is not None

    def __getitem__(self, key: type[PreTrainedConfig]) -> object:
        found = self.get(key)
        if isinstance(found, (tuple, _Chooser, _ClassOnDemand)):
            return found
        if found is None and (native := self._native(key)) is not None:
            found = self._mapping._load_attr_from_module(*native)
        trained = _ClassOnDemand(key, self._kind, is_alone=found is None)
        self[key] = trained if found is None else _Chooser(found, trained)
        if found is not None:
            self[trained] = trained  # pipelines look for the names of all classes here
        return self[key]


def _register_what_is_ready() -> None:
    """Register every pair whose two modules have run; one still running calls this again at its end.

    While any of them runs, importing another of ours could come back to it half-way.
    """
    if _running:
        return
    for auto_module, auto_name, our_module, our_name in _REGISTRATIONS:
        auto_class = getattr(sys.modules.get(auto_module), auto_name, None)
        if auto_class is None:
            continue
        config = getattr(importlib.import_module(_CONFIGURATION), "StripedHyena2Config", None)
        ours = getattr(importlib.import_module(our_module), our_name, None)
        if config is not None and ours is not None:
            key = _key(auto_name, ours, config)
            auto_class.register(key, ours, exist_ok=True)
            if auto_name == "AutoConfig":
                _register_families(sys.modules[auto_module])
            if auto_name in _TRAINED_KINDS:
                _offer_trained(sys.modules[auto_module])


def _key(auto_name: str, ours: type, config: type[PreTrainedConfig]) -> object:
    if auto_name == "AutoConfig":
        return config.model_type
    # a tokenizer without a model of its own is looked for by its class's name, whatever its key is
    return ours if ours.__name__ == "KmerTokenizer" else config


def _register_families(auto_module: ModuleType) -> None:
    for family in importlib.import_module("genoembed.models.families").FAMILIES:
        if family.port is not None and family.model_type not in auto_module.CONFIG_MAPPING:
            auto_module.CONFIG_MAPPING.register(family.model_type, _ConfigOnDemand(family))


def _offer_trained(auto_module: ModuleType) -> None:
    for auto_name, kind in _TRAINED_KINDS.items():
        mapping = getattr(auto_module, auto_name)._model_mapping
        if not isinstance(mapping._extra_content, _WithTrained):
            mapping._extra_content = _WithTrained(mapping, kind)


class _ConfigOnDemand:
    """Stands for the configuration class of a family until it is used."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self.__name__ = family.model_type

    def __getattr__(self, name: str) -> object:
        return getattr(self._family.config_class(), name)

    def __call__(self, *args: object, **kwargs: object) -> PreTrainedConfig:
        return self._family.config_class()(*args, **kwargs)


class _AutoClassWatcher(importlib.abc.MetaPathFinder):
    """Finds the watched modules where they are, and registers after they ran."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _WATCHED and not fullname.startswith(_OURS):
            return None
        spec = next(
            (
                found
                for finder in sys.meta_path
                # the others, asked as if this one were not there: it finds nothing itself
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
        _running.add(module.__name__)
        try:
            self._loader.exec_module(module)
        finally:
            _running.discard(module.__name__)
        _register_what_is_ready()

    # tracebacks and resources ask a loader for more than an importer does, such as its source
    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)


def packages_of_others() -> tuple[str, ...]:
    """List the packages that have registered model types with transformers in this process, ours aside."""
    auto_module = sys.modules.get(f"{_AUTO}configuration_auto")
    if auto_module is None:
        return ()
    kinds = auto_module.CONFIG_MAPPING._extra_content.values()
    homes = {kind.__module__.partition(".")[0] for kind in kinds}
    return tuple(sorted(homes - {"genoembed", "transformers", "transformers_modules", "__main__"}))


def install() -> None:
    """Register with transformers, now or when it is imported. Calling it again changes nothing."""
    if not any(isinstance(finder, _AutoClassWatcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoClassWatcher())
    _register_what_is_ready()
