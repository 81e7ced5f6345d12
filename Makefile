# `make check` is what CI runs before the tests.
.PHONY: check docs format test test-avx2

check:
	ruff format --check .
	ruff check .
	mypy

docs:
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

format:
	ruff format .
	ruff check --fix .

test:
	python -m pytest -n 2

# What computes, once more as on a CPU without AVX-512 and matrix units: other kernels, and other types of products.
NUMERIC_TESTS = tests/models tests/pooling tests/property tests/scoring/test_score_sequences.py \
	tests/retrieval/test_grad_cache.py tests/pretraining/test_trainer.py::test_bfloat16_stays_near_float32

test-avx2:
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m pytest -n 2 $(NUMERIC_TESTS)
