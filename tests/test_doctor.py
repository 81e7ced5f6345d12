"""The doctor gives a clean bill to a sound folder, and finds each fault without losing the other tests."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from examples.package_mini import KNOWN_SEQUENCE, package
from genoembed import CharTokenizer, load_model
from genoembed.doctor import checks as doctor
from genoembed.doctor.checks import embed_sequences
from genoembed.doctor.results import KNOWN_ANSWER, DoctorCheck
from genoembed.doctor.run import run_doctor
from genoembed.errors import ConfigError, GenoembedError
from genoembed.models.names import BUNDLED_NAME
from genoembed.models.provenance import weights_digest
from genoembed.models.registry import BUNDLED_FOLDER, ModelSource
from genoembed.models.striped_hyena2.fp8 import round_to_e4m3
from tests.oracles import hopper_product
from tests.tiny_models import build_striped_hyena

TOKENIZER, DIGEST, VECTOR, INVARIANCE, BFLOAT16, STORE, FP8, DEVICE = NAMES = (
    "tokenizer ids",
    "bundled weights",
    "bundled model's vector",
    "batch and padding invariance",
    "bfloat16 against float32",
    "embedding file",
    "FP8 of Evo 2",
    "device",
)
LAYER = "blocks.2.mlp.l3"
MAX_PACKAGE_BYTES = 16_000_000


@pytest.fixture(scope="module")
def sound_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("doctor")
    build_striped_hyena().save_pretrained(root / "trained")
    package(root / "trained", root / "packaged", layer=LAYER)
    return root / "packaged"


@pytest.fixture
def folder(sound_folder, tmp_path):
    return shutil.copytree(sound_folder, tmp_path / "packaged")


def failures(folder) -> dict[str, str]:
    checks = run_doctor(model=str(folder))
    assert [check.name for check in checks] == list(NAMES)
    assert all(check.detail for check in checks)
    return {check.name: check.detail for check in checks if not check.passed}


def change_answer(folder, **changes) -> None:
    path = folder / KNOWN_ANSWER
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_sound_folder_passes_every_test(sound_folder):
    reported: list[DoctorCheck] = []
    checks = run_doctor(model=str(sound_folder), on_check=reported.append)
    assert checks == reported
    assert [check.name for check in checks] == list(NAMES)
    assert [check.detail for check in checks if not check.passed] == []
    assert all(0 <= check.seconds < 60 for check in checks)


def test_known_answer_is_the_mean_over_bases_of_the_layer(sound_folder):
    answer = json.loads((sound_folder / KNOWN_ANSWER).read_text())
    assert (answer["sequence"], answer["layer"], answer["pooling"]) == (KNOWN_SEQUENCE, LAYER, "mean")
    model = load_model(str(sound_folder), device="cpu", dtype="float32")
    seen = []
    hook = model.module.get_submodule(LAYER).register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.inference_mode():
        model.module(torch.tensor([list(KNOWN_SEQUENCE.encode())]))
    hook.remove()
    torch.testing.assert_close(seen[0][0].mean(0), torch.tensor(answer["vector"]), rtol=1e-4, atol=1e-5)


def test_embed_sequences_gives_a_row_a_sequence_in_order(sound_folder):
    model = load_model(str(sound_folder), device="cpu", dtype="float32")
    sequences = [b"ACGT" * 5, b"G", b"TTAGC"]
    together = embed_sequences(model, sequences, LAYER)
    assert together.shape == (3, 32)
    for row, sequence in zip(together, sequences, strict=True):
        alone = embed_sequences(model, [sequence], LAYER)[0]
        assert (row - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_changed_weights_fail_digest_and_vector_only(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["blocks.0.mlp.l3.weight"] *= 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = failures(folder)
    assert set(found) == {DIGEST, VECTOR}
    expected = json.loads((folder / KNOWN_ANSWER).read_text())["weights_sha256"]
    assert found[DIGEST] == (
        f"the weights' SHA-256: {weights_digest(folder)}, expected {expected}; "
        "this installation is damaged, install it again"
    )
    assert found[VECTOR].startswith("the largest difference to the known vector, relative is ")
    assert found[VECTOR].endswith("expected 1e-04 or less; report it with your versions of torch")


def test_cut_weights_fail_whatever_needs_the_model(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    found = failures(folder)
    assert set(found) == {DIGEST, VECTOR, INVARIANCE, BFLOAT16}
    assert "the weights cannot be read" in found[VECTOR]


def test_missing_weights_are_called_so(folder):
    (folder / "model.safetensors").unlink()
    found = failures(folder)
    assert set(found) == {DIGEST, VECTOR, INVARIANCE, BFLOAT16}
    assert found[DIGEST].startswith("the weights' SHA-256: no weights, expected ")
    assert "no weights were found" in found[INVARIANCE]


def test_changed_known_vector_fails_that_test_only(folder):
    vector = json.loads((folder / KNOWN_ANSWER).read_text())["vector"]
    vector[7] += 1e-3 * max(map(abs, vector))
    change_answer(folder, vector=vector)
    assert set(failures(folder)) == {VECTOR}


def test_known_vector_of_another_length_fails_that_test_only(folder):
    change_answer(folder, vector=[1.0])
    found = failures(folder)
    assert set(found) == {VECTOR}
    assert found[VECTOR].startswith("the length of the vector: 32, expected 1;")


def test_unknown_layer_is_named(folder):
    change_answer(folder, layer="blocks.28.mlp.l3")
    found = failures(folder)
    assert set(found) == {VECTOR, INVARIANCE, BFLOAT16}
    assert all("blocks.28.mlp.l3" in detail for detail in found.values())


@pytest.mark.parametrize("text", ["", "{}", "[1]"])
def test_unreadable_known_answer_fails_what_needs_it(folder, text):
    (folder / KNOWN_ANSWER).write_text(text)
    found = failures(folder)
    assert set(found) == {DIGEST, VECTOR, INVARIANCE, BFLOAT16}
    assert all(detail.endswith("; install genoembed again") for detail in found.values())


@pytest.fixture
def installed(monkeypatch):
    """Have the bundled model lie elsewhere, as in a damaged installation."""

    def install(folder):
        source = ModelSource(name=BUNDLED_NAME, location=str(folder), is_local=True)
        monkeypatch.setattr(doctor, "locate_model", lambda _name: source)

    return install


def test_missing_known_answer_is_named(folder, installed):
    (folder / KNOWN_ANSWER).unlink()
    installed(folder)
    found = failures(BUNDLED_NAME)
    assert set(found) == {DIGEST, VECTOR, INVARIANCE, BFLOAT16}
    assert set(found.values()) == {f"{folder / KNOWN_ANSWER} is missing; install genoembed again"}


def test_missing_folder_leaves_the_tests_that_need_none(tmp_path, installed):
    installed(tmp_path / "nowhere")
    assert set(failures(BUNDLED_NAME)) == {DIGEST, VECTOR, INVARIANCE, BFLOAT16}


def test_vectors_that_depend_on_the_batch_are_found(folder, monkeypatch):
    def leaking(model, sequences, layer):
        return embed_sequences(model, sequences, layer) * (1 + 1e-4 * (len(sequences) - 1))

    monkeypatch.setattr(doctor, "embed_sequences", leaking)
    found = failures(folder)
    assert set(found) == {INVARIANCE}
    assert found[INVARIANCE].startswith("the difference between alone and in a padded batch is 3.0e-04,")


@pytest.mark.parametrize("value", [math.nan, -1.0])
def test_wrong_bfloat16_is_found(folder, monkeypatch, value):
    def rounded(model, sequences, layer):
        vectors = embed_sequences(model, sequences, layer)
        return vectors * value if model.dtype == torch.bfloat16 else vectors

    monkeypatch.setattr(doctor, "embed_sequences", rounded)
    found = failures(folder)
    assert set(found) == {BFLOAT16}
    assert found[BFLOAT16].endswith("expected 0.99 or more; use dtype='float32' here")


def test_vectors_that_are_not_finite_are_found(folder, monkeypatch):
    def broken(model, sequences, layer):
        return embed_sequences(model, sequences, layer) * math.nan

    monkeypatch.setattr(doctor, "embed_sequences", broken)
    assert set(failures(folder)) == {VECTOR, INVARIANCE, BFLOAT16}


def test_wrong_tokenizer_is_found(folder, monkeypatch):
    class Padless(CharTokenizer):
        pad_token_id = 0

    monkeypatch.setattr(doctor, "CharTokenizer", Padless)
    found = failures(folder)
    assert set(found) == {TOKENIZER}
    assert found[TOKENIZER].startswith("EOD, EOS and PAD: (0, 0, 0), expected (0, 0, 1);")


def test_file_that_cannot_be_written_is_found(folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(doctor, "EmbeddingWriter", full)
    found = failures(folder)
    assert set(found) == {STORE}
    assert "No space left on device" in found[STORE]


def test_file_that_reads_back_other_values_is_found(folder, monkeypatch):
    monkeypatch.setattr(doctor, "open_embeddings", lambda path: _Swapped())
    found = failures(folder)
    assert set(found) == {STORE}
    assert found[STORE].startswith("the stored ids: ['c', 'a/b'], expected ['a/b', 'c'];")


class _Swapped:
    def __init__(self):
        self.ids = ["c", "a/b"]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


def test_device_is_described(sound_folder):
    detail = run_doctor(model=str(sound_folder))[-1].detail
    assert detail.startswith(
        "CUDA: " if torch.cuda.is_available() else f"CPU with {torch.get_num_threads()} "
    )


def test_interrupt_is_not_taken_for_a_failure(folder, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt("by the user")

    monkeypatch.setattr(doctor, "embed_sequences", interrupted)
    with pytest.raises(KeyboardInterrupt, match="by the user"):
        run_doctor(model=str(folder))


def test_bundled_model_passes_every_test():
    checks = run_doctor()
    assert [check.name for check in checks] == list(NAMES)
    assert [(check.name, check.detail) for check in checks if not check.passed] == []
    assert sum(check.seconds for check in checks) < 60


def test_bundled_model_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in BUNDLED_FOLDER.iterdir() if path.is_file()}
    assert set(files) >= {
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
        KNOWN_ANSWER,
        "MODEL_CARD.md",
    }
    assert sum(files.values()) <= MAX_PACKAGE_BYTES


def test_known_sequence_is_the_start_of_the_phage_of_the_examples(pytestconfig):
    phages = (pytestconfig.rootpath / "examples" / "data" / "phages.fa").read_text()
    first = phages.split(">")[1]
    assert first.startswith("NC_001422")
    assert first.partition("\n")[2].replace("\n", "").startswith(KNOWN_SEQUENCE)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "evo2-7b"), "did you mean 'evo2_7b'?"),
        (
            ("--model", "someone/dnabert-3"),
            "--model is 'someone/dnabert-3', which 'genoembed models' does not list",
        ),
        (("--model", "tests", "--as", "nt-v2-50"), "did you mean 'nt-v2-50m'"),
        (("--model", "tests"), "nothing says which published model this folder holds"),
        (("--model", "evo2_7b", "--tolerance", "1"), "no vectors are published of 'evo2_7b'"),
    ],
)
def test_wrong_model_is_seen_before_torch_is_imported(words, said):
    code = """
import sys
from genoembed.cli import main
try:
    main(["doctor", *sys.argv[1:]], prog_name="genoembed")
finally:
    print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    root = Path(__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", code, *words], cwd=root, capture_output=True, text=True)
    assert ran.returncode == 1
    assert said in ran.stderr
    assert ran.stdout == "[]\n"


# FP8


def found_of(name: str, checks: list[DoctorCheck]) -> str:
    [check] = [check for check in checks if check.name == name]
    assert check.passed, check.detail
    return check.detail


def test_fp8_is_compared_with_exact_integers():
    x, weight = doctor._fp8_operands()
    expected = hopper_product(x.tolist(), weight.tolist(), list(doctor._FP8_SCALES))
    assert expected == doctor._FP8_PRODUCT
    # to multiply values rounded to E4M3 in float32 gives other numbers, all of them
    scales = torch.tensor(doctor._FP8_SCALES)
    left, right = round_to_e4m3(x, scales[0]), round_to_e4m3(weight, scales[1])
    plain = ((left @ right.T) / (scales[0] * scales[1])).bfloat16().float()
    assert not (plain == torch.tensor(expected)).any()


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("numba", "emulated by numba, with the sums of exact integers"),
        ("torch", r"emulated by PyTorch, .*; numba would .*: python -m pip install .*\[fp8\].*"),
    ],
)
def test_doctor_says_what_computes_fp8(form, said, monkeypatch):
    monkeypatch.setattr(doctor, "emulation_form", lambda _device: form)
    assert re.fullmatch(said, doctor._check_fp8("cpu"))


def test_wrong_sums_in_hardware_are_found(monkeypatch):
    monkeypatch.setattr(doctor, "has_hopper_sums", lambda _device: True)
    assert doctor._check_fp8("cpu").startswith("in hardware, and emulated by ")  # here it is emulated as well
    monkeypatch.setattr(doctor, "fp8_linear", lambda x, *_args, **_options: x.new_zeros(2, 4))
    with pytest.raises(GenoembedError, match=r"this GPU gives .* set fp8 to emulate here"):
        doctor._check_fp8("cpu")


def test_wrong_sums_of_the_emulation_are_found(monkeypatch):
    monkeypatch.setattr(doctor, "emulate_product", lambda x, *_args, **_options: x.new_zeros(2, 4))
    with pytest.raises(GenoembedError, match=r"an FP8 product: \[\[0\.0, .*, expected \[\[390\.0, "):
        doctor._check_fp8("cpu")


@pytest.fixture(scope="module")
def fp8_folder(tmp_path_factory):
    """A small Evo 2 whose projections need FP8."""
    folder = tmp_path_factory.mktemp("fp8") / "evo2"
    build_striped_hyena(fp8_projections="needed").save_pretrained(folder)
    return folder


def test_folder_that_needs_fp8_says_so(fp8_folder):
    checks = run_doctor(model=str(fp8_folder))
    assert [check.name for check in checks] == [TOKENIZER, FP8, "FP8 scales", DEVICE]
    assert found_of("FP8 scales", checks) == (
        f"{fp8_folder} needs FP8; all 3 input projections have their scales"
    )
    with pytest.raises(ConfigError, match=r"tolerance is 0\.1, but no vectors are published of .*evo2"):
        run_doctor(model=str(fp8_folder), tolerance=0.1)


@pytest.mark.parametrize("value", [None, 0.0, math.nan])
def test_missing_scales_are_found(value, fp8_folder, tmp_path):
    folder = shutil.copytree(fp8_folder, tmp_path / "evo2")
    weights = load_file(folder / "model.safetensors")
    key = next(key for key in weights if key.endswith("fp8_scales"))
    if value is None:
        del weights[key]
    else:
        weights[key][1] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    [problem] = [check.detail for check in run_doctor(model=str(folder)) if not check.passed]
    assert "needs FP8, but 1 of 3 input projections have no scales that can be used; convert" in problem


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("evo2_1b_base", "evo2_1b_base needs FP8; its weights are not here yet"),
        ("evo2_7b", "evo2_7b does without FP8, and has scales for it; its weights are not here yet"),
    ],
)
def test_checkpoint_that_is_not_here_yet(name, said, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    assert found_of("FP8 scales", run_doctor(model=name)).startswith(said)
