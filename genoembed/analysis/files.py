"""The probe over an embedding file: its layers are the candidates, its ids find the labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from genoembed.analysis.probe import ProbeResult, probe
from genoembed.errors import ConfigError
from genoembed.store import EmbeddingFile, open_embeddings

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from genoembed.analysis.folds import Task

_SHOWN = 3


def probe_file(
    path: str | os.PathLike[str],
    labels: Mapping[str, str | float],
    *,
    task: Task = "classification",
    groups: Mapping[str, object] | None = None,
    layers: Sequence[str] | None = None,
    unlabelled: Literal["error", "skip"] = "error",
    **options: Any,
) -> ProbeResult:
    """Probe the layers of an embedding file; one layer is in memory at a time.

    Args:
        path: A pooled file that genoembed wrote.
        labels: Class or value by record id; ids that the file does not have are of no consequence.
        task: What the labels are.
        groups: Group by record id; every labelled record needs one.
        layers: Which layers of the file; None takes all.
        unlabelled: What to do with records without a label: ``error`` or ``skip``.
        **options: What ``probe`` takes: ``fusions``, ``top``, ``finalists``, ``num_folds``, ``seed``.

    Returns:
        Scores, choices and a table of all layers.

    Raises:
        ConfigError: If options are wrong, records have no label or no group, or the rows cannot fill the
            folds.
        LayerError: If the file has no such layer.
        NonFiniteError: If an embedding is NaN or infinite.
        StoreError: If the file cannot be read, or holds a vector for every token.
        MissingExtraError: If scikit-learn is not installed.
    """
    with open_embeddings(path) as embeddings:
        _ = embeddings.X  # a per-token file says here that it has no row a record
        ids = embeddings.ids
        rows = [row for row, name in enumerate(ids) if name in labels]
        if unlabelled == "error" and len(rows) < len(ids):
            raise ConfigError(_missing("labels", [name for name in ids if name not in labels], "unlabelled"))
        used = [ids[row] for row in rows]
        if groups is not None and (absent := [name for name in used if name not in groups]):
            raise ConfigError(_missing("groups", absent, None))
        return probe(
            _Layers(embeddings, embeddings.layers if layers is None else layers, np.array(rows)),
            np.array([labels[name] for name in used]),
            task=task,
            groups=None if groups is None else [groups[name] for name in used],
            **options,
        )


class _Layers(Mapping[str, "NDArray[np.floating]"]):
    """Layers of a file, each read when it is asked for."""

    def __init__(self, embeddings: EmbeddingFile, layers: Sequence[str], rows: NDArray[np.int64]) -> None:
        self._matrices = {name: embeddings[name] for name in layers}
        self._rows = rows

    def __getitem__(self, name: str) -> NDArray[np.floating]:
        return np.asarray(self._matrices[name])[self._rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)


def _missing(what: str, absent: Sequence[str], policy: str | None) -> str:
    shown = ", ".join(repr(name) for name in absent[:_SHOWN]) + (", ..." if len(absent) > _SHOWN else "")
    remedy = "add them" if policy is None else f"add them, or set {policy}='skip'"
    return f"{what}: {len(absent)} record(s) of the file have none ({shown}), expected one each; {remedy}"
