"""Turn a StripedHyena 2 checkpoint in its original format into a safetensors folder.

In: a ``.pt`` file, the pieces of one (``.pt.part0`` ...), or a ``.safetensors`` file with the original keys.
Out: a folder that ``AutoModel`` and ``AutoModelForCausalLM`` open, in the key names and row order of the
original. Promised: no code of the checkpoint runs, no tensor is missing, left over or of another shape, the
folder appears complete or not at all, and memory stays near the size of one shard. A checkpoint that is not
in the registry is described by its original YAML.
"""

from __future__ import annotations

import difflib
import io
import json
import logging
import pickle
import re
import shutil
import struct
import zipfile
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from genoembed.atomic import check_folder, replacing_folder
from genoembed.config.paths import check_paths
from genoembed.errors import CheckpointError, ConfigError, InputFileError, ModelError, first_line
from genoembed.models.architecture import NAMES_SHOWN, NONSENSE, listing
from genoembed.models.registry import KnownModel, known_models
from genoembed.models.striped_hyena2.blocks import rotary_frequencies
from genoembed.models.striped_hyena2.configuration import StripedHyena2Config
from genoembed.models.striped_hyena2.network import PlainStripedHyena2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from genoembed.models.striped_hyena2.shape import Fp8Need


_LOG = logging.getLogger(__name__)

_IGNORED_SUFFIXES = ("_extra_state", "mixer.mixer.filter.t")
_SCALES = ".projections.fp8_scales"
_FLOAT32_SUFFIXES = ("log_poles", "residues", "inv_freq", _SCALES)
_FP8_STATE = re.compile(r"(?P<block>blocks\.\d+)\.projections\._extra_state")
_MAX_STATE_BYTES = 1 << 20
_FREQUENCY_SUFFIX = "rotary_emb.inv_freq"
_EMBEDDING = "embedding_layer.weight"
_UNEMBEDDING = "unembed.weight"
_PART = re.compile(r"(?P<base>.+\.pt)\.part(?P<number>\d+)")
# what torch's reader raises on damaged bytes, in addition to UnpicklingError
_DAMAGE_ERRORS = (
    RuntimeError, SafetensorError, EOFError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, OverflowError, MemoryError, struct.error,
)  # fmt: skip


def convert_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    *,
    name: str | None = None,
    config: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Path:
    """Convert a checkpoint.

    Args:
        source: ``.pt``, any piece or the base name of ``.pt.part*``, or ``.safetensors``.
        output_dir: Folder to write.
        name: Registry name of the checkpoint; None reads it off the file name.
        config: YAML description of a checkpoint that is not in the registry; not together with ``name``.
        dtype: Type of the stored weights; None means bfloat16, as the original runs them. Poles, residues and
            rotary frequencies are float32 in any case.
        max_shard_bytes: Largest shard, in bytes; one tensor is never cut.
        overwrite: Replace ``output_dir`` where it exists.

    Returns:
        The folder.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged, holds code, or does not fit its configuration.
        ModelError: If the configuration is not given and cannot be derived from the file name or is given
            twice, the folder exists, or it holds the checkpoint itself.
    """
    source, output_dir = Path(source), Path(output_dir)
    described = [config] if isinstance(config, str | Path) else []
    check_paths(
        [], [(output_dir, "folder")], may_read=[path for path in (source, *described) if Path(path).exists()]
    )
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    check_folder(output_dir, overwrite=overwrite)
    files = checkpoint_files(source)
    entry, model_config = _describe(source, name=name, config=config)
    with replacing_folder(output_dir, overwrite=overwrite) as folder:
        whole = _join_parts(files, folder) if len(files) > 1 else files[0]
        tensors = read_tensors(whole, path=source)
        scales = {key: tensors.pop(key) for key in list(tensors) if key.endswith(_SCALES)}
        tensors = _fitted(tensors, model_config, path=source)
        model_config.fp8_projections = _fp8_need(scales, model_config, entry, path=source)
        if model_config.fp8_projections != "none":  # of some blocks they are of no use
            tensors |= scales
        dtype = torch.bfloat16 if dtype is None else dtype
        _save_shards(tensors, folder, dtype=dtype, max_shard_bytes=max_shard_bytes)
        model_config.dtype = dtype
        model_config.architectures = ["StripedHyena2ForCausalLM"]
        model_config.save_pretrained(folder)
        _save_tokenizer(folder)
        _write_card(folder, files, entry)
        if whole not in files:
            whole.unlink()
    _LOG.info("converted %s to %s (%d tensors)", source, output_dir, len(tensors))
    return output_dir


def checkpoint_files(source: Path) -> tuple[Path, ...]:
    """Find the file, or all pieces, of a checkpoint."""
    if source.is_file() and not _PART.fullmatch(source.name):
        return (source,)
    part = _PART.fullmatch(source.name)
    base = part.group("base") if part else source.name
    parts = {}
    for path in source.parent.glob(f"{base}.part*"):
        if found := _PART.fullmatch(path.name):
            parts[int(found.group("number"))] = path
    if not parts:
        message = "file not found, and no pieces .part0, .part1 ... of it; check the path of the checkpoint"
        raise CheckpointError(message, path=str(source))
    absent = sorted(set(range(max(parts) + 1)) - parts.keys())
    if absent:
        message = (
            f"found pieces {sorted(parts)}, but pieces {absent} are missing; fetch {base}.part{absent[0]} too"
        )
        raise CheckpointError(message, path=str(source))
    return tuple(parts[number] for number in sorted(parts))


def read_tensors(whole: Path, *, path: Path) -> dict[str, Callable[[], Tensor]]:
    """Open a checkpoint without running anything in it and without reading the weights yet."""
    try:
        if whole.suffix != ".safetensors":
            return _open_pickle(whole, path)
        stored = safe_open(whole, framework="pt")
        states = {key: stored.get_tensor(key) for key in stored.keys() if _FP8_STATE.fullmatch(key)}
        kept = [key for key in stored.keys() if not key.endswith(_IGNORED_SUFFIXES)]
        return {key: partial(stored.get_tensor, key) for key in kept} | _fp8_scales(states)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):  # torch's own words advise to run whatever it holds
            reason = "not in PyTorch's format"
            raise _unreadable(reason, path) from error
        message = (
            "it holds Python objects other than tensors, which could run code; rejected, nothing was run. "
            "Expected tensors only; get the checkpoint from its authors"
        )
        raise CheckpointError(message, path=str(path)) from error
    except _DAMAGE_ERRORS as error:
        if isinstance(error, CheckpointError):
            raise
        raise _unreadable(first_line(error), path) from error


def _unreadable(reason: str, path: Path) -> CheckpointError:
    message = f"cannot be read as a checkpoint ({reason}); it may be cut short, fetch it again"
    return CheckpointError(message, path=str(path))


def _open_pickle(whole: Path, path: Path) -> dict[str, Callable[[], Tensor]]:
    # the released files carry what their FP8 kernels need as byte buffers
    with torch.serialization.safe_globals([io.BytesIO]):
        stored = torch.load(whole, map_location="cpu", mmap=_is_zip(whole), weights_only=True)
    if isinstance(stored, dict) and isinstance(stored.get("module"), dict):
        stored = stored["module"]
    if not isinstance(stored, dict):
        message = f"holds a {type(stored).__name__}, expected tensors by name; check the file"
        raise CheckpointError(message, path=str(path))
    found = {str(key).removeprefix("module."): value for key, value in stored.items()}
    kept = {key: value for key, value in found.items() if not key.endswith(_IGNORED_SUFFIXES)}
    foreign = [key for key, value in kept.items() if not isinstance(value, Tensor)]
    if foreign:
        message = f"{listing(foreign)} hold no tensors, expected tensors only; check the file"
        raise CheckpointError(message, path=str(path))
    return {key: partial(torch.Tensor.detach, value) for key, value in kept.items()} | _fp8_scales(found)


def _fp8_scales(states: Mapping[str, object]) -> dict[str, Callable[[], Tensor]]:
    """Read what the projections of Hyena blocks are multiplied with in FP8, by the names of our tensors.

    Blocks whose state cannot be read safely are left out, with a word.
    """
    scales: dict[str, Callable[[], Tensor]] = {}
    for key, state in states.items():
        if name := _FP8_STATE.fullmatch(key):
            try:
                read = _read_scales(state)
            except pickle.UnpicklingError:  # torch's own words advise to run whatever it holds
                _LOG.info("%s: its FP8 scales are left out: it holds Python objects other than tensors", key)
            except (*_DAMAGE_ERRORS, zipfile.BadZipFile) as error:
                _LOG.info("%s: its FP8 scales are left out: %s", key, first_line(error))
            else:
                scales[f"{name['block']}{_SCALES}"] = partial(torch.Tensor.detach, read)
    return scales


def _read_scales(state: object) -> Tensor:
    """Read the scales of inputs and weights from the state that Transformer Engine keeps for a layer."""
    # Releases below 2 keep a file of torch.save in a buffer, later ones pickled bytes in a tensor. The latter
    # are never opened: to unpickle them would run whatever code they hold.
    if isinstance(state, Tensor):
        data = bytes(state.flatten().view(torch.uint8)[: _MAX_STATE_BYTES + 1].tolist())
    elif isinstance(state, io.BytesIO):
        data = state.getvalue()
    else:
        message = f"a {type(state).__name__}, expected the bytes of a file written by torch.save"
        raise TypeError(message)
    if len(data) > _MAX_STATE_BYTES or not data.startswith(b"PK"):
        message = f"{len(data)} bytes that are no small file written by torch.save"
        raise ValueError(message)
    with zipfile.ZipFile(io.BytesIO(data)) as members:
        if sum(member.file_size for member in members.infolist()) > _MAX_STATE_BYTES:
            message = "they unpack to far more than scales"
            raise ValueError(message)
    content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    # of the input and the weight; the third one is for the output, which stays bfloat16
    scales: Tensor = content["scale_fwd"][:2].clone()
    if (
        scales.dtype != torch.float32
        or scales.shape != (2,)
        or not bool(((0 < scales) & (scales < inf)).all())
    ):
        message = f"scale_fwd is {content['scale_fwd']}, expected float32 numbers above 0"
        raise ValueError(message)
    return scales


def _is_zip(whole: Path) -> bool:
    with whole.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _describe(
    source: Path, *, name: str | None, config: str | Path | None
) -> tuple[KnownModel | None, StripedHyena2Config]:
    """Find the configuration: the given file, the given name, or the name that the file bears."""
    if name is not None and config is not None:
        message = f"{source}: both name and config are given, expected one; leave one out"
        raise ModelError(message)
    if config is not None:
        return None, read_vortex_config(Path(config))
    wanted = name if name is not None else re.sub(r"\.(pt(\.part\d+)?|safetensors)$", "", source.name)
    entries = {entry.name: entry for entry in known_models() if entry.files}
    if wanted not in entries:
        message = (
            f"{source}: {wanted!r} is not the name of a known checkpoint ({', '.join(entries)}); "
            "set name to one of them, or config to a YAML description"
        )
        raise ModelError(message)
    return entries[wanted], StripedHyena2Config.from_dict(entries[wanted].shape.to_dict())


def _fp8_need(
    scales: Mapping[str, object], config: StripedHyena2Config, entry: KnownModel | None, *, path: Path
) -> Fp8Need:
    """Return whether the projections have scales and need them; raise if a model that needs them has none."""
    indices = range(config.num_hidden_layers)
    hyena_blocks = [index for index in indices if config.block_kind(index) != "attention"]
    absent = [index for index in hyena_blocks if f"blocks.{index}{_SCALES}" not in scales]
    is_needed = config.fp8_projections == "needed" if entry is None else entry.needs_fp8
    if hyena_blocks and not absent:
        return "needed" if is_needed else "optional"
    if entry is not None and is_needed:
        names = listing([f"blocks.{index}.projections._extra_state" for index in absent])
        message = (
            f"{entry.name} needs FP8 scales, but none can be read of {names}; without them it gives other "
            "numbers; fetch the checkpoint again"
        )
        raise CheckpointError(message, path=str(path))
    if is_needed:
        _LOG.warning("%s: no FP8 scales are stored; the projections will run without FP8", path)
    return "none"


def _fitted(
    tensors: dict[str, Callable[[], Tensor]], config: StripedHyena2Config, *, path: Path
) -> dict[str, Callable[[], Tensor]]:
    """Check names and shapes against the configuration; drop the tied copy, fill in absent frequencies."""
    with torch.device("meta"):
        state = PlainStripedHyena2(config).state_dict()
    expected = {key: tensor for key, tensor in state.items() if not key.endswith(_SCALES)}
    tensors = dict(tensors)
    unembedding = tensors.pop(_UNEMBEDDING, None)
    absent = [key for key in expected if key not in tensors]
    if absent and all(key.endswith(_FREQUENCY_SUFFIX) for key in absent):
        _LOG.warning("%s: rotary frequencies are not stored; computed from rotary_emb_base", path)
        head_size = config.hidden_size // config.num_attention_heads
        computed = partial(rotary_frequencies, head_size, config.rotary_emb_base)
        tensors.update(dict.fromkeys(absent, computed))
        absent = []
    problems = []
    if absent:
        problems.append(f"{len(absent)} tensors are missing ({listing(absent)})")
    if extra := [key for key in tensors if key not in expected]:
        problems.append(f"{len(extra)} tensors have no place in the model ({listing(extra)})")
    shapes = {key: tuple(tensors[key]().shape) for key in expected if key in tensors}
    wrong = [
        f"{key} is {shape}, expected {tuple(expected[key].shape)}"
        for key, shape in shapes.items()
        if shape != tuple(expected[key].shape)
    ]
    if wrong:
        problems.append(f"{len(wrong)} tensors have another shape ({'; '.join(wrong[:NAMES_SHOWN])})")
    if not problems and unembedding is not None and not torch.equal(unembedding(), tensors[_EMBEDDING]()):
        problems.append(f"{_UNEMBEDDING} differs from {_EMBEDDING}, expected one tied matrix")
    if problems:
        message = f"{'; '.join(problems)}; check that name or config belongs to this checkpoint"
        raise CheckpointError(message, path=str(path))
    return {key: tensors[key] for key in expected}


def _join_parts(files: tuple[Path, ...], folder: Path) -> Path:
    needed = sum(path.stat().st_size for path in files)
    free = shutil.disk_usage(folder).free
    if free < needed:
        message = (
            f"joining the pieces needs {needed} bytes, but {free} are free at {folder.parent}; make room"
        )
        raise CheckpointError(message, path=str(files[0]))
    whole = folder / "whole.pt"
    with whole.open("wb") as joined:
        for path in files:
            with path.open("rb") as piece:
                shutil.copyfileobj(piece, joined, length=1 << 24)
    return whole


def _save_shards(
    tensors: Mapping[str, Callable[[], Tensor]], folder: Path, *, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Write safetensors shards one at a time, with the index that transformers expects."""
    shard: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    shard_bytes = total_bytes = 0

    def flush() -> None:
        shards.append(list(shard))
        save_file(shard, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shard.clear()

    for key, read in tensors.items():
        kept = torch.float32 if key.endswith(_FLOAT32_SUFFIXES) else dtype
        # cloned, because a stored tensor may be a view into a larger one
        tensor = read().to(kept).clone(memory_format=torch.contiguous_format)
        num_bytes = tensor.numel() * tensor.element_size()
        if shard and shard_bytes + num_bytes > max_shard_bytes:
            flush()
            shard_bytes = 0
        shard[key] = tensor
        shard_bytes += num_bytes
        total_bytes += num_bytes
    flush()
    _name_shards(shards, folder, total_bytes)


def _name_shards(shards: list[list[str]], folder: Path, total_bytes: int) -> None:
    if len(shards) == 1:
        (folder / "part-1").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file_name)
        weight_map.update(dict.fromkeys(keys, file_name))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _save_tokenizer(folder: Path) -> None:
    tokenizer_class = TOKENIZER_MAPPING.get(StripedHyena2Config, None)
    if tokenizer_class is None:
        message = "StripedHyena2Config: no tokenizer is registered with transformers; import genoembed first"
        raise ModelError(message)
    tokenizer_class().save_pretrained(folder)


def _write_card(folder: Path, files: Iterable[Path], entry: KnownModel | None) -> None:
    lines = ["---", f"license: {entry.license.lower() if entry else 'unknown'}", "library_name: transformers"]
    lines += ["---", "", f"# {entry.name if entry else 'StripedHyena 2'}", ""]
    lines += ["Converted by genoembed from the original checkpoint:", ""]
    lines += [f"- `{path.name}`, {path.stat().st_size} bytes" for path in files]
    if entry is not None:
        lines += ["", f"Repository `{entry.repo_id}`: {entry.summary}, context {entry.context} tokens."]
        lines += ["", f"Precision: {entry.precision_note}."]
    lines += ["", "Tensors keep the original names and row order."]
    lines += ["", "Open it with `import genoembed` and `AutoModelForCausalLM.from_pretrained`.", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


_RENAMED = {
    "num_layers": "num_hidden_layers",
    "inner_mlp_size": "intermediate_size",
    "eps": "rms_norm_eps",
    "max_seqlen": "max_position_embeddings",
} | {
    key: key
    for key in (
        "vocab_size hidden_size num_attention_heads attn_layer_idxs hcl_layer_idxs hcm_layer_idxs "
        "hcs_layer_idxs short_filter_length hcs_filter_length hcm_filter_length hcs_filter_groups "
        "hcm_filter_groups state_size rotary_emb_base interleave evo2_style_activations "
        "mlp_activation qkv_proj_bias mha_out_proj_bias hyena_out_proj_bias"
    ).split()
}
"""Key of the description -> argument of ``StripedHyena2Config``."""
_REQUIRED = (
    "vocab_size hidden_size num_layers num_attention_heads attn_layer_idxs hcl_layer_idxs hcm_layer_idxs "
    "hcs_layer_idxs hcs_filter_groups hcm_filter_groups state_size max_seqlen"
).split()
_FIXED: dict[str, Any] = {
    "column_split": True,
    "column_split_hyena": False,
    "hyena_flip_x1x2": False,
    "proj_groups": 1,
    "final_norm": True,
    "tie_embeddings": True,
    "short_filter_bias": False,
    "tokenizer_type": "CharLevelTokenizer",
}
_DERIVED = (
    "rotary_emb_scaling_factor",
    "use_interpolated_rotary_pos_emb",
    "inner_size_multiple_of",
    "model_parallel_size",
    "model_name",
    "use_fp8_input_projections",
)
_WITHOUT_EFFECT = frozenset(
    (
        "num_filters hcl_filter_groups hyena_filter_groups mlp_init_method "
        "mlp_output_init_method make_vocab_size_divisible_by log_intermediate_values "
        "pipe_parallel_size max_batch_size use_flash_attn use_flash_rmsnorm use_flash_depthwise "
        "use_flashfft use_laughing_hyena use_hcs_kernel use_hcm_kernel use_hcl_kernel inference_mode "
        "prefill_style print_activations"
    ).split()
)
"""How the original trains, prints and runs; nothing here changes a value of the model."""


def read_vortex_config(path: Path) -> StripedHyena2Config:
    """Read a model description."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        message = f"cannot be read ({error.strerror}); check the path of config"
        raise InputFileError(message, path=str(path)) from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        message = f"{path}: is not YAML ({type(error).__name__}), expected one mapping; check config"
        raise ConfigError(message) from error
    if not isinstance(content, dict):
        message = f"{path}: holds a {type(content).__name__}, expected one mapping; check config"
        raise ConfigError(message)
    missing = [f"key {key!r} is missing; add it" for key in _REQUIRED if key not in content]
    problems = [*_unknown_keys(content), *missing, *_contradictions(content)]
    if problems:
        raise ConfigError(*(f"{path}: {problem}" for problem in problems))
    try:
        return StripedHyena2Config(**vortex_arguments(content))
    except ConfigError:
        raise
    except NONSENSE as error:  # a text or a list in the place of a number
        reason = " ".join(str(error).split()) or type(error).__name__
        message = f"{path}: a value is of another kind than its key needs ({reason}); check config"
        raise ConfigError(message) from error


def vortex_arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a checked description into arguments of ``StripedHyena2Config``.

    Example:
        >>> vortex_arguments({"hidden_size": 48, "eps": "1e-6"})["intermediate_size"]
        128
    """
    arguments = {_RENAMED[key]: value for key, value in content.items() if key in _RENAMED}
    if "rms_norm_eps" in arguments:
        arguments["rms_norm_eps"] = float(arguments["rms_norm_eps"])  # YAML 1.1 reads 1e-6 as text
    if "rotary_emb_base" in arguments:
        arguments["rotary_emb_base"] = float(arguments["rotary_emb_base"])
    if content.get("use_interpolated_rotary_pos_emb"):
        arguments["rotary_emb_scaling_factor"] = float(content["rotary_emb_scaling_factor"])
    # the original's own rule: only models called 7B may run without FP8
    if content.get("use_fp8_input_projections") and "7b" not in str(content.get("model_name", "")).lower():
        arguments["fp8_projections"] = "needed"
    if arguments.get("intermediate_size") is None:
        multiple = content.get("inner_size_multiple_of", 64) * content.get("model_parallel_size", 1)
        inner = int(2 * content["hidden_size"] * 4 / 3)
        arguments["intermediate_size"] = -(-inner // multiple) * multiple
    return arguments


def _unknown_keys(content: Mapping[str, Any]) -> list[str]:
    known = [*_RENAMED, *_FIXED, *_DERIVED, *sorted(_WITHOUT_EFFECT)]
    problems = []
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it"
            problems.append(f"key {key!r} is not known; {hint}")
    return problems


def _contradictions(content: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{key} is {content[key]!r}, expected {value!r} in every StripedHyena 2 model; check config"
        for key, value in _FIXED.items()
        if content.get(key, value) != value
    ]
    if content.get("use_interpolated_rotary_pos_emb") and "rotary_emb_scaling_factor" not in content:
        problems.append(
            "use_interpolated_rotary_pos_emb is set without rotary_emb_scaling_factor; add the factor"
        )
    return problems
