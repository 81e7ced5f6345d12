"""What a name stands for, and the one-time conversion of registry checkpoints."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError

from genoembed.errors import ModelError, ModelNotFoundError, PrecisionWarning
from genoembed.models import load as load_module
from genoembed.models import locate
from genoembed.models.load import load_model
from genoembed.models.locate import converted_folder, locate_model
from genoembed.models.registry import CheckpointFile, KnownModel, find_model
from genoembed.models.striped_hyena2 import convert as convert_module
from genoembed.models.striped_hyena2.vortex_config import vortex_arguments

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINT = GOLDEN / "b_1m" / "evo2_golden_40bstyle.pt"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache beside an empty repository, and a count of what is asked of it."""
    repository = tmp_path / "repository"
    repository.mkdir()
    asked = []

    def fetch(repo_id, file_name, *, local_files_only=False):
        asked.append((repo_id, file_name, local_files_only))
        if local_files_only or not (repository / file_name).is_file():
            message = "not cached"
            raise LocalEntryNotFoundError(message)
        return str(repository / file_name)

    monkeypatch.setattr(locate, "hf_hub_download", fetch)
    monkeypatch.setattr(locate.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(locate.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    return repository, asked


@pytest.fixture
def entry(monkeypatch) -> KnownModel:
    """A small checkpoint in the registry, in two pieces, that needs FP8."""
    content = yaml.safe_load((GOLDEN / "b_1m" / "config.yml").read_text())
    size = CHECKPOINT.stat().st_size
    small = dataclasses.replace(
        find_model("evo2_40b"),
        name="evo2_tiny",
        files=(
            CheckpointFile(name="evo2_tiny.pt.part0", num_bytes=size // 2),
            CheckpointFile(name="evo2_tiny.pt.part1", num_bytes=size - size // 2),
        ),
        config=vortex_arguments(content),
    )
    for module in (locate, convert_module, load_module):
        monkeypatch.setattr(module, "known_models", lambda: (small,))
    return small


def write_pieces(repository: Path) -> None:
    content = CHECKPOINT.read_bytes()
    half = len(content) // 2
    (repository / "evo2_tiny.pt.part0").write_bytes(content[:half])
    (repository / "evo2_tiny.pt.part1").write_bytes(content[half:])


def test_registry_name_is_fetched_and_converted_once(hub, entry, tmp_path):
    repository, asked = hub
    write_pieces(repository)
    with pytest.warns(PrecisionWarning, match="evo2_tiny: trained with 8-bit .* much worse"):
        model = load_model("evo2_tiny", device="cpu")
    assert model.location == tmp_path / "home" / "genoembed" / "evo2_tiny"
    assert asked == [
        (entry.repo_id, "evo2_tiny.pt.part0", True),
        (entry.repo_id, "evo2_tiny.pt.part0", False),
        (entry.repo_id, "evo2_tiny.pt.part1", True),
        (entry.repo_id, "evo2_tiny.pt.part1", False),
    ]
    assert (model.provenance["checkpoint"], model.provenance["license"]) == ("evo2_tiny", "Apache-2.0")
    asked.clear()
    assert converted_folder(entry) == model.location
    assert asked == []


def test_converted_folder_is_recognised_under_another_name(hub, entry, tmp_path):
    write_pieces(hub[0])
    shutil.copytree(converted_folder(entry), tmp_path / "elsewhere")
    with pytest.warns(PrecisionWarning, match="evo2_tiny"):
        model = load_model(str(tmp_path / "elsewhere"), device="cpu")
    assert model.entry is entry


def test_merged_file_of_the_original_package_is_used(hub, entry, tmp_path):
    (tmp_path / "home").mkdir()
    shutil.copy(CHECKPOINT, tmp_path / "home" / "evo2_tiny.pt")
    assert (converted_folder(entry) / "config.json").is_file()
    assert hub[1] == []


def test_other_size_than_recorded_is_logged(hub, entry, caplog):
    write_pieces(hub[0])
    odd = dataclasses.replace(
        entry, files=(CheckpointFile(name=entry.files[0].name, num_bytes=7), entry.files[1])
    )
    with caplog.at_level(logging.WARNING):
        converted_folder(odd)
    assert "but 7 were recorded for evo2_tiny" in caplog.text


def test_unreachable_checkpoint_says_what_to_do(hub, entry):
    with pytest.raises(ModelNotFoundError, match=r"evo2_tiny.pt.part0 of .* go online once, or convert"):
        locate_model("evo2_tiny")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "evo2_7b.pt", "~/nowhere"])
def test_absent_path_is_never_looked_up_online(name):
    with pytest.raises(ModelNotFoundError, match="no such file or folder"):
        locate_model(name)


def test_checkpoint_file_and_bare_folder_say_to_convert(tmp_path):
    with pytest.raises(ModelError, match="a file, expected a folder; convert it first"):
        locate_model(str(CHECKPOINT))
    with pytest.raises(ModelError, match=r"without config.json; name a folder written by save_pretrained"):
        locate_model(str(tmp_path))
    shutil.copy(CHECKPOINT, tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"without config.json; convert x.pt first"):
        locate_model(str(tmp_path))


def test_local_folder_comes_before_a_hub_id(tiny_folder, monkeypatch):
    folder = tiny_folder("bert")
    monkeypatch.chdir(folder.parent)
    assert locate_model("bert").is_local
    source = locate_model("someone/bert")
    assert (source.is_local, source.location) == (False, "someone/bert")


def test_damaged_installation_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(locate, "BUNDLED_FOLDER", tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"'genoembed-mini': .* install genoembed again"):
        locate_model("genoembed-mini")
