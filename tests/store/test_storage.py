"""An HDF5 file shows nothing but itself, whichever way it tries to lead elsewhere."""

import subprocess
import sys

import h5py
import numpy as np
import pytest

from genoembed import fit_transform
from genoembed.errors import StoreFormatError
from genoembed.pipeline.embedding_file import load_transform
from genoembed.store import open_embeddings
from genoembed.store.seal import number_chunks, write_seal
from tests.store.blocks import pooled_block, write_file

SECRET = b"what the machine has elsewhere, and nobody may read"
ROWS = ["a", "b"]


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_bytes(SECRET)
    with h5py.File(tmp_path / "other.h5", "w") as hdf5:
        hdf5["X"] = np.zeros((2, 4), np.float32)
        hdf5["text"] = np.array([b"x", b"y"])
    return path


def external(where, shape, dtype):
    def change(hdf5, secret):
        del hdf5[where]
        hdf5.create_dataset(where, shape, dtype, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])

    return change


def virtual(where, shape, dtype):
    def change(hdf5, secret):
        del hdf5[where]
        layout = h5py.VirtualLayout(shape, dtype)
        layout[:] = h5py.VirtualSource(str(secret.with_name("other.h5")), "X", shape)
        hdf5.create_virtual_dataset(where, layout)

    return change


def link(where, to):
    def change(hdf5, secret):
        del hdf5[where]
        hdf5[where] = to(secret)

    return change


def references(hdf5, secret):
    hdf5["uns/pointers"] = np.array([hdf5["X"].ref], dtype=h5py.ref_dtype)


def region_references(hdf5, secret):
    hdf5["uns/pointers"] = np.array([hdf5["X"].regionref[:1]], dtype=h5py.regionref_dtype)


def compound_references(hdf5, secret):
    kind = np.dtype([("a", "<f4"), ("b", h5py.ref_dtype)])
    hdf5.create_dataset("uns/pointers", (1,), kind)


def plugin(hdf5, secret):
    del hdf5["X"]
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_chunk((2, 4))
    plan.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, ())
    h5py.h5d.create(hdf5.id, b"X", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((2, 4)), plan)


def named_type(hdf5, secret):
    hdf5["uns/kind"] = np.dtype("<f8")


def soft(_):
    return h5py.SoftLink("/obs/id")


KINDS = {
    "external storage of texts": external("obs/description", (2,), "S20"),
    "external storage of X": external("X", (2, 4), "<f4"),
    "external storage of what is not read": external("uns/more", (2,), "S4"),
    "external storage in obsm": external("obsm/m", (2, 4), "<f4"),
    "virtual X": virtual("X", (2, 4), "<f4"),
    "external link to X": link("X", lambda s: h5py.ExternalLink(str(s.with_name("other.h5")), "/X")),
    "external link to obs": link("obs/description", lambda s: h5py.ExternalLink("other.h5", "/text")),
    "external link to a group": link("obsm", lambda s: h5py.ExternalLink("other.h5", "/")),
    "soft link": link("obs/description", soft),
    "dangling soft link": link("obs/description", lambda s: h5py.SoftLink("/nowhere")),
    "references": references,
    "region references": region_references,
    "references in a compound": compound_references,
    "a filter that is a plugin": plugin,
    "a named type": named_type,
}


def hostile(folder, secret, change):
    path = write_file(folder / "a.h5", pooled_block(ROWS, ("l", "m")))
    with h5py.File(path, "r+") as hdf5:
        hdf5.require_group("uns")
        hdf5.require_dataset("uns/more", (1,), "i4")
        change(hdf5, secret)
    return path


@pytest.mark.parametrize("untrusted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_file_that_leads_elsewhere_is_refused(tmp_path, secret, kind, untrusted):
    path = hostile(tmp_path, secret, KINDS[kind])
    with pytest.raises(StoreFormatError, match="expected groups and data sets of the file itself"):
        open_embeddings(path, untrusted=untrusted)


@pytest.mark.parametrize("kind", ["external storage of texts", "virtual X", "external link to X"])
def test_forged_seal_helps_nobody(tmp_path, secret, kind):
    path = hostile(tmp_path, secret, KINDS[kind])
    with h5py.File(path, "r") as hdf5:
        gaps = np.zeros((0, 2), "<u8") if kind == "virtual X" else number_chunks(hdf5)
    with path.open("r+b") as file:
        write_seal(file, gaps)
    with pytest.raises(StoreFormatError, match="expected groups and data sets of the file itself"):
        open_embeddings(path)


def test_group_that_holds_itself_ends(tmp_path, secret):
    def change(hdf5, _):
        hdf5["uns/again"] = hdf5["uns"]

    with open_embeddings(hostile(tmp_path, secret, change)) as file:
        assert file.ids == ROWS


@pytest.mark.parametrize("how", ["external", "link"])
def test_transform_that_leads_elsewhere_is_refused(tmp_path, secret, how):
    block = pooled_block([f"r{number}" for number in range(40)], ("l",))
    fit_transform(write_file(tmp_path / "b.h5", block), output=tmp_path / "t.h5", method="center")
    with h5py.File(tmp_path / "t.h5", "r+") as hdf5:
        if how == "external":
            external("arrays/mean", (4,), "<f8")(hdf5, secret)
        else:
            link("facts_json", lambda s: h5py.ExternalLink("other.h5", "/text"))(hdf5, secret)
    with pytest.raises(StoreFormatError, match="expected groups and data sets of the file itself"):
        load_transform(tmp_path / "t.h5")


def test_command_does_not_show_the_secret(tmp_path, secret):
    path = hostile(tmp_path, secret, KINDS["external storage of texts"])
    for words in (["info", str(path)], ["export", str(path), "--to", "csv", "-o", str(tmp_path / "o.csv")]):
        done = subprocess.run([sys.executable, "-m", "genoembed", *words], capture_output=True, check=False)
        assert done.returncode == 1, done.stderr
        assert b"external storage" in done.stderr
        assert SECRET[:12] not in done.stdout + done.stderr


def test_anndata_and_what_it_writes_are_taken(tmp_path):
    path = write_file(tmp_path / "a.h5", pooled_block(ROWS, ("l", "m")))
    with open_embeddings(path) as file:
        whole = file.to_anndata()
    assert list(whole.obs_names) == ROWS
