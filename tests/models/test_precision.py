"""Where ``auto`` is bfloat16: on CPUs that multiply faster in it, measured once and kept in a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from genoembed.models import precision
from genoembed.models.precision import automatic_dtype, bfloat16_speedup

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache folder that is not there yet, in a process that has decided nothing."""
    monkeypatch.setattr(precision.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(precision, "_decided", {})
    return tmp_path / "cache" / "genoembed"


@pytest.fixture
def measured(monkeypatch) -> list[float]:
    """The speedups that measurements find, in turn; the list gets shorter with each."""
    found = [2.0, 3.0, 4.0, 5.0]
    monkeypatch.setattr(precision, "_measured_speedup", lambda: found.pop(0))
    return found


@pytest.mark.parametrize(
    ("speedup", "dtype"), [(9.0, torch.bfloat16), (1.1, torch.float32), (0.1, torch.float32)]
)
@pytest.mark.usefixtures("cache")
def test_auto_is_bfloat16_where_products_are_faster_in_it(speedup, dtype, monkeypatch):
    monkeypatch.setattr(precision, "_measured_speedup", lambda: speedup)
    assert automatic_dtype(CPU) == dtype


def test_measurement_compares_the_same_products_and_leaves_the_process_as_it_was():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        assert 0.001 < precision._measured_speedup() < 1000
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_shortest_times_count(monkeypatch):
    """Half of the products in bfloat16 are held up, as by other processes."""
    number = 0

    def seconds(product):
        nonlocal number
        number += 1
        is_half = number % 2 == 0
        return (0.5 if is_half else 1.0) * (100 if is_half and number % 4 == 0 else 1)

    monkeypatch.setattr(precision, "_seconds", seconds)
    assert precision._measured_speedup() == 2


def test_process_measures_once_and_machine_too(cache, measured, monkeypatch):
    assert automatic_dtype(CPU) == automatic_dtype(CPU) == torch.bfloat16
    assert bfloat16_speedup() == 2.0  # the next process
    assert len(measured) == 3
    [file] = cache.iterdir()
    assert json.loads(file.read_text())["facts"]["torch"] == torch.__version__
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")  # not what the suite itself is run with
    assert bfloat16_speedup() == 3.0
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert bfloat16_speedup() == 4.0
    assert len([*cache.iterdir()]) == 3


DAMAGED = (
    *("", "{", "[]", "null", "{}", "[" * 100_000, '{"speedup": 9}', '{"speedup": 9, "facts": {}}'),
    *(f'{{"speedup": {speedup}, "facts": FACTS}}' for speedup in ("NaN", "-1", "1e999", '"x"', "[]")),
)


@pytest.mark.parametrize("damaged", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_cache_is_ignored_and_written_anew(damaged, cache, measured):
    bfloat16_speedup()
    [file] = cache.iterdir()
    good = file.read_text()
    file.write_text(damaged.replace("FACTS", json.dumps(json.loads(good)["facts"])))
    assert bfloat16_speedup() == 3.0
    assert json.loads(file.read_text()) == json.loads(good) | {"speedup": 3.0}
    assert len(measured) == 2


@pytest.mark.parametrize("where", ["file", "relative", "no home"])
def test_without_a_cache_folder_each_process_measures(where, cache, measured, monkeypatch, tmp_path, caplog):
    if where == "file":
        cache.parent.write_text("in the way")
    elif where == "relative":
        monkeypatch.setenv("XDG_CACHE_HOME", "here")
        monkeypatch.chdir(tmp_path)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: Path("~nobody-of-that-name").expanduser())
    assert [bfloat16_speedup(), bfloat16_speedup()] == [2.0, 3.0]
    assert not caplog.messages
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


@pytest.mark.parametrize(
    ("system", "variables", "folder"),
    [
        ("linux", {"XDG_CACHE_HOME": ""}, "HOME/.cache"),
        ("darwin", {}, "HOME/Library/Caches"),
        ("win32", {"LOCALAPPDATA": "/somewhere/local"}, "/somewhere/local"),
    ],
)
def test_cache_is_where_the_system_keeps_caches(system, variables, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(precision.sys, "platform", system)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = precision._cache_file({})
    assert found.parent == Path(folder.replace("HOME", str(tmp_path))) / "genoembed"
