"""Vectors of a server are those of ``extract``, whatever shares their forward passes."""

from __future__ import annotations

import base64
import json
import random
import threading

import numpy as np
import pytest

import genoembed
from genoembed.errors import ConfigError, ModelError
from genoembed.serving.service import EmbeddingService
from tests.serving.conftest import MODEL, WIDTH, serving

DRAW = random.Random(5)
SEQUENCES = [
    *("".join(DRAW.choices("ACGT", k=length)) for length in (1, 7, 64, 65, 130, 333)),
    "acgtnnnnACGTryk",
    "ACGUUGCA",
    "ACGT ACGT\nTTGC",
    "ACGTACGTACGT",
    "ACGTACGTACGT",
]


def extracted(tmp_path, sequences=SEQUENCES, **options) -> np.ndarray:
    """Embed with files."""
    fasta = tmp_path / "in.fa"
    # a FASTA file has lines of its own
    fasta.write_text("".join(f">{number}\n{text}\n" for number, text in enumerate(sequences)))
    genoembed.extract(fasta, output=tmp_path / "out.h5", **{**MODEL, **options}, overwrite=True)
    with genoembed.open_embeddings(tmp_path / "out.h5") as file:
        return file.X[:]


def decoded(reply) -> np.ndarray:
    """Decode as OpenAI's client does."""
    return np.stack([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in reply["data"]])


def test_vectors_are_those_of_extract_in_both_encodings(served, tmp_path):
    expected = extracted(tmp_path, window=64, stride=48)
    as_base64 = decoded(served.embed(SEQUENCES, encoding_format="base64"))
    as_numbers = np.array([item["embedding"] for item in served.embed(SEQUENCES)["data"]])
    assert np.array_equal(as_numbers.astype(np.float32), as_base64)
    np.testing.assert_allclose(as_base64, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    assert as_base64.dtype == np.float32


@pytest.mark.parametrize(
    "options",
    [
        {"rc": "concat", "pooling": "max"},
        {"layers": [1, 3], "fusion": "concat", "rc": "mean", "skip_first": 3},
        {"layers": [1, 3], "fusion": "weighted", "fusion_weights": [0.25, 0.75], "pooling": "weighted_mean"},
        {"window": 32, "pooling": "last", "keep_case": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_vectors_are_those_of_extract_with_other_options(options, tmp_path):
    sequences = [text for text in SEQUENCES if len(text) > 4]
    expected = extracted(tmp_path, sequences, **options)
    with serving(**options) as served:
        found = decoded(served.embed(sequences, encoding_format="base64"))
        assert json.loads(served.ask("GET", "/v1/models")[2])["data"][0]["dimensions"] == expected.shape[1]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_a_vector_does_not_depend_on_who_else_asks(served):
    alone = {text: served.embed(text)["data"][0]["embedding"] for text in SEQUENCES}
    found: dict[int, list] = {}

    def ask(number: int) -> None:
        chosen = random.Random(number).sample(SEQUENCES, 4)
        found[number] = list(zip(chosen, served.embed(chosen)["data"], strict=True))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    before = served.server.service.stats.batches
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    for text, item in (pair for pairs in found.values() for pair in pairs):
        np.testing.assert_allclose(item["embedding"], alone[text], rtol=1e-5, atol=1e-4)
    # 48 sequences shared passes
    assert served.server.service.stats.batches - before < 48


def test_tokens_are_counted_without_the_overlap_of_windows(served):
    usage = served.embed(["A" * 130, "ACGT"])["usage"]
    assert usage == {"prompt_tokens": 134, "total_tokens": 134}


def test_single_sequence_is_a_list_of_one(served):
    reply = served.embed("ACGT", model="genoembed-mini", user="somebody", dimensions=WIDTH)
    assert reply["object"] == "list"
    assert [item["index"] for item in reply["data"]] == [0]
    assert reply["model"] == "genoembed-mini"


def test_normalize_and_transform_change_vectors_as_said(tmp_path):
    expected = extracted(tmp_path).astype(np.float64)
    genoembed.fit_transform(tmp_path / "out.h5", output=tmp_path / "center.h5")
    with serving(normalize=True, transform=tmp_path / "center.h5") as served:
        found = decoded(served.embed(SEQUENCES, encoding_format="base64"))
    centered = expected - expected.mean(axis=0)
    unit = centered / np.linalg.norm(centered, axis=1, keepdims=True)
    np.testing.assert_allclose(found, unit, atol=1e-5)
    other = EmbeddingService("genoembed-mini", transform=tmp_path / "center.h5", layers=3, dtype="float32")
    with pytest.raises(ConfigError, match="hold vectors of another kind"):
        other.start()
    other.close()


def test_several_layers_without_fusion_are_refused():
    with pytest.raises(ConfigError, match="layers give as many vectors per sequence, but a reply holds one"):
        EmbeddingService("genoembed-mini", layers="blocks.[12].mlp.l3")


def test_model_without_a_vector_for_a_trial_sequence_is_refused_at_once():
    service = EmbeddingService("genoembed-mini", layers=2, window=16, stride=16, skip_first=16)
    with pytest.raises(ModelError, match=r"trial.*nothing to pool"):
        service.start()
    service.close()


def test_name_of_a_folder_is_its_last_part(tmp_path):
    model = genoembed.load_model("genoembed-mini", dtype="float32")
    (tmp_path / "run" / "final").mkdir(parents=True)
    for folder, name in ((tmp_path, tmp_path.name), (tmp_path / "run" / "final", "run")):
        model.name = str(folder)
        assert EmbeddingService(model, layers=2).name == name
