"""The known-answer tests themselves.

The bundled model has a known answer beside its weights. For published models, `genoembed.models.geneb` has
short inputs and the vectors that the real weights give. For Evo 2 checkpoints, whose vectors are not known,
the FP8 product that some of them need is tested, and that their scales are there.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from genoembed.batching.pad import pad_batch, pool_mask
from genoembed.config.cores import available_cores, describe_waiting
from genoembed.contracts import Batch, EmbeddingBlock, ObsRow
from genoembed.doctor.results import KNOWN_ANSWER, DoctorCheck, PublishedCheck
from genoembed.errors import GenoembedError, install_command
from genoembed.models.geneb import known_answers
from genoembed.models.load import load_model
from genoembed.models.locate import locate_model
from genoembed.models.precision import bfloat16_speedup
from genoembed.models.provenance import weight_files, weights_digest
from genoembed.models.registry import entry_named
from genoembed.models.striped_hyena2.configuration import StripedHyena2Config
from genoembed.models.striped_hyena2.fp8 import emulate_product, emulation_form, fp8_linear, has_hopper_sums
from genoembed.pipeline.agreement import difference
from genoembed.pooling.reduce import pool
from genoembed.store import EmbeddingWriter, open_embeddings
from genoembed.tokenization.char import CharTokenizer
from genoembed.tokenization.hf import build_encoder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from genoembed.models.geneb import KnownAnswer, PublishedModel
    from genoembed.models.genomic_model import GenomicModel

logger = logging.getLogger(__name__)

# Other CPUs sum in other orders, over all layers up to the one that is taken; a batch changes less.
_VECTOR_TOLERANCE = 1e-4
_INVARIANCE_TOLERANCE = 1e-5
_BFLOAT16_COSINE = 0.99
_BASES_SHOWN = 15

_FP8_SCALES = (60.0, 57.0)
_FP8_PRODUCT = [[390.0, 378.0, 382.0, 382.0], [380.0, 390.0, 378.0, 382.0]]
"""What exact integers give for `_fp8_operands`: sums that are not cut off as Hopper's are give others."""
_FASTER_CPU = "numba would take a seventh of the time, and is not installed or does not work here"
_FP8_FORMS = {
    "numba": "emulated by numba",
    "triton": "emulated by Triton",
    "torch": "emulated by PyTorch",
}


class _WrongAnswerError(GenoembedError):
    """A test that gave another answer than the known one."""


Tests: TypeAlias = "list[tuple[str, Callable[[], str]]]"
"""Names, and what says what it found."""


def installation_tests(model: str, device: str | None) -> Tests:
    """List the tests of an installation, with a model whose answer is known."""
    known = _KnownModel(model)
    return [
        ("tokenizer ids", _check_tokenizer),
        ("bundled weights", known.check_digest),
        ("bundled model's vector", known.check_vector),
        ("batch and padding invariance", known.check_invariance),
        ("bfloat16 against float32", known.check_bfloat16),
        ("embedding file", _check_store),
        ("FP8 of Evo 2", partial(_check_fp8, device)),
        ("device", _describe_device),
    ]


def evo2_tests(model: str, device: str | None) -> Tests:
    """List the tests of an Evo 2 checkpoint, by its name or folder."""
    return [
        ("tokenizer ids", _check_tokenizer),
        ("FP8 of Evo 2", partial(_check_fp8, device)),
        ("FP8 scales", partial(_check_scales, model)),
        ("device", _describe_device),
    ]


def run_tests(tests: Tests, on_check: Callable[[DoctorCheck], None] | None) -> list[DoctorCheck]:
    """Run all tests, whatever fails."""
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


def check_published(
    published: PublishedModel,
    name: str,
    *,
    device: str | None,
    revision: str | None,
    tolerance: float | None,
    on_check: Callable[[DoctorCheck], None] | None,
) -> list[DoctorCheck]:
    """Compare each published vector of a model with the one that its weights give here."""
    model = load_model(name, device=device or "cpu", dtype="float32", revision=revision)
    checks: list[DoctorCheck] = []
    for answer in known_answers(published.title):
        check = _check_answer(
            published, answer, model, tolerance=_VECTOR_TOLERANCE if tolerance is None else tolerance
        )
        checks.append(check)
        if on_check is not None:
            on_check(check)
    return checks


def _check_answer(
    published: PublishedModel, answer: KnownAnswer, model: GenomicModel, *, tolerance: float
) -> PublishedCheck:
    started = time.perf_counter()
    ids, vector = _published_vector(published, answer, model)
    found = difference(vector, np.array(answer.values))
    problems = []
    if answer.num_tokens not in (None, len(ids)):
        problems.append(f"the tokenizer gives {len(ids)} tokens, expected {answer.num_tokens}")
    if len(vector) != len(answer.values):
        problems.append(f"the vector has {len(vector)} values, expected {len(answer.values)}")
    elif not found.is_within(tolerance):
        problems.append(f"the largest difference is {found.absolute:.1e}")
    is_met = not problems
    numbers = f"relative {found.relative:.1e}, tolerance {tolerance:.1g}, cosine {found.cosine:.7f}"
    detail = f"met within {found.absolute:.1e}" if is_met else f"missed: {'; '.join(problems)}"
    revision = model.provenance["revision"]
    if revision is None:
        origin = f"the folder names no revision, the vector is of {answer.revision[:12]}"
    elif revision == answer.revision:
        origin = f"revision {answer.revision[:12]} as recorded"
    else:
        origin = (
            f"other revision: the weights are of {revision[:12]}, the vector is of {answer.revision[:12]}"
        )
    shown = answer.sequence[:_BASES_SHOWN] + ("..." if len(answer.sequence) > _BASES_SHOWN else "")
    return PublishedCheck(
        name=f"{published.title}, {shown} ({len(answer.sequence)} bases)",
        passed=is_met,
        detail=f"{detail} ({numbers}); {origin}",
        seconds=time.perf_counter() - started,
        verdict="met" if is_met else "missed",
        sequence=answer.sequence,
        absolute=found.absolute,
        relative=found.relative,
        cosine=found.cosine,
        tolerance=tolerance,
        revision=revision,
        known_revision=answer.revision,
        is_known_revision=None if revision is None else revision == answer.revision,
    )


def _published_vector(
    published: PublishedModel, answer: KnownAnswer, model: GenomicModel
) -> tuple[list[int], NDArray[np.float64]]:
    """Embed an input as the benchmark does: letters as they are, special tokens counted where it counts them.

    Returns the token ids and the vector.
    """
    multiple = published.trim or 1
    bases = answer.sequence[: len(answer.sequence) // multiple * multiple]
    ids = model.tokenizer(published.prefix + bases, add_special_tokens=published.adds_special_tokens)[
        "input_ids"
    ]
    mask = torch.ones(1, len(ids), dtype=torch.int64)
    batch = Batch(input_ids=torch.tensor([ids]), attention_mask=mask, pool_mask=mask.bool(), rows=(0,))
    [layer] = model.resolve(published.state)
    hidden_LD = model.forward(batch, [layer.path])[layer.path][0].double().cpu()
    vector = hidden_LD[0] if published.pooling == "cls" else hidden_LD.mean(0)
    return ids, vector.numpy()


def embed_sequences(model: GenomicModel, sequences: Sequence[bytes], layer: str) -> Tensor:
    """Embed sequences in one batch, mean over bases: the shortest way through the stages."""
    encoder = build_encoder(model.tokenizer, add_special_tokens=model.special_tokens)
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


def _check_fp8(device: str | None) -> str:
    """Compare an FP8 product with exact integers; say what computes it here."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    x_TK, weight_NK = (one.to(place) for one in _fp8_operands())
    scales = torch.tensor(_FP8_SCALES, device=place)
    form = emulation_form(place)
    emulated = emulate_product(x_TK, weight_NK, scales, form=form).tolist()
    _compare("an FP8 product", emulated, _FP8_PRODUCT)
    if has_hopper_sums(place):
        computed = fp8_linear(x_TK, weight_NK, scales, is_native=True).tolist()
        if computed != _FP8_PRODUCT:
            message = f"this GPU gives {computed}, expected {_FP8_PRODUCT}; set fp8 to emulate here"
            raise _WrongAnswerError(message)
        return f"in hardware, and {_FP8_FORMS[form]}, with the sums of exact integers"
    detail = f"{_FP8_FORMS[form]}, with the sums of exact integers"
    if form != "torch":
        return detail
    if place.type == "cpu":
        return f"{detail}; {_FASTER_CPU}: {install_command('fp8')}"
    return f"{detail}; Triton would take less time, and is not installed or does not work here"


def _fp8_operands() -> tuple[Tensor, Tensor]:
    """Make activations and weights by a rule that gives the same everywhere: 1000 inputs."""
    x_TK, weight_NK = (
        ((torch.arange(rows * 1000).view(rows, 1000) * step % 97) - 8) / 64
        for rows, step in ((2, 31), (4, 57))
    )
    return x_TK, weight_NK


def _check_scales(name: str) -> str:
    """Check that each projection of a checkpoint that runs in FP8 has its scales."""
    folder = Path(locate_model(name, with_weights=False).location)
    entry = entry_named(name)
    if entry is not None:
        is_needed = entry.needs_fp8
    else:
        is_needed = StripedHyena2Config.from_pretrained(folder).fp8_projections == "needed"
    need = "needs FP8" if is_needed else "does without FP8, and has scales for it"
    files = weight_files(folder)
    if not files:
        return f"{name} {need}; its weights are not here yet, so that its scales were not looked at"
    num_projections, scales = 0, []
    for path in files:
        try:
            with safe_open(path, framework="pt") as weights:
                keys = [key for key in weights.keys() if ".projections." in key]
                num_projections += sum(key.endswith(".weight") for key in keys)
                scales += [weights.get_tensor(key) for key in keys if key.endswith(".fp8_scales")]
        except (OSError, SafetensorError) as error:
            message = f"{path} cannot be read ({error}); convert the checkpoint again"
            raise _WrongAnswerError(message) from error
    usable = sum(bool((one.isfinite() & (one > 0)).all()) for one in scales)
    if usable < num_projections or not scales:
        message = (
            f"{name} {need}, but {num_projections - usable} of {num_projections} input projections have no "
            "scales that can be used; convert the checkpoint again"
        )
        raise _WrongAnswerError(message)
    return f"{name} {need}; all {num_projections} input projections have their scales"


def _describe_device() -> str:
    if torch.cuda.is_available():
        return f"CUDA: {torch.cuda.get_device_name()}, bfloat16 {torch.cuda.is_bf16_supported()}"
    cores, num_threads = available_cores(), torch.get_num_threads()
    threads = "1 thread" if num_threads == 1 else f"{num_threads} threads"
    there = "1 core" if cores.count == 1 else f"{cores.count} cores"
    return (
        f"CPU with {threads} on {there} ({cores.source}), {describe_waiting()}; "
        f"{torch.backends.cpu.get_cpu_capability()}, products in bfloat16 {bfloat16_speedup():.1f} times as "
        "fast as in float32"
    )


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
