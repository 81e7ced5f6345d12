"""FP8 products as Hopper computes them: every form equals exact integer arithmetic bit for bit."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import cache, partial
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genoembed.errors import MissingExtraError, ModelError
from genoembed.models.striped_hyena2 import fp8
from genoembed.models.striped_hyena2.fp8 import emulate_product, round_to_e4m3
from tests.oracles import hopper_product

if TYPE_CHECKING:
    from collections.abc import Callable

HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_CUDA = torch.cuda.is_available()
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def with_triton(*operands):
    computed = emulate_product(*(one.cuda() if HAS_CUDA else one for one in operands), form="triton")
    return computed.cpu()


FORMS: dict[str, Callable[..., torch.Tensor]] = {"torch": partial(emulate_product, form="torch")}
if importlib.util.find_spec("numba") is not None:
    FORMS["numba"] = partial(emulate_product, form="numba")
if HAS_TRITON and (HAS_CUDA or IS_INTERPRETED):
    FORMS["triton"] = with_triton
SCALES = torch.tensor([61.189205, 0.37])


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Callable[..., torch.Tensor]:
    """Each form of the emulation that can run here."""
    return FORMS[request.param]


# the forms take turns with the same operands
expected_product = cache(hopper_product)


def assert_equals_oracle(form, x_TK, weight_NK, scales=SCALES):
    rows, columns = (tuple(map(tuple, one.tolist())) for one in (x_TK, weight_NK))
    expected = torch.tensor(expected_product(rows, columns, tuple(scales.tolist())))
    computed = form(x_TK, weight_NK, scales)
    assert computed.dtype == torch.bfloat16
    assert computed.shape == (len(x_TK), len(weight_NK))
    assert torch.equal(computed.isnan(), expected.isnan())
    assert torch.equal(computed.float().nan_to_num(0.0), expected.nan_to_num(0.0))


def normal(*shape: int, seed: int = 0, spread: float = 0.0) -> torch.Tensor:
    """Normal values, times powers of two of this spread."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return values * torch.exp2(spread * torch.randn(shape, generator=generator).round())


def test_every_bfloat16_is_rounded_as_pytorch_rounds_to_e4m3():
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for scale in (1.0, 0.37, 61.189, 1e-3, 1e5):
        expected = (values.float() * scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float()
        rounded = round_to_e4m3(values, torch.tensor(scale))
        assert torch.equal(rounded.isnan(), expected.isnan())
        assert torch.equal(rounded.nan_to_num(0.0), expected.nan_to_num(0.0))


@pytest.mark.parametrize("num_inputs", [1, 31, 32, 33, 48, 64, 160])
def test_sum_of_few_groups(form, num_inputs):
    assert_equals_oracle(form, normal(5, num_inputs), normal(7, num_inputs, seed=1))


@pytest.mark.parametrize("spread", [0.0, 2.0, 6.0])
@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_long_sum(form, spread, bias):
    # with a bias the sum grows far above the products, so that it decides what is cut off
    x = normal(1, 4096, spread=spread) + bias
    assert_equals_oracle(form, x, normal(2, 4096, seed=1, spread=spread) + bias, torch.tensor([60.0, 57.0]))


def test_saturated_values(form):
    x, weight = normal(3, 70) * 100, normal(4, 70, seed=1) * 1000
    assert (x.abs() * 60 > 448).float().mean() > 0.8
    assert_equals_oracle(form, x, weight, torch.tensor([60.0, 57.0]))


def test_values_below_the_normal_range(form):
    # products of these only: their exponents do not go below the lowest of the format
    x, weight = normal(4, 96) * 2.0**-9, normal(5, 96, seed=1) * 2.0**-8
    scales = torch.ones(2)
    assert (round_to_e4m3(x, scales[0]).abs() < 2.0**-6).float().mean() > 0.9
    assert_equals_oracle(form, x, weight, scales)
    assert_equals_oracle(form, x, weight * 2.0**12, scales)


def test_ties(form):
    # 17 / 16 lies between 1 and 9 / 8; many sums of these lie between two results in bfloat16
    values = torch.tensor([17.0, 19.0, 21.0, 9.0, 8.5]) / 16
    x = values.repeat(13)[None, :64]
    weight = torch.stack([values.repeat(13)[k : k + 64] * (-1.0) ** torch.arange(64) for k in range(2)])
    assert_equals_oracle(form, x, weight.abs(), torch.ones(2))
    assert_equals_oracle(form, x, weight, torch.ones(2))


def test_a_value_below_the_normal_range_keeps_the_lowest_exponent(form):
    # 2**-9 has exponent -6, so its product with 448 cuts off whatever is below 2**(-6 + 8 - 13)
    x, weight = torch.full((1, 32), 1.125 * 2.0**-6), torch.full((1, 32), 1.125 * 2.0**-6)
    x[0, 0], weight[0, 0] = 2.0**-9, 448.0
    assert form(x, weight, torch.ones(2)).item() == 0.875
    assert (x.double() @ weight.double().T).item() > 0.875 + 2.0**-8
    assert_equals_oracle(form, x, weight, torch.ones(2))


def test_a_sum_that_outgrows_its_products_is_cut_again(form):
    # 1 + 2**-8 + 2**-14 of products up to 2**-4: the last bit would decide how the tie is rounded
    x = torch.full((1, 32), 2.0**-2)
    weight = torch.tensor([[2.0**-2] * 16 + [2.0**-6, 2.0**-12 * 16] + [0.0] * 14])
    x[0, 17] = 2.0**-6
    assert (x @ weight.T).item() == 1 + 2.0**-8 + 2.0**-14
    assert form(x, weight, torch.ones(2)).item() == 1.0
    assert_equals_oracle(form, x, weight, torch.ones(2))


def test_zeros_add_nothing_and_have_no_exponent(form):
    x, weight = normal(4, 96), normal(5, 96, seed=1)
    x[0] = 0.0
    x[1, :32] = 0.0
    x[2, 64:] = -0.0
    weight[0] = 0.0
    weight[1, 1:] = 0.0
    assert_equals_oracle(form, x, weight)
    assert not torch.signbit(form(x, weight, SCALES)[0]).any()


def test_sum_that_cancels_leaves_what_came_before(form):
    x = torch.zeros(1, 96)
    x[0, :2], x[0, 32], x[0, 64] = torch.tensor([400.0, 3.0]), -400.0, 2.0**-6
    weight = torch.ones(1, 96)
    weight[0, 0], weight[0, 32], weight[0, 64] = 400.0, 400.0, 2.0**-6
    assert_equals_oracle(form, x, weight, torch.ones(2))


def test_not_a_number_spoils_its_row_or_column_only(form):
    x, weight = normal(3, 40), normal(4, 40, seed=1)
    x[1, 39] = torch.nan
    weight[2, 0] = torch.nan
    computed = form(x, weight, SCALES)
    expected = torch.zeros(3, 4, dtype=torch.bool)
    expected[1] = expected[:, 2] = True
    assert torch.equal(computed.isnan(), expected)
    assert_equals_oracle(form, x, weight)


def test_infinity_is_the_largest_number(form):
    x, weight = normal(2, 40), normal(3, 40, seed=1)
    x[0, 3], weight[1, 5] = torch.inf, -torch.inf
    assert_equals_oracle(form, x, weight)


def test_wider_inputs_are_rounded_to_bfloat16_first(form):
    x, weight = normal(6, 64), normal(6, 64, seed=1)
    rounded = form(x.bfloat16(), weight.bfloat16(), SCALES)
    assert torch.equal(form(x, weight, SCALES), rounded)
    assert torch.equal(form(x.double(), weight, SCALES), rounded)


def test_no_rows(form):
    assert form(torch.empty(0, 40), normal(3, 40), SCALES).shape == (0, 3)


def test_a_row_does_not_depend_on_the_rows_beside_it(form):
    x, weight = normal(300, 96), normal(700, 96, seed=1)
    whole = form(x, weight, SCALES)
    assert torch.equal(form(x[100:101], weight, SCALES), whole[100:101])
    assert torch.equal(form(x, weight[600:], SCALES), whole[:, 600:])


def test_threads_change_nothing(form):
    x, weight = normal(40, 96), normal(900, 96, seed=1)
    alone, before = form(x, weight, SCALES), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(form(x, weight, SCALES), alone)
    finally:
        torch.set_num_threads(before)


def test_numba_is_taken_on_cpus_where_it_works(monkeypatch):
    name = "genoembed.models.striped_hyena2.fp8_numba"
    expected = "numba" if "numba" in FORMS else "torch"
    assert fp8.emulation_form(torch.device("cpu")) == expected
    monkeypatch.setitem(sys.modules, name, None)  # as where it is absent, or is not for this NumPy
    fp8._numba_sums.cache_clear()
    try:
        assert fp8.emulation_form(torch.device("cpu")) == "torch"
        with pytest.raises(MissingExtraError, match=r"install .*\[fp8\]"):
            emulate_product(normal(1, 3), normal(2, 3), SCALES, form="numba")
    finally:
        fp8._numba_sums.cache_clear()


@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_any_codes_equal_the_oracle(seed, data):
    """Any E4M3 codes, NaN left out: all exponents at once, as no activations have them."""
    rows, columns, inputs = (data.draw(st.integers(1, high)) for high in (4, 4, 100))
    rng = np.random.default_rng(seed)
    codes = [rng.integers(0, 256, size=(count, inputs), dtype=np.uint8) for count in (rows, columns)]
    x, weight = (
        torch.from_numpy(np.where(one & 0x7F == 0x7F, 0, one)).view(torch.float8_e4m3fn).float()
        for one in codes
    )
    for form in FORMS.values():
        assert_equals_oracle(form, x, weight, torch.ones(2))


# Triton


@pytest.mark.skipif(not HAS_TRITON or "triton" in FORMS, reason="Triton is absent, or tested as other forms")
def test_triton_without_gpus_equals_the_oracle_in_its_interpreter():
    chosen = "(triton and not threads and not beside) or any_codes"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout
    assert " passed" in ran.stdout


@pytest.mark.skipif(not HAS_TRITON or IS_INTERPRETED, reason="Triton is absent, or interprets")
@pytest.mark.parametrize(("capability", "num_rows"), [(80, None), (90, None), (90, 1)])
def test_triton_compiles_for_gpus_that_are_not_here(capability, num_rows, tmp_path, monkeypatch):
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from genoembed.models.striped_hyena2.fp8_triton import _sum_tile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kinds = ["*fp32", "*bf16", "*fp32", "*fp32", "i32", "i32", "i32", "constexpr", "constexpr"]
    constants = {(7,): 8, (8,): 32}
    if num_rows is not None:  # Triton makes a constant of an argument of 1
        kinds[4], constants[4,] = "constexpr", num_rows
    source = ASTSource(
        fn=_sum_tile,
        signature=dict(zip(_sum_tile.arg_names, kinds, strict=True)),
        constexprs=constants,
    )
    compiled = compile_kernel(
        source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False}
    )
    assert "cvt.rzi.s32.f32" in compiled.asm["ptx"]  # toward zero, as the hardware cuts
    assert "fma" not in compiled.asm["ptx"]


@pytest.fixture
def triton_sums(monkeypatch):
    """Stands for what Triton compiles; calls are counted, and what it does can be changed."""
    sums = mock.Mock(side_effect=fp8._sum_in_torch)
    monkeypatch.setattr(fp8, "_triton_sums", lambda: sums)
    monkeypatch.setattr(fp8, "_triton_works", cache(fp8._triton_works.__wrapped__))
    return sums


def works_with_triton() -> bool:
    return fp8._triton_works(torch.device("cpu"))


def test_triton_is_taken_where_it_gives_the_sums_of_pytorch(triton_sums, monkeypatch):
    assert works_with_triton()
    assert works_with_triton()
    assert triton_sums.call_count == 1
    assert fp8.emulation_form(torch.device("cpu")) != "triton"
    monkeypatch.setattr(fp8, "_triton_works", lambda _device: True)
    assert fp8.emulation_form(torch.device("cuda")) == "triton"


@pytest.mark.parametrize(
    ("effect", "reason"),
    [
        (lambda *given: fp8._sum_in_torch(*given) + 2**-9, "gives other sums"),
        (
            RuntimeError("Failed to find C compiler.\nSet CC"),
            "fails: RuntimeError: Failed to find C compiler.",
        ),
    ],
)
def test_pytorch_emulates_where_triton_does_not(triton_sums, effect, reason, caplog, monkeypatch):
    triton_sums.side_effect = effect
    assert not works_with_triton()
    assert caplog.messages == [f"FP8 is emulated by PyTorch, which takes longer, for Triton {reason}"]
    monkeypatch.setattr(fp8, "_triton_works", lambda _device: False)
    assert fp8.emulation_form(torch.device("cuda")) == "torch"


def test_forms_are_compared_without_autocast(triton_sums, monkeypatch):
    found = []
    monkeypatch.setattr(fp8, "emulation_form", lambda _: found.append(works_with_triton()) or "torch")
    with torch.autocast("cpu", torch.bfloat16):
        emulate_product(normal(1, 3), normal(2, 3), SCALES)
    assert found == [True]


def test_no_memory_left_says_nothing_about_triton(triton_sums):
    triton_sums.side_effect = torch.OutOfMemoryError
    with pytest.raises(torch.OutOfMemoryError):
        works_with_triton()
    triton_sums.side_effect = fp8._sum_in_torch
    assert works_with_triton()


def test_where_triton_is_absent_pytorch_emulates(monkeypatch, caplog):
    monkeypatch.setattr(fp8, "_triton_sums", lambda: None)
    monkeypatch.setattr(fp8, "_triton_works", fp8._triton_works.__wrapped__)
    assert fp8.emulation_form(torch.device("cuda")) == "torch"
    assert caplog.messages == []
    with pytest.raises(ModelError, match=r"needs Triton, .* take another form"):
        emulate_product(normal(1, 3), normal(2, 3), SCALES, form="triton")


# Hopper


def scaled_product(left, right, *, scale_a, scale_b, out_dtype, use_fast_accum):
    """What `torch._scaled_mm` takes on Hopper, and gives but for rounding."""
    for operand in (left, right):
        assert operand.dtype == torch.float8_e4m3fn
        assert all(size % 16 == 0 for size in operand.shape)
    assert left.is_contiguous()
    assert right.t().is_contiguous()  # column by column
    for scale in (scale_a, scale_b):
        assert (scale.dtype, scale.numel()) == (torch.float32, 1)
    assert use_fast_accum
    assert left.shape[1] == right.shape[0]
    return (left.double() @ right.double() * scale_a.double() * scale_b.double()).to(out_dtype)


@pytest.mark.parametrize("shape", [(16, 32, 48), (5, 33, 7), (1, 1, 1), (17, 64, 16), (0, 32, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operands_of_the_hardware(shape, dtype, monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", scaled_product)
    num_rows, num_inputs, num_outputs = shape
    x = normal(num_rows, num_inputs).to(dtype)
    weight = normal(num_outputs, num_inputs, seed=1).to(dtype)
    computed = fp8._multiply_natively(x, weight, SCALES)
    assert (computed.dtype, computed.shape) == (torch.bfloat16, (num_rows, num_outputs))
    expected = emulate_product(x, weight, SCALES, form="torch").float()
    # products are of this size; the sums of the emulation cut off more
    assert torch.allclose(computed.float(), expected, rtol=2**-7, atol=1e-3 * num_inputs)


def test_hardware_takes_what_pytorch_takes():
    # for CPUs PyTorch has the same product, with other sums
    x, weight = normal(5, 40), normal(18, 40, seed=1)
    x[1, 2], weight[3, 4] = torch.nan, torch.inf
    computed = fp8._multiply_natively(x, weight, SCALES)
    expected = emulate_product(x, weight, SCALES, form="torch")
    assert torch.equal(computed.isnan(), expected.isnan())
    assert torch.allclose(computed.float(), expected.float(), rtol=2**-6, atol=0.02, equal_nan=True)
