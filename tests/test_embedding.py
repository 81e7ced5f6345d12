"""``embed``: vectors of sequences in memory, equal to those that ``extract`` writes."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import pyarrow
import pytest
from Bio.Seq import MutableSeq, Seq
from Bio.SeqRecord import SeqRecord

from genoembed import SequenceRecord, embed, extract, load_model, open_embeddings
from genoembed.errors import AlphabetError, ConfigError, EmptyRecordError
from genoembed.sklearn import SequenceEmbedder
from tests.tiny_models import build_tiny

SEQUENCES = ["ACGTACGTTT", "acgu", "GGGATTTACCCNA", "T"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(build_tiny("bert", tmp_path_factory.mktemp("embed") / "bert"))


def test_embed_equals_extract(bert, tmp_path):
    text = "".join(f">{index}\n{sequence}\n" for index, sequence in enumerate(SEQUENCES))
    (tmp_path / "a.fa").write_text(text)
    options = {"layers": (0, -1), "pooling": "max", "rc": "mean", "dtype": "float32"}
    extract(tmp_path / "a.fa", model=bert, output=tmp_path / "a.h5", **options)
    found = embed(SEQUENCES, model=bert, **options)
    with open_embeddings(tmp_path / "a.h5") as file:
        assert list(found.matrices) == list(found.layers) == file.layers
        for layer in file.layers:
            np.testing.assert_array_equal(found.matrices[layer], file[layer][:])
        assert list(found.feature_names) == file.feature_names
    np.testing.assert_array_equal(found.X, found.matrices[found.layers[0]])


def test_embed_takes_bytes_records_and_a_loaded_model(bert):
    model = load_model(bert, dtype="float32")
    records = [SequenceRecord(id="same", sequence=b"ACGT"), b"acgt", "ACGU"]
    found = embed(records, model=model, layers=1)
    assert found.X.dtype == np.float32
    assert (found.X == found.X[0]).all()
    assert found.X.any()


@pytest.mark.parametrize(
    ("sequences", "options", "error", "problem"),
    [
        ([], {}, EmptyRecordError, "sequences: there are none"),
        (["ACGT", ""], {}, EmptyRecordError, "record '1': has no bases"),
        (["ACGT", "AJG"], {}, AlphabetError, "record '1': 'J' at position 2"),
        (["ACé"], {}, AlphabetError, "record '0': .* at position 3"),
        (["ACGT", float("nan")], {}, ConfigError, r"sequences\[1\] is float, expected letters"),
        (["ACGT", None], {}, ConfigError, r"sequences\[1\] is NoneType, expected letters"),
        (["AC"], {"pooling": "none"}, ConfigError, "several vectors a sequence"),
        (["AC"], {"per_window": True, "window": 8}, ConfigError, "several vectors a sequence"),
        (["AC"], {"output": "a.h5"}, ConfigError, "output: for files, and there are none here"),
        (["AC"], {"invalid": "skip"}, ConfigError, "invalid and empty cannot be 'skip' here"),
        (["AC"], {"poling": "max"}, ConfigError, "'poling' is not an option; did you mean 'pooling'"),
    ],
)
def test_embed_refuses(sequences, options, error, problem, bert):
    with pytest.raises(error, match=problem):
        embed(sequences, model=bert, **options)


ONE = "sequences is one sequence, expected a list of them; put it into a list"
LETTERS = "ACGTTGCA"
NOT_A_LIST = {
    "str": (LETTERS, ONE),
    "bytes": (LETTERS.encode(), ONE),
    "bytearray": (bytearray(LETTERS, "ascii"), ONE),
    "Seq": (Seq(LETTERS), ONE),
    "MutableSeq": (MutableSeq(LETTERS), ONE),
    "SeqRecord": (SeqRecord(Seq(LETTERS), id="a"), ONE),
    "SequenceRecord": (SequenceRecord(id="a", sequence=LETTERS.encode()), ONE),
    "dict": ({"KRAS": LETTERS}, "is a dict, which has names and sequences"),
    "mapping": (MappingProxyType({"KRAS": LETTERS}), "is a mappingproxy, which has names and sequences"),
    "set": ({LETTERS}, "is a set, which has no order for the rows"),
    "data frame": (pd.DataFrame({"ACGT": [LETTERS]}), r"has shape \(1, 1\), expected \(N,\)"),
    "Arrow table": (pyarrow.table({"ACGT": [LETTERS]}), r"has shape \(1, 1\), expected \(N,\)|is a Table"),
    "scalar array": (np.array(LETTERS), r"has shape \(\), expected \(N,\)"),
    "column": (np.array([[LETTERS]]), r"has shape \(1, 1\), expected \(N,\)"),
    "None": (None, "is NoneType, expected a list of sequences"),
    "path": (Path("a.fa"), "is PosixPath, expected a list of sequences"),
    "letterless": ([Seq(None, 8)], r"sequences\[0\] has a length but no letters"),
}


@pytest.mark.parametrize("kind", NOT_A_LIST)
def test_what_is_no_list_of_sequences_is_refused_rather_than_gone_through(kind, bert):
    sequences, problem = NOT_A_LIST[kind]
    with pytest.raises(ConfigError, match=problem):
        embed(sequences, model=bert)
    with pytest.raises(ConfigError, match=problem.replace("sequences is", "X is")):
        SequenceEmbedder(bert).fit(sequences)


def test_lists_of_every_kind_give_the_same_rows(bert):
    model, pair = load_model(bert, dtype="float32"), [LETTERS, LETTERS[::-1]]
    expected = embed(pair, model=model).X
    lists = (
        tuple(pair),
        iter(pair),
        dict(enumerate(pair)).values(),
        np.array(pair),
        pd.Series(pair, index=["x", "y"]),
        [letters.encode() for letters in pair],
        [Seq(letters) for letters in pair],
        [MutableSeq(letters) for letters in pair],
        [SeqRecord(Seq(letters), id="same") for letters in pair],
        [bytearray(letters, "ascii") for letters in pair],
    )
    for sequences in lists:
        np.testing.assert_array_equal(embed(sequences, model=model).X, expected)


def test_embed_refuses_loading_options_of_a_loaded_model(bert):
    with pytest.raises(ConfigError, match="dtype: the model is loaded already"):
        embed(["AC"], model=load_model(bert), dtype="float32")
