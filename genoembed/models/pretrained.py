"""Load models with transformers: any folder or Hugging Face id that its Auto classes or our families open.

In: where a model is. Out: what a `GenomicModel` is made of. Promised: no code from a repository runs unless
it is trusted, nothing is unpickled, and no weight that an embedding depends on is left random.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
import struct
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from genoembed.errors import CheckpointError, GenoembedError, ModelError, first_line
from genoembed.models.architecture import (
    NONSENSE,
    auto_class,
    base_of,
    bounded_build,
    check_tokenizer_config,
    leads_outside,
    listing,
    needs_trust,
    read_config,
    trusted_code,
    unbuildable,
)
from genoembed.models.layers import final_candidates, find_blocks
from genoembed.models.registry import entry_named
from genoembed.models.trained_folder import fetch_sentence_files

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import torch

    from genoembed.models.families import Family
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.models.registry import ModelSource

_LOG = logging.getLogger(__name__)
_REPORTER = logging.getLogger("transformers.modeling_utils")

# stored by older releases, computed from the configuration today
_COMPUTED_BUFFERS = ("inv_freq", "position_ids", "masked_bias")


def load_pretrained(
    source: ModelSource,
    *,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool,
    device_map: str | Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Load a base model and its tokenizer; return the arguments of `GenomicModel`, its name aside."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.revision is not None:
        options["revision"] = source.revision
    config, family = read_config(source, options)
    if family is not None:  # run by code that is here, whatever the folder brings
        trust_remote_code = options["trust_remote_code"] = False
    _check_folder(source)
    if source.adapter is not None:
        from genoembed.models.adapters import check_adapter, merge_adapter

        check_adapter(source.adapter)
    whole, loading_info = _load_weights(source, config, options, dtype=dtype, device_map=device_map)
    module = base_of(whole)
    untrained = _check_keys(whole, module, loading_info, source=source, trusted=trust_remote_code)
    if source.adapter is not None:
        inside = _prefix_in(whole, module)
        optional = [f"{inside}{name}" for name in _unused_children(module)]
        merge_adapter(source.adapter, whole, optional=optional)
    if all(parameter.dtype != dtype for parameter in module.parameters()):
        asked, found = (str(kind).removeprefix("torch.") for kind in (dtype, module.dtype))
        _LOG.warning("model %r: its weights stay in %s, whatever is asked (%s)", name, found, asked)
    if device_map is None:
        module = module.to(device)
    config_path = _file_of(source, "config.json", options)
    if not source.is_local:
        fetch_sentence_files(source)
    entry = source.entry or entry_named(getattr(config, "checkpoint_name", None))
    return {
        "module": module,
        "tokenizer": load_tokenizer(source, config, options, family=family),
        "location": None if config_path is None else config_path.parent,
        "adapter": source.adapter,
        "family": family,
        "published": source.published,
        "entry": entry if source.adapter is None else None,
        "untrained": untrained,
    }


def _check_folder(source: ModelSource) -> None:
    """Raise if the folder's files send the loader to files elsewhere."""
    if not source.is_local:
        return
    folder = Path(source.location)
    for index in sorted(folder.glob("*.index.json")):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            strangers = sorted(name for name in names if leads_outside(name))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            message = f"it is not an index of weights ({first_line(error)}); fetch the folder again"
            raise CheckpointError(message, path=str(index)) from error
        if strangers:
            message = (
                f"it names {strangers[0]!r}, expected files in its own folder; fetch the folder again, from "
                "whom you trust"
            )
            raise CheckpointError(message, path=str(index))


def _load_weights(
    source: ModelSource,
    config: PreTrainedConfig,
    options: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    device_map: str | Mapping[str, Any] | None,
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Load through the barest class that the repository offers; report which keys did not fit."""
    extra = {} if device_map is None else {"device_map": device_map}
    try:
        is_trusted = options["trust_remote_code"]
        bound = nullcontext() if is_trusted else bounded_build(source)
        with without_progress_bars(), bound, trusted_code(source, config, is_trusted=is_trusted):
            return auto_class(config, trust_remote_code=options["trust_remote_code"]).from_pretrained(
                source.location,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **options,
                **extra,
            )
    except GenoembedError:
        raise
    except (pickle.UnpicklingError, SafetensorError, RuntimeError) as error:
        message = (
            f"the weights cannot be read or do not fit config.json ({first_line(error)}); fetch them again"
        )
        raise CheckpointError(message, path=source.location) from error
    except OSError as error:
        is_cache = Path(source.location).parent.name == "snapshots" or not source.is_local
        remedy = "fetch the model while online" if is_cache else "the folder needs safetensors files"
        message = f"no weights were found ({first_line(error)}); {remedy}"
        raise CheckpointError(message, path=source.location) from error
    except (EOFError, struct.error) as error:
        message = f"the weights cannot be read ({first_line(error)}); fetch them again"
        raise CheckpointError(message, path=source.location) from error
    except (*NONSENSE, ImportError) as error:
        raise unbuildable(source, error) from error


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing on standard error, which belongs to the caller.

    Nor does it list weights that do not fit: those that matter are refused by name, and heads are no fault.
    """
    was_enabled = is_progress_bar_enabled()
    disable_progress_bar()
    # not its level: transformers reads that, and looks for more to warn of
    _REPORTER.addFilter(_is_error)
    try:
        yield
    finally:
        _REPORTER.removeFilter(_is_error)
        if was_enabled:
            enable_progress_bar()


def _check_keys(
    whole: PreTrainedModel,
    module: PreTrainedModel,
    info: Mapping[str, Any],
    *,
    source: ModelSource,
    trusted: bool,
) -> tuple[str, ...]:
    """Raise if weights do not fit; return the top-level modules that no hidden state depends on."""
    prefix = _prefix_in(whole, module)
    families = tuple(dict.fromkeys(filter(None, (prefix, f"{whole.base_model_prefix or ''}.".lstrip(".")))))
    children = [name for name, _ in module.named_children()]
    tail = _unused_children(module)
    missing = {_strip(key, families) for key in info["missing_keys"] if key.startswith(prefix)}
    unused = {key for key in missing if key.partition(".")[0] in tail}
    unexpected = {
        stripped
        for stripped in (_strip(key, families) for key in info["unexpected_keys"])
        if stripped.partition(".")[0] in set(children) - tail and not stripped.endswith(_COMPUTED_BUFFERS)
    }
    problems = [
        f"{len(keys)} weights {what} ({listing(sorted(keys))})"
        for what, keys in (
            ("are missing and would be random", missing - unused),
            ("have no place in the model", unexpected),
            ("have another shape", {_shapes(key) for key in info["mismatched_keys"]}),
        )
        if keys
    ]
    if problems:
        remedy = "check that config.json belongs to these weights"
        if getattr(whole.config, "auto_map", None) and not trusted:
            remedy = "the repository brings its own code: read it, then set trust_remote_code=True"
        message = f"{'; '.join(problems)}; {remedy}"
        raise CheckpointError(message, path=source.location)
    return tuple(dict.fromkeys(key.partition(".")[0] for key in sorted(unused)))


def _prefix_in(whole: PreTrainedModel, module: PreTrainedModel) -> str:
    """Return the path of a module in a model, with a dot; empty where it is the model."""
    return next((f"{name}." for name, child in whole.named_modules() if child is module and name), "")


def _unused_children(module: PreTrainedModel) -> set[str]:
    """Return the modules after the blocks that are not the final norm: poolers and the like."""
    children = [name for name, _ in module.named_children()]
    blocks = find_blocks(module).partition(".")[0]
    # whichever of these norms gives the last hidden states, none of them may be random
    final = {path.partition(".")[0] for path in final_candidates(module)}
    return set(children[children.index(blocks) + 1 :]) - final


def _strip(key: str, prefixes: Iterable[str]) -> str:
    for prefix in prefixes:
        key = key.removeprefix(prefix)
    return key


_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.txt", "vocab.json")


def load_tokenizer(
    source: ModelSource, config: PreTrainedConfig, options: Mapping[str, Any], *, family: Family | None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer; that of a family by our own rules, and that of StripedHyena 2 needs no files.

    Folders of adapters mostly bring the tokenizer that they were made with.
    """
    if source.adapter is not None and (source.adapter.folder / "tokenizer_config.json").is_file():
        source = dataclasses.replace(
            source, location=str(source.adapter.folder), is_local=True, revision=None
        )
        options = {key: value for key, value in options.items() if key != "revision"}
    files = {name: _file_of(source, name, options) for name in _TOKENIZER_FILES}
    described = files["tokenizer_config.json"]
    if family is not None and family.tokenizer is not None:
        folder = next((path.parent for path in files.values() if path is not None), Path(source.location))
        tokenizer = family.load_tokenizer(folder)
        if tokenizer is not None:
            return tokenizer
    if config.model_type == "striped_hyena2" and described is None:
        tokenizer_class = TOKENIZER_MAPPING.get(type(config), None)
        if tokenizer_class is not None:
            return tokenizer_class()
    if not options["trust_remote_code"]:
        check_tokenizer_config(described, source)
    try:
        # a ported family's config.json is ours to read: transformers would take it for another model's
        known = {} if family is None or family.port is None else {"config": config}
        tokenizer = AutoTokenizer.from_pretrained(source.location, **known, **options)
    except GenoembedError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if "trust_remote_code" in str(error):
            raise needs_trust(source) from error
        message = (
            f"model {source.name!r}: no tokenizer could be loaded ({first_line(error)}); "
            "save the model's tokenizer into its folder"
        )
        raise ModelError(message) from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        message = (
            f"model {source.name!r}: its tokenizer knows special tokens only, expected a vocabulary; save "
            "the model's tokenizer into its folder"
        )
        raise ModelError(message)
    check_reads_dna(tokenizer, source.name)
    return tokenizer


def open_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer alone, of a folder that brings no code."""
    options = {"trust_remote_code": False}
    config, family = read_config(source, options)
    return load_tokenizer(source, config, options, family=family)


_DNA_TAGS = ("<dna>", "</dna>")
_NUCLEOTIDES, _AMINO_ACIDS = frozenset("acgtun"), frozenset("ACDEFGHIKLMNPQRSTVWY")


def check_reads_dna(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer that takes plain upper-case bases for something else, which no output would show."""
    vocabulary = tokenizer.get_vocab()
    letters = frozenset(token for token in vocabulary if len(token) == 1 and token.isascii())
    lower = frozenset(letter for letter in letters if letter.islower())
    if vocabulary.keys() >= {*_DNA_TAGS}:
        problem = (
            "its tokenizer reads DNA between <dna> and </dna> only, and bases without them as other text; "
            "genoembed adds no such tags"
        )
    # all lower-case letters are nucleotides: other tokenizers with both cases have the whole alphabet
    elif {*"acgt"} <= lower <= _NUCLEOTIDES and letters >= _AMINO_ACIDS:
        problem = (
            "its tokenizer reads DNA in lower case, and letters in upper case as protein; genoembed has "
            "sequences in upper case"
        )
    else:
        return
    message = f"model {name!r}: {problem}; choose a model that reads plain DNA in upper case"
    raise ModelError(message)


def _file_of(source: ModelSource, file_name: str, options: Mapping[str, Any]) -> Path | None:
    """Find one of the model's files, in the Hugging Face cache for an id."""
    if source.is_local:
        path = Path(source.location) / file_name
        return path if path.is_file() else None
    found = cached_file(
        source.location,
        file_name,
        revision=options.get("revision"),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _shapes(mismatch: str | tuple[str, Iterable[int], Iterable[int]]) -> str:
    """Phrase what transformers reports: the name alone, or with the shapes found and expected."""
    if isinstance(mismatch, str):
        return mismatch
    name, found, expected = mismatch
    return f"{name} is {tuple(found)}, expected {tuple(expected)}"


def load_whole(model: GenomicModel, auto_class: str, *, head: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Load the class with the head, and return its base, too: the one that is loaded already, if it can be.

    Raises:
        ModelError: If there is no folder to load it from, or no class with such a head.
        CheckpointError: If the folder's weights do not hold the head.
    """
    if model.location is None:
        message = (
            f"model {model.name!r} was loaded without its {head}, and is in no folder to fetch it "
            "from; give the model by name"
        )
        raise ModelError(message)
    auto = getattr(transformers, auto_class)
    # weights are mapped from their file, so those of the second base are never read
    try:
        with without_progress_bars():
            whole, info = auto.from_pretrained(
                model.location,
                config=model.module.config,
                dtype=model.dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                trust_remote_code=type(model.module).__module__.startswith("transformers_modules"),
            )
    except GenoembedError:
        raise
    except (OSError, ImportError, *NONSENSE) as error:
        message = (
            f"model {model.name!r}: it has no {head} ({first_line(error)}); set model to one that was "
            "trained to predict tokens"
        )
        raise ModelError(message) from error
    prefix = whole.base_model_prefix
    is_same = type(getattr(whole, prefix, None)) is type(model.module)
    lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if is_same:  # loading the base has looked at these
        lacking = [key for key in lacking if not key.startswith(f"{prefix}.")]
    if lacking:
        message = (
            f"the checkpoint holds no {head} ({lacking[0]} is missing or of another shape), so "
            f"probabilities would be random; save the model with its head ({auto_class})"
        )
        raise CheckpointError(message, path=str(model.location))
    if model.adapter is not None:
        from genoembed.models.adapters import merge_adapter

        merge_adapter(model.adapter, whole)
    if is_same:
        setattr(whole, prefix, model.module)
    whole = whole.to(model.device).eval()
    return whole, base_of(whole)
