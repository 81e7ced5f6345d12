"""Known-answer tests of an installation: a few seconds that say whether vectors can be trusted here."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from genoembed.batching.pad import pad_batch, pool_mask
from genoembed.contracts import EmbeddingBlock, ObsRow
from genoembed.errors import GenoembedError
from genoembed.models.load import load_model
from genoembed.models.locate import locate_model
from genoembed.models.provenance import weights_digest
from genoembed.models.registry import BUNDLED_NAME
from genoembed.pooling.reduce import pool
from genoembed.store import EmbeddingWriter, open_embeddings
from genoembed.tokenization.char import CharTokenizer
from genoembed.tokenization.hf import build_encoder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from genoembed.models.genomic_model import GenomicModel

logger = logging.getLogger(__name__)

KNOWN_ANSWER = "known_answer.json"
"""Beside the bundled weights: a sequence, a layer and the vector they give."""

# Other CPUs sum in other orders, over all layers up to the one that is taken; a batch changes less.
_VECTOR_TOLERANCE = 1e-4
_INVARIANCE_TOLERANCE = 1e-5
_BFLOAT16_COSINE = 0.99


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorCheck:
    """One known-answer test."""

    name: str
    """What was tested."""
    passed: bool
    """Whether the answer is the known one."""
    detail: str
    """What was found."""
    seconds: float
    """Wall time."""


class _WrongAnswerError(GenoembedError):
    """A test that gave another answer than the known one."""


def run_doctor(
    *, model: str = BUNDLED_NAME, on_check: Callable[[DoctorCheck], None] | None = None
) -> list[DoctorCheck]:
    """Test this installation against known answers.

    Args:
        model: The bundled model, or a folder that holds a known answer next to its weights.
        on_check: Called with each result as soon as it is there.

    Returns:
        One result a test; all are run, whatever fails.
    """
    known = _KnownModel(model)
    tests: list[tuple[str, Callable[[], str]]] = [
        ("tokenizer ids", _check_tokenizer),
        ("bundled weights", known.check_digest),
        ("bundled model's vector", known.check_vector),
        ("batch and padding invariance", known.check_invariance),
        ("bfloat16 against float32", known.check_bfloat16),
        ("embedding file", _check_store),
        ("device", _describe_device),
    ]
    checks = []
    for name, test in tests:
        started = time.perf_counter()
        try:
            passed, detail = True, test()
        except GenoembedError as error:
            passed, detail = False, str(error)
        except Exception as error:  # whatever is broken here, the other tests are run
            logger.debug("%s: failed", name, exc_info=True)
            passed, detail = False, f"{type(error).__name__}: {error}; install genoembed again"
        check = DoctorCheck(name=name, passed=passed, detail=detail, seconds=time.perf_counter() - started)
        checks.append(check)
        if on_check is not None:
            on_check(check)
    return checks


def embed_sequences(model: GenomicModel, sequences: Sequence[bytes], layer: str) -> Tensor:
    """Embed sequences in one batch, mean over bases: the shortest way through the stages."""
    encoder = build_encoder(model.tokenizer)
    pieces = [encoder.encode(sequence) for sequence in sequences]
    batch = pad_batch(
        pieces,
        pool_masks=[
            pool_mask(piece, core_start=0, core_end=len(sequence))
            for piece, sequence in zip(pieces, sequences, strict=True)
        ],
        rows=range(len(pieces)),
        pad_token_id=encoder.pad_token_id,
    )

    def reduce(_: str, hidden_BLD: Tensor) -> Tensor:
        return pool(hidden_BLD, batch.pool_mask.to(hidden_BLD.device), method="mean").cpu()

    return model.forward(batch, [layer], reduce)[layer]


class _KnownModel:
    """The tests of a model whose answer is known; it is loaded once."""

    def __init__(self, name: str) -> None:
        self._name = name

    def check_digest(self) -> str:
        expected = str(self.answer["weights_sha256"])
        _compare("the weights' SHA-256", weights_digest(self.folder) or "no weights", expected)
        return f"SHA-256 {expected[:12]}..."

    def check_vector(self) -> str:
        vector = embed_sequences(self.model, [self.sequence], self.layer)[0]
        known = torch.tensor(self.answer["vector"])
        _compare("the length of the vector", len(vector), len(known))
        error = float((vector - known).abs().max() / known.abs().max())
        _limit("the largest difference to the known vector, relative", error, _VECTOR_TOLERANCE)
        return f"{self.layer}: within {error:.1e} of the known vector"

    def check_invariance(self) -> str:
        # one shorter and two longer, so that the batch is padded, and the sequence is in it with padding
        others = [self.sequence[:100], self.sequence[::-1] * 3, self.sequence * 2]
        alone = embed_sequences(self.model, [self.sequence], self.layer)[0]
        together = embed_sequences(self.model, [others[0], self.sequence, *others[1:]], self.layer)[1]
        error = float((alone - together).abs().max() / alone.abs().max())
        _limit("the difference between alone and in a padded batch", error, _INVARIANCE_TOLERANCE)
        return f"alone and in a padded batch: {error:.1e} apart"

    def check_bfloat16(self) -> str:
        exact = embed_sequences(self.model, [self.sequence], self.layer)[0]
        rounded_model = load_model(self._name, device="cpu", dtype="bfloat16")
        rounded = embed_sequences(rounded_model, [self.sequence], self.layer)[0]
        cosine = float(torch.nn.functional.cosine_similarity(exact, rounded, dim=0))
        if not cosine >= _BFLOAT16_COSINE:
            message = f"cosine {cosine:.4f}, expected {_BFLOAT16_COSINE} or more; use dtype='float32' here"
            raise _WrongAnswerError(message)
        return f"cosine {cosine:.5f}"

    @property
    def folder(self) -> Path:
        """Where the weights and their known answer are."""
        return Path(locate_model(self._name).location)

    @cached_property
    def model(self) -> GenomicModel:
        """The model in float32 on the CPU."""
        return load_model(self._name, device="cpu", dtype="float32")

    @cached_property
    def answer(self) -> dict[str, Any]:
        """What is known about the model."""
        path = self.folder / KNOWN_ANSWER
        if not path.is_file():
            message = f"{path} is missing; install genoembed again"
            raise _WrongAnswerError(message)
        answer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return answer

    @property
    def sequence(self) -> bytes:
        """The sequence of the known answer."""
        return str(self.answer["sequence"]).encode("ascii")

    @property
    def layer(self) -> str:
        """The layer of the known answer."""
        return str(self.answer["layer"])


def _check_tokenizer() -> str:
    tokenizer = CharTokenizer()
    _compare("the ids of ACGT", tokenizer("ACGT")["input_ids"], [65, 67, 71, 84])
    _compare(
        "EOD, EOS and PAD",
        (tokenizer.eod_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id),
        (0, 0, 1),
    )
    _compare("the vocabulary", tokenizer.vocab_size, 512)
    return "ACGT is 65 67 71 84, EOD = EOS = 0, PAD = 1, vocabulary 512"


def _check_store() -> str:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    rows = tuple(
        ObsRow(
            id=name,
            description="",
            length=4,
            start=0,
            end=4,
            strand="+",
            source="doctor",
            n_windows=1,
            sha256="",
            flags="",
        )
        for name in ("a/b", "c")
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "doctor.h5")
        with EmbeddingWriter(path, kind="pooled") as writer:
            writer.append(EmbeddingBlock(rows=rows, matrices={"layer": values}))
            writer.finish({})
        with open_embeddings(path) as stored:
            _compare("the stored ids", stored.ids, ["a/b", "c"])
            _compare("the stored values", stored.X[:].tolist(), values.tolist())
    return "written and read back"


def _describe_device() -> str:
    if torch.cuda.is_available():
        return f"CUDA: {torch.cuda.get_device_name()}, bfloat16 {torch.cuda.is_bf16_supported()}"
    return f"CPU with {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _compare(what: str, found: object, expected: object) -> None:
    if found != expected:
        message = f"{what}: {found}, expected {expected}; this installation is damaged, install it again"
        raise _WrongAnswerError(message)


def _limit(what: str, error: float, tolerance: float) -> None:
    if not error <= tolerance:  # NaN as well
        message = (
            f"{what} is {error:.1e}, expected {tolerance:.0e} or less; report it with your versions of torch"
        )
        raise _WrongAnswerError(message)
