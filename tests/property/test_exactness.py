"""A vector depends on its sequence alone: not on batch size, batch-mates, order, padding or work units."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed import load_model
from genoembed.config.embed import embed_config
from genoembed.contracts import SequenceRecord
from genoembed.models.registry import BUNDLED_FOLDER
from genoembed.pipeline.embedder import UnitEmbedder
from genoembed.pipeline.units import WorkUnit
from tests.by_hand import ALL_FAMILIES, STRIPED, folder_of, model_of, random_dna

TOLERANCE = 1e-5
HALF_TOLERANCE = 1e-2
"""In bfloat16, relative to the vector's largest value."""
LONGEST = 600
SOME_BASES = st.sampled_from([(17, "ACGT"), (17, "ACGTN"), (64, "ACGT"), (65, "ACGT"), (LONGEST, "ACGT")])
ANY_BASES = st.tuples(st.integers(1, LONGEST), st.sampled_from(["ACGT", "ACGTN", "A"]))


@st.composite
def batches(draw):
    """Records (some of one length), an order of them, and a budget of slots."""
    shapes = draw(st.lists(SOME_BASES | ANY_BASES, min_size=2, max_size=6))
    records = [
        SequenceRecord(id=f"r{index}", sequence=random_dna(length, index, letters).encode())
        for index, (length, letters) in enumerate(shapes)
    ]
    order = draw(st.permutations(range(len(records))))
    longest = max(length for length, _ in shapes)
    budget = draw(st.sampled_from([1, longest, 3 * longest, 16 * longest]))
    return records, order, budget


def vectors_of(model, records, *, batch_tokens, **options):
    config = embed_config({"inputs": ("a.fa",), "batch_tokens": batch_tokens, **options})
    block = UnitEmbedder(model, config)(WorkUnit(number=0, records=tuple(records))).block
    assert [row.id for row in block.rows] == [record.id for record in records]
    return block.matrices


def assert_same_in_any_company(model, case, **options):
    records, order, budget = case
    alone = [vectors_of(model, [record], batch_tokens=1, **options) for record in records]
    together = vectors_of(model, [records[index] for index in order], batch_tokens=budget, **options)
    for layer, matrix in together.items():
        expected = np.concatenate([alone[index][layer] for index in order])
        np.testing.assert_allclose(matrix, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("family", ALL_FAMILIES)
@settings(max_examples=8)
@given(case=batches())
def test_vectors_do_not_depend_on_company(family, case):
    assert_same_in_any_company(model_of(family), case, layers=("0", "final"))


@pytest.mark.parametrize("family", ALL_FAMILIES)
@settings(max_examples=3)
@given(case=batches(), pooling=st.sampled_from(["max", "last", "weighted_mean", "mean_std"]))
def test_other_poolings_and_strands_do_not_depend_on_company(family, case, pooling):
    assert_same_in_any_company(model_of(family), case, pooling=pooling, rc="concat", window=50)


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("num_rows", [1, 3, 16])
def test_batches_of_one_three_and_sixteen_rows_agree(family, num_rows, monkeypatch):
    """Thirty-two records of 47 or 48 bases, so that the budget gives the number of rows."""
    model = model_of(family)
    is_equal = model.padding == "equal"
    lengths = [48 if is_equal else 47 + index % 2 for index in range(32)]
    records = [
        SequenceRecord(id=f"r{index}", sequence=random_dna(length, index).encode())
        for index, length in enumerate(lengths)
    ]
    alone = vectors_of(model, records, batch_tokens=1)
    seen = []
    original = type(model).forward

    def forward(self, batch, *args, **options):
        seen.append(len(batch.input_ids))
        return original(self, batch, *args, **options)

    monkeypatch.setattr(type(model), "forward", forward)
    num_special = 2 if family in ("bert", "esm", "modernbert") else 0
    found = vectors_of(model, records, batch_tokens=num_rows * (48 + num_special))
    if family == "gpt_neox":  # joins bases, so rows are more
        assert max(seen) >= num_rows
    else:
        assert max(seen) == num_rows
    for layer, matrix in found.items():
        np.testing.assert_allclose(matrix, alone[layer], rtol=TOLERANCE, atol=TOLERANCE)


def assert_close_in_any_company(model, case):
    """Half precision: products of other shapes are rounded elsewhere."""
    records, order, budget = case
    alone = [vectors_of(model, [record], batch_tokens=1) for record in records]
    together = vectors_of(model, [records[index] for index in order], batch_tokens=budget)
    for layer, matrix in together.items():
        for row, index in zip(matrix, order, strict=True):
            (expected,) = alone[index][layer]
            assert np.abs(row - expected).max() <= HALF_TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("family", ["esm", "llama", STRIPED])
@settings(max_examples=6)
@given(case=batches())
def test_half_precision_vectors_hardly_depend_on_company(family, case, half_model_of):
    assert_close_in_any_company(half_model_of(family), case)


@pytest.fixture(scope="session")
def half_model_of():
    """A tiny family, or the bundled model, in bfloat16; each loaded once."""
    return cache(
        lambda family: load_model(
            "genoembed-mini" if family == "bundled" else str(folder_of(family)),
            device="cpu",
            dtype="bfloat16",
        )
    )


HAS_BUNDLED_WEIGHTS = pytest.mark.skipif(
    not (BUNDLED_FOLDER / "model.safetensors").exists(), reason="the bundled weights are not in this tree"
)


@HAS_BUNDLED_WEIGHTS
@settings(max_examples=3)
@given(case=batches())
def test_bundled_model_in_half_precision_hardly_depends_on_company(case, half_model_of):
    assert_close_in_any_company(half_model_of("bundled"), case)


@HAS_BUNDLED_WEIGHTS
def test_bundled_model_in_half_precision_is_close_to_full(bundled, half_model_of):
    """What ``dtype='auto'`` costs on a CPU with a matrix unit."""
    records = [
        SequenceRecord(id=f"r{index}", sequence=random_dna(length, index).encode())
        for index, length in enumerate((150, 400, 1000))
    ]
    options = {"batch_tokens": 2048, "layers": ("28", "24", "final")}
    full = vectors_of(bundled, records, **options)
    half = vectors_of(half_model_of("bundled"), records, **options)
    assert len(full) == 3
    # a mean of codes of k-mers has no large constant beside which errors would look small
    shares = dict(zip(full, (0.03, 0.03, HALF_TOLERANCE), strict=True))
    for layer, matrix in full.items():
        for exact, rounded in zip(matrix, half[layer], strict=True):
            assert not np.array_equal(exact, rounded)
            assert np.abs(exact - rounded).max() <= shares[layer] * np.abs(exact).max()
            assert exact @ rounded > 0.9997 * np.linalg.norm(exact) * np.linalg.norm(rounded)


@HAS_BUNDLED_WEIGHTS
@settings(max_examples=4)
@given(case=batches())
def test_bundled_model_does_not_depend_on_company(bundled, case):
    assert_same_in_any_company(bundled, case, layers=("28", "final"))


@pytest.fixture(scope="session")
def bundled():
    """The bundled model, loaded once."""
    return load_model(device="cpu", dtype="float32")
