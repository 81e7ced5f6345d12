"""What the writer promises: complete or not at all, refused input changes nothing, and nothing is lost."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import h5py
import numpy as np
import pytest

from genoembed import atomic
from genoembed.contracts import EmbeddingBlock
from genoembed.errors import ConfigError, DuplicateIdError, NonFiniteError, ShapeError, StoreError
from genoembed.store import EmbeddingWriter, check_output, open_embeddings
from genoembed.store.schema import OBS_COLUMNS
from tests.store.blocks import obs_row, pooled_block, token_block, write_file


def test_obs_columns_are_the_fields_of_obsrow():
    assert ("id", *OBS_COLUMNS) == tuple(type(obs_row("a")).__dataclass_fields__)


def test_writer_one_matrix_is_only_x(tmp_path):
    block = pooled_block(["a", "b"])
    with h5py.File(write_file(tmp_path / "a.h5", block)) as hdf5:
        np.testing.assert_array_equal(hdf5["X"][:], block.matrices["blocks.1"])
        assert list(hdf5["obsm"]) == []
        assert hdf5["X"].compression is None
        assert hdf5.attrs["genoembed-schema"] == 2


def test_writer_x_is_a_hard_link_to_the_first_layer(tmp_path):
    block = pooled_block([f"r{i}" for i in range(3000)], ("late", "early"), width=64)
    path = write_file(tmp_path / "a.h5", block)
    with h5py.File(path) as hdf5:
        assert isinstance(hdf5.get("obsm/late", getlink=True), h5py.HardLink)
        assert hdf5["X"] == hdf5["obsm/late"]
        assert hdf5["X"] != hdf5["obsm/early"]
        np.testing.assert_array_equal(hdf5["X"][:], block.matrices["late"])
    values = sum(matrix.nbytes for matrix in block.matrices.values())
    assert values < path.stat().st_size < values * 1.7


def test_writer_same_rows_give_same_bytes_however_they_are_cut(tmp_path):
    ids = [f"r{i}" for i in range(7)]
    whole = pooled_block(ids)
    parts = [
        EmbeddingBlock(
            rows=whole.rows[i : i + 1], matrices={"blocks.1": whole.matrices["blocks.1"][i : i + 1]}
        )
        for i in range(7)
    ]
    first = write_file(tmp_path / "a.h5", whole)
    second = write_file(tmp_path / "b.h5", *parts)
    assert first.read_bytes() == second.read_bytes()


def test_writer_copies_the_values(tmp_path):
    block = pooled_block(["a"])
    expected = block.matrices["blocks.1"].copy()
    with EmbeddingWriter(tmp_path / "a.h5", kind="pooled") as writer:
        writer.append(block)
        block.matrices["blocks.1"][:] = 0
        writer.finish({})
    with open_embeddings(tmp_path / "a.h5") as embeddings:
        np.testing.assert_array_equal(embeddings.X[:], expected)


def test_writer_hundred_thousand_rows_in_blocks(tmp_path):
    generator = np.random.default_rng(0)
    started = time.monotonic()
    with EmbeddingWriter(tmp_path / "a.h5", kind="pooled") as writer:
        for first in range(0, 100_000, 500):
            rows = tuple(obs_row(f"record/{i}") for i in range(first, first + 500))
            matrix = generator.normal(size=(500, 16)).astype(np.float32)
            writer.append(EmbeddingBlock(rows=rows, matrices={"l": matrix}))
        writer.finish({})
    with open_embeddings(tmp_path / "a.h5") as embeddings:
        assert len(embeddings) == writer.num_rows == 100_000
        assert embeddings.index_of("record/99999") == 99_999
    assert time.monotonic() - started < 60


def test_writer_single_rows_are_buffered(tmp_path):
    matrix = np.ones((1, 8), np.float32)
    started = time.monotonic()
    with EmbeddingWriter(tmp_path / "a.h5", kind="pooled") as writer:
        for i in range(10_000):
            writer.append(EmbeddingBlock(rows=(obs_row(f"r{i}"),), matrices={"l": matrix}))
        writer.finish({})
    assert time.monotonic() - started < 30


def test_writer_small_file_is_small(tmp_path):
    assert write_file(tmp_path / "a.h5", pooled_block(["a", "b"])).stat().st_size < 60_000


def test_writer_rows_may_be_zero(tmp_path):
    with open_embeddings(write_file(tmp_path / "a.h5", pooled_block([]))) as embeddings:
        assert embeddings.X.shape == (0, 4)
        assert embeddings.ids == []
        assert embeddings.obs["strand"].shape == (0,)


# --- complete or not at all -----------------------------------------------------------------------


def _fail_while_writing(path):
    with EmbeddingWriter(path, kind="pooled", overwrite=True) as writer:
        writer.append(pooled_block([f"r{i}" for i in range(9000)], width=64))
        assert len(list(path.parent.iterdir())) == 2
        raise KeyError("boom")


def test_writer_exception_leaves_nothing_and_keeps_the_old_file(tmp_path):
    path = write_file(tmp_path / "a.h5", pooled_block(["old"]))
    before = path.read_bytes()
    with pytest.raises(KeyError, match="boom"):
        _fail_while_writing(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.h5"]
    assert path.read_bytes() == before


def test_writer_without_finish_leaves_nothing_and_says_so(tmp_path, caplog):
    with EmbeddingWriter(tmp_path / "a.h5", kind="pooled") as writer:
        writer.append(pooled_block(["a"]))
    assert list(tmp_path.iterdir()) == []
    assert "left without finish" in caplog.text


def test_writer_killed_process_keeps_the_old_file(tmp_path):
    path = write_file(tmp_path / "a.h5", pooled_block(["old"]))
    before = path.read_bytes()
    script = """
        import os, signal, sys
        from genoembed.store import EmbeddingWriter
        from tests.store.blocks import pooled_block
        with EmbeddingWriter(sys.argv[1], kind="pooled", overwrite=True) as writer:
            writer.append(pooled_block([f"r{i}" for i in range(9000)], width=64))
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), path], check=False)
    assert done.returncode == -9
    assert path.read_bytes() == before


def test_writer_existing_output_is_refused_before_work(tmp_path):
    path = write_file(tmp_path / "a.h5", pooled_block(["old"]))
    with pytest.raises(StoreError, match=r"a\.h5: exists already; set overwrite=True") as caught:
        EmbeddingWriter(path, kind="pooled")
    assert caught.value.path == str(path)


def test_writer_output_that_appears_meanwhile_is_kept(tmp_path):
    path = tmp_path / "a.h5"
    with EmbeddingWriter(path, kind="pooled") as writer:
        writer.append(pooled_block(["a"]))
        path.write_text("someone else's")
        with pytest.raises(StoreError, match="exists already"):
            writer.finish({})
    assert path.read_text() == "someone else's"
    assert len(list(tmp_path.iterdir())) == 1


def test_writer_overwrite_replaces(tmp_path):
    path = write_file(tmp_path / "a.h5", pooled_block(["old"]))
    write_file(path, pooled_block(["new"]), overwrite=True)
    with open_embeddings(path) as embeddings:
        assert embeddings.ids == ["new"]


def test_writer_follows_a_symbolic_link(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "a.h5"
    link.symlink_to(tmp_path / "disk" / "real.h5")
    write_file(link, pooled_block(["a"]))
    assert link.is_symlink()
    assert (tmp_path / "disk" / "real.h5").is_file()


@pytest.mark.parametrize(
    ("name", "message"),
    [(".", "is a folder"), ("no/such/a.h5", "folder '.*such' does not exist; make it")],
)
def test_check_output_refuses_a_place_without_files(tmp_path, name, message):
    with pytest.raises(StoreError, match=message):
        check_output(tmp_path / name)


def test_check_output_refuses_standard_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match=r"^-: HDF5 cannot be written to standard output; set output to"):
        check_output("-")
    assert check_output("./-") == tmp_path.resolve() / "-"


def test_check_output_never_replaces_a_device(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="is a device or pipe, expected a regular file"):
        check_output(tmp_path / "pipe", overwrite=True)


def test_writer_file_modes(tmp_path):
    old = os.umask(0o027)
    try:
        with EmbeddingWriter(tmp_path / "a.h5", kind="pooled") as writer:
            writer.append(pooled_block(["a"]))
            (temporary,) = tmp_path.iterdir()
            assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
            assert temporary.name.startswith(".a.h5.")
            writer.finish({})
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.h5").stat().st_mode) == 0o640


def test_writer_syncs_the_file_before_and_the_folder_after_the_rename(tmp_path, monkeypatch):
    events = []
    fsync = os.fsync
    path = tmp_path / "a.h5"

    def recorded(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append(("folder" if is_folder else "file", path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(atomic.os, "fsync", recorded)
    write_file(path, pooled_block(["a"]))
    assert events == [("file", False), ("folder", True)]


def test_writer_failed_sync_is_reported(tmp_path, monkeypatch):
    def broken(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(atomic.os, "fsync", broken)
    with pytest.raises(StoreError, match=r"could not be written \(Input/output error\)"):
        write_file(tmp_path / "a.h5", pooled_block(["a"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [20_000, 300_000, 2_000_000])
def test_writer_full_disk_is_one_clear_error(tmp_path, limit):
    """A file size limit fails as a full disk does; plain h5py ends this script with a segmentation fault."""
    script = """
        import resource, sys
        from genoembed.errors import StoreError
        from genoembed.store import EmbeddingWriter
        from tests.store.blocks import pooled_block
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
        try:
            with EmbeddingWriter(sys.argv[1], kind="pooled") as writer:
                for part in range(40):
                    writer.append(pooled_block([f"{part}-{i}" for i in range(200)], width=128))
                writer.finish({})
        except StoreError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), tmp_path / "a.h5", str(limit)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "a.h5: could not be written (File too large), nothing is left of it; check the free" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_writer_interrupt_inside_hdf5_comes_out_as_itself(tmp_path, monkeypatch):
    def interrupted(self, view):
        raise KeyboardInterrupt("Ctrl-C")

    with EmbeddingWriter(tmp_path / "a.h5", kind="pooled") as writer:
        writer.append(pooled_block(["a"]))
        monkeypatch.setattr(atomic.AtomicFile, "_write_all", interrupted)
        with pytest.raises(KeyboardInterrupt, match="Ctrl-C"):
            writer.finish({})
    assert list(tmp_path.iterdir()) == []


# --- refused input --------------------------------------------------------------------------------


def test_writer_refused_block_changes_nothing(tmp_path):
    with EmbeddingWriter(tmp_path / "a.h5", kind="pooled") as writer:
        writer.append(pooled_block(["a", "b"]))
        with pytest.raises(
            DuplicateIdError, match=r"record 'b': is in this file already.*duplicates='suffix'"
        ):
            writer.append(pooled_block(["c", "b"]))
        writer.append(pooled_block(["c"]))
        writer.finish({})
    with open_embeddings(tmp_path / "a.h5") as embeddings:
        assert embeddings.ids == ["a", "b", "c"]


def test_writer_duplicate_inside_a_block_is_refused(tmp_path):
    with pytest.raises(DuplicateIdError, match="record 'b'"):
        write_file(tmp_path / "a.h5", pooled_block(["b", "b"]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_writer_names_the_record_that_is_not_finite(tmp_path, value):
    block = pooled_block(["a", "b", "c"])
    block.matrices["blocks.1"][1, 2] = value
    with pytest.raises(
        NonFiniteError, match=rf"record 'b': layer 'blocks\.1' has the value {value} at feature 2"
    ):
        write_file(tmp_path / "a.h5", block)


def test_writer_names_the_record_of_a_token_that_is_not_finite(tmp_path):
    block = token_block([2, 0, 3])
    block.values["blocks.1"][2, 0] = np.nan
    with pytest.raises(NonFiniteError, match="record 'r2'"):
        write_file(tmp_path / "a.h5", block)


def test_writer_float16_overflow_is_refused_with_the_remedy(tmp_path):
    block = pooled_block(["a", "b"])
    block.matrices["blocks.1"][1, 0] = 70_000
    with pytest.raises(
        NonFiniteError, match=r"record 'b': .*70000.*float16's largest, 65504.*out_dtype to float32"
    ):
        write_file(tmp_path / "a.h5", block, dtype="float16")


def test_writer_float16_rounds(tmp_path):
    block = pooled_block(["a", "b"])
    with open_embeddings(write_file(tmp_path / "a.h5", block, dtype="float16")) as embeddings:
        assert embeddings.X.dtype == np.float16
        np.testing.assert_array_equal(embeddings.X[:], block.matrices["blocks.1"].astype(np.float16))


def test_writer_other_layers_are_refused(tmp_path):
    with EmbeddingWriter(tmp_path / "a.h5", kind="pooled") as writer:
        writer.append(pooled_block(["a"], ("x", "y")))
        with pytest.raises(ShapeError, match=r"expected .*as in the first block"):
            writer.append(pooled_block(["b"], ("y", "x")))
        with pytest.raises(ShapeError, match=r"expected .*as in the first block"):
            writer.append(pooled_block(["b"], ("x", "y"), width=5))


@pytest.mark.parametrize("block", [pooled_block(["a"], ()), pooled_block(["a"], width=0)])
def test_writer_block_without_values_is_refused(tmp_path, block):
    with pytest.raises(ShapeError, match="expected one or more"):
        write_file(tmp_path / "a.h5", block)


def test_writer_kind_of_block_must_fit(tmp_path):
    with EmbeddingWriter(tmp_path / "a.h5", kind="tokens") as writer:
        with pytest.raises(ShapeError, match="a EmbeddingBlock does not belong in a file of kind 'tokens'"):
            writer.append(pooled_block(["a"]))


def test_writer_negative_length_is_refused(tmp_path):
    with pytest.raises(ShapeError, match="lengths holds -1"):
        write_file(tmp_path / "a.h5", replace(token_block([3, 0]), lengths=np.array([4, -1])))


@pytest.mark.parametrize("record_id", ["a\0b", "a\udcff"])
def test_writer_id_that_hdf5_cannot_hold_is_refused(tmp_path, record_id):
    with pytest.raises(StoreError, match="the id holds NUL or is not valid Unicode; rename"):
        write_file(tmp_path / "a.h5", pooled_block([record_id]))


def test_writer_other_text_is_escaped(tmp_path):
    block = EmbeddingBlock(
        rows=(obs_row("a", description="x\0y", source="caf\udce9.fa"),), matrices={"l": np.ones((1, 1))}
    )
    with open_embeddings(write_file(tmp_path / "a.h5", block)) as embeddings:
        assert embeddings.obs["description"].tolist() == [r"x\x00y"]
        assert embeddings.obs["source"].tolist() == [r"caf\udce9.fa"]


def test_writer_layer_that_hdf5_cannot_hold_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"layer .*rename it"):
        write_file(tmp_path / "a.h5", pooled_block(["a"], ("x\0",)))


def test_writer_token_layer_cannot_be_called_offsets(tmp_path):
    with pytest.raises(StoreError, match="layer 'offsets' has the name of a part of the file; rename it"):
        write_file(tmp_path / "a.h5", token_block([1], ("offsets",)))
    write_file(tmp_path / "a.h5", pooled_block(["a"], ("offsets", "X")))


def test_writer_feature_names_must_fit(tmp_path):
    with pytest.raises(ShapeError, match=r"feature_names has 3 names, expected 4 as 'blocks.1'"):
        write_file(tmp_path / "a.h5", pooled_block(["a"]), feature_names=["x", "y", "z"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "ragged"}, "kind is 'ragged', expected one of pooled, tokens"),
        ({"kind": "pooled", "dtype": "int8"}, "out_dtype is 'int8', expected one of float32, float16"),
        ({"kind": "tokens", "feature_names": ["x"]}, "feature_names is for kind 'pooled' only"),
        ({"kind": "pooled", "feature_names": ["x", "x"]}, "feature_names holds a name twice"),
    ],
)
def test_writer_choices_are_checked(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        EmbeddingWriter(tmp_path / "a.h5", **options)


def test_writer_finish_without_blocks_is_refused(tmp_path):
    with EmbeddingWriter(tmp_path / "a.h5", kind="pooled") as writer:
        with pytest.raises(StoreError, match="no block was appended"):
            writer.finish({})


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}])
def test_writer_provenance_must_be_json(tmp_path, value):
    with pytest.raises(StoreError, match="the provenance is not JSON"):
        write_file(tmp_path / "a.h5", pooled_block(["a"]), provenance={"x": value})
    assert list(tmp_path.iterdir()) == []


def test_writer_outside_with_is_refused(tmp_path):
    writer = EmbeddingWriter(tmp_path / "a.h5", kind="pooled")
    with pytest.raises(StoreError, match="the writer is not open"):
        writer.append(pooled_block(["a"]))
