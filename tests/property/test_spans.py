"""Words of bases against a slow oracle: windows, regions, pooling, spans, values of bases.

Four kinds of tokens: bytes, non-overlapping words, words of a learned vocabulary, words at every base. The
oracle splits each window into tokens letter by letter, runs it alone, and goes from base to base.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from genoembed.config.embed import embed_config
from genoembed.contracts import Batch, SequenceRecord
from genoembed.errors import UnreadError
from genoembed.models.load import load_model
from genoembed.pipeline.cutting import Cutter
from genoembed.pipeline.embedder import UnitEmbedder
from genoembed.pipeline.units import WorkUnit
from genoembed.store.reader import spread
from genoembed.tokenization.hf import build_encoder
from genoembed.tokenization.kmer import KmerTokenizer
from tests.by_hand import STRIPED, model_of, revcomp
from tests.tiny_models import build_config, build_six_mers, build_tiny

K = 3
LAYER = 1
KINDS = ("bytes", "six-mers", "learned", "overlapping")


@functools.cache
def model_of_kind(kind):
    if kind == "bytes":
        return model_of(STRIPED)
    folder = Path(tempfile.mkdtemp())
    if kind == "learned":
        build_tiny("gpt_neox", folder)
    elif kind == "six-mers":
        build_six_mers("bert", folder)
    else:
        kmers = ["".join(letters) for letters in itertools.product("ATCG", repeat=K)]
        tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *kmers]
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens))
        config = build_config("bert")
        config.vocab_size, config.pad_token_id = len(tokens), 0
        config.architectures = ["BertModel"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            AutoModel.from_config(config).save_pretrained(folder)
        KmerTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return load_model(str(folder), dtype="float32")


def slow_tokens(kind, text):
    """Return token ids, the bases of each (None for special tokens), and which are unread."""
    tokenizer = model_of_kind(kind).tokenizer
    if kind == "bytes":
        return list(text.encode()), [(at, at + 1) for at in range(len(text))], [False] * len(text)
    vocabulary = tokenizer.get_vocab()
    words = []
    if kind == "overlapping":
        words = [(at, at + K) for at in range(len(text) - K + 1)]
    elif kind == "learned":
        position = 0
        for word in tokenizer.tokenize(text):
            words.append((position, position + len(word)))
            position += len(word)
        assert position == len(text)
    else:
        position = 0
        while position < len(text):
            is_word = len(text) - position >= 6 and set(text[position : position + 6]) <= set("ACGT")
            words.append((position, position + (6 if is_word else 1)))
            position = words[-1][1]
    unknown = vocabulary[tokenizer.unk_token]
    ids = [vocabulary.get(text[start:end], unknown) for start, end in words]
    unread = [index == unknown for index in ids]
    if kind == "learned":
        return ids, words, unread
    first, last = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    return [first, *ids, last], [None, *words, None], [False, *unread, False]


def slow_states(kind, ids):
    """Run a window alone."""
    model = model_of_kind(kind)
    ids_BL = torch.tensor([ids])
    ones = torch.ones_like(ids_BL)
    batch = Batch(input_ids=ids_BL, attention_mask=ones, pool_mask=ones.bool(), rows=(0,))
    path = model.resolve(LAYER)[0].path
    return model.forward(batch, [path])[path][0].double().numpy()


def slow_windows(kind, sequence, windows, skip_first):
    """For each window, its tokens that count as (state, span within the core, unread), and its bases."""
    for window in windows:
        ids, spans, unread = slow_tokens(kind, sequence[window.start : window.end])
        core = range(max(window.core_start, window.start + skip_first), window.core_end)
        states = slow_states(kind, ids)
        tokens = [
            (state, set(range(window.start + span[0], window.start + span[1])), is_unread)
            for state, span, is_unread in zip(states, spans, unread, strict=True)
            if span is not None
        ]
        bases = {}
        for base in core:
            covering = [state for state, mine, _ in tokens if base in mine]
            if covering:
                bases[base] = np.mean(covering, axis=0)
        num_unread = sum(not any(base in mine and not lost for _, mine, lost in tokens) for base in core)
        counted = [(state, sorted(mine & set(core))) for state, mine, _ in tokens if mine & set(core)]
        yield counted, bases, num_unread, len(core)


def slow_row(kind, record, cutter, pooling, skip_first):
    """Pool one strand, and count what cannot be read of how much."""
    parts = list(slow_windows(kind, record.sequence.decode(), cutter.windows(record), skip_first))
    tokens = [token for counted, *_ in parts for token in counted]
    bases = {base: value for _, mine, *_ in parts for base, value in mine.items()}
    assert len(bases) == sum(len(mine) for _, mine, *_ in parts), "a base counts in two windows"
    unread, total = (sum(part[index] for part in parts) for index in (2, 3))
    if not tokens:
        return None, tokens, bases, unread, total
    states = [state for state, _ in tokens]
    if pooling == "mean":
        return np.mean(list(bases.values()), axis=0), tokens, bases, unread, total
    chosen = {"max": lambda: np.max(states, axis=0), "first": lambda: states[0], "last": lambda: states[-1]}
    return chosen.get(pooling, lambda: None)(), tokens, bases, unread, total


@st.composite
def records(draw, kind):
    letters = st.sampled_from("ACGT" * 6 + "N")
    sequence = "".join(draw(st.lists(letters, min_size=1, max_size=70)))
    start = draw(st.integers(0, len(sequence) - 1))
    end = draw(st.sampled_from([start + 1, len(sequence)]) | st.integers(start + 1, len(sequence)))
    return SequenceRecord(id="x", sequence=sequence.encode(), core_start=start, core_end=end)


@st.composite
def settings_of(draw, kind):
    frame = 6 if kind == "six-mers" else 1
    window = draw(st.none() | st.integers(max(frame, K), 40))
    stride = None if window is None else draw(st.none() | st.integers(frame, window))
    poolings = ["mean", "max", "last"] + (["first"] if kind in ("six-mers", "overlapping") else [])
    return {
        "window": window,
        "stride": stride,
        "skip_first": draw(st.sampled_from([0, 0, 0, 2])),
        "pooling": draw(st.sampled_from(poolings)),
    }


def run(kind, record, **options):
    """Embed a record with others in its batches."""
    given_options = {name: value for name, value in options.items() if value is not None}
    config = embed_config({"inputs": ("a.fa",), "layers": (LAYER,), "on_error": "skip", **given_options})
    other = SequenceRecord(id="other", sequence=b"ACGTTGCAAGCTTACGATCGATCA" * 2)
    embedder = UnitEmbedder(model_of_kind(kind), config)
    return embedder, embedder(WorkUnit(number=0, records=(other, record)))


def slow_cutter(kind, window=None, stride=None):
    model = model_of_kind(kind)
    return Cutter(
        encoder=build_encoder(model.tokenizer),
        max_tokens=model.max_length,
        is_causal=model.is_causal,
        window=window,
        stride=stride,
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_pooled_vectors_count_every_base_once(kind, data):
    record = data.draw(records(kind))
    options = data.draw(settings_of(kind))
    cutter = slow_cutter(kind, options["window"], options["stride"])
    check_windows(record, cutter, options)
    expected, _, _, unread, total = slow_row(kind, record, cutter, options["pooling"], options["skip_first"])
    _, found = run(kind, record, **options)
    row, vector = found.block.rows[1], next(iter(found.block.matrices.values()))[1]
    assert row.unread == unread
    if unread * 2 > total or expected is None:
        assert found.record.failed == {"x": "unread" if unread * 2 > total else "nothing to pool"}
        return
    assert not found.record.failed
    np.testing.assert_allclose(vector, expected, atol=2e-5)


def check_windows(record, cutter, options):
    frame, windows = cutter.encoder.frame_bp, cutter.windows(record)
    bases = [base for window in windows for base in range(window.core_start, window.core_end)]
    assert bases == list(range(record.core_start, record.core_end))
    for window in windows:
        assert window.start % frame == 0
        assert window.end % frame == 0 or window.end == len(record.sequence)
        assert window.core_end % frame == 0 or window.core_end == record.core_end
        if options["window"] is not None:
            assert window.end - window.start <= options["window"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_both_strands_count_every_base_once(kind, data):
    record = data.draw(records(kind))
    options = data.draw(settings_of(kind)) | {"skip_first": 0}
    cutter = slow_cutter(kind, options["window"], options["stride"])
    length = len(record.sequence)
    turned = SequenceRecord(
        id="x",
        sequence=revcomp(record.sequence.decode()).encode(),
        core_start=length - record.core_end,
        core_end=length - record.core_start,
    )
    rows = [slow_row(kind, strand, cutter, options["pooling"], 0) for strand in (record, turned)]
    _, found = run(kind, record, rc="mean", **options)
    if found.record.failed:
        assert rows[0][3] * 2 > rows[0][4]
        return
    vector = next(iter(found.block.matrices.values()))[1]
    np.testing.assert_allclose(vector, (rows[0][0] + rows[1][0]) / 2, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_tokens_have_their_spans_and_bases_their_values(kind, data):
    record = data.draw(records(kind))
    options = data.draw(settings_of(kind)) | {"pooling": "none", "skip_first": 0}
    cutter = slow_cutter(kind, options["window"], options["stride"])
    _, tokens, bases, unread, total = slow_row(kind, record, cutter, "none", 0)
    _, found = run(kind, record, **options)
    if unread * 2 > total:
        assert found.record.failed == {"x": "unread"}
        assert found.block.lengths[1] == 0
        return
    first = int(found.block.lengths[0])
    values, spans = next(iter(found.block.values.values()))[first:], found.block.spans[first:]
    np.testing.assert_allclose(values, [state for state, _ in tokens], atol=2e-5)
    assert spans.tolist() == [
        [mine[0] - record.core_start, mine[-1] + 1 - record.core_start] for _, mine in tokens
    ]
    of_bases = spread(values, spans)
    assert (of_bases.bases + record.core_start).tolist() == sorted(bases)
    np.testing.assert_allclose(of_bases.values, [bases[base] for base in sorted(bases)], atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_region_shorter_than_a_word(kind):
    record = SequenceRecord(id="x", sequence=b"ACGTTGCAAGCTTACGATCG", core_start=8, core_end=9)
    expected, _, bases, *_ = slow_row(kind, record, slow_cutter(kind), "mean", 0)
    _, found = run(kind, record)
    assert list(bases) == [8]
    np.testing.assert_allclose(next(iter(found.block.matrices.values()))[1], expected, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "sequence", "why"),
    [
        ("overlapping", b"NNNNNNNNNNACG", "10 of 13 bases cannot be read .* has no N"),
        ("overlapping", b"AC", "2 of 2 bases .* holds words of 3 letters only, and the sequence has 2"),
        ("overlapping", b"acgtacgt", "8 of 8 bases .* they are in lower case"),
        ("six-mers", b"RYRYRYRACGT", "7 of 11 bases .* has no R, Y"),
    ],
)
def test_record_that_cannot_be_read_is_refused_with_the_reason(kind, sequence, why):
    config = embed_config({"inputs": ("a.fa",), "layers": (LAYER,)})
    unit = WorkUnit(number=0, records=(SequenceRecord(id="x", sequence=sequence),))
    with pytest.raises(UnreadError, match=why):
        UnitEmbedder(model_of_kind(kind), config)(unit)
