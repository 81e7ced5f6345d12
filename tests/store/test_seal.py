"""The seal behind a file, and the trial of files without one: HDF5 never meets damaged bytes here."""

from __future__ import annotations

import random
import shutil
import struct
import sys
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest

from genoembed.errors import StoreFormatError
from genoembed.store import open_embeddings, seal
from genoembed.store.seal import MAGIC, check_seal
from tests.store.blocks import pooled_block, token_block, write_file

ARCHIVES = Path(__file__).parents[1] / "data" / "archives"
TRAILER = struct.Struct("<32sQQ16s")


@pytest.fixture
def no_trial(monkeypatch):
    def refuse(path):
        raise AssertionError(f"{path} was tried in a child process")

    monkeypatch.setattr(seal, "check_in_child", refuse)


def trailer_of(path):
    content = path.read_bytes()
    return TRAILER.unpack(content[-TRAILER.size :]), content


@pytest.mark.parametrize(
    "block",
    [pooled_block([f"r{i}" for i in range(50)], ("l", "m")), token_block([3, 0, 2]), pooled_block([])],
    ids=["pooled", "tokens", "rowless"],
)
def test_seal_of_a_written_file_holds_and_needs_no_trial(tmp_path, no_trial, block):
    path = write_file(tmp_path / "a.h5", block)
    assert check_seal(path) is True
    with open_embeddings(path) as embeddings:
        assert len(embeddings) == len(block.rows)
    (_, _, end, magic), content = trailer_of(path)
    assert magic == MAGIC
    assert int.from_bytes(content[40:48], "little") == end  # what HDF5 calls the end of the file
    with h5py.File(path) as hdf5:
        assert hdf5.attrs["genoembed-schema"] == 2


def test_seal_covers_every_byte_but_the_numbers(tmp_path):
    path = write_file(tmp_path / "a.h5", pooled_block([f"r{i}" for i in range(40)], ("l", "m"), width=64))
    (_, num_gaps, end, _), content = trailer_of(path)
    gaps = np.frombuffer(content[end : end + 16 * num_gaps], "<u8").reshape(-1, 2)
    covered = np.ones(end, bool)
    for offset, size in gaps.tolist():
        covered[offset : offset + size] = False
    # X, m, and seven columns of numbers (two of them codes)
    assert (~covered).sum() == 40 * (2 * 64 * 4 + 5 * 8 + 2 * 4)
    rng = random.Random(1)
    places = [rng.randrange(len(content)) for _ in range(60)]
    damaged = tmp_path / "damaged.h5"
    found = {True: 0, False: 0}
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        damaged.write_bytes(changed)
        is_covered = place >= end or bool(covered[place])
        found[is_covered] += 1
        if not is_covered:
            assert check_seal(damaged) is True
        elif place >= len(content) - len(MAGIC):
            assert check_seal(damaged) is False
        else:
            with pytest.raises(StoreFormatError, match=r"damaged\.h5: is (not|cut off)"):
                check_seal(damaged)
    assert min(found.values()) > 5


@pytest.mark.parametrize("forged", [(0, 2**63), (2**63, 2**63), (100, 50), (0, 0)])
def test_seal_with_nonsense_for_gaps_is_damage(tmp_path, forged):
    path = write_file(tmp_path / "a.h5", pooled_block(["a"]))
    (digest, num_gaps, end, magic), content = trailer_of(path)
    table = bytearray(content[end : end + 16 * num_gaps])
    table[16:32] = struct.pack("<QQ", *forged)
    path.write_bytes(content[:end] + table + TRAILER.pack(digest, num_gaps, end, magic))
    with pytest.raises(StoreFormatError, match="its checksum differs, so the file is damaged"):
        check_seal(path)
    path.write_bytes(content[:end] + table + TRAILER.pack(digest, 2**60, end, magic))
    with pytest.raises(StoreFormatError, match="its checksum differs"):
        check_seal(path)


def test_seal_goes_when_another_program_changes_the_file(tmp_path):
    path = write_file(tmp_path / "a.h5", pooled_block(["a", "b"]))
    with h5py.File(path, "r+") as hdf5:
        hdf5["X"][0, 0] = 5
    assert check_seal(path) is False
    with open_embeddings(path) as embeddings:
        assert embeddings.X[0, 0] == 5


def test_sealed_file_is_whole_for_anndata(tmp_path):
    block = pooled_block(["a", "b"])
    adata = anndata.read_h5ad(write_file(tmp_path / "a.h5", block))
    np.testing.assert_array_equal(adata.X, block.matrices["blocks.1"])


# --- files without a seal -------------------------------------------------------------------------


def test_file_without_a_seal_is_tried_once_and_read(monkeypatch):
    tried = []
    monkeypatch.setattr(seal, "check_in_child", tried.append)
    with open_embeddings(ARCHIVES / "v1" / "pooled.h5") as embeddings:
        assert len(embeddings.ids) == 3
    assert tried == [ARCHIVES / "v1" / "pooled.h5"]


def test_file_from_a_stranger_is_tried_despite_its_seal(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(seal, "check_in_child", tried.append)
    path = write_file(tmp_path / "a.h5", pooled_block(["a"]))
    open_embeddings(path).close()
    assert tried == []
    open_embeddings(path, untrusted=True).close()
    assert tried == [path]


def test_trial_passes_a_sound_file():
    assert seal.check_in_child(ARCHIVES / "v1" / "tokens.h5") is None


@pytest.mark.parametrize(
    "code",
    [
        "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "raise SystemExit(0)",
        "raise ValueError('odd')",
    ],
    ids=["crash", "silent", "exception"],
)
def test_trial_that_does_not_end_in_order_is_an_error(tmp_path, monkeypatch, code):
    monkeypatch.setattr(seal, "_CHILD", code)
    path = shutil.copy(ARCHIVES / "v1" / "pooled.h5", tmp_path / "a.h5")
    with pytest.raises(
        StoreFormatError, match=r"a\.h5: cannot be read: HDF5 crashed or hung on it in a trial"
    ):
        open_embeddings(path)


def test_trial_that_computes_for_ever_is_ended(tmp_path, monkeypatch):
    endless = seal._CHILD.replace("walk(sys.argv[2])", "").rstrip("; ")
    endless += "; import genoembed.store.seal as q; q._CPU_SECONDS = 1"
    endless += "; q.walk = lambda path: [0 for _ in iter(int, 1)]"
    monkeypatch.setattr(seal, "_CHILD", endless + "; q.walk_in_child(sys.argv[2])")
    path = Path(shutil.copy(ARCHIVES / "v1" / "pooled.h5", tmp_path / "a.h5"))
    with pytest.raises(
        StoreFormatError, match=r"HDF5 crashed or hung on it in a trial \(which ended with status -"
    ):
        seal.check_in_child(path)


def test_trial_that_waits_for_ever_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(seal, "_CHILD", "import time; time.sleep(60)")
    monkeypatch.setattr(seal, "_WALL_SECONDS", 0.5)
    with pytest.raises(StoreFormatError, match=r"in a trial \(which took over 0.5 s\)"):
        seal.check_in_child(ARCHIVES / "v1" / "pooled.h5")


def test_trial_is_left_out_where_there_is_no_python(monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", "")
    with open_embeddings(ARCHIVES / "v1" / "pooled.h5") as embeddings:
        assert len(embeddings) == 3
    assert "there is no Python to try it with" in caplog.text


def test_walk_ends_in_order_on_nonsense(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(200))
    assert seal.walk(tmp_path / "a.h5") is None
    with h5py.File(tmp_path / "b.h5", "w") as hdf5:
        hdf5["X"] = np.ones((3, 3))
        hdf5.attrs["x"] = "y"
    assert seal.walk(tmp_path / "b.h5") is None


def test_dataset_larger_than_its_file_can_hold_is_refused(tmp_path):
    path = Path(shutil.copy(ARCHIVES / "v1" / "pooled.h5", tmp_path / "a.h5"))
    with h5py.File(path, "r+") as hdf5:
        hdf5["X"].resize(2**40, axis=0)
    with pytest.raises(
        StoreFormatError, match=r"/X claims shape \(1099511627776, 4\) in a file of \d+ bytes"
    ):
        open_embeddings(path)


def test_file_with_something_in_front_is_read(tmp_path):
    with (
        h5py.File(tmp_path / "a.h5", "w", userblock_size=1024) as hdf5,
        h5py.File(ARCHIVES / "v1" / "pooled.h5") as source,
    ):
        for name in source:
            source.copy(name, hdf5)
        hdf5.attrs.update(source.attrs)
    with open_embeddings(tmp_path / "a.h5") as embeddings:
        assert len(embeddings.ids) == 3
