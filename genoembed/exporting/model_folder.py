"""``export_model``: a folder that ``SentenceTransformer`` loads, and whose ``encode`` gives our vectors.

In: a Hugging Face model. Out: its weights and tokenizer with a mean over the bases of the last layer: a token
has as much weight as bases. Special tokens get the weight 0, since our means leave them out and those of
sentence-transformers do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from genoembed.atomic import check_folder, replacing_folder
from genoembed.config.fields import named_options
from genoembed.config.files import ModelExportConfig
from genoembed.config.paths import check_paths
from genoembed.errors import ModelError
from genoembed.models.layers import FINAL
from genoembed.models.load import load_model
from genoembed.models.pretrained import without_progress_bars
from genoembed.models.trained_folder import MODULES_FILE, find_facts
from genoembed.pipeline.sentence_folder import why_other_vectors, write_sentence_modules
from genoembed.tokenization.published import opened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genoembed.config.choices import ComputeDtype
    from genoembed.models.genomic_model import GenomicModel


_README = "README.md"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelExportReport:
    """What was written."""

    output: Path
    model: str
    layer: str
    """Module path of the layer that ``encode`` averages."""
    width: int
    """Features of a vector."""
    max_tokens: int | None
    """Longest input; ``encode`` cuts what is longer. None: no limit."""
    special_tokens: tuple[str, ...]
    """Tokens that the mean leaves out."""
    needs_genoembed: bool
    """Whether ``import genoembed`` must come before the folder is loaded: the architecture is ours."""


@named_options(ModelExportConfig)
def export_model(
    model: str | PathLike[str],
    output: str | PathLike[str],
    *,
    dtype: ComputeDtype = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> ModelExportReport:
    """Write a model as a folder for sentence-transformers: mean pooling of the last layer.

    ``SentenceTransformer(output).encode(sequences)`` equals ``embed(sequences, layers="final",
    pooling="mean")`` for sequences in upper case that fit the context and of which the tokenizer reads every
    letter; longer ones are cut there, and windowed here.

    Args:
        model: Bundled or registry name, local folder, or Hugging Face id.
        output: The folder to write.
        dtype: Of the weights that are written.
        revision: Branch, tag or commit of a Hugging Face repository.
        trust_remote_code: Run code that the model's repository brings.
        overwrite: Replace an existing folder.

    Returns:
        What was written.

    Raises:
        ConfigError: If the folder exists and must stay.
        ModelError: If the model cannot be loaded, sees padding, or was fine-tuned for other vectors than the
            mean of its last layer.
        StoreError: If the folder cannot be written.
    """
    check_paths([], [(output, "folder")], may_read=[fspath(model)])
    target = check_folder(output, overwrite=overwrite)
    loaded = load_model(
        fspath(model), device="cpu", dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
    )
    layer = _check(loaded)
    with replacing_folder(output, overwrite=overwrite) as folder:
        width = _save(loaded, folder)
        report = ModelExportReport(
            output=target,
            model=loaded.name,
            layer=layer,
            width=width,
            max_tokens=loaded.max_length,
            special_tokens=tuple(_special_tokens(loaded.tokenizer)),
            needs_genoembed=any(
                type(part).__module__.startswith("genoembed.") for part in (loaded.module, loaded.tokenizer)
            ),
        )
        (folder / _README).write_text(_readme(report), encoding="utf-8")
    return report


def _check(loaded: GenomicModel) -> str:
    """Raise if ``encode`` would return other vectors; return the path of the last layer."""
    layer = loaded.resolve("final")[0].path
    if loaded.padding == "equal":
        message = (
            f"{loaded.name} sees padding (it is neither causal nor takes a mask), and sentence-transformers "
            "pads; use genoembed.embed, which puts equal lengths together"
        )
        raise ModelError(message)
    reason = why_other_vectors(loaded.tokenizer)
    if reason is not None:
        message = f"{loaded.name}: {reason}; use genoembed.embed"
        raise ModelError(message)
    facts = find_facts(loaded)
    if facts is not None:
        is_plain = facts.layers in ((layer,), (FINAL,)) and facts.pooling == "mean" and facts.finisher is None
        is_open = (facts.folder / MODULES_FILE).is_file()
        if not is_plain or facts.skip_first:
            message = (
                f"{loaded.name} was fine-tuned for {facts.pooling} vectors of {', '.join(facts.layers)}"
                f"{', projected or normalized' if facts.finisher else ''}, expected the mean of {layer}; "
                f"{'SentenceTransformer opens its folder as it is' if is_open else 'use genoembed.embed'}"
            )
            raise ModelError(message)
    return layer


def _save(loaded: GenomicModel, folder: Path) -> int:
    """Write the model, and the modules of the sentence model around it; return its width."""
    with without_progress_bars():
        loaded.module.save_pretrained(folder)
    tokenizer = opened(loaded.tokenizer, add_special_tokens=loaded.special_tokens, keep_case=False)
    tokenizer.save_pretrained(folder)
    width = loaded.resolve(FINAL)[0].width or int(loaded.module.get_input_embeddings().weight.shape[1])
    vocab_size = int(getattr(loaded.module.config, "vocab_size", 0) or 0)
    write_sentence_modules(
        folder,
        tokenizer,
        width=width,
        num_ids=max(len(tokenizer), vocab_size),
        max_tokens=loaded.max_length,
    )
    return width


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens that stand for no base; unknown letters are bases."""
    return [str(token) for token in tokenizer.all_special_tokens if token != tokenizer.unk_token]


def _readme(report: ModelExportReport) -> str:
    first = "import genoembed  # it provides the architecture\n" if report.needs_genoembed else ""
    limit = "" if report.max_tokens is None else f"Longer inputs than {report.max_tokens:,} tokens are cut.\n"
    return (
        f"# {Path(report.model).name} for sentence-transformers\n\n"
        f"Mean of `{report.layer}` over the bases of a sequence: a token has as much weight as letters, and "
        f"special tokens have none; {report.width} features. Written by genoembed.\n\n"
        "```python\n"
        f"{first}from sentence_transformers import SentenceTransformer\n\n"
        'vectors = SentenceTransformer("THIS FOLDER").encode(["ACGTACGT"])\n'
        "```\n\n"
        f"Write sequences in upper case, with T for U. {limit}"
    )
