"""Load any genomic language model through one door.

In: a name (bundled, registry, local folder or checkpoint file, Hugging Face id). Out: a `GenomicModel`: the
base model in eval mode, its tokenizer, and the facts that the other stages need. StripedHyena 2 folders are
read here; whatever else there is, and whatever is out of the ordinary in them, by
:mod:`genoembed.models.pretrained`, which imports transformers.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import torch

from genoembed.config.choices import Fp8Choice
from genoembed.contracts import ByteTokens
from genoembed.errors import CheckpointError, ModelError, PrecisionWarning, first_line, foreign_code
from genoembed.models.genomic_model import GenomicModel
from genoembed.models.locate import find_source, say_inner_folder
from genoembed.models.names import BUNDLED_NAME
from genoembed.models.precision import automatic_dtype
from genoembed.models.registry import ModelSource, entry_named
from genoembed.models.striped_hyena2.folder import read_network
from genoembed.models.trained_folder import FACTS_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from genoembed.config.choices import ComputeDtype
    from genoembed.models.registry import KnownModel
    from genoembed.models.striped_hyena2.network import PlainStripedHyena2

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name_or_path: str = BUNDLED_NAME,
    *,
    device: str | torch.device | None = None,
    dtype: ComputeDtype | torch.dtype | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    fp8: Fp8Choice = "auto",
) -> GenomicModel:
    """Load a model and its tokenizer.

    Args:
        name_or_path: Bundled or registry name, local folder or checkpoint file, short name of a published
            model (`published_models`), or Hugging Face id; looked for in this order. A checkpoint file is
            converted the first time.
        device: Where to run; None takes CUDA if present, else the CPU; ``auto`` is ``device_map="auto"``.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None or ``auto`` takes bfloat16 where the device
            is faster in it (CUDA from Ampere on; CPUs are measured once), else float32.
        trust_remote_code: Run code that the model's repository brings.
        revision: Branch, tag or commit of a Hugging Face repository.
        device_map: Spread the model over devices with accelerate (``auto`` or a mapping); ``device`` then
            only decides about ``dtype``.
        fp8: Whether the input projections of Evo 2 run in FP8, which some checkpoints need: ``auto`` (those
            that need it, in hardware on Hopper GPUs and emulated elsewhere), ``emulate`` (all that have the
            scales, never in hardware) or ``off``.

    Returns:
        The model, in eval mode.

    Raises:
        ModelNotFoundError: If nothing answers to the name.
        ModelError: If the model needs code that is not trusted, has no tokenizer, ``dtype`` or ``fp8`` is
            unknown or does not suit it, or ``device`` is not there.
        CheckpointError: If the weights are damaged, do not fit the configuration, or lack FP8 scales.
    """
    if fp8 not in get_args(Fp8Choice):
        message = f"fp8 is {fp8!r}, expected one of {', '.join(get_args(Fp8Choice))}; set fp8 to one of them"
        raise ModelError(message)
    if device == "auto":
        device, device_map = None, device_map or "auto"
    device = _choose_device(device)
    chosen_dtype = _choose_dtype(dtype, device)
    source = find_source(name_or_path, revision=revision)
    say_inner_folder(source)
    with foreign_code(f"model {name_or_path!r}"):
        plain = None
        if source.folder is not None and source.adapter is None and device_map is None:
            plain = read_network(source.folder, dtype=chosen_dtype)
        if plain is not None:
            model = _of_network(plain.to(device), source, name=name_or_path)
        else:
            from genoembed.models.pretrained import load_pretrained

            model = GenomicModel(
                name=name_or_path,
                **load_pretrained(
                    source,
                    name=name_or_path,
                    device=device,
                    dtype=chosen_dtype,
                    trust_remote_code=trust_remote_code,
                    device_map=device_map,
                ),
            )
    check_scales(model.network, model.entry, model.location, is_off=fp8 == "off")
    if _use_fp8(model, fp8):
        message = (
            f"{name_or_path}: trained with 8-bit (FP8) input projections, but FP8 is off; without them its "
            "predictions are much worse than published, and its vectors are not those of the original"
        )
        warnings.warn(PrecisionWarning(message), stacklevel=2)
    return model


def check_scales(
    module: PreTrainedModel | PlainStripedHyena2,
    entry: KnownModel | None,
    folder: Path | None,
    *,
    is_off: bool = False,
) -> None:
    """Raise if a checkpoint needs FP8 scales, and its folder is from a release that did not keep them."""
    if is_off or entry is None or not entry.needs_fp8 or folder is None:
        return
    # a folder that was fine-tuned without them learned to do without
    if module.config.fp8_projections == "none" and not (folder / FACTS_FILE).is_file():
        message = (
            f"it holds no FP8 scales, which {entry.name} needs: it was converted by a release that left them "
            "out; delete the folder and convert the checkpoint again, or set fp8 to off"
        )
        raise CheckpointError(message, path=str(folder))


def _use_fp8(model: GenomicModel, choice: Fp8Choice) -> bool:
    """Switch FP8 on or off; return whether a model that needs it goes without."""
    if choice == "emulate" and model.fp8 is None:
        message = f"model {model.name!r}: it has no FP8 scales, so there is nothing to emulate; leave fp8 out"
        raise ModelError(message)
    if model.fp8 is not None:
        model.network.set_fp8(choice)
    needs = getattr(model.network.config, "fp8_projections", "none") == "needed"
    if model.fp8 in (None, "off"):
        return needs or (choice == "off" and model.entry is not None and model.entry.needs_fp8)
    if model.dtype == torch.float16:
        message = (
            f"model {model.name!r}: dtype is float16, but its FP8 projections multiply bfloat16 weights; set "
            "dtype to bfloat16 or float32"
        )
        raise ModelError(message)
    return False


def _of_network(network: PlainStripedHyena2, source: ModelSource, *, name: str) -> GenomicModel:
    return GenomicModel(
        network,
        ByteTokens(),
        name=name,
        location=source.folder,
        published=source.published,
        entry=source.entry or entry_named(getattr(network.config, "checkpoint_name", None)),
        open_tokenizer=partial(_open_tokenizer, source),
    )


def _open_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    from genoembed.models.pretrained import open_tokenizer

    return open_tokenizer(source)


def _choose_device(device: str | torch.device | None) -> torch.device:
    """Find the device, and make sure that it takes tensors: torch says so late, in words of many kinds."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError) as error:
        reason = f" ({first_line(error)})" if str(device).startswith("cuda") else ""
        there = ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
        message = (
            f"device {str(device)!r} cannot be used here{reason}, expected one such as {there}; "
            "set device to one of these, or leave it out"
        )
        raise ModelError(message) from error
    return torch.device(device)


def _choose_dtype(dtype: ComputeDtype | torch.dtype | None, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None or dtype == "auto":
        return automatic_dtype(device)
    if dtype not in _DTYPES:
        message = (
            f"dtype {dtype!r} is not known, expected auto, {', '.join(_DTYPES)}; set dtype to one of them"
        )
        raise ModelError(message)
    return _DTYPES[dtype]
