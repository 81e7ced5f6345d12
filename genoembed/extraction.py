"""From sequence files to an embedding file: the order of the stages, and no maths.

``read -> units -> embed -> save -> merge``. Each unit is saved as it is done, so that a run that was cut off
goes on where it was; the file gets its name when it is complete.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, replace
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genoembed._version import __version__
from genoembed.config.embed import EmbedConfig
from genoembed.config.fields import named_options
from genoembed.config.files import MergeConfig
from genoembed.config.paths import check_paths
from genoembed.errors import EmptyRecordError, Problem, Remedy, StoreError
from genoembed.models.provenance import WEIGHTS
from genoembed.models.registry import name_earlier_weights
from genoembed.pipeline.embedder import describe_run, local_engine
from genoembed.pipeline.request import begun_dtype, read_records, read_request
from genoembed.pipeline.threads import Interruption
from genoembed.pipeline.units import PendingUnits, iter_units
from genoembed.sequences import InputCounts
from genoembed.sequences.compression import InputDigests, file_facts
from genoembed.store import (
    InputFacts,
    Manifest,
    Merged,
    Parts,
    check_output,
    differences_from,
    find_merged,
    finish_removal,
    is_output_of,
    merge_parts,
    open_embeddings,
    parts_folder,
    read_block,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from os import PathLike

    from genoembed.config.choices import Fusion, Pooling
    from genoembed.contracts import SequenceRecord
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.pipeline.embedder import RunFacts, UnitEngine
    from genoembed.pipeline.request import Request
    from genoembed.pipeline.units import RunStats

logger = logging.getLogger(__name__)

_SHOWN = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractionReport:
    """What a run did."""

    output: Path
    """The file that was written, or will be by ``merge``."""
    num_rows: int | None
    """Rows of the file; None where a share of the units was made, and ``merge`` makes the file."""
    width: int | None
    """Features of the primary matrix (of a token, in per-token files); None likewise."""
    layers: tuple[str, ...]
    """Module paths of the layers that were taken."""
    failed: Mapping[str, str]
    """Records without a vector (NaN in the file), by id: why."""
    shard: str | None
    """Which share of the units was made; None is all."""
    counts: InputCounts
    """What was read, and what the input policies did."""
    stats: RunStats
    """What the forward passes cost."""
    seconds: float
    """Wall time of the run, without loading the model; 0 where everything was there."""


@named_options(EmbedConfig)
def extract(
    inputs: str | PathLike[str] | Iterable[str | PathLike[str]],
    *,
    model: str | PathLike[str] | GenomicModel = "genoembed-mini",
    layers: int | str | Sequence[int | str] | None = None,
    pooling: Pooling | None = None,
    fusion: Fusion | None = None,
    output: str | PathLike[str] | None = None,
    progress: Callable[[RunStats], None] | None = None,
    **options: Any,
) -> ExtractionReport:
    """Embed the sequences of files and write one HDF5 file.

    Args:
        inputs: Sequence files; ``-`` is standard input.
        model: Bundled or registry name, local folder, Hugging Face id, or a model that is loaded already.
        layers: Block numbers, module paths, globs, ``final`` or ``all``; one or several. None takes what a
            fine-tuned model was trained with, and ``final`` of any other.
        pooling: ``mean``, ``max``, ``first``, ``last``, ``cls``, ``weighted_mean``, ``mean_std``, or ``none``
            for one vector per token. None: as trained, else ``mean``.
        fusion: ``none``, ``concat``, ``mean``, ``max`` or ``weighted``, over layers. None: as trained, else
            ``none``.
        output: The file to write; None is the first input's stem and ``.h5``.
        progress: Called with the running totals after each forward pass.
        **options: Any other field of :class:`~genoembed.config.embed.EmbedConfig`: ``regions``, ``flank``,
            ``feature``, ``name_attribute``, ``join_by``, ``bad_regions``, ``invalid``, ``duplicates``,
            ``empty``, ``gaps``, ``keep_case``, ``revision``, ``trust_remote_code``, ``dtype``, ``fp8``,
            ``device``, ``threads``, ``batch_tokens``, ``skip_first``, ``fusion_weights``, ``rc``, ``window``,
            ``stride``, ``per_window``, ``carry_state``, ``out_dtype``, ``overwrite``. None stands for
            the default. A model that is loaded already takes no ``revision``, ``trust_remote_code``,
            ``dtype``, ``fp8`` or ``device``.

    Returns:
        What was done.

    Raises:
        ConfigError: If options are wrong, alone or together; all of them in one message.
        GenoembedError: If input, model or output fail; the output is then as it was before.
    """
    request = read_request(
        inputs, model=model, layers=layers, pooling=pooling, fusion=fusion, output=output, **options
    )
    config = request.config
    output_is_there = check_files(config)
    counts, digests = InputCounts(), InputDigests()
    records = read_records(config, counts, digests=digests)
    interruption = Interruption()
    while True:
        with _engine(_as_begun(request), progress, interruption) as engine:
            logger.info("%s: layers %s", config.model.model, ", ".join(engine.facts.layers))
            manifest = manifest_of(config, engine.facts)
            _warn_of_earlier_weights(config, manifest)
            if _as_begun(request).config.model.dtype not in ("auto", manifest.identity["dtype"]):
                continue  # while the model loaded, another share began, on a machine of another kind
            if output_is_there and (merged := _already_there(config, manifest)) is not None:
                return _report(config, engine, counts, merged, seconds=0.0)
            with interruption.watched():
                return _run(config, engine, manifest, records, counts, digests)


def _as_begun(request: Request) -> Request:
    """Compute in the type in which the run began, on any machine: units of two types would never merge."""
    config = request.config
    if not isinstance(request.model, str) or config.model.dtype != "auto":
        return request
    dtype = begun_dtype(config.model.dtype, _begun_identity(config))
    return replace(request, config=config.changed(model=config.model.changed(dtype=dtype)))


def _begun_identity(config: EmbedConfig) -> Mapping[str, Any] | None:
    """Return the identity of the run that began this output; None where there is none to go on with."""
    if (parts := Parts.find(config.output.output)) is not None:
        return parts.manifest.identity
    if config.output.resume and Path(config.output.output).is_file():
        with open_embeddings(config.output.output) as file:
            identity: Mapping[str, Any] | None = file.provenance.get("identity")
            return identity
    return None


def _warn_of_earlier_weights(config: EmbedConfig, manifest: Manifest) -> None:
    """Say it if a run that goes on began with weights that its model has no more: it will be refused."""
    begun = (_begun_identity(config) or {}).get(WEIGHTS)
    if begun != manifest.identity.get(WEIGHTS) and (whose := name_earlier_weights(begun)):
        logger.warning("%s: begun with %s", config.output.output, whose)


def _engine(
    request: Request, progress: Callable[[RunStats], None] | None, interruption: Interruption
) -> AbstractContextManager[UnitEngine]:
    """Choose who embeds; the model is loaded when the engine is entered."""
    if request.config.run.engine == "ray":
        from genoembed.pipeline.ray import ray_engine

        return ray_engine(request.config, on_totals=progress)
    return local_engine(
        request.config, request.model, trained=request.trained, on_batch=progress, interruption=interruption
    )


@named_options(MergeConfig)
def merge(output: str | PathLike[str], *, overwrite: bool = False) -> Merged:
    """Join the work units that several processes embedded (``shard``) to the output.

    Args:
        output: The output file of those processes.
        overwrite: True where an existing file is replaced.

    Returns:
        What was written. The parts are removed. Where they are gone, since the output was merged before,
        what is in it.

    Raises:
        StoreError: If there are no parts, units are missing, the file exists and must stay, or it cannot be
            written; the parts stay then.
    """
    parts = Parts.find(output)
    if parts is None and (merged := find_merged(output)) is not None and not overwrite:
        # a job that is started again after a kill finds its work done; the file may be of an earlier run, too
        logger.warning("%s: there are no parts to merge; it was merged before and stays as it is", output)
        return merged
    if parts is None:
        problem = f"there is no {str(parts_folder(output))!r} to merge; give the output of the extract runs"
        raise StoreError(problem, path=fspath(output))
    if parts.manifest.out_dtype is None:
        problem = "holds units of a table, not of vectors; run the command that began it again"
        raise StoreError(problem, path=str(parts.folder))
    if is_output_of(parts):
        return finish_removal(parts)
    check_output(output, overwrite=overwrite)
    return merge_parts(parts, overwrite=overwrite)


def check_files(config: EmbedConfig) -> bool:
    """Raise if the output is one of the files to be read, or exists and must stay."""
    output, overwrite = config.output.output, config.output.overwrite
    parts = Parts.find(output)
    # whether it is what this run would make is known once the model and its content are
    may_stay = config.output.resume or (parts is not None and is_output_of(parts))
    check_paths(
        config.input.inputs,
        [(output, "hdf5")],
        may_read=(*config.input.regions, config.model.model),
        overwrite=overwrite,
    )
    target = check_output(output, overwrite=overwrite or may_stay)
    return target.exists() and may_stay


def _already_there(config: EmbedConfig, manifest: Manifest) -> Merged | None:
    """Return what is in an output that this very run has made; None if it is to be made again."""
    parts = Parts.find(config.output.output)
    if parts is not None and parts.manifest.digest == manifest.digest and is_output_of(parts):
        return finish_removal(parts)  # it was cut off in the middle of that
    differences = ["its run was cut off"]
    if parts is None and config.output.resume:
        inputs = [file_facts(name) for name in config.input.inputs]
        regions = [file_facts(name) for name in config.input.regions]
        found, differences = differences_from(config.output.output, manifest, inputs, regions)
        if found is not None:
            return found
    if config.output.overwrite:
        return None
    problem = Problem(
        f"exists already, and another run made it: {', '.join(differences[:_SHOWN])}",
        Remedy("overwrite", True),
        ", or choose another name",
    )
    raise StoreError(problem, path=config.output.output)


def manifest_of(config: EmbedConfig, facts: RunFacts) -> Manifest:
    """Build the manifest that identifies a run."""
    return Manifest(
        identity={"genoembed": __version__, **facts.identity},
        policies=facts.policies,
        provenance={"genoembed_version": __version__, **describe_run(config, facts)},
        out_dtype=config.output.out_dtype,
        num_shares=config.run.share[1],
    )


def _run(
    config: EmbedConfig,
    engine: UnitEngine,
    manifest: Manifest,
    records: Iterator[SequenceRecord],
    counts: InputCounts,
    digests: InputDigests,
) -> ExtractionReport:
    """Embed the units that are not finished yet, and merge them unless others have a share."""
    started = time.perf_counter()
    parts = Parts.begin(config.output.output, manifest, drop_other=config.output.overwrite)
    first, step = config.run.share
    pending = PendingUnits(
        iter_units(records, max_bases=engine.facts.unit_bases, max_records=engine.facts.unit_records),
        parts,
        engine.stats,
        first=first,
        step=step,
        sample=config.run.certificate,
    )
    with parts.lock(f"shard-{first + 1}-of-{step}"):
        try:
            engine.run(pending, parts.save)
            if not pending.num_units:
                skipped = counts.skipped_regions
                regions = f", {skipped} regions as beyond their contig or on none" if skipped else ""
                remedy = "bad_regions='error' to see why" if skipped else "invalid='mask'"
                problem = (
                    f"no record is left to embed ({counts.skipped_invalid} skipped as invalid, "
                    f"{counts.skipped_empty} as empty{regions}); check the input, or set {remedy}"
                )
                raise EmptyRecordError(problem, path=", ".join(config.input.inputs))
            if pending.sample:
                parts.save_certificate(_certificate(engine, parts, pending))
            # digests are of what was read just now, so they are there only when the input has come to its end
            facts = InputFacts(
                num_units=pending.num_units,
                counts=asdict(counts),
                inputs=[digests.facts(name) for name in config.input.inputs],
                regions=[digests.facts(name) for name in config.input.regions],
            )
            parts.close_input(facts)
            merged = merge_parts(parts, overwrite=config.output.overwrite) if step == 1 else None
        except BaseException as error:  # Ctrl-C too: what is finished is kept in any case
            parts.note_kept(error, alone=step == 1)
            raise
    if merged is not None:
        # by whoever embedded the units, in an earlier run perhaps
        counts.windows = merged.num_windows
        counts.unread = engine.stats.unread = merged.num_unread
    return _report(config, engine, counts, merged, seconds=time.perf_counter() - started)


def _certificate(
    engine: UnitEngine, parts: Parts, pending: PendingUnits
) -> dict[str, float | int | bool | None]:
    from genoembed.pipeline.agreement import FP8, certify_rows

    with open_embeddings(parts.shard(0)) as file:
        block = read_block(file)
    identity = engine.facts.identity
    types = [str(identity["dtype"]), *([FP8] if identity["fp8"] == "on" else [])]
    return certify_rows(engine, pending.sample, block, types=types)


def _report(
    config: EmbedConfig,
    engine: UnitEngine,
    counts: InputCounts,
    merged: Merged | None,
    *,
    seconds: float,
) -> ExtractionReport:
    return ExtractionReport(
        output=Path(config.output.output),
        num_rows=None if merged is None else merged.num_rows,
        width=None if merged is None else merged.width,
        layers=engine.facts.layers,
        failed={} if merged is None else dict(merged.failed),
        shard=config.run.shard,
        counts=counts,
        stats=engine.stats,
        seconds=seconds,
    )
