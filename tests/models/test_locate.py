"""What a name stands for, and the one-time conversion of registry checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError

from genoembed.errors import CheckpointError, ModelError, ModelNotFoundError, PrecisionWarning
from genoembed.models import hub as hub_client
from genoembed.models import locate, registry
from genoembed.models.describe import describe_layers
from genoembed.models.load import load_model
from genoembed.models.locate import converted_folder, locate_model
from genoembed.models.registry import CheckpointFile, KnownModel, find_model
from genoembed.models.striped_hyena2 import convert as convert_module
from genoembed.models.striped_hyena2.convert import vortex_arguments

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINT = GOLDEN / "b_1m" / "evo2_golden_40bstyle.pt"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache beside an empty repository, and a count of what is asked of it."""
    repository = tmp_path / "repository"
    repository.mkdir()
    asked = []

    def fetch(repo_id, file_name, revision=None):
        asked.append((repo_id, file_name))
        if not (repository / file_name).is_file():
            message = "no such file"
            raise LocalEntryNotFoundError(message)
        return str(repository / file_name)

    monkeypatch.setattr(hub_client, "hf_hub_download", fetch)
    monkeypatch.setattr(hub_client, "hub_answers", lambda: True)
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
    for module in (registry, convert_module):
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
    model = load_model("evo2_tiny", device="cpu")
    assert model.fp8 == "emulated"
    assert model.location == tmp_path / "home" / "genoembed" / "evo2_tiny"
    assert asked == [
        (entry.repo_id, "evo2_tiny.pt.part0"),
        (entry.repo_id, "evo2_tiny.pt.part1"),
    ]
    assert (model.provenance["checkpoint"], model.provenance["license"]) == ("evo2_tiny", "Apache-2.0")
    asked.clear()
    assert converted_folder(entry) == model.location
    assert asked == []


def test_converted_folder_is_recognized_under_another_name(hub, entry, tmp_path):
    write_pieces(hub[0])
    shutil.copytree(converted_folder(entry), tmp_path / "elsewhere")
    model = load_model(str(tmp_path / "elsewhere"), device="cpu")
    assert model.fp8 == "emulated"
    assert model.entry is entry


def test_merged_file_of_the_original_package_is_used(hub, entry, tmp_path):
    (tmp_path / "home").mkdir()
    shutil.copy(CHECKPOINT, tmp_path / "home" / "evo2_tiny.pt")
    assert (converted_folder(entry) / "config.json").is_file()
    assert hub[1] == []


def test_merged_file_is_verified_by_size_and_digest(hub, entry, tmp_path):
    content = CHECKPOINT.read_bytes()
    known = dataclasses.replace(entry, merged_sha256=hashlib.sha256(content).hexdigest())
    merged = tmp_path / "home" / "evo2_tiny.pt"
    merged.parent.mkdir()
    merged.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    with pytest.raises(CheckpointError, match=rf"SHA-256 [0-9a-f]+ .*expected {known.merged_sha256}"):
        converted_folder(known)
    merged.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"{len(content) - 1} bytes, expected {len(content)}"):
        converted_folder(known)
    merged.write_bytes(content)
    assert (converted_folder(known) / "config.json").is_file()


def with_digests(entry: KnownModel, repository: Path) -> KnownModel:
    """Record the digests that the files in the repository have."""
    files = tuple(
        dataclasses.replace(file, sha256=hashlib.sha256((repository / file.name).read_bytes()).hexdigest())
        for file in entry.files
    )
    whole = hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest()
    return dataclasses.replace(entry, files=files, merged_sha256=whole)


def test_pieces_with_the_recorded_digests_are_converted(hub, entry):
    write_pieces(hub[0])
    assert (converted_folder(with_digests(entry, hub[0])) / "config.json").is_file()


@pytest.mark.parametrize("keep", ["pieces", "whole"])
def test_other_digest_than_recorded_is_refused_before_converting(keep, hub, entry, tmp_path):
    repository, _ = hub
    write_pieces(repository)
    known = with_digests(entry, repository)
    known = dataclasses.replace(
        known, **({"merged_sha256": None} if keep == "pieces" else {"files": entry.files})
    )
    piece = repository / "evo2_tiny.pt.part1"
    changed = bytearray(piece.read_bytes())
    changed[1000] ^= 1
    piece.write_bytes(changed)
    found = hashlib.sha256(changed).hexdigest()
    expected = known.files[1].sha256
    if keep == "whole":
        found = hashlib.sha256((repository / "evo2_tiny.pt.part0").read_bytes() + changed).hexdigest()
        expected = known.merged_sha256
    with pytest.raises(
        CheckpointError, match=rf"SHA-256 {found}.*expected {expected} as recorded .*; delete"
    ):
        converted_folder(known)
    assert not (tmp_path / "home" / "genoembed").exists()


def test_other_size_than_recorded_is_refused(hub, entry):
    write_pieces(hub[0])
    odd = dataclasses.replace(
        entry, files=(CheckpointFile(name=entry.files[0].name, num_bytes=7), entry.files[1])
    )
    with pytest.raises(CheckpointError, match=r"evo2_tiny.pt.part0: \d+ bytes, expected 7 as recorded"):
        converted_folder(odd)


def test_files_without_recorded_digests_are_said_to_be_unverified(hub, entry, caplog):
    write_pieces(hub[0])
    with caplog.at_level(logging.INFO):
        converted_folder(entry)
    assert "evo2_tiny: no SHA-256 is recorded, sizes only are verified" in caplog.text


def test_unreachable_checkpoint_says_where_it_was_looked_for_and_how_to_get_it(hub, entry, monkeypatch):
    repository, asked = hub
    monkeypatch.setattr(hub_client, "hub_answers", lambda: False)
    with pytest.raises(ModelNotFoundError) as caught:
        locate_model("evo2_tiny")
    text = str(caught.value)
    assert "\n" not in text
    for fact in (
        str(repository.parent / "home" / "genoembed" / "evo2_tiny"),
        str(repository.parent / "home" / "hub"),
        "evo2_tiny.pt.part0 and evo2_tiny.pt.part1 (0.0 GB)",
        "HF_HUB_OFFLINE",
        f"{entry.repo_id} where there is a network, make a folder of it with genoembed convert",
        "set model to that folder",
    ):
        assert fact in text
    assert asked == []


def test_files_in_the_hubs_cache_are_not_fetched(hub, entry, tmp_path, monkeypatch):
    cached = tmp_path / "home" / "hub" / f"models--{entry.repo_id.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("b" * 40)
    (cached / "snapshots" / ("b" * 40)).mkdir(parents=True)
    write_pieces(cached / "snapshots" / ("b" * 40))
    monkeypatch.setattr(hub_client, "hub_answers", lambda: False)
    assert (converted_folder(entry) / "config.json").is_file()
    assert hub[1] == []


def test_broken_download_says_what_to_do(hub, entry):
    with pytest.raises(
        ModelNotFoundError, match=r"fetching evo2_tiny.pt.part0 failed \(LocalEntryNot.*no such file"
    ):
        locate_model("evo2_tiny")


def test_registry_name_needs_nothing_where_no_weights_are_wanted(hub, entry):
    source = locate_model("evo2_tiny", with_weights=False)
    assert (source.entry, source.is_local, hub[1]) == (entry, True, [])
    assert not Path(source.location).exists()


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "evo2_7b.pt", "~/nowhere"])
def test_absent_path_is_never_looked_up_online(name):
    with pytest.raises(ModelNotFoundError, match="file or folder not found"):
        locate_model(name)


def test_checkpoint_file_is_converted_once_and_kept_by_its_contents(hub, entry, tmp_path):
    shutil.copy(CHECKPOINT, tmp_path / "evo2_tiny.pt")
    first = locate_model(str(tmp_path / "evo2_tiny.pt"))
    assert Path(first.location).parent == tmp_path / "home" / "genoembed"
    written = (Path(first.location) / "config.json").stat().st_mtime_ns
    with pytest.warns(PrecisionWarning, match=r"evo2_tiny\.pt: trained with 8-bit .* much worse"):
        model = load_model(str(tmp_path / "evo2_tiny.pt"), device="cpu", fp8="off")
    assert str(model.location) == first.location
    assert (model.location / "config.json").stat().st_mtime_ns == written
    # the same bytes in pieces are the same checkpoint, other bytes under the same name are not
    write_pieces(tmp_path)
    assert locate_model(str(tmp_path / "evo2_tiny.pt.part0")).location == first.location
    other = tmp_path / "other"
    other.mkdir()
    (other / "evo2_tiny.pt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match=r"evo2_tiny\.pt"):
        locate_model(str(other / "evo2_tiny.pt"))


def test_checkpoint_file_whose_name_says_nothing_needs_a_configuration(hub, tmp_path):
    shutil.copy(CHECKPOINT, tmp_path / "mine.pt")
    with pytest.raises(ModelError, match=r"'mine' is not the name of a known checkpoint"):
        locate_model(str(tmp_path / "mine.pt"))


def test_other_file_and_bare_folder_say_what_to_name(tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ModelError, match="a file that is not a checkpoint"):
        locate_model(str(tmp_path / "notes.txt"))
    (tmp_path / "notes.txt").unlink()
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


@pytest.mark.parametrize("load", [load_model, describe_layers])
def test_revision_of_what_has_none_is_refused(load):
    with pytest.raises(
        ModelError, match="'genoembed-mini': revision is 'v2', but only a Hugging Face id has"
    ):
        load("genoembed-mini", revision="v2")
