"""An open file held against the schema, or against AnnData where another program wrote it last.

In: an open file. Out: its :class:`Layout`, or an error that names the file. The parts of a file are checked
to belong together. A file of the schema must have all of them. One that went through AnnData has lost what
AnnData does not know, the attributes of the root, and is read by its provenance and structure.

N rows (one per record), T tokens of all records together, D width of a layer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import h5py
import numpy as np

from genoembed.errors import SchemaVersionError, StoreFormatError
from genoembed.store.columns import (
    PARTS,
    column_names,
    encoding_of,
    index_name,
    is_known_column,
    read_text,
)
from genoembed.store.schema import (
    INDEX,
    LAYERS_ATTR,
    MUTATIONS_ATTR,
    OBS_COLUMNS,
    OTHER_FILES,
    PROVENANCE,
    PROVENANCE_JSON,
    ROOT_ENCODINGS,
    SCHEMA_ATTR,
    SCHEMA_VERSION,
    SINCE,
    SPANS,
    LazyMatrix,
    check_size,
    escape_name,
    reading,
    refuse,
    unescape_name,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from genoembed.store.schema import Kind

_COLUMN = re.compile(r"(.+?)(:rc)?(:std)?:([0-9]{1,9})")
"""Layer, strand, moment, number: the columns of a matrix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The checked parts of an open file."""

    kind: Kind
    schema_version: int
    num_rows: int
    matrices: Mapping[str, LazyMatrix]
    """By layer, in the requested order: ``(N, D)``, in per-token files ``(T, D)``."""
    offsets: NDArray[np.int64] | None
    """First token of each record and the end, ``(N + 1,)``; None in pooled files."""
    spans: tuple[h5py.Dataset, ...]
    """First base of each token, and one past its last, ``(T,)`` each; empty where the file does not say."""
    more: Mapping[str, LazyMatrix]
    """Other matrices of ``/obsm`` that have a row per record, such as scanpy writes; pooled files only."""
    index: str = f"obs/{INDEX}"
    """Where the record ids are."""
    features: str | None = f"var/{INDEX}"
    """Where the names of the columns of the first matrix are; None where they are its own, numbered."""
    provenance: Mapping[str, Any] | None = None
    """What the structure says of how the file was made; None where it stands in the file."""
    changes: tuple[str, ...] = ()
    """What is known of changes by other programs, in words; empty where there are none."""


def read_layout(hdf5: h5py.File, path: str) -> Layout:
    """Check an open file against the schema."""
    with reading(path):
        if _is_foreign(hdf5, path):
            return _read_anndata(hdf5, path)
        # first of all: a file of a newer format is no damaged one, whatever else is not as expected
        version = _read_version(hdf5, path)
        kind = _read_kind(hdf5, path)
        num_rows = _check_obs(hdf5, path, version)
        _member(hdf5, f"{PROVENANCE}/{PROVENANCE_JSON}", path)
        layers = [str(name) for name in hdf5.attrs[LAYERS_ATTR]]
        if not layers:
            refuse(f"attribute {LAYERS_ATTR} is empty, expected one layer or more", path)
        offsets = _read_offsets(hdf5, num_rows, path) if kind == "tokens" else None
        rows = num_rows if offsets is None else int(offsets[-1])
        places = _places(kind, layers)
        matrices = {name: _matrix(hdf5, where, rows, path) for name, where in places.items()}
        spans = (
            () if offsets is None or version < 2 else tuple(_span(hdf5, name, rows, path) for name in SPANS)
        )
        if kind == "pooled":
            width = matrices[layers[0]].shape[1]
            names = f"var/{index_name(hdf5['var'])}"
            _check_length(_member(hdf5, names, path), width, "features of X", path)
    return Layout(
        kind=kind,
        schema_version=version,
        num_rows=num_rows,
        matrices=matrices,
        offsets=offsets,
        spans=spans,
        more={} if kind == "tokens" else _more_matrices(hdf5, num_rows, layers, path),
        index=f"obs/{index_name(hdf5['obs'])}",
        features=None if kind == "tokens" else names,
    )


def _read_version(hdf5: h5py.File, path: str) -> int:
    version = hdf5.attrs.get(SCHEMA_ATTR)
    others = [words for name, words in OTHER_FILES.items() if name in hdf5.attrs]
    if version is None and others:
        problem = f"is {others[0]}, expected a file of embeddings; check the path"
        raise StoreFormatError(problem, path=path)
    if version is None:
        problem = (
            f"has no attribute {SCHEMA_ATTR}, so genoembed did not write it, and it is no AnnData file; "
            "check the path"
        )
        raise StoreFormatError(problem, path=path)
    if not isinstance(version, (int, np.integer)) or version < 1:
        refuse(f"attribute {SCHEMA_ATTR} is {version!r}, expected 1 to {SCHEMA_VERSION}", path)
    if version > SCHEMA_VERSION:
        raise SchemaVersionError(path=path, found=int(version), supported=SCHEMA_VERSION)
    return int(version)


def _read_kind(hdf5: h5py.File, path: str) -> Kind:
    found = hdf5.attrs.get("encoding-type")
    for kind, encoding in ROOT_ENCODINGS.items():
        if found == encoding.type:
            return kind
    expected = " or ".join(encoding.type for encoding in ROOT_ENCODINGS.values())
    refuse(f"attribute encoding-type is {found!r}, expected {expected}", path)


def _places(kind: Kind, layers: list[str]) -> dict[str, str]:
    """Return where each layer's matrix is."""
    if kind == "tokens":
        return {name: f"tokens/{escape_name(name)}/values" for name in layers}
    return {name: f"obsm/{escape_name(name)}" if index else "X" for index, name in enumerate(layers)}


def _member(hdf5: h5py.File, where: str, path: str) -> h5py.Dataset:
    node = hdf5.get(where)
    if not isinstance(node, h5py.Dataset):
        found = "is missing" if node is None else "is a group"
        refuse(f"/{where} {found}, expected a dataset", path)
    check_size(node, path)
    return node


def _check_length(dataset: h5py.Dataset, expected: int, of_what: str, path: str) -> None:
    if dataset.shape != (expected,):
        refuse(f"{dataset.name} has shape {dataset.shape}, expected ({expected},), the {of_what}", path)


def _matrix(hdf5: h5py.File, where: str, rows: int, path: str) -> LazyMatrix:
    dataset = _member(hdf5, where, path)
    if dataset.ndim != 2 or dataset.shape[0] != rows or not dataset.shape[1] or dataset.dtype.kind != "f":
        problem = (
            f"/{where} has shape {dataset.shape} and dtype {dataset.dtype}, expected ({rows}, D) "
            "and floating point"
        )
        refuse(problem, path)
    return LazyMatrix(dataset, path)


def _check_obs(hdf5: h5py.File, path: str, version: int) -> int:
    """Check the table of records; return how many there are."""
    table = hdf5.get("obs")
    if not isinstance(table, h5py.Group):
        refuse("/obs is missing, expected a dataset for each column", path)
    index = _member(hdf5, f"obs/{index_name(table)}", path)
    rows = index.shape[0] if index.ndim == 1 else -1
    _check_length(index, rows, "rows", path)
    # a column that the list of columns lacks was taken out on purpose; one that is listed must be there
    listed = column_names(table)
    for name in OBS_COLUMNS:
        if SINCE.get(name, 1) <= version and name in listed:
            _check_column(hdf5, f"obs/{name}", rows, path)
    return rows


def _check_column(hdf5: h5py.File, where: str, rows: int, path: str) -> None:
    node = hdf5.get(where)
    parts = PARTS.get(encoding_of(node), ()) if isinstance(node, h5py.Group) else ()
    for part in [_member(hdf5, f"{where}/{name}", path) for name in parts] or [_member(hdf5, where, path)]:
        if part.name.endswith("/categories"):
            continue
        _check_length(part, rows, "rows of /obs", path)


def _read_offsets(hdf5: h5py.File, num_rows: int, path: str) -> NDArray[np.int64]:
    dataset = _member(hdf5, "tokens/offsets", path)
    _check_length(dataset, num_rows + 1, "rows of /obs and one more", path)
    offsets: NDArray[np.int64] = dataset[:].astype(np.int64)
    if offsets[0] != 0 or (np.diff(offsets) < 0).any():
        refuse("/tokens/offsets does not rise from 0", path)
    return offsets


def _span(hdf5: h5py.File, name: str, rows: int, path: str) -> h5py.Dataset:
    dataset = _member(hdf5, f"tokens/{name}", path)
    _check_length(dataset, rows, "tokens of all records", path)
    if dataset.dtype.kind != "i":
        refuse(f"{dataset.name} has dtype {dataset.dtype}, expected integers", path)
    return dataset


# ------------------------------------------------------------------------------- what other programs wrote


def _is_foreign(hdf5: h5py.File, path: str) -> bool:
    """Tell whether this is an AnnData file without our attributes."""
    if SCHEMA_ATTR in hdf5.attrs or any(name in hdf5.attrs for name in OTHER_FILES):
        return False
    obs = hdf5.get("obs")
    if isinstance(obs, h5py.Dataset) and obs.dtype.names:
        problem = (
            "has /obs in the format of AnnData before 0.7, expected a newer one; read it with "
            "anndata.read_h5ad and save it again"
        )
        raise StoreFormatError(problem, path=path)
    # before AnnData 0.8 the root had no encoding
    return encoding_of(hdf5) == "anndata" or (isinstance(obs, h5py.Group) and encoding_of(obs) == "dataframe")


def _read_anndata(hdf5: h5py.File, path: str) -> Layout:
    """Find in a file that AnnData wrote what a file of the schema has at fixed places."""
    obs, var = (_table(hdf5, name, path) for name in ("obs", "var"))
    ids = _member(hdf5, f"obs/{index_name(obs)}", path)
    num_rows = ids.shape[0] if ids.ndim == 1 else -1
    _check_length(ids, num_rows, "rows", path)
    for name in column_names(obs):
        if is_known_column(obs[name]):
            _check_column(hdf5, f"obs/{name}", num_rows, path)
    _check_unique(ids, path)
    provenance = read_provenance(hdf5, path)
    features = _member(hdf5, f"var/{index_name(var)}", path)
    names = read_text(features)
    if "methods" in provenance and names == list("ACGT"):
        problem = f"is {OTHER_FILES[MUTATIONS_ATTR]}, expected a file of embeddings; check the path"
        raise StoreFormatError(problem, path=path)
    more = _more_matrices(hdf5, num_rows, (), path)
    recorded = _recorded_layers(provenance)
    main, is_whole = _read_columns(names, provenance)
    if recorded and main not in recorded:
        main, is_whole = recorded[0], None
    matrices: dict[str, LazyMatrix] = {}
    is_x = has_features = False
    if (copy := more.pop(escape_name(main or ""), None)) is not None:
        matrices[str(main)] = copy  # whole, whatever became of the columns of X
        has_features = bool(is_whole) and len(names) == copy.shape[1]
    elif _is_matrix(x := hdf5.get("X"), num_rows):
        check_size(x, path)
        _check_length(features, x.shape[1], "features of X", path)
        matrices[main or "X"] = LazyMatrix(x, path)
        is_x = has_features = True
    if not recorded and is_whole is not None:
        # the account is lost, and the columns say that the file was ours; scanpy's names begin with X_
        recorded = [unescape_name(name) for name in more if not name.startswith("X_")]
    for name in recorded:
        if (found := more.pop(escape_name(name), None)) is not None:
            matrices[name] = found
    if not matrices:
        matrices, more = more, {}
    if not matrices:
        _refuse_without_matrix(hdf5, path)
    picked = None
    if is_x and is_whole is False:
        picked = hashlib.sha256("\n".join(names).encode()).hexdigest()
        provenance = {**provenance, "columns": {**provenance.get("columns", {}), str(main): picked}}
    return Layout(
        kind="pooled",
        schema_version=SCHEMA_VERSION,
        num_rows=num_rows,
        matrices=matrices,
        offsets=None,
        spans=(),
        more=more,
        index=f"obs/{index_name(obs)}",
        features=f"var/{index_name(var)}" if has_features else None,
        provenance=provenance,
        changes=tuple(_changes(provenance, obs, num_rows, has_picked=picked is not None)),
    )


def _table(hdf5: h5py.File, name: str, path: str) -> h5py.Group:
    table = hdf5.get(name)
    if not isinstance(table, h5py.Group):
        refuse(f"/{name} is no table, expected one as AnnData writes it", path)
    return table


def _check_unique(ids: h5py.Dataset, path: str) -> None:
    (most, times), *_ = Counter(read_text(ids)).most_common(1) or [("", 1)]
    if times > 1:
        problem = (
            f"id {most!r} names {times} rows, expected ids that are unique; make them so with "
            "adata.obs_names_make_unique() and save it again"
        )
        raise StoreFormatError(problem, path=path)


def _is_matrix(node: object, rows: int) -> bool:
    """Tell whether an element holds a vector for each row."""
    return (
        isinstance(node, h5py.Dataset)
        and node.ndim == 2
        and node.shape[0] == rows
        and node.shape[1] > 0
        and node.dtype.kind == "f"
    )


def _more_matrices(hdf5: h5py.File, rows: int, layers: Sequence[str], path: str) -> dict[str, LazyMatrix]:
    """Find the matrices of ``/obsm`` that are not among the layers, by the names of their links."""
    group = hdf5.get("obsm")
    found = {}
    taken = {escape_name(name) for name in layers}
    for name in group if isinstance(group, h5py.Group) else ():
        if name not in taken and _is_matrix(group[name], rows):
            check_size(group[name], path)
            found[name] = LazyMatrix(group[name], path)
    return found


def _refuse_without_matrix(hdf5: h5py.File, path: str) -> NoReturn:
    x = hdf5.get("X")
    what = (
        "is missing"
        if x is None
        else f"is stored as {encoding_of(x) or 'a group'}"
        if isinstance(x, h5py.Group)
        else f"has shape {x.shape} and dtype {x.dtype}"
    )
    problem = (
        f"has no vectors: /X {what}, and /obsm has no matrix of floating point, expected one with a row per "
        "record; make X dense (adata.X = adata.X.toarray().astype('float32')), or put vectors into adata.obsm"
    )
    raise StoreFormatError(problem, path=path)


def _recorded_layers(provenance: Mapping[str, Any]) -> list[str]:
    """Return the names of the matrices that genoembed wrote."""
    if isinstance(joined := provenance.get("matrices"), list):
        return list(map(str, joined))
    config = provenance.get("config")
    embedding = config.get("embedding") if isinstance(config, dict) else None
    fusion = embedding.get("fusion", "none") if isinstance(embedding, dict) else "none"
    layers = provenance.get("layers")
    names = list(map(str, layers)) if isinstance(layers, list) else []
    # one layer has nothing to be fused with, and keeps its name
    return names if fusion == "none" or len(names) == 1 else [str(fusion)]


def _read_columns(names: Sequence[str], provenance: Mapping[str, Any]) -> tuple[str | None, bool | None]:
    """Return the matrix that has these columns, and whether they are all there in the order of the writer.

    None, None where their names are not ours; ``docs/FORMAT.md`` says what those are.

    Example:
        >>> _read_columns(["blocks.1:0", "blocks.1:1"], {}), _read_columns(["blocks.1:0", "blocks.1:7"], {})
        (('blocks.1', True), ('blocks.1', False))
        >>> _read_columns(["blocks.1:std:0", "blocks.1:0"], {}), _read_columns(["gene"], {})
        (('blocks.1', False), (None, None))
    """
    found = [_COLUMN.fullmatch(name) for name in names]
    parts = [match.groups("") for match in found if match]
    widths: dict[str, int] = {}
    for layer, _, _, number in parts:
        widths[layer] = max(widths.get(layer, 0), int(number) + 1)
    if len(parts) != len(names) or not names:
        return None, None
    joined = provenance.get("layers") if _recorded_layers(provenance) == ["concat"] else None
    if isinstance(joined, list) and widths.keys() <= set(joined):
        matrix, layers = "concat", joined
    elif len(widths) == 1:
        (matrix,) = layers = [*widths]
    else:
        return None, None
    strands = ("", ":rc") if any(strand for _, strand, _, _ in parts) else ("",)
    moments = ("", ":std") if any(moment for _, _, moment, _ in parts) else ("",)
    # a width that is made up of a huge number is not counted up to
    if sum(widths.values()) * len(strands) * len(moments) != len(names) or len(widths) < len(layers):
        return matrix, False
    expected = (
        f"{layer}{strand}{moment}:{index}"
        for layer in layers
        for strand in strands
        for moment in moments
        for index in range(widths[layer])
    )
    return matrix, list(expected) == list(names)


def read_provenance(hdf5: h5py.File, path: str) -> dict[str, Any]:
    """Read how a file was made; of what another program left of it, what is there."""
    text = hdf5.get(f"{PROVENANCE}/{PROVENANCE_JSON}")
    if isinstance(text, h5py.Dataset):
        check_size(text, path)
        found = json.loads(text.asstr()[()])
        if not isinstance(found, dict):
            problem = f"/{PROVENANCE}/{PROVENANCE_JSON} is not a JSON object; make the file again"
            raise StoreFormatError(problem, path=path)
        return found
    # AnnData joins files entry by entry: what differs between them is gone, and with it the JSON
    mirror = hdf5.get(PROVENANCE)
    return _unmirrored(mirror, path) if isinstance(mirror, h5py.Group) else {}


def _unmirrored(group: h5py.Group, path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, node in group.items():
        key = unescape_name(name)
        if isinstance(node, h5py.Group):
            found[key] = _unmirrored(node, path)
            continue
        check_size(node, path)
        value = node.asstr()[()] if h5py.check_string_dtype(node.dtype) is not None else node[()]
        found[key] = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    return found


def _changes(provenance: Mapping[str, Any], obs: h5py.Group, num_rows: int, *, has_picked: bool) -> list[str]:
    """Say what is known of the changes that another program made."""
    if not provenance.keys() - {"columns"}:
        found = [
            "does not say which model and settings made its vectors: another program wrote it; it can be "
            "searched with vectors only"
        ]
    else:
        found = [
            "another program wrote it again, so no seal protects its values; verify embeds a sample again"
        ]
    counts, config = provenance.get("counts"), provenance.get("config")
    windows = config.get("windows") if isinstance(config, dict) else None
    has_windows = isinstance(windows, dict) and windows.get("per_window")
    counted = counts.get("windows" if has_windows else "records") if isinstance(counts, dict) else None
    if isinstance(counted, int) and counted < num_rows:
        found.append(f"its account is of {counted:,} rows, and it has {num_rows:,}")
    if "inputs" in provenance:
        found += _strange_rows(provenance["inputs"], obs)
    if has_picked:
        found.append("columns of its vectors were left out or reordered")
    return found


def _strange_rows(inputs: object, obs: h5py.Group) -> list[str]:
    """Say which rows cannot be of the run that a file's account tells of."""
    names = (
        {item.get("name") for item in inputs if isinstance(item, dict)} if isinstance(inputs, list) else ()
    )
    texts = {name: set(read_text(obs[name])) for name in ("sha256", "source") if name in column_names(obs)}
    found = []
    if "" in texts.get("sha256", ()):
        found.append("rows without a SHA-256 of their sequence were added by another program")
    if names and (others := sorted(texts.get("source", set()) - names - {""})):
        found.append(f"its account does not name {', '.join(others[:3])}, which rows of it are from")
    return found
