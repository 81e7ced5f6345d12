"""HDF5 of other kinds: AnnData's ``.h5ad``, and one dataset a record, as UniProt ships embeddings."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import h5py

from genoembed.errors import MissingExtraError
from genoembed.exporting.blocks import row_blocks
from genoembed.store.atomic import AtomicFile
from genoembed.store.schema import escape_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from genoembed.store import EmbeddingFile


def write_h5ad(file: EmbeddingFile, layers: Sequence[str], target: Path) -> None:
    """Write an AnnData file: a copy, since a pooled file is one; or one with another layer as ``X``."""
    if list(layers) == file.layers:
        shutil.copyfile(file.path, target)
        return
    try:
        import anndata
    except ImportError as error:
        raise MissingExtraError(package="anndata", extra="analysis", purpose="a layer as h5ad") from error
    (layer,) = layers
    whole = file.to_anndata()
    names = [f"{layer}:{index}" for index in range(file[layer].shape[1])]
    made = anndata.AnnData(X=file[layer][:], obs=whole.obs, uns=dict(whole.uns))
    made.var_names = names
    made.write_h5ad(target)


def write_one_dataset_a_record(file: EmbeddingFile, layers: Sequence[str], target: Path) -> None:
    """Write a dataset for each record at the root: ``(D,)``, in a per-token file ``(T, D)``.

    A dataset's name is the id, in which ``%`` is ``%25`` and ``/`` is ``%2F``; its attribute ``original_id``
    is the id as it was. The root's attribute ``layer`` names the layer.
    """
    (layer,) = layers
    output = AtomicFile(target)
    try:
        with h5py.File(output, "w", libver=("earliest", "v110")) as made:
            made.attrs["layer"] = layer
            for block in row_blocks(file, [layer]):
                for index in range(block.start, block.stop):
                    first, last = block.offsets[index - block.start : index - block.start + 2]
                    values = block.matrices[layer]
                    vectors = values[first] if file.kind == "pooled" else values[first:last]
                    record_id = file.ids[index]
                    dataset = made.create_dataset(escape_name(record_id), data=vectors)
                    dataset.attrs["original_id"] = record_id
        output.commit()
    finally:
        output.discard()
