"""What docs/SECURITY.md promises: nothing here can run what a file holds, or follow where it points."""

from __future__ import annotations

import ast
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from genoembed.atomic import AtomicFile
from genoembed.errors import CheckpointError, StoreError
from genoembed.models.load import load_model
from genoembed.store.tables import open_table
from tests.tiny_models import build_tiny

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "genoembed").rglob("*.py"))

FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.spawnv", "pickle.load",
    "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads", "joblib.load", "cloudpickle.load",
    "cloudpickle.loads", "marshal.load", "marshal.loads", "shelve.open", "yaml.load", "yaml.full_load",
    "yaml.unsafe_load", "pd.read_pickle", "pandas.read_pickle", "tempfile.mktemp", "subprocess.getoutput",
    "subprocess.getstatusoutput",
}  # fmt: skip
SUBPROCESS = {
    "subprocess.run",
    "subprocess.Popen",
    "subprocess.call",
    "subprocess.check_call",
    "subprocess.check_output",
}


def problems_in(source: str) -> list[str]:
    """Return every call that could run or unpickle what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in FORBIDDEN_CALLS:
            found.append(name)
        if name.endswith("torch.load") and given.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
            found.append("numpy.load with allow_pickle")
        if given.get("shell", "False") != "False":
            found.append("shell=True")
        if name in SUBPROCESS and not (node.args and isinstance(node.args[0], ast.Name | ast.List)):
            found.append(f"{name} without a list")
        if given.get("trust_remote_code") == "True":
            found.append("trust_remote_code=True")
    return found


def test_security_no_call_in_the_package_runs_what_a_file_holds():
    found = {str(path.relative_to(ROOT)): problems_in(path.read_text()) for path in SOURCES}
    assert len(found) > 100
    assert {path: calls for path, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "source",
    [
        "pickle.load(f)", "torch.load(p)", "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)", "yaml.load(t)",
        "eval(t)", "exec(t)", "os.system(t)", "subprocess.run('a b', shell=True)",
        "subprocess.run('a')", "AutoModel.from_pretrained(x, trust_remote_code=True)", "tempfile.mktemp()",
    ],
)  # fmt: skip
def test_security_check_knows_each_danger(source):
    assert problems_in(source)


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "re.compile(p)",
        "torch.load(p, weights_only=True)",
        "np.load(p)",
        "subprocess.run([a], check=True)",
    ],
)
def test_security_check_lets_the_harmless_pass(source):
    assert problems_in(source) == []


def test_security_temporary_files_are_private(tmp_path):
    tmp_path.chmod(0o777)
    file = AtomicFile(tmp_path / "out.h5")
    assert stat.S_IMODE(file.temporary.stat().st_mode) == 0o600
    file.discard()
    assert list(tmp_path.iterdir()) == []


def test_finished_files_have_the_mode_of_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        with open_table(tmp_path / "t.tsv", ("a",)) as table:
            assert stat.S_IMODE((tmp_path / ".t.tsv.partial").stat().st_mode) == 0o600
            table.write((1,))
        with AtomicFile(tmp_path / "out.h5") as file:
            file.write(memoryview(b"x"))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_security_link_at_the_temporary_name_is_not_followed(link, tmp_path):
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    link(victim, tmp_path / ".out.h5.partial")
    with pytest.raises(StoreError, match=r"out\.h5\.partial' beside it is a link, or a file of another user"):
        AtomicFile(tmp_path / "out.h5")
    assert victim.read_text() == "precious"


# --- model folders --------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    """A model folder in two shards, and a function that renames the first in the index."""
    folder = tmp_path / "model"
    build_tiny("llama", folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for name, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, folder / name, metadata={"format": "pt"})

    def index(first="one.safetensors"):
        weight_map = {
            key: first if name == "one.safetensors" else name for name, keys in halves.items() for key in keys
        }
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)
        return str(folder)

    return index


def test_security_shards_in_their_own_folder_are_read(sharded):
    assert load_model(sharded(), device="cpu").layers


@pytest.mark.parametrize(
    "name", ["../one.safetensors", "x/../../one.safetensors", "..\\one.safetensors", "C:one", ""]
)
def test_security_index_that_leads_outside_its_folder_is_refused(sharded, name):
    folder = Path(sharded(first=name))
    shutil.copy(folder / "one.safetensors", folder.parent / "one.safetensors")
    with pytest.raises(CheckpointError, match=r"index\.json: it names .*, expected files in its own folder"):
        load_model(str(folder), device="cpu")


def test_security_absolute_name_in_an_index_is_refused(sharded, tmp_path):
    folder = sharded(first=str(tmp_path / "model" / "one.safetensors"))
    with pytest.raises(CheckpointError, match=r"it names '/.*', expected files in its own folder"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"weight_map": 3}', b'{"weight_map": {"a": 1}}', b"[" * 2000, b"\xff"]
)
def test_security_index_that_is_none_is_one_line(sharded, content):
    folder = Path(sharded())
    (folder / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"index\.json: it is not an index of weights"):
        load_model(str(folder), device="cpu")


def test_security_model_that_an_adapter_names_is_checked_as_any_other(sharded, tmp_path):
    base = Path(sharded(first="../elsewhere.safetensors"))
    folder = tmp_path / "adapter"
    folder.mkdir()
    text = json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(base)})
    (folder / "adapter_config.json").write_text(text)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"expected files in its own folder"):
        load_model(str(folder), device="cpu")


def test_security_pickled_adapter_is_not_unpickled(sharded, tmp_path):
    pytest.importorskip("peft")
    folder = tmp_path / "adapter"
    folder.mkdir()
    text = json.dumps({"peft_type": "LORA", "base_model_name_or_path": sharded()})
    (folder / "adapter_config.json").write_text(text)
    torch.save({"weights": Bomb(str(tmp_path / "harm"))}, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="weights of the adapter cannot be read"):
        load_model(str(folder), device="cpu")
    assert not (tmp_path / "harm").exists()


class Bomb:
    """An object whose unpickling leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_security_pickled_code_in_a_model_folder_is_refused_and_not_run(sharded, tmp_path):
    folder = Path(sharded())
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({"code": Bomb(str(tmp_path / "ran"))}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"cannot be read or do not fit config\.json"):
        load_model(str(folder), device="cpu")
    assert not (tmp_path / "ran").exists()
