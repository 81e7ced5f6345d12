"""Continue the sequences of files: prompts in, a FASTA file out.

``read -> tokens -> model, token by token -> FASTA``, a few prompts at a time. Promised: the same policies for
letters, ids and gaps as in ``extract``; each record says how it was made; a run that was cut off goes on.
"""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, NamedTuple

from genoembed._version import __version__
from genoembed.config.fields import named_options
from genoembed.config.generate import GenerateConfig
from genoembed.config.paths import check_paths, path_strings
from genoembed.errors import ConfigError, EmptyRecordError, visible
from genoembed.generation.sampler import GeneratorOptions, SampledSequence, SamplingOptions, SequenceGenerator
from genoembed.models.language_model import LanguageModel, check_has_head
from genoembed.models.provenance import WEIGHTS
from genoembed.pipeline.request import LOADING_OPTIONS, load_configured, loading_problems, use_threads
from genoembed.pipeline.table_parts import keeping_units
from genoembed.pipeline.units import iter_units
from genoembed.sequences import InputCounts, begin_reading, read_sequences
from genoembed.store.tables import open_fasta

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from genoembed.contracts import SequenceRecord
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.pipeline.units import RunStats, WorkUnit
    from genoembed.store.tables import FastaWriter


logger = logging.getLogger(__name__)

_POLICIES = ("invalid", "duplicates", "empty", "gaps", "keep_case")
_DECIDING = ("num_samples", "length", "temperature", "top_k", "top_p", "seed", "tag", "stop_at_end")
"""Options that decide the sequences, with the model and its start token."""
_UNIT_SAMPLES = 64
"""Sequences of a work unit, about: what a run that is cut off loses at most."""
_DIGITS = 12
"""Of the digest of the weights, in a header."""


class GeneratedSequence(NamedTuple):
    """One sequence."""

    id: str
    """Id of the prompt, and the number of the sample."""
    prompt: str
    """Id of the prompt."""
    prompt_start: int
    """First base of the prompt that the model has read, 0-based."""
    prompt_end: int
    """One past the last one."""
    sample: int
    """Number of the sample, from 1."""
    sequence: str
    log_likelihood: float
    """Sum over its bases of ``ln p(base | all before it)``, as ``score`` gives it; NaN without bases."""
    mean_log_likelihood: float
    """A base."""
    ended: str
    """``length``, or ``eod`` where the model ended it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationReport:
    """What a run did."""

    output: str | None
    """The FASTA file; ``-`` is standard output; None where sequences were requested."""
    rows: tuple[GeneratedSequence, ...]
    """The sequences, where no output was named; else empty."""
    num_prompts: int
    num_sequences: int
    num_bases: int
    """Bases that were generated."""
    mean_log_likelihood: float
    """A base, over all sequences."""
    ended: Mapping[str, int]
    """How many sequences ended for which reason."""
    windowed: int
    """Prompts of which only the last bases fit the context."""
    out_of_frame: int
    """Prompts whose first bases were left out so that words of several bases end where they do."""
    cached: bool
    """Whether the model carried its state from token to token."""
    rescored: int
    """Draws that rounding could have changed, for which a row was scored alone."""
    start_token: str
    """Id of the token before each prompt, or ``none``."""
    failed: Mapping[str, str]
    """Prompts without sequences, by id: why."""
    counts: InputCounts
    """What was read, and what the input policies did."""
    stats: RunStats
    """What the forward passes cost; its bases are those generated."""
    seconds: float
    """Wall time, without loading the model."""


@named_options(GenerateConfig)
def generate(
    inputs: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    model: str | PathLike[str] | GenomicModel = "genoembed-mini",
    output: str | PathLike[str] | None = None,
    overwrite: bool = False,
    num_samples: int = 1,
    length: int = 500,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    progress: Callable[[RunStats], None] | None = None,
    **options: Any,
) -> GenerationReport:
    """Continue the sequences of files with a causal model.

    Only tokens made of A, C, G and T can be sampled, and the token that ends a document. The same prompt and
    seed give the same sequences in float32, whatever their number, batch and order; the first two of four are
    those of two.

    Args:
        inputs: Prompts: sequence files in any format of ``extract``; ``-`` is standard input. Of a prompt
            that is too long for the context, the last bases are read.
        model: Name or folder of a causal model, or one that is loaded already.
        output: The FASTA file; ``-`` is standard output. None writes none and gives the sequences in the
            report.
        overwrite: Replace a file that ``generate`` has written, once the new one is complete.
        num_samples: Sequences for each prompt.
        length: Bases of a sequence; its last token may go beyond.
        temperature: Logits are divided by it; 0 is greedy: always the most likely token.
        top_k: Sample from this number of most likely tokens only; None for all.
        top_p: Of these, sample from the smallest set whose probabilities sum to this.
        seed: Random seed, 0 or more.
        progress: Called with the running totals after each forward pass.
        **options: ``tag`` (text before each prompt), ``start_token`` (``auto``, or ``none``),
            ``stop_at_end``, ``with_prompt`` (write prompts as well), ``cache`` (False reads everything again
            for each token), ``batch_rows``, ``on_error`` (``stop`` at a prompt that fails, or ``skip``),
            ``revision``, ``trust_remote_code``, ``dtype`` (float32), ``fp8``, ``device``, ``threads``,
            ``batch_tokens``; and ``invalid``, ``duplicates``, ``empty``, ``gaps``, ``keep_case`` as for
            ``extract``. A model that is loaded already takes no ``revision``, ``trust_remote_code``,
            ``dtype``, ``fp8`` or ``device``. None stands for the default.

    Returns:
        What was done.

    Raises:
        ConfigError: If options are wrong, alone or together; all of them in one message.
        ModelError: If the model is not causal, has no next-token head or no tokens of DNA, or its context is
            too short for the length.
        GenoembedError: If input, model or output fail; the output is then as it was before, and what was
            generated is kept for the next run of the same call.
    """
    given = {
        "num_samples": num_samples,
        "length": length,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        **options,
    }
    config = _config(inputs, model, output, overwrite, given)
    check_paths(
        config.inputs,
        [(config.output, "fasta")],
        may_read=[model] if isinstance(model, str | PathLike) else [],
        overwrite=overwrite,
    )
    counts = InputCounts()
    policies = {name: getattr(config, name) for name in _POLICIES}
    records = begin_reading(read_sequences(config.inputs, counts=counts, **policies))
    with ExitStack() as stack:
        stack.enter_context(use_threads(config.threads))
        kept = stack.enter_context(keeping_units(config.output))
        writer = None
        if config.output is not None:
            # before the model is loaded: a second process with the same output is refused at once
            writer = stack.enter_context(open_fasta(config.output, overwrite=overwrite))
        generator = _build_generator(config, model, progress)
        kept.begin(
            lambda: _identity(config, generator),
            policies={**policies, "on_error": config.on_error},
            stats=generator.stats,
            drop_other=overwrite,
        )
        started = time.perf_counter()
        outputs = _Outputs(writer, config, generator)
        per_unit = max(1, _UNIT_SAMPLES // config.num_samples)
        for unit in iter_units(records, max_records=per_unit):
            values = kept.take(unit, partial(_generate_unit, unit, generator))
            for record, value in zip(unit.records, values, strict=True):
                outputs.add(
                    record, value if isinstance(value, str) else [SampledSequence(*one) for one in value]
                )
        if not outputs.num_prompts:
            problem = f"no record is left to continue ({counts}); check the input"
            raise EmptyRecordError(problem, path=str(inputs))
    outputs.warn()
    return GenerationReport(
        output=config.output,
        rows=tuple(outputs.rows),
        num_prompts=outputs.num_prompts,
        num_sequences=outputs.num_sequences,
        num_bases=outputs.num_bases,
        mean_log_likelihood=outputs.log_likelihood / outputs.num_bases if outputs.num_bases else float("nan"),
        ended=dict(outputs.ended),
        windowed=outputs.windowed,
        out_of_frame=outputs.out_of_frame,
        cached=generator.is_cached,
        rescored=generator.num_rescored,
        start_token=str(generator.start_token),
        failed=kept.failed,
        counts=counts,
        stats=generator.stats,
        seconds=time.perf_counter() - started,
    )


def _config(
    inputs: str | PathLike[str] | Sequence[str | PathLike[str]],
    model: str | PathLike[str] | GenomicModel,
    output: str | PathLike[str] | None,
    overwrite: bool,
    given: Mapping[str, Any],
) -> GenerateConfig:
    """Check all options at once."""
    is_name = isinstance(model, str | PathLike)
    problems = [] if is_name else loading_problems({name: given.get(name) for name in LOADING_OPTIONS})
    try:
        config = GenerateConfig.build(
            {
                "inputs": path_strings(inputs),
                "model": fspath(model) if isinstance(model, str | PathLike) else model.name,
                "output": None if output is None else fspath(output),
                "overwrite": overwrite,
                **given,
            }
        )
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from None
    if problems:
        raise ConfigError(*problems)
    return config


def _build_generator(
    config: GenerateConfig,
    model: str | PathLike[str] | GenomicModel,
    progress: Callable[[RunStats], None] | None,
) -> SequenceGenerator:
    check_has_head(model)
    loaded = load_configured(config) if isinstance(model, str | PathLike) else model
    options = GeneratorOptions(
        length=config.length,
        num_samples=config.num_samples,
        seed=config.seed,
        sampling=SamplingOptions(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p),
        tag=config.tag or "",
        start_token=config.start_token,
        stop_at_end=config.stop_at_end,
        use_cache=config.cache,
        batch_rows=config.batch_rows,
        batch_tokens=config.batch_tokens,
        on_error=config.on_error,
    )
    return SequenceGenerator(LanguageModel(loaded), options, on_batch=progress)


def _identity(config: GenerateConfig, generator: SequenceGenerator) -> dict[str, Any]:
    """What decides the sequences of a prompt; two runs with the same may share finished units."""
    model = generator.model.model
    return {
        **model.content,
        "model": model.class_name,
        "dtype": str(model.dtype),
        "fp8": model.fp8_numbers,
        "max_length": model.max_length,
        "start_token": str(generator.start_token),
        **{name: getattr(config, name) for name in _DECIDING},
    }


def _generate_unit(unit: WorkUnit, generator: SequenceGenerator) -> list[list[SampledSequence] | str]:
    generator.stats.units += 1
    return generator.generate(unit.records)


class _Outputs:
    """The FASTA file, or sequences in memory; and what the report says of them."""

    def __init__(
        self, writer: FastaWriter | None, config: GenerateConfig, generator: SequenceGenerator
    ) -> None:
        self.rows: list[GeneratedSequence] = []
        self.num_prompts = self.num_sequences = self.num_bases = 0
        self.windowed = self.out_of_frame = 0
        self.log_likelihood = 0.0
        self.ended: Counter[str] = Counter()
        self._writer = writer
        self._config = config
        self._generator = generator
        self._made_by = _how_made(config, generator)

    def add(self, record: SequenceRecord, samples: Sequence[SampledSequence] | str) -> None:
        """Write or keep the sequences of a prompt; text says why it has none."""
        self.num_prompts += 1
        if isinstance(samples, str):
            if self._writer is not None:
                failed = _fields({"prompt": record.id, "failed": samples})
                self._writer.write(f"{record.id} {self._made_by} {failed}", "")
            return
        prompt = self._generator.prompt(record)
        self.windowed += prompt.is_windowed
        self.out_of_frame += prompt.start > 0 and not prompt.is_windowed
        for number, sample in enumerate(samples, start=1):
            row = GeneratedSequence(
                id=f"{record.id}_{number}",
                prompt=record.id,
                prompt_start=prompt.start,
                prompt_end=prompt.end,
                sample=number,
                sequence=sample.sequence,
                log_likelihood=sample.log_likelihood if sample.sequence else float("nan"),
                mean_log_likelihood=(
                    sample.log_likelihood / len(sample.sequence) if sample.sequence else float("nan")
                ),
                ended=sample.ended,
            )
            self.num_sequences += 1
            self.num_bases += len(row.sequence)
            self.log_likelihood += sample.log_likelihood
            self.ended[row.ended] += 1
            if self._writer is None:
                self.rows.append(row)
            else:
                before = record.sequence.decode("ascii") if self._config.with_prompt else ""
                self._writer.write(f"{row.id} {self._made_by} {_facts(row)}", before + row.sequence)

    def warn(self) -> None:
        """Say what happened to prompts, once."""
        if self.windowed:
            logger.warning(
                "of %d prompts, only the last bases were read: with %d bases to come, the context of %s has "
                "room for %s tokens (prompt_bases says which)",
                self.windowed,
                self._config.length,
                self._generator.model.model.name,
                self._generator.room,
            )
        if self.out_of_frame:
            logger.warning(
                "of %d prompts, the first bases were not read: words of several bases end where the prompt "
                "does (prompt_bases says which)",
                self.out_of_frame,
            )


def _how_made(config: GenerateConfig, generator: SequenceGenerator) -> str:
    """Say what all sequences of a run have in common, for their headers."""
    model = generator.model.model
    facts: dict[str, object] = {
        "generated_by": f"genoembed-{__version__}",
        "model": model.name,
        "weights": model.content[WEIGHTS][:_DIGITS],
        "dtype": str(model.dtype).removeprefix("torch."),
        "start_token": generator.start_token,
        "length": config.length,
        "temperature": f"{config.temperature:g}",
        "top_k": config.top_k or "all",
        "top_p": f"{config.top_p:g}",
        "seed": config.seed,
    }
    if model.fp8 is not None:
        facts["fp8"] = model.fp8
    if config.tag:
        facts["tag"] = config.tag
    if not config.stop_at_end:
        facts["stop_at_end"] = "no"
    return _fields(facts)


def _facts(row: GeneratedSequence) -> str:
    return _fields(
        {
            "prompt": row.prompt,
            "prompt_bases": f"{row.prompt_start + 1}-{row.prompt_end}",
            "sample": row.sample,
            "bases": len(row.sequence),
            "ended": row.ended,
            "log_likelihood": f"{row.log_likelihood:.4f}" if row.sequence else "NA",
            "mean_log_likelihood": f"{row.mean_log_likelihood:.4f}" if row.sequence else "NA",
        }
    )


def _fields(facts: Mapping[str, object]) -> str:
    """Write ``name=value`` with blanks between them; blanks within a value become ``%20``.

    Example:
        >>> _fields({"tag": "|S__ORYZA SATIVA|", "seed": 0})
        'tag=|S__ORYZA%20SATIVA| seed=0'
    """
    return " ".join(f"{name}={_percent_encoded(str(value))}" for name, value in facts.items())


def _percent_encoded(text: str) -> str:
    return visible(
        re.sub(r"[\s%]", lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), text)
    )
