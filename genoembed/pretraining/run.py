"""Pretrain a causal model on packed sequences: corpus files in, a model folder out.

``claim the folder -> read the first records -> load or build the model -> read, cut, shuffle, encode, pack,
train``. Promised: whatever can be refused without a model is refused before torch is imported; a run that was
killed goes on from its newest checkpoint with the rows that come next, and the loss curve is that of a run
that was never killed (bitwise on CPUs in float32); it goes on only with the options, the model and the
corpus that it began with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from genoembed.config.fields import named_options
from genoembed.config.paths import path_strings
from genoembed.config.pretrain import TrainConfig, train_config
from genoembed.pretraining.corpus import check_corpus
from genoembed.training.packages import check_packages
from genoembed.training.run_folder import check_processes, claimed_run

if TYPE_CHECKING:
    from collections.abc import Iterable
    from os import PathLike

__all__ = ["PretrainReport", "pretrain"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainReport:
    """What a run did."""

    output: str
    """Folder of the trained model and its tokenizer."""
    steps: int
    """Optimizer steps, those before a resumption counted."""
    bits_per_base: float
    """On what is held out, at the end."""
    metrics: str
    """JSON-lines file with the whole curve."""


@named_options(TrainConfig)
def pretrain(
    corpus: str | PathLike[str] | Iterable[str | PathLike[str]] | None,
    output_dir: str | PathLike[str],
    *,
    config: str | PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    **options: Any,
) -> PretrainReport:
    """Train a causal model on packed sequences.

    Writes checkpoints, ``metrics.jsonl``, ``run.json`` and, at the end, the folder ``final``. SIGINT and
    SIGTERM end the run after the step being done, with a checkpoint. Under ``torchrun`` each process trains
    on its own part of the documents.

    Args:
        corpus: Sequence files to train on; None takes those of ``config``.
        output_dir: Folder for everything that is written.
        config: TOML, YAML or JSON file with values for what ``options`` leave out.
        resume: Go on from the newest checkpoint in ``output_dir``.
        overwrite: Start again where there is a run in ``output_dir``.
        threads: CPU threads; None leaves torch's choice.
        **options: Any field of ``StartConfig``, ``DataConfig``, ``RecipeConfig``, ``VectorLossConfig`` and
            ``TeacherConfig`` of :mod:`genoembed.config.pretrain`, such as ``model`` or ``like``, ``heldout``
            or ``heldout_fraction``, ``packing``, ``window``, ``isolate``, ``max_steps``, ``kmer_codes``,
            ``teacher``. None stands for the file's value, or the default.

    Returns:
        Where the model is, and what it reached.

    Raises:
        ConfigError: If options are wrong, ``output_dir`` holds a run and neither ``resume`` nor ``overwrite``
            is set, or the run to resume has another config.
        GenoembedError: If corpus or model fail.
        KeyboardInterrupt: After a checkpoint was saved because of a signal; its text says where.
    """
    keys = options | {
        "corpus": (path_strings(corpus) or None),
        "heldout": (path_strings(options.get("heldout")) or None),
    }
    settings = train_config(keys, file=config)
    check_packages(settings.recipe)
    check_processes(settings.recipe.distributed)
    with claimed_run(output_dir, resume=resume, overwrite=overwrite) as folder:
        check_corpus(settings.data)
        # not at the top: importing torch takes seconds, and all that came before may have been refused
        from genoembed.pretraining.training import run_pretraining

        return PretrainReport(**run_pretraining(settings, folder, resume=resume, threads=threads))
