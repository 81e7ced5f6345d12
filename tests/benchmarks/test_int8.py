"""The 8-bit layers of the benchmark multiply, and only those that round per token keep rows apart."""

from __future__ import annotations

import int8
import pytest
import torch
from torch import nn

ENGINES = torch.backends.quantized.supported_engines


@pytest.fixture(autouse=True)
def _engine_stays():
    before = torch.backends.quantized.engine
    yield
    torch.backends.quantized.engine = before


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("form", int8.FORMS)
def test_form_multiplies_to_eight_bits_and_keeps_rows_apart_or_not(form):
    if (
        form.partition(", ")[2].lower() in ("fbgemm", "onednn")
        and form.partition(", ")[2].lower() not in ENGINES
    ):
        pytest.skip("not in this build of torch")
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 48), torch.randn(32, 64)
    with torch.inference_mode():
        layer = int8.FORMS[form](linear)
        expected = linear(x)
        found = layer(x)
        beside = layer(torch.cat((x, 50 * x)))[:32]
    assert int8.rms(found - expected) < 0.02 * int8.rms(expected)
    assert torch.equal(found, beside) is (form == "int8, torch._int_mm")
