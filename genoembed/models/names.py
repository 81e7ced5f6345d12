"""Names of models: which there are, and what to do about a name that nothing answers to.

In: a name as ``--model`` takes it. Out: nothing, or an error that suggests another name. Nothing here imports
torch or transformers, so that a typing error is found within a moment.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants

from genoembed.contracts import FINAL_FOLDER
from genoembed.errors import ModelNotFoundError

if TYPE_CHECKING:
    from os import PathLike

BUNDLED_NAME = "genoembed-mini"
EVO2_NAMES = (
    "evo2_1b_base",
    "evo2_7b",
    "evo2_7b_base",
    "evo2_7b_262k",
    "evo2_7b_microviridae",
    "evo2_20b",
    "evo2_40b",
    "evo2_40b_base",
)
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def model_names() -> tuple[str, ...]:
    """List all names that need neither a path nor an owner.

    Returns:
        The bundled model, Evo 2, and the models of the GENEB benchmark.

    Example:
        >>> [name for name in model_names() if name.startswith(("genoembed", "dnabert"))]
        ['genoembed-mini', 'dnabert-s', 'dnabert-2']
    """
    from genoembed.models.geneb import published_models

    return (BUNDLED_NAME, *EVO2_NAMES, *(model.name for model in published_models()))


def check_model_name(name: str) -> None:
    """Check, without asking the hub, that something can answer to a name.

    Args:
        name: As ``load_model`` takes it: a name of `model_names`, a file or folder, or a Hugging Face id.

    Raises:
        ModelNotFoundError: If a path leads nowhere, or a name without an owner is none of ours.
    """
    path = Path(name).expanduser()
    if name in (BUNDLED_NAME, *EVO2_NAMES) or path.exists():
        return
    from genoembed.models.geneb import published_named

    if published_named(name) is not None:
        return
    if looks_like_path(name):
        message = f"model {name!r}: file or folder not found; {suggestion(path.name)}"
        raise ModelNotFoundError(message)
    # the hub has a few repositories without owner: taken if they were fetched by other means
    if "/" not in name and not Path(constants.HF_HUB_CACHE, f"models--{name}").is_dir():
        message = (
            f"model {name!r}: not found: not a name from 'genoembed models', not a local folder, and not a "
            "Hugging Face id (OWNER/NAME); "
            f"{suggestion(name)}"
        )
        raise ModelNotFoundError(message)


def model_folder(folder: str | PathLike[str]) -> Path:
    """Return the folder of a model, where another stands for it.

    That of a training run stands for its ``final``, one of sentence-transformers for the folder in it.
    """
    path = Path(folder).expanduser()
    if (path / "config.json").exists():
        return path
    inner = (path / FINAL_FOLDER, path / "0_Transformer")
    return next((folder for folder in inner if (folder / "config.json").is_file()), path)


def looks_like_path(name: str) -> bool:
    """Check whether a name can be meant as nothing but a path."""
    return (
        name.startswith(("/", ".", "~"))
        or name.count("/") > 1
        or "\\" in name
        or name.endswith(CHECKPOINT_SUFFIXES)
    )


def suggestion(name: str, *, is_converted: bool = False) -> str:
    """Phrase what to do about a name that nothing answers to.

    Args:
        name: What was typed.
        is_converted: Suggest only models whose checkpoints are converted: the bundled one and Evo 2.

    Returns:
        The nearest names, or all that there is.

    Example:
        >>> suggestion("evo2-7b"), suggestion("dnabert2")
        ("did you mean 'evo2_7b'?", "did you mean 'dnabert-2' or 'dnabert-s'?")
    """
    ours = (BUNDLED_NAME, *EVO2_NAMES)
    near = difflib.get_close_matches(name.lower(), ours if is_converted else model_names(), n=2, cutoff=0.7)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    rest = "" if is_converted else " and the others of genoembed models"
    return f"use a local folder, a Hugging Face id, or one of {', '.join(ours)}{rest}"
