"""iter_windows against a slow oracle that asks each base for its best window."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.errors import ConfigError, ShapeError
from genoembed.pipeline.cutting import default_stride, iter_windows


@st.composite
def cuts(draw):
    length = draw(st.integers(1, 120))
    window = draw(st.integers(1, 40))
    stride = draw(st.none() | st.integers(1, window))
    core = sorted(draw(st.tuples(st.integers(0, length), st.integers(0, length))))
    return length, window, stride, draw(st.booleans()), core


@settings(deadline=None, max_examples=300)
@given(cuts())
def test_iter_windows_cores_partition_the_core(cut):
    length, window, stride, causal, (core_start, core_end) = cut
    windows = list(
        iter_windows(
            length,
            window_bp=window,
            stride_bp=stride,
            causal=causal,
            core_start=core_start,
            core_end=core_end,
        )
    )
    covered = [base for w in windows for base in range(w.core_start, w.core_end)]
    assert covered == list(range(core_start, core_end))
    for w in windows:
        assert 0 <= w.start <= w.core_start < w.core_end <= w.end <= length
        assert w.end - w.start == min(window, length)


def context(base, window, causal):
    left, right = base - window.start, window.end - 1 - base
    return left if causal else min(left, right)


@settings(deadline=None, max_examples=200)
@given(cuts())
def test_iter_windows_gives_each_base_its_best_context(cut):
    length, window_bp, stride, causal, _ = cut
    windows = list(iter_windows(length, window_bp=window_bp, stride_bp=stride, causal=causal))
    for w in windows:
        for base in range(w.core_start, w.core_end):
            holding = [v for v in windows if v.start <= base < v.end]
            assert context(base, w, causal) == max(context(base, v, causal) for v in holding)


@settings(deadline=None, max_examples=100)
@given(cuts())
def test_iter_windows_starts_by_the_stride_and_ends_with_the_sequence(cut):
    length, window, stride, causal, _ = cut
    starts = [w.start for w in iter_windows(length, window_bp=window, stride_bp=stride, causal=causal)]
    step = default_stride(window) if stride is None else stride
    last = max(0, length - window)
    assert starts == [*range(0, last, step), last]


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (0, []),
        (1, [(0, 1, 0, 1)]),
        (8, [(0, 8, 0, 8)]),
        (9, [(0, 8, 0, 4), (1, 9, 4, 9)]),
        (16, [(0, 8, 0, 7), (6, 14, 7, 11), (8, 16, 11, 16)]),
    ],
)
def test_iter_windows_at_the_edges(length, expected):
    windows = iter_windows(length, window_bp=8)
    assert [(w.start, w.end, w.core_start, w.core_end) for w in windows] == expected


def test_iter_windows_leaves_out_windows_of_flank_only():
    windows = iter_windows(100, window_bp=10, stride_bp=10, core_start=35, core_end=52)
    assert [(w.start, w.core_start, w.core_end) for w in windows] == [
        (30, 35, 40),
        (40, 40, 50),
        (50, 50, 52),
    ]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"window_bp": 0}, "window is 0, expected at least 1 base; set window to the model's context"),
        ({"window_bp": 8, "stride_bp": 0}, "stride is 0, expected at least 1 base"),
        ({"window_bp": 8, "stride_bp": 9}, "stride is 9, but window is 8: .*set stride to 8 or less"),
    ],
)
def test_iter_windows_refuses_options_at_once(options, problem):
    with pytest.raises(ConfigError, match=problem):
        iter_windows(10, **options)


@pytest.mark.parametrize("core", [(-1, 5), (6, 5), (0, 11)])
def test_iter_windows_refuses_a_core_outside_the_sequence(core):
    with pytest.raises(ShapeError, match=r"core -?\d+-\d+ is outside a sequence of 10 bases"):
        iter_windows(10, window_bp=4, core_start=core[0], core_end=core[1])
