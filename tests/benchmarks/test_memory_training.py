"""The benchmark of memory in training: it counts what a step holds."""

from __future__ import annotations

import pytest
from memory_training import build, main, take_step

SHAPE = {"rows": 1, "bases": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build(folder, width=32, blocks=6, bases=32)
    return str(folder)


def test_a_step_counts_weights_and_states(model):
    full, small = (take_step(model, **SHAPE, optim=optim) for optim in ("adamw", "adafactor"))
    assert full["weights_MB"] == pytest.approx(4 * full["parameters_M"])
    assert full["states_MB"] > 1.8 * full["weights_MB"] * 0.9
    assert small["states_MB"] < 0.2 * full["states_MB"]


def test_frozen_weights_of_sixteen_bits_take_half(model):
    wide, half = (take_step(model, **SHAPE, tuning="lora", dtype=d) for d in ("float32", "bfloat16"))
    assert half["weights_MB"] < 0.8 * wide["weights_MB"]


def test_the_script_runs_and_prints_a_page(capsys, monkeypatch):
    def here(folder, settings, *, threads):
        return {"peak_MB": 1.0} | ({} if settings is None else take_step(str(folder), **settings))

    monkeypatch.setattr("memory_training.measure", here)  # without processes, for time
    main(["--quick", "--threads", "1"])
    page = capsys.readouterr().out
    assert "lora, 16 bits, checkpointed" in page
    assert "above_libraries_MB" in page
