"""The convolutions against direct sums in float64, written out here; causality, gradients, precision."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genoembed.models import precision
from genoembed.models.striped_hyena2 import operators
from genoembed.models.striped_hyena2.operators import (
    CHUNK,
    causal_convolution,
    causal_fir,
    depthwise_correlation,
    modal_convolution,
    modal_convolution_from,
    modal_matrices,
    toeplitz_matrix,
)

ALL_LENGTHS = range(1, 301)
MANY_TAPS = 128
WIDTH = 6


def per_channel(taps: Tensor, width: int) -> Tensor:
    """Return for channel c the filter of group ``floor(c * G / D)``."""
    groups = taps.shape[0]
    return torch.stack([taps[channel * groups // width] for channel in range(width)])


def slow_correlation(x: Tensor, taps: Tensor) -> Tensor:
    """``y[t] = sum_k taps[k] x[t - (K - 1) + k]``, a position and a tap at a time."""
    x, taps = x.double(), per_channel(taps.double(), x.shape[2])
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for k in range(taps.shape[1]):
            source = t - (taps.shape[1] - 1) + k
            if source >= 0:
                y[:, t] += taps[:, k] * x[:, source]
    return y


def slow_convolution(x: Tensor, taps: Tensor, skip: Tensor | None) -> Tensor:
    """``y[t] = sum_k taps[k] x[t - k] + skip x[t]``, a position at a time."""
    x, taps = x.double(), per_channel(taps.double(), x.shape[2])
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        reach = min(taps.shape[1], t + 1)
        recent_first = x[:, t - reach + 1 : t + 1].flip(1)
        y[:, t] = (taps[:, :reach].T * recent_first).sum(dim=1)
    return y if skip is None else y + skip.double() * x


def slow_modal(x: Tensor, log_poles: Tensor, residues: Tensor, skip: Tensor) -> Tensor:
    """The definition: build the whole filter from its modes, then convolve directly."""
    length = x.shape[1]
    filters = torch.zeros(x.shape[2], length, dtype=torch.float64)
    for t in range(length):
        filters[:, t] = (residues.double() * torch.exp(log_poles.double() * t)).sum(-1)
    return slow_convolution(x, filters, skip)


def random_modes(width: int, states: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Poles from forgetting at once to lasting for 10,000 positions, residues, skips."""
    generator = torch.Generator().manual_seed(seed)
    log_poles = -torch.logspace(-4, 0.5, width * states).reshape(width, states)
    return (
        log_poles[:, torch.randperm(states, generator=generator)],
        torch.randn(width, states, generator=generator),
        torch.randn(width, generator=generator),
    )


@functools.cache
def longest_case() -> tuple[dict[str, tuple[Tensor, ...]], Tensor, dict[str, Tensor]]:
    """Inputs and slow outputs at the greatest length; causality makes them those of every length."""
    torch.manual_seed(0)
    x = torch.randn(2, ALL_LENGTHS[-1], WIDTH)
    parameters = {
        "fir": (torch.randn(2, 7),),
        "convolution": (torch.randn(3, MANY_TAPS), torch.randn(WIDTH)),
        "modal": random_modes(WIDTH, 5),
    }
    slow = {name: SLOW[name](x, *values) for name, values in parameters.items()}
    return parameters, x, slow


FAST = {"fir": causal_fir, "convolution": causal_convolution, "modal": modal_convolution}
SLOW = {"fir": slow_correlation, "convolution": slow_convolution, "modal": slow_modal}


@pytest.mark.parametrize("operator", FAST)
def test_operator_equals_direct_sum_at_every_length(operator) -> None:
    parameters, x, slow = longest_case()
    values, expected = parameters[operator], slow[operator]
    scale = expected.abs().max()
    doubles = tuple(value.double() for value in values)
    for length in ALL_LENGTHS:
        fast = FAST[operator](x[:, :length], *values)
        assert fast.dtype == torch.float32
        assert fast.shape == (2, length, WIDTH)
        assert (fast.double() - expected[:, :length]).abs().max() < 3e-6 * scale, length
        if length % 8 < 2:
            exact = FAST[operator](x[:, :length].double(), *doubles)
            assert (exact - expected[:, :length]).abs().max() < 1e-12 * scale, length


@given(
    length=st.one_of(
        st.sampled_from([CHUNK * n + d for n in (1, 2, 3) for d in (-1, 0, 1)]), st.integers(1, 400)
    ),
    batch=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 3, 6]),
    taps=st.sampled_from([1, 2, 3, 7, 127, 128, 129, 300]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15)
def test_operators_equal_direct_sums_for_any_shape(length, batch, groups, taps, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, 6, generator=generator, dtype=torch.float64)
    filters = torch.randn(groups, taps, generator=generator, dtype=torch.float64)
    skip = torch.randn(6, generator=generator, dtype=torch.float64)
    kept = per_channel(filters, 6)
    # the definition once more, as a matrix: row t, column t - k holds tap k
    matrix = torch.zeros(6, length, length, dtype=torch.float64)
    for k in range(min(taps, length)):
        matrix.diagonal(-k, 1, 2).copy_(kept[:, k : k + 1])
    expected = torch.einsum("dts,bsd->btd", matrix, x)
    assert torch.allclose(causal_convolution(x, filters, skip), expected + skip * x, atol=1e-11)
    assert torch.allclose(causal_convolution(x, filters), expected, atol=1e-11)
    assert torch.allclose(causal_fir(x, filters.flip(-1)), expected, atol=1e-11)


def test_modal_convolution_keeps_its_memory_over_many_chunks() -> None:
    # a mode that halves in 7,000 positions: the float32 result after 40 chunks is as good as after one
    length = 40 * CHUNK + 17
    x = torch.randn(1, length, 2)
    log_poles = torch.tensor([[-1e-4], [-1e-2]])
    residues, skip = torch.ones(2, 1), torch.zeros(2)
    fast = modal_convolution(x, log_poles, residues, skip).double()
    state, slow = torch.zeros(1, 2, dtype=torch.float64), []
    for t in range(length):
        state = state * torch.exp(log_poles[:, 0].double()) + x[:, t].double()
        slow.append(state)
    expected = torch.stack(slow, dim=1)
    assert (fast - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("length", [1, 5, CHUNK + 3])
@pytest.mark.parametrize("operator", FAST)
def test_operator_gradients_are_those_of_finite_differences(operator, length) -> None:
    torch.manual_seed(length)
    x = torch.randn(1, length, 2, dtype=torch.float64, requires_grad=True)
    values = {
        "fir": (torch.randn(1, 3),),
        "convolution": (torch.randn(2, 9), torch.randn(2)),
        "modal": random_modes(2, 3),
    }[operator]
    doubles = tuple(value.double().requires_grad_() for value in values)
    # fast_mode: one random direction a tensor, else the long case takes minutes
    assert torch.autograd.gradcheck(FAST[operator], (x, *doubles), fast_mode=length > 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 7, CHUNK, 300])
def test_operator_in_half_precision_is_off_by_roundings_only(dtype, length) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, length, 6).to(dtype)
    taps, skip = torch.randn(3, 7).to(dtype), torch.randn(6).to(dtype)
    many = torch.randn(2, MANY_TAPS).to(dtype) / 8
    log_poles, residues, _ = random_modes(6, 4)
    cases = {
        # taps are exact and sums are float32: the output's own rounding, and the one before the skip
        "fir": ((taps,), 0.5),
        "convolution": ((many, skip), 1.5),
        # the long filter's values and what enters and leaves its states are rounded once each
        "modal": ((log_poles, residues, skip), 4),
    }
    for operator, (values, ulps) in cases.items():
        ours = FAST[operator](x, *values)
        expected = SLOW[operator](x, *values)
        assert ours.dtype == dtype
        # a rounding is relative to the largest of the terms that meet
        scale = expected.abs().amax(dim=1, keepdim=True).clamp(min=1)
        assert ((ours.double() - expected).abs() < ulps * torch.finfo(dtype).eps * scale).all(), operator


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("length", [3, CHUNK - 1, CHUNK, 300])
@pytest.mark.parametrize("operator", FAST)
def test_operator_never_looks_ahead(operator, length, dtype) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, length, 6).to(dtype)
    values = {
        "fir": (torch.randn(3, 7).to(dtype),),
        "convolution": (torch.randn(2, MANY_TAPS).to(dtype), torch.randn(6).to(dtype)),
        "modal": random_modes(6, 4),
    }[operator]
    before = FAST[operator](x, *values)
    for cut in {1, length // 2, length - 1}:
        changed = x.clone()
        changed[:, cut:] = 100 * torch.randn(2, length - cut, 6).to(dtype)
        after = FAST[operator](changed, *values)
        assert torch.equal(before[:, :cut], after[:, :cut])
        assert not torch.equal(before[:, cut:], after[:, cut:])


@pytest.mark.parametrize("operator", FAST)
def test_operator_sees_no_future_in_its_gradient(operator) -> None:
    parameters, x, _ = longest_case()
    x = x.clone().requires_grad_()
    FAST[operator](x, *parameters[operator])[:, 140].sum().backward()
    assert (x.grad[:, 141:] == 0).all()
    assert (x.grad[:, 140] != 0).all()


@pytest.mark.parametrize("operator", FAST)
def test_operator_takes_empty_sequences_and_leaves_inputs_alone(operator) -> None:
    parameters, x, _ = longest_case()
    copies = [x.clone(), *(value.clone() for value in parameters[operator])]
    assert FAST[operator](x[:, :0], *parameters[operator]).shape == (2, 0, WIDTH)
    assert FAST[operator](x[:0], *parameters[operator]).shape == (0, x.shape[1], WIDTH)
    FAST[operator](x, *parameters[operator])
    assert all(map(torch.equal, copies, [x, *parameters[operator]]))


@pytest.mark.parametrize("operator", ["convolution", "modal"])
def test_operator_takes_strided_input(operator) -> None:
    parameters, x, _ = longest_case()
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    values = parameters[operator]
    assert torch.equal(FAST[operator](strided, *values), FAST[operator](x, *values))


@given(groups=st.integers(1, 3), taps=st.integers(1, 9), rows=st.integers(1, 8), history=st.integers(0, 10))
@settings(max_examples=40)
def test_toeplitz_matrix_holds_the_taps_and_zeros(groups, taps, rows, history) -> None:
    filters = torch.randn(groups, taps)
    matrix = toeplitz_matrix(filters, num_rows=rows, history=history)
    assert matrix.shape == (groups, rows, history + rows)
    for i in range(rows):
        for j in range(history + rows):
            tap = history + i - j
            expected = filters[:, tap] if 0 <= tap < taps else torch.zeros(groups)
            assert torch.equal(matrix[:, i, j], expected)


def test_autocast_keeps_the_products_close() -> None:
    # training may run the products in bfloat16; the recurrence between chunks stays float32
    parameters, x, slow = longest_case()
    for operator in FAST:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = FAST[operator](x, *parameters[operator])
        error = (y.double() - slow[operator]).square().mean().sqrt()
        assert error < 0.01 * slow[operator].square().mean().sqrt()


@pytest.fixture(params=[False, True], ids=["float32 products", "bfloat16 products"])
def _has_units(request, monkeypatch) -> None:
    """Take the products of either kind of CPU."""
    monkeypatch.setitem(precision._decided, "cpu", request.param)


@pytest.mark.usefixtures("_has_units")
@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("operator", FAST)
def test_autocast_changes_nothing_about_bfloat16_activations(operator, backward_inside) -> None:
    # float32 weights: what training in bfloat16 has
    parameters, x, _ = longest_case()
    found = []
    for is_on in (False, True):
        inputs = [value.clone().requires_grad_() for value in (x.bfloat16(), *parameters[operator])]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_on):
            y = FAST[operator](*inputs)
            if backward_inside:
                y.float().square().sum().backward()
        if not backward_inside:
            y.float().square().sum().backward()
        found.append([y, *(value.grad for value in inputs)])
    # exactly where training calls backward, outside. Inside, autocast has the backward pass of products; and
    # where products are bfloat16, it lays the modal filter out in bfloat16, too
    is_exact = not backward_inside and (operator != "modal" or not precision.multiplies_bfloat16())
    for off, on in zip(*found, strict=True):
        assert on.dtype == off.dtype
        difference = (on - off).double().square().mean().sqrt()
        assert difference <= (0 if is_exact else 0.01) * off.double().square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backward_inside", [True, False])
def test_depthwise_correlation_under_autocast_is_that_without(dtype, backward_inside) -> None:
    torch.manual_seed(0)
    x, taps, weights = torch.randn(2, 40, 6), torch.randn(6, 3), torch.randn(2, 40, 6)
    found = []
    for is_on in (False, True):
        inputs = [value.to(dtype).requires_grad_() for value in (x.clone(), taps.clone())]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_on):
            y = depthwise_correlation(*inputs, left_zeros=2)
            loss = (y * weights.to(dtype)).sum()
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        found.append([y, *(value.grad for value in inputs)])
    for off, on in zip(*found, strict=True):
        assert on.dtype == dtype
        assert torch.equal(on, off)


def test_turned_matrix_and_its_gradient_are_exact_under_autocast() -> None:
    matrix = torch.randn(5, 3, requires_grad=True)
    weights = torch.randn(3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        turned = operators._Turned.apply(matrix)
        (turned * weights).sum().backward()
    assert torch.equal(turned, matrix.T)
    assert torch.equal(matrix.grad, weights.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_products_are_rounded_where_the_original_rounds(dtype, monkeypatch) -> None:
    monkeypatch.setitem(precision._decided, "cpu", False)
    torch.manual_seed(0)
    x, skip = torch.randn(2, 200, 6).to(dtype), torch.randn(6).to(dtype)
    taps = torch.randn(2, MANY_TAPS).to(dtype) / 8
    once = slow_convolution(x, taps, skip).to(dtype)
    log_poles, residues, _ = random_modes(6, 4)
    thrice = slow_modal(x, log_poles, residues, torch.zeros(6)).to(dtype) + x * skip
    blocks = modal_convolution_from(x, log_poles, residues, skip, state_BDS=None).output
    # sums of another order flip the rounding of a few; with other roundings, 0.6 to 0.8 are equal
    for ours, expected in (
        (causal_convolution(x, taps, skip), once),
        (modal_convolution(x, log_poles, residues, skip), thrice),
        (blocks, thrice),
    ):
        assert (ours == expected).double().mean() > 0.99


@pytest.mark.parametrize(
    ("device_type", "dtype", "expected"),
    [
        ("cuda", torch.float32, False),  # cuDNN would round it
        ("cuda", torch.float64, False),
        ("cuda", torch.bfloat16, True),
        ("cuda", torch.float16, True),
        ("mps", torch.float32, True),
    ],
)
def test_short_filters_are_convolved_where_that_is_exact(device_type, dtype, expected):
    assert operators._has_convolution(device_type, dtype) is expected


def test_fir_without_a_convolution_library_gives_the_same(monkeypatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 40, WIDTH, dtype=torch.float64, requires_grad=True)
    taps = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 40, WIDTH, dtype=torch.float64)
    expected = causal_fir(x, taps)
    gradients = torch.autograd.grad((expected * weights).sum(), (x, taps))
    monkeypatch.setattr(operators, "_HAS_ONEDNN", False)
    monkeypatch.setattr(torch.nn.functional, "conv2d", None)  # it must not be asked
    plain = causal_fir(x, taps)
    assert torch.allclose(plain, expected, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad((plain * weights).sum(), (x, taps)), gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-11)


def test_modal_matrices_are_float32_under_autocast():
    generator = torch.Generator().manual_seed(0)
    log_poles = -torch.rand(6, 4, generator=generator)
    residues = torch.randn(6, 4, generator=generator)
    expected = modal_matrices(log_poles, residues, chunk=8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = modal_matrices(log_poles, residues, chunk=8, dtype=torch.float32)
    for ours, reference in zip(found, expected, strict=True):
        assert torch.equal(ours, reference)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_position_by_position_equals_the_direct_sum(dtype) -> None:
    torch.manual_seed(0)
    x, skip = torch.randn(2, 150, WIDTH).to(dtype), torch.randn(WIDTH).to(dtype)
    short, medium = torch.randn(2, 7).to(dtype), torch.randn(3, MANY_TAPS).to(dtype)
    log_poles, residues, _ = random_modes(WIDTH, 5)
    expected = {
        "fir": slow_correlation(x, short),
        "convolution": slow_convolution(x, medium, skip),
        "modal": slow_modal(x, log_poles, residues, skip),
    }
    found = {name: [] for name in expected}
    state = None
    for t in range(150):
        here, before = x[:, t : t + 1], x[:, max(0, t - MANY_TAPS + 1) : t]
        padded = torch.nn.functional.pad(before, (0, 0, MANY_TAPS - 1 - before.shape[1], 0))
        found["fir"].append(causal_fir(here, short, history=padded[:, -6:]))
        found["convolution"].append(causal_convolution(here, medium, skip, history=padded))
        step = modal_convolution_from(here, log_poles, residues, skip, state_BDS=state)
        state = step.state_BDS
        found["modal"].append(step.output)
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2}[dtype]
    for name, parts in found.items():
        joined = torch.cat(parts, dim=1)
        assert joined.dtype == dtype
        difference = (joined.double() - expected[name]).abs().max() / expected[name].abs().max()
        assert difference < tolerance, name


def test_steps_of_slow_modes_do_not_drift() -> None:
    """Ten thousand steps with poles up to 0.99999, against the sum of the geometric series in float64."""
    log_poles = torch.tensor([[-1e-5, -1e-4, -1e-3]])
    residues, skip, steps = torch.tensor([[1.0, -2.0, 0.5]]), torch.zeros(1), 10_000
    one = torch.ones(1, 1, 1)
    state = None
    for _ in range(steps):
        output, state = modal_convolution_from(one, log_poles, residues, skip, state_BDS=state)
    poles = log_poles.double().exp()
    expected = (residues.double() * (1 - poles**steps) / (1 - poles)).sum()
    assert abs(float(output) / float(expected) - 1) < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_steps_of_complex_modes_are_the_whole_sequence(seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    radius = -torch.rand(WIDTH, 4, generator=generator) * 0.1
    log_poles = torch.complex(radius, torch.rand(WIDTH, 4, generator=generator) * 6)
    residues = torch.complex(*torch.randn(2, WIDTH, 4, generator=generator))
    x, skip = torch.randn(2, 90, WIDTH, generator=generator), torch.randn(WIDTH, generator=generator)
    whole = modal_convolution(x, log_poles, residues, skip)
    first = modal_convolution_from(x[:, :30], log_poles, residues, skip, state_BDS=None)
    outputs, state = [first.output], first.state_BDS
    for t in range(30, 60):
        output, state = modal_convolution_from(x[:, t : t + 1], log_poles, residues, skip, state_BDS=state)
        outputs.append(output)
    # and a block after the steps
    outputs.append(modal_convolution_from(x[:, 60:], log_poles, residues, skip, state_BDS=state).output)
    assert (torch.cat(outputs, dim=1) - whole).abs().max() < 1e-5 * whole.abs().max()
