"""The models that genoembed knows by name, the bundled one and the official Evo 2 checkpoints; and adapters.

Sizes and digests of the files are as published with another open reader of these checkpoints; parameter
counts follow from the configurations (tied output embedding counted once).
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from genoembed.errors import CheckpointError, ConfigError, ModelNotFoundError
from genoembed.models.names import BUNDLED_NAME, suggestion
from genoembed.models.provenance import CONFIG, WEIGHTS, content_digest, file_digest, folder_content
from genoembed.models.striped_hyena2.shape import StripedHyena2Shape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from genoembed.models.geneb import PublishedModel

BUNDLED_FOLDER = Path(__file__).parent / "bundled"
BUNDLED_FACTS = "bundled.json"
"""What the bundled folder says beside its configuration: ``vectors`` and ``earlier_weights``."""

_FP8_NEEDED = (
    "trained with 8-bit (FP8) input projections, without which its predictions are much worse than "
    "published; they run in hardware on Hopper GPUs, and emulated bit for bit elsewhere, which takes longer"
)
_FP8_OPTIONAL = "gives the published numbers in bfloat16, without FP8"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFile:
    """One file of a checkpoint, as its repository names it."""

    name: str
    """File name; ``.part0``, ``.part1`` ... are pieces of one file, to be concatenated."""
    num_bytes: int | None = None
    """Size, where known."""
    sha256: str | None = None
    """SHA-256 in hexadecimal digits, where known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownModel:
    """A model with a name of its own."""

    name: str
    summary: str
    """What it is, in a few words."""
    config: Mapping[str, Any]
    """Arguments of ``StripedHyena2Config``."""
    license: str = "Apache-2.0"
    """SPDX identifier."""
    repo_id: str | None = None
    """Hugging Face repository; None for the bundled model."""
    files: tuple[CheckpointFile, ...] = ()
    """What to fetch from the repository, pieces in order."""
    merged_sha256: str | None = None
    """SHA-256 of the concatenated pieces, if known."""
    needs_fp8: bool = False
    """Whether the published numbers need 8-bit input projections."""
    vectors: Mapping[str, Any] = field(default_factory=dict)
    """Layers, pooling and fusion of its vectors where the caller names none, as ``extract`` takes them."""
    earlier_weights: tuple[str, ...] = ()
    """SHA-256 of the weights that it had before these, version 1 first."""

    @property
    def context(self) -> int:
        """Longest input, in tokens (one token, one base)."""
        return self.shape.max_position_embeddings

    @property
    def num_parameters(self) -> int:
        """Weights, the tied output embedding counted once."""
        return count_parameters(self.shape)

    @property
    def precision_note(self) -> str:
        """What FP8 means for its numbers."""
        if self.repo_id is None:
            return "runs anywhere in float32"
        return _FP8_NEEDED if self.needs_fp8 else _FP8_OPTIONAL

    @property
    def num_bytes(self) -> int | None:
        """Size of all files together, or None where one is unknown."""
        sizes = [file.num_bytes for file in self.files]
        return None if not sizes or None in sizes else sum(size for size in sizes if size is not None)

    @property
    def shape(self) -> StripedHyena2Shape:
        """The model's configuration, without transformers."""
        return StripedHyena2Shape(**self.config, checkpoint_name=self.name)


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """A folder of peft."""

    folder: Path
    values: Mapping[str, Any]
    """What its ``adapter_config.json`` says."""

    @property
    def base(self) -> str:
        """Name of the model that it changes."""
        return str(self.values["base_model_name_or_path"])

    @property
    def base_revision(self) -> str | None:
        """Revision of that model, if one is named."""
        return self.values.get("revision") or None

    @property
    def statement(self) -> dict[str, Any]:
        """What a file says about it."""
        return {"kind": self.values["peft_type"], "base": self.base, "base_revision": self.base_revision}

    @property
    def weights(self) -> Path:
        """File of its weights."""
        found = [path for name in ADAPTER_WEIGHTS if (path := self.folder / name).is_file()]
        if not found:
            message = f"it holds {ADAPTER_CONFIG}, but no {' or '.join(ADAPTER_WEIGHTS)}; fetch it again"
            raise CheckpointError(message, path=str(self.folder))
        return found[0]

    def content(self, base: Mapping[str, str]) -> dict[str, str]:
        """Compute the digests of a model with this adapter; ``base`` are those of the model without."""
        own = folder_content(self.folder)
        del own[WEIGHTS]
        own.pop(CONFIG, None)  # the base's is read
        weights = content_digest({"base": base.get(WEIGHTS, ""), "adapter": file_digest(self.weights)})
        return {**base, **own, WEIGHTS: weights}


def read_adapter(folder: Path) -> Adapter | None:
    """Read what a folder says about the adapter in it; None where there is none."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        base, kind = values["base_model_name_or_path"], values["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        message = f"it describes no adapter ({type(error).__name__}: {error}); fetch the folder again"
        raise CheckpointError(message, path=str(path)) from error
    if not (isinstance(base, str) and base and isinstance(kind, str)):
        message = "it names no base_model_name_or_path; write there which model the adapter is for"
        raise CheckpointError(message, path=str(path))
    if values.get("megatron_config"):
        message = "it names code to import (megatron_config), which is not run; remove that line"
        raise CheckpointError(message, path=str(path))
    return Adapter(folder=folder, values=values)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """Where a model comes from."""

    name: str
    """The name as given."""
    location: str
    """Local folder or Hugging Face id, as ``from_pretrained`` takes it."""
    is_local: bool
    entry: KnownModel | None = None
    """The registry's entry, if the name is one."""
    published: PublishedModel | None = None
    """The model of the GENEB benchmark that the name stands for, if it is one."""
    revision: str | None = None
    """What to fetch of a Hugging Face repository; None is its newest state."""
    adapter: Adapter | None = None
    """What changes the model that lies at the location, if the name stands for an adapter."""

    @property
    def folder(self) -> Path | None:
        """The local folder; None for a Hugging Face id."""
        return Path(self.location) if self.is_local else None

    def revision_for(self, given: str | None) -> str | None:
        """Return what to fetch of a repository: what was given, else what a short name stands for."""
        is_short_name = self.published is not None and self.name != self.location
        return self.published.branch if given is None and is_short_name and self.published else given


def known_models() -> tuple[KnownModel, ...]:
    """List the models that have short names, the bundled one first.

    Returns:
        All of them.

    Example:
        >>> [model.name for model in known_models()][:3]
        ['genoembed-mini', 'evo2_1b_base', 'evo2_7b']
    """
    return (_bundled(BUNDLED_FOLDER), *_OFFICIAL)


def entry_named(name: str | None) -> KnownModel | None:
    """Return the model that has exactly this name, if one has."""
    return next((model for model in known_models() if model.name == name), None)


def name_earlier_weights(digest: str | None) -> str | None:
    """Return whose weights had this SHA-256 before others took their place; None for all other weights."""
    for model in known_models():
        if digest in model.earlier_weights:
            version = model.earlier_weights.index(digest) + 1
            return f"{model.name} of version {version}, whose weights were exchanged since"
    return None


def find_model(name: str) -> KnownModel:
    """Look a model up by its name.

    Example:
        >>> find_model("evo2_7b").context
        1048576
    """
    if entry := entry_named(name):
        return entry
    names = [model.name for model in known_models()]
    message = f"model {name!r} is not known ({', '.join(names)}); {suggestion(name, is_converted=True)}"
    raise ModelNotFoundError(message)


@cache
def _bundled(folder: Path) -> KnownModel:
    """Describe the bundled model by its own files, so that the two cannot differ."""
    config = _bundled_config(folder / "config.json")
    facts = read_bundled_facts(folder)
    fields = inspect.signature(StripedHyena2Shape).parameters
    return KnownModel(
        name=BUNDLED_NAME,
        summary="small StripedHyena 2 inside the package, layers as in Evo 2 7B",
        config=MappingProxyType({key: value for key, value in config.to_dict().items() if key in fields}),
        vectors=MappingProxyType({key: _as_option(value) for key, value in facts["vectors"].items()}),
        earlier_weights=tuple(facts["earlier_weights"]),
    )


def read_bundled_facts(folder: Path) -> dict[str, Any]:
    """Read what a bundled folder says beside its configuration; a folder without the file says nothing."""
    path = folder / BUNDLED_FACTS
    nothing: dict[str, Any] = {"vectors": {}, "earlier_weights": []}
    if not path.is_file():
        return nothing
    try:
        return nothing | dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        message = f"model {BUNDLED_NAME!r}: {path} is damaged ({error}); install genoembed again"
        raise ModelNotFoundError(message) from error


def _as_option(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _bundled_config(path: Path) -> StripedHyena2Shape:
    """Read the folder's configuration; a source tree may not hold the weights yet."""
    if not path.is_file():
        return StripedHyena2Shape(num_attention_heads=2)
    try:
        return StripedHyena2Shape(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, ConfigError) as error:
        message = f"model {BUNDLED_NAME!r}: {path} is damaged ({error}); install genoembed again"
        raise ModelNotFoundError(message) from error


def count_parameters(config: StripedHyena2Shape) -> int:
    """Add up the weights of a StripedHyena 2 model, without building it.

    Example:
        >>> count_parameters(find_model("evo2_7b").shape)
        6581722880
    """
    width = config.hidden_size
    projections = 3 * width * (width + bool(config.qkv_proj_bias))
    output = width * width
    hyena = projections + 3 * width * config.short_filter_length + output
    hyena += width * bool(config.hyena_out_proj_bias)
    mixers = {
        "attention": projections + output + width * bool(config.mha_out_proj_bias),
        "hcs": hyena + config.hcs_filter_groups * config.hcs_filter_length,
        "hcm": hyena + config.hcm_filter_groups * config.hcm_filter_length + width,
        "hcl": hyena + 2 * width * config.state_size + width,
    }
    norms_and_mlp = 2 * width + 3 * width * config.intermediate_size
    blocks = (mixers[config.block_kind(index)] + norms_and_mlp for index in range(config.num_hidden_layers))
    return config.vocab_size * width + sum(blocks) + width


_KINDS = {"s": "hcs_layer_idxs", "m": "hcm_layer_idxs", "l": "hcl_layer_idxs", "A": "attn_layer_idxs"}
_PERIOD = "smlAsml"
"""Mixers of consecutive blocks: Hyena with a short, medium and long filter, and attention."""
_BLOCKS_32 = (5 * _PERIOD)[:32]
# blocks, width, filter groups of the medium and short filters
_1B = (_BLOCKS_32[:25], 1920, 128)
_7B = (_BLOCKS_32, 4096, 256)
_20B = (_BLOCKS_32[:24], 8192, 512)
_40B = (f"{_BLOCKS_32}smlA{2 * 'smlsmlA'}", 8192, 512)


def _config(
    size: tuple[str, int, int], *, inner: int, context: int, rope_base: float = 1e4, rope_factor: float = 1.0
) -> Mapping[str, Any]:
    """Write out what differs between the released models; head size is 128 in all of them."""
    blocks, width, groups = size
    values = {
        key: tuple(index for index, block in enumerate(blocks) if block == kind)
        for kind, key in _KINDS.items()
    } | {
        "num_hidden_layers": len(blocks),
        "hidden_size": width,
        "num_attention_heads": width // 128,
        "intermediate_size": inner,
        "hcs_filter_groups": groups,
        "hcm_filter_groups": groups,
        "max_position_embeddings": context,
        "rotary_emb_base": rope_base,
        "rotary_emb_scaling_factor": rope_factor,
    }
    return MappingProxyType(values)


def _evo2(
    name: str,
    summary: str,
    config: Mapping[str, Any],
    *files: tuple[str, int | None, str | None],
    needs_fp8: bool = False,
    repo_id: str | None = None,
) -> KnownModel:
    return KnownModel(
        name=name,
        summary=summary,
        config=config,
        repo_id=repo_id or f"arcinstitute/{name}",
        files=tuple(CheckpointFile(name=f, num_bytes=size, sha256=digest) for f, size, digest in files),
        needs_fp8=needs_fp8,
    )


_7B_8K = _config(_7B, inner=11008, context=32768)

_OFFICIAL: tuple[KnownModel, ...] = (
    _evo2(
        "evo2_1b_base",
        "Evo 2 1B, trained at 8 kb",
        _config(_1B, inner=5120, context=8192),
        ("evo2_1b_base.pt", 2698327083, "8ffba7d0e6445a8f2c92d9ff1c4e772c7f73ca9179f5e0c699b8b0ca1b966f64"),
        needs_fp8=True,
    ),
    _evo2(
        "evo2_7b",
        "Evo 2 7B, context 1 Mb",
        _config(_7B, inner=11264, context=1048576, rope_factor=128.0),
        ("evo2_7b.pt", 13766621200, "c66645929dc1b9c631f5be656da8726f38946315dc9167000a615dd626fcecf4"),
    ),
    _evo2(
        "evo2_7b_base",
        "Evo 2 7B, trained at 8 kb",
        _7B_8K,
        ("evo2_7b_base.pt", 13006429947, "d8a0e775a5d849921b8725837c6a3cbc71fa15e712f4189a2ed52ef955aad29b"),
    ),
    _evo2(
        "evo2_7b_262k",
        "Evo 2 7B, context 262 kb",
        _config(_7B, inner=11008, context=262144, rope_factor=32.0),
        ("evo2_7b_262k.pt", 13860249112, "887d009cb9eaf059e4cc4304861d7196f378c085581a1d9c037b4f8ba6ad623a"),
    ),
    _evo2(
        "evo2_7b_microviridae",
        "Evo 2 7B base, tuned on Microviridae genomes",
        _7B_8K,
        ("evo2_7b_microviridae.pt", None, None),
        repo_id="evo-design/evo-2-7b-8k-microviridae",
    ),
    _evo2(
        "evo2_20b",
        "Evo 2 20B, context 1 Mb",
        _config(_20B, inner=22528, context=1048576, rope_base=1e6, rope_factor=128.0),
        ("evo2_20b.pt", 47945795557, "979b345dc700a9cae6b63f570d9b3f438e31a68dd8dc0bc0d8d2a0fcd3caf791"),
        needs_fp8=True,
    ),
    _evo2(
        "evo2_40b",
        "Evo 2 40B, context 1 Mb",
        _config(_40B, inner=22528, context=1048576, rope_base=1e6, rope_factor=128.0),
        ("evo2_40b.pt.part0", 41126745847, None),
        ("evo2_40b.pt.part1", 41126745847, None),
        needs_fp8=True,
    ),
    _evo2(
        "evo2_40b_base",
        "Evo 2 40B, trained at 8 kb",
        _config(_40B, inner=21888, context=8192, rope_base=1e6),
        ("evo2_40b_base.pt.part0", 40340310342, None),
        ("evo2_40b_base.pt.part1", 40340310341, None),
        needs_fp8=True,
    ),
)
