"""What a model folder was trained as: layers, pooling and fusion of its vectors, and how they are finished.

In: a model folder, fine-tuned here or by sentence-transformers. Out: :class:`FinetunedFacts`, or None for a
folder that was trained for no vector. What it says fills in the options that a caller leaves out, and another
choice warns. Promised: a folder of a newer format is rejected, never half understood, and so are modules of
sentence-transformers that are not run here, unless the caller says which vectors to take.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from genoembed.errors import (
    CheckpointError,
    ConfigError,
    ModelError,
    ModelNotFoundError,
    PoolingMismatchWarning,
)
from genoembed.models.layers import FINAL
from genoembed.models.locate import fetched, locate_model, reachable_source
from genoembed.models.names import model_folder
from genoembed.models.provenance import backbone_files
from genoembed.models.registry import entry_named

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from os import PathLike

    from torch import Tensor

    from genoembed.config.embed import EmbeddingConfig
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.models.registry import ModelSource

FACTS_FILE = "genoembed_finetuned.json"
HEADS_FILE = "heads.safetensors"
FACTS_FORMAT = 1
HEAD_PREFIX = "head."
"""Begins the names of a predicting head's weights."""
_DENSE_WEIGHTS = "model.safetensors"
PROJECTION_PATTERN, _PROJECTION = f"*_Dense/{_DENSE_WEIGHTS}", "linear."
"""Where sentence-transformers looks for a projection behind the pooling, and how its weights' names begin."""
NEXT_TOKEN_HEAD = "next_token_head"
"""Key that says of a folder with vectors that its next-token head learned last."""
EMBEDDING_TASKS = ("contrastive", "triplet", "retrieval", "sentence-transformers")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetunedFacts:
    """How a fine-tuned encoder makes vectors."""

    folder: Path
    task: str
    """What it was trained for."""
    layers: tuple[str, ...]
    """Module paths; empty for a language model, which was trained for no vector."""
    pooling: str
    skip_first: int
    """Bases at the start that pooling leaves out."""
    fusion: str
    fusion_weights: tuple[float, ...]
    """One per layer, for ``weighted``."""
    normalize: bool
    """Whether vectors have length 1."""
    pooler: str | None
    """Name of the projection after the pooling among the heads' weights."""
    values: Mapping[str, Any]
    """All that the file says."""
    unsupported: str | None = None
    """What of it is not done here."""
    counts_tokens: bool = False
    """Whether each token counts once in its pooling, special ones too; here bases count."""

    def finish(self, pooled_ND: Tensor) -> Tensor:
        """Project and normalize pooled vectors, as training did."""
        if self.pooler is not None:
            weight, bias = (
                values.to(pooled_ND.device) for values in read_heads(self.folder, self.pooler).values()
            )
            pooled_ND = F.linear(pooled_ND.to(weight.dtype), weight, bias)
        return F.normalize(pooled_ND, dim=-1) if self.normalize else pooled_ND

    @property
    def add_pooler(self) -> bool:
        """Whether a projection comes after the pooling."""
        return self.pooler is not None

    @property
    def is_tuned(self) -> bool:
        """Whether its vectors were trained themselves, rather than what is predicted from them."""
        # a next-token head is noted only where vectors were carried through the training of a language model
        return self.task in EMBEDDING_TASKS or bool(self.values.get(NEXT_TOKEN_HEAD))

    @property
    def finisher(self) -> Callable[[Tensor], Tensor] | None:
        """What is done to fused vectors; None if nothing is."""
        return self.finish if self.normalize or self.pooler is not None else None


def read_finetuned(folder: str | PathLike[str]) -> FinetunedFacts | None:
    """Read what a folder says about itself."""
    path = model_folder(folder) / FACTS_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = int(values["format"])
        facts = FinetunedFacts(
            folder=path.parent,
            task=str(values["task"]),
            layers=tuple(values["layers"]),
            pooling=str(values["pooling"]),
            skip_first=int(values["skip_first"]),
            fusion=str(values["fusion"]),
            fusion_weights=tuple(map(float, values["fusion_weights"])),
            # folders written before the American spelling say "normalise"
            normalize=bool(values["normalize"] if "normalize" in values else values["normalise"]),
            pooler=values["pooler"],
            values=values,
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        message = (
            f"it is damaged ({type(error).__name__}: {error}); fine-tune again, or fetch the folder again"
        )
        raise CheckpointError(message, path=str(path)) from error
    if found > FACTS_FORMAT:
        message = f"format {found} is newer than this genoembed reads (1-{FACTS_FORMAT}); upgrade genoembed"
        raise CheckpointError(message, path=str(path))
    return facts


def find_facts(model: str | GenomicModel, *, revision: str | None = None) -> FinetunedFacts | None:
    """Read what a model was trained as; None where it was trained for no vector."""
    if not isinstance(model, str):
        folder = model.location if model.adapter is None else model.adapter.folder
    elif entry_named(model):
        folder = None
    else:
        folder = Path(model) if Path(model).expanduser().exists() else _fetched_folder(model, revision)
    if folder is None:
        return None
    facts = read_finetuned(folder)
    if facts is None:
        return _read_sentence_folder(folder)
    return facts if facts.layers else None


def _fetched_folder(name: str, revision: str | None) -> Path | None:
    """Fetch what a repository says about its vectors; None where it says nothing."""
    try:
        source = locate_model(name, with_weights=False)
        given = source.revision_for(revision)
        source = dataclasses.replace(reachable_source(source, revision=given), revision=given)
    except (ModelError, ModelNotFoundError):  # said where the model is loaded
        return None
    return fetch_sentence_files(source)


def fetch_sentence_files(source: ModelSource) -> Path | None:
    """Fetch the files that say how vectors are made, and heads; None where there are none."""
    # ours says so without a list of modules where sentence-transformers could not make its vectors
    facts, listed = fetched(source, FACTS_FILE), fetched(source, MODULES_FILE)
    if facts is not None:
        fetched(source, HEADS_FILE)
    if listed is None:
        return None if facts is None else facts.parent
    fetched(source, _SENTENCE_CONFIG)
    for module in _sentence_modules(listed):
        fetched(source, f"{module.path}/config.json" if module.path else _BERT_CONFIG)
        if module.kind == "Dense":
            fetched(source, f"{module.path}/{_DENSE_WEIGHTS}")
    return listed.parent


MODULES_FILE = "modules.json"
_SENTENCE_CONFIG, _BERT_CONFIG = "config_sentence_transformers.json", "sentence_bert_config.json"
_POOLINGS = {"cls": "cls", "mean": "mean", "max": "max", "weightedmean": "weighted_mean", "lasttoken": "last"}
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""What older releases wrote instead of a name."""


class _SentenceModule(NamedTuple):
    """A step of a model of sentence-transformers."""

    kind: str
    """Name of its class; with its module, where that is not of sentence-transformers."""
    path: str


def _sentence_modules(listed: Path) -> list[_SentenceModule]:
    modules = _read_json(listed)
    try:
        named = [(str(module["type"]), str(module["path"])) for module in modules]
    except (TypeError, KeyError) as error:
        message = f"it is not a list of modules ({type(error).__name__}: {error}); fetch the folder again"
        raise CheckpointError(message, path=str(listed)) from error
    for _, path in named:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\\" in path:
            message = f"it names {path!r}, expected folders beside it; fetch the folder again"
            raise CheckpointError(message, path=str(listed))
    ours = "sentence_transformers."
    return [
        _SentenceModule(kind.rpartition(".")[2] if kind.startswith(ours) else kind, path)
        for kind, path in named
    ]


def _read_sentence_folder(folder: Path) -> FinetunedFacts | None:
    """Read which vectors a folder of sentence-transformers makes."""
    folder = folder.expanduser()
    outer = folder.parent if folder.name == "0_Transformer" else folder
    if not (outer / MODULES_FILE).is_file():
        return None
    modules = _sentence_modules(outer / MODULES_FILE)
    settings = [_read_json(outer / module.path / "config.json", default={}) for module in modules]
    steps = {module.kind: values for module, values in zip(modules, settings, strict=True)}
    pooling = _sentence_pooling(steps.get("Pooling", {}))
    normalize = "Normalize" in steps
    if pooling == "mean_sqrt_len_tokens" and normalize:
        pooling = "mean"  # they differ in length only
    kinds = [module.kind for module in modules]
    has_dense = "Dense" in steps and _is_projection(outer, modules, steps["Dense"])
    problems = [
        f"its module {kind}"
        for kind, values in steps.items()
        if not (_is_done_here(kind, values) or (kind == "Dense" and has_dense))
    ]
    if pooling not in _POOLINGS:
        problems.append(f"its pooling {pooling!r}")
    bert, prompts = (_read_json(outer / name, default={}) for name in (_BERT_CONFIG, _SENTENCE_CONFIG))
    prompt = (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name"))
    if prompt:
        problems.append(f"its prompt {prompt!r}")
    if bert.get("do_lower_case"):
        problems.append("lower-casing (do_lower_case)")
    pooler = "projection" if has_dense else None
    return FinetunedFacts(
        folder=outer,
        task="sentence-transformers",
        layers=(FINAL,),
        pooling=_POOLINGS.get(pooling, pooling),
        skip_first=0,
        fusion="none",
        fusion_weights=(),
        normalize=normalize,
        pooler=pooler,
        values={"task": "sentence-transformers", "modules": kinds, "normalize": normalize, "pooler": pooler},
        unsupported=" and ".join(problems) or None,
        counts_tokens=pooling != "cls" and "WordWeights" not in steps,
    )


def _is_projection(folder: Path, modules: list[_SentenceModule], values: Mapping[str, Any]) -> bool:
    """Whether a Dense module is a projection as ``add_pooler`` makes it: one linear layer after pooling."""
    kinds = [module.kind for module in modules]
    place = kinds.index("Dense")
    width = values.get("in_features")
    is_plain = str(values.get("activation_function")).endswith(".Identity") and values.get("bias") is True
    return (
        kinds.count("Dense") == 1
        and kinds[place - 1] == "Pooling"
        and is_plain
        and width is not None
        and width == values.get("out_features")
        and modules[place].path.endswith("_Dense")
        and (folder / modules[place].path / _DENSE_WEIGHTS).is_file()
    )


def _sentence_pooling(values: Mapping[str, Any]) -> str:
    """Return the name of a pooling; several, joined by +, which nothing here does."""
    named = values.get("pooling_mode")
    if named is None:
        flags = [mode for flag, mode in _POOLING_FLAGS.items() if values.get(flag)]
        named = flags or ["mean"]
    return named if isinstance(named, str) else "+".join(map(str, named))


def _is_done_here(kind: str, values: Mapping[str, Any]) -> bool:
    """Check that a module is done here, or does nothing when a trained model runs."""
    if kind == "WordWeights":  # as genoembed exports models: words weigh their bases, special tokens nothing
        weights = values.get("word_weights") or {}
        by_bases = all(
            not word.isalpha() if weight == 0 else weight in range(1, len(word) + 1)
            for word, weight in weights.items()
        )
        return by_bases and values.get("unknown_word_weight") == 1
    return kind in ("Transformer", "Pooling", "Normalize", "Dropout")


def _read_json(path: Path, *, default: Any = None) -> Any:
    if default is not None and not path.is_file():
        return default
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        message = f"it cannot be read ({type(error).__name__}: {error}); fetch the folder again"
        raise CheckpointError(message, path=str(path)) from error
    if default is not None and not isinstance(values, type(default)):
        message = "it holds no settings; fetch the folder again"
        raise CheckpointError(message, path=str(path))
    return values


def carried_options(
    facts: FinetunedFacts | None, given: Mapping[str, object], *, model: str | None = None
) -> dict[str, object]:
    """Add to the options that are given those of training, or a named model's own."""
    if facts is None:
        return _default_vectors(model, given) | dict(given)
    if facts.unsupported is not None:
        if {"layers", "pooling"} <= given.keys():
            return dict(given)
        message = (
            f"model {str(facts.folder)!r}: a model of sentence-transformers whose vectors are not made here: "
            f"{facts.unsupported}; set layers and pooling to take vectors of the model in it, or use "
            "sentence-transformers"
        )
        raise ModelError(message)
    carried = ["layers", "pooling"]
    if given.get("pooling") != "none":  # tokens are all kept
        carried.append("skip_first")
    if "fusion" not in given and "layers" not in given:
        # weights belong to their layers, and so does the way to fuse them
        carried += ["fusion", "fusion_weights"]
    return {key: getattr(facts, key) for key in carried} | dict(given)


def _default_vectors(model: str | None, given: Mapping[str, object]) -> dict[str, object]:
    """Return the options of a model's own vectors; a caller who names layers chose all of them."""
    entry = entry_named(model)
    if entry is None or not entry.vectors or "layers" in given:
        return {}
    are_tokens = given.get("pooling") == "none"  # which are not fused
    return {key: value for key, value in entry.vectors.items() if not (are_tokens and key == "fusion")}


def finisher(
    facts: FinetunedFacts | None, embedding: EmbeddingConfig, layers: tuple[str, ...]
) -> Callable[[Tensor], Tensor] | None:
    """Return what is to be done to fused vectors; warn of what differs from training."""
    if facts is None or facts.unsupported is not None:
        return None
    asked = {"layers": layers}
    if embedding.pooling != "none":  # tokens are neither pooled nor fused
        asked |= {key: getattr(embedding, key) for key in ("pooling", "skip_first", "fusion")}
    lost = "vectors are not projected or normalized either" if facts.finisher else ""
    if not is_as_trained(facts, asked, lost=lost):
        return None
    if embedding.pooling == "none" or facts.finisher is None:
        return None
    if embedding.rc == "concat" and embedding.fusion == "concat":
        message = f"rc is 'concat', but {facts.folder} concatenates layers; set rc to 'mean' or 'none'"
        raise ConfigError(message)
    return facts.finisher


def is_as_trained(
    facts: FinetunedFacts,
    asked: Mapping[str, object],
    *,
    expected: Mapping[str, object] | None = None,
    lost: str = "",
) -> bool:
    """Compare settings with those of training; warn of others, and of what is lost with them."""
    trained = {key: getattr(facts, key) for key in asked} if expected is None else expected
    said = "; ".join(
        f"{key} is {_said(value)}, it was trained with {_said(trained[key])}"
        for key, value in asked.items()
        if value != trained[key]
    )
    if said:
        ending = f" ({lost})" if lost else ""
        message = f"model {str(facts.folder)!r}: {said}{ending}; leave it out to take what was trained"
        warnings.warn(PoolingMismatchWarning(message), stacklevel=4)
    return not said


def _said(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else repr(value)


def read_heads(folder: Path, prefix: str = "", *, pooler: str | None = None) -> dict[str, Tensor]:
    """Read weights of heads; ``pooler`` is the name of the projection, which has a file of its own."""
    path = folder / HEADS_FILE
    whole = _read_tensors(path) if path.is_file() else {}
    if not any(name.startswith(HEAD_PREFIX) for name in whole):
        # heads that predict are with the weights of the model, where transformers looks for them
        for weights in backbone_files(folder):
            if weights.suffix == ".safetensors" and weights.name != HEADS_FILE:
                whole |= _read_tensors(weights, HEAD_PREFIX)
    for weights in folder.glob(PROJECTION_PATTERN) if pooler or prefix else ():
        tensors = _read_tensors(weights, _PROJECTION)
        whole |= {f"{pooler or prefix}.{name.removeprefix(_PROJECTION)}": tensors[name] for name in tensors}
    start = f"{prefix}." if prefix else ""
    names = sorted((name for name in whole if name.startswith(start)), reverse=True)
    if not names:
        message = f"no weights of {prefix or 'heads'!r}; fine-tune again, or fetch the folder again"
        raise CheckpointError(message, path=str(path))
    return {name.removeprefix(start): whole[name] for name in names}


def _read_tensors(path: Path, start: str = "") -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith(start)}
    except (OSError, SafetensorError) as error:
        message = f"heads cannot be read ({error}); fine-tune again, or fetch the folder again"
        raise CheckpointError(message, path=str(path)) from error
