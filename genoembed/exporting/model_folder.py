"""``export_model``: a folder that ``SentenceTransformer`` loads, and whose ``encode`` gives our vectors.

In: a Hugging Face model. Out: its weights and tokenizer with a mean over the bases of the last layer: a token
has as much weight as bases. Special tokens get the weight 0, since our means leave them out and those of
sentence-transformers do not.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from genoembed.atomic import check_folder, replacing_folder
from genoembed.config.fields import named_options
from genoembed.config.files import ModelExportConfig
from genoembed.config.paths import check_paths
from genoembed.errors import MissingExtraError, ModelError
from genoembed.models.layers import FINAL
from genoembed.models.load import load_model
from genoembed.models.trained_folder import find_facts
from genoembed.tokenization.hf import word_length
from genoembed.tokenization.kmer import KmerTokenizer

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
        MissingExtraError: If sentence-transformers is not installed.
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
        width = _save(loaded, folder, trust_remote_code=trust_remote_code)
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
    if isinstance(loaded.tokenizer, KmerTokenizer):
        message = (
            f"{loaded.name} reads overlapping k-mers, which sentence-transformers cannot weigh by their "
            "bases; use genoembed.embed"
        )
        raise ModelError(message)
    facts = find_facts(loaded)
    if facts is not None:
        is_plain = facts.layers in ((layer,), (FINAL,)) and facts.pooling == "mean" and facts.finisher is None
        if not is_plain or facts.skip_first:
            message = (
                f"{loaded.name} was fine-tuned for {facts.pooling} vectors of {', '.join(facts.layers)}"
                f"{', projected or normalized' if facts.finisher else ''}, expected the mean of {layer}; use "
                "genoembed.embed"
            )
            raise ModelError(message)
    return layer


def _save(loaded: GenomicModel, folder: Path, *, trust_remote_code: bool) -> int:
    """Write the model, and build and write the sentence model around it; gives its width."""
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import Pooling, Transformer, WordWeights
    except ImportError as error:
        raise MissingExtraError(
            package="sentence-transformers", extra="sentence-transformers", purpose="export_model"
        ) from error
    plain = folder / "plain"
    loaded.module.save_pretrained(plain)
    tokenizer = loaded.tokenizer
    tokenizer.padding_side = "right"  # exact for causal models
    tokenizer.save_pretrained(plain)
    trust = {"trust_remote_code": trust_remote_code}
    backbone = Transformer(
        str(plain),
        max_seq_length=loaded.max_length,
        model_kwargs=dict(trust),
        processor_kwargs=dict(trust),
        config_kwargs=dict(trust),
    )
    width = int(backbone.get_word_embedding_dimension())
    num_ids = max(len(tokenizer), int(getattr(loaded.module.config, "vocab_size", 0) or 0))
    vocabulary = [str(tokenizer.convert_ids_to_tokens(index)) for index in range(num_ids)]
    modules = [backbone]
    weights = {token: float(max(1, word_length(token))) for token in vocabulary}
    weights |= dict.fromkeys(_special_tokens(tokenizer), 0.0)
    if tokenizer.unk_token is not None:
        weights[str(tokenizer.unk_token)] = 1.0
    if set(weights.values()) != {1.0}:
        modules.append(WordWeights(vocabulary, weights, unknown_word_weight=1.0))
    modules.append(Pooling(width, pooling_mode="mean"))
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder), create_model_card=False)
    shutil.rmtree(plain)
    return width


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens that stand for no base; unknown letters are bases."""
    return [str(token) for token in tokenizer.all_special_tokens if token != tokenizer.unk_token]


def _readme(report: ModelExportReport) -> str:
    first = "import genoembed  # the architecture is its\n" if report.needs_genoembed else ""
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
