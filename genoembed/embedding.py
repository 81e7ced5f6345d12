"""``embed``: from sequences in memory to vectors in memory.

The same stages and the same numbers as ``extract``, without files: for a few thousand sequences in a
notebook, for ``genoembed.sklearn``, and for checking files. What is larger goes through ``extract``.

N sequences, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import numpy as np

from genoembed.config.embed import DEFAULT_MODEL, EmbedConfig, embed_config
from genoembed.config.fields import named_options
from genoembed.contracts import EmbeddingBlock, SequenceRecord, TokenBlock
from genoembed.errors import ConfigError, EmptyRecordError
from genoembed.models.trained_folder import FinetunedFacts, carried_options, find_facts
from genoembed.pipeline.embedder import UnitEmbedder
from genoembed.pipeline.request import load_configured, loading_problems, plain_options
from genoembed.pipeline.units import iter_units
from genoembed.sequences.reading import clean_record, list_sequences, sequence_letters
from genoembed.sequences.records import IdRegistry, InputCounts, Policies, RawRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from genoembed.config.choices import Fusion, Pooling
    from genoembed.contracts import ObsRow
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.pipeline.units import RunStats
    from genoembed.sequences.reading import SequenceInput

PLACE = "sequences"
"""What errors name as the file, since there is none."""
_FILE_OPTIONS = (
    *("inputs", "output", "overwrite", "resume", "shard", "engine", "workers"),
    *("regions", "flank", "feature", "name_attribute", "join_by", "bad_regions"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedded:
    """Vectors of sequences."""

    matrices: Mapping[str, NDArray[np.float32]]
    """One ``(N, D)`` matrix a layer, or a single one when layers were fused; rows in the order given."""
    feature_names: tuple[str, ...]
    """Of the columns of the first matrix."""
    layers: tuple[str, ...]
    """Module paths of the layers that were taken."""

    @property
    def X(self) -> NDArray[np.float32]:  # noqa: N802 - the field's name for it
        """The first matrix, float32, ``(N, D)``."""
        return next(iter(self.matrices.values()))


class RecordEmbedder:
    """A loaded model with settings, which embeds records in memory, again and again."""

    def __init__(self, model: str | PathLike[str] | GenomicModel = DEFAULT_MODEL, **options: Any) -> None:
        name = fspath(model) if isinstance(model, PathLike) else model
        facts = find_facts(name, revision=options.get("revision"))
        self.config: EmbedConfig = _config(name, options, facts)
        """What is done."""
        self.model: GenomicModel = load_configured(self.config.model) if isinstance(name, str) else name
        """The model."""
        self._embedder = UnitEmbedder(self.model, self.config, facts=facts)

    @property
    def layers(self) -> tuple[str, ...]:
        """Module paths of the layers."""
        return self._embedder.layers

    @property
    def batch_tokens(self) -> int:
        """Slots of a forward pass, padding included."""
        return self._embedder.batch_tokens

    @property
    def stats(self) -> RunStats:
        """What the forward passes cost so far."""
        return self._embedder.stats

    def num_tokens(self, record: SequenceRecord) -> int:
        """Count the tokens of a record."""
        return self._embedder.num_tokens(record)

    @property
    def provenance(self) -> dict[str, Any]:
        """How vectors are made, in the words of a file's provenance."""
        facts = self._embedder.facts
        return {
            "model": dict(self.model.provenance),
            "layers": list(self.layers),
            "config": self.config.to_dict(),
            **({} if facts is None else {"finetuned": dict(facts.values)}),
        }

    @property
    def feature_names(self) -> dict[str, tuple[str, ...]]:
        """Names of the columns of each matrix; empty before anything was embedded."""
        return self._embedder.feature_names

    def rows(
        self, records: Iterable[SequenceRecord]
    ) -> Iterator[tuple[ObsRow, dict[str, NDArray[np.floating]]]]:
        """Embed records."""
        units = iter_units(
            records, max_bases=self._embedder.unit_bases, max_records=self._embedder.unit_records
        )
        for unit in units:
            yield from _block_rows(self._embedder(unit).block)

    def matrices(self, records: Sequence[SequenceRecord]) -> dict[str, NDArray[np.float32]]:
        """Embed records to matrices."""
        if self.config.embedding.pooling == "none" or self.config.windows.per_window:
            message = (
                "pooling='none' and per_window give several vectors a sequence, but a matrix has a row a "
                "sequence; set pooling to 'mean', or use extract, which writes a file"
            )
            raise ConfigError(message)
        found = [vectors for _, vectors in self.rows(records)]
        return {name: np.stack([vectors[name] for vectors in found]).astype(np.float32) for name in found[0]}


@named_options(EmbedConfig)
def embed(
    sequences: Iterable[SequenceInput | SequenceRecord],
    *,
    model: str | PathLike[str] | GenomicModel = DEFAULT_MODEL,
    layers: int | str | Sequence[int | str] | None = None,
    pooling: Pooling | None = None,
    fusion: Fusion | None = None,
    **options: Any,
) -> Embedded:
    """Embed sequences in memory; the numbers are those that ``extract`` writes.

    Args:
        sequences: A list, array, column or iterator of one or more ``str``, ``bytes``, Biopython's ``Seq`` or
            ``SeqRecord``, or records of :func:`read_sequences`. Lower case is upper-cased and ``U`` becomes
            ``T``.
        model: Bundled or registry name, local folder, Hugging Face id, or a model that is loaded already.
        layers: As for ``extract``.
        pooling: As for ``extract``, but not ``none``.
        fusion: As for ``extract``.
        **options: Other options of ``extract`` that are not about files: ``rc``, ``skip_first``, ``window``,
            ``stride``, ``carry_state``, ``batch_tokens``, ``dtype``, ``fp8``, ``device``, ``invalid``
            (``error`` or ``mask``), ``gaps``, ``keep_case``, ``fusion_weights``, ``revision``,
            ``trust_remote_code``. None is the default.

    Returns:
        The vectors, one row per sequence, in the given order.

    Raises:
        AlphabetError: If a letter is invalid under the policies; says which sequence, from 0.
        EmptyRecordError: If there are no sequences, or one has no bases.
        ConfigError: If options are wrong, alone or together.
        GenoembedError: If the model fails.

    Example:
        >>> found = embed(["ACGTACGT", "ACGT"], layers=2)
        >>> found.X.shape, found.feature_names[0]
        ((2, 128), 'blocks.2.mlp.l3:0')
    """
    embedder = RecordEmbedder(model, layers=layers, pooling=pooling, fusion=fusion, **options)
    records = clean_sequences(sequences, embedder.config)
    matrices = embedder.matrices(records)
    names = next(iter(embedder.feature_names.values()))
    return Embedded(matrices=matrices, feature_names=names, layers=embedder.layers)


def clean_sequences(
    sequences: Iterable[SequenceInput | SequenceRecord], config: EmbedConfig
) -> list[SequenceRecord]:
    """Apply the input policies to sequences."""
    policies = Policies(
        invalid=config.input.invalid, gaps=config.input.gaps, keep_case=config.input.keep_case
    )
    if policies.invalid == "skip" or config.input.empty == "skip":
        message = "invalid and empty cannot be 'skip' here: every sequence has a row; set invalid to 'mask'"
        raise ConfigError(message)
    ids, counts = IdRegistry("error"), InputCounts()
    records = []
    for index, sequence in enumerate(list_sequences(sequences, PLACE)):
        if isinstance(sequence, SequenceRecord):  # cleaned as it was read
            records.append(sequence)
            continue
        letters = sequence_letters(sequence, f"{PLACE}[{index}]")
        # its position is its id, so that none appears twice
        raw = RawRecord(str(index), "", PLACE, PLACE, None, iter([(letters, None)]))
        record = clean_record(raw, policies=policies, ids=ids, counts=counts)
        assert record is not None, "no policy skips"
        records.append(record)
    if not records:
        problem = "there are none, expected one or more; give at least one"
        raise EmptyRecordError(problem, path=PLACE)
    return records


def _config(
    model: str | GenomicModel, options: Mapping[str, Any], facts: FinetunedFacts | None = None
) -> EmbedConfig:
    misplaced = [name for name in options if name in _FILE_OPTIONS]
    if misplaced:
        message = f"{', '.join(misplaced)}: for files, and there are none here; leave it out, or use extract"
        raise ConfigError(message)
    # a model that is loaded is as it is: an option that could change nothing must not seem to
    if not isinstance(model, str) and (problems := loading_problems(options)):
        raise ConfigError(*problems)
    name = model if isinstance(model, str) else model.name
    given = carried_options(facts, plain_options(options), model=name)
    return embed_config({"inputs": (PLACE,), "output": "-", "model": name, **given})


def load_for_embedding(
    name: str,
    *,
    dtype: str = "auto",
    fp8: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> GenomicModel:
    """Load a model to give to ``embed`` again and again."""
    given = {"dtype": dtype, "fp8": fp8, "device": device, "revision": revision}
    return load_configured(_config(name, {**given, "trust_remote_code": trust_remote_code}).model)


def _block_rows(
    block: EmbeddingBlock | TokenBlock,
) -> Iterator[tuple[ObsRow, dict[str, NDArray[np.floating]]]]:
    if isinstance(block, EmbeddingBlock):
        for index, row in enumerate(block.rows):
            yield row, {name: matrix[index] for name, matrix in block.matrices.items()}
        return
    ends = np.cumsum(block.lengths)
    for row, start, end in zip(block.rows, ends - block.lengths, ends, strict=True):
        yield row, {name: values[start:end] for name, values in block.values.items()}
