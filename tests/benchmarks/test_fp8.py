"""The benchmark of FP8 emulation runs what the device has, the hardware included."""

from __future__ import annotations

import json

import fp8
import pytest

from genoembed.models.striped_hyena2 import fp8 as fp8_module


@pytest.mark.parametrize("has_hardware", [False, True])
def test_forms_are_compared(has_hardware, tmp_path, monkeypatch):
    for module in (fp8, fp8_module):  # PyTorch has the product for CPUs, too, with other sums
        monkeypatch.setattr(module, "has_hopper_sums", lambda _device: has_hardware)
    words = ["fp8.py", "--quick", "--rounds", "2", "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    fp8.main()
    filed = json.loads((tmp_path / "fp8.json").read_text())
    [rows] = filed["tables"].values()
    forms = {row["form"] for row in rows}
    assert forms >= {"torch", "plain bfloat16"}
    assert ("hardware" in forms) is has_hardware
    assert any("of the hardware differ" in remark for remark in filed["remarks"]) is has_hardware
    assert all(figure["value"] > 0 for figure in filed["figures"])
