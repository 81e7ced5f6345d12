"""Whatever way records are written they are read back; whatever bytes are read, nothing foreign is raised."""

import bz2
import gzip
import lzma
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from genoembed.contracts import SequenceRecord
from genoembed.errors import GenoembedError
from genoembed.pipeline.cutting import iter_windows
from genoembed.sequences import DNA_IUPAC, compression, read_sequences

CASES = Path(__file__).parents[1] / "data" / "sequences"
SEEDS = sorted(path.read_bytes() for path in CASES.iterdir() if path.is_file())
PACKERS = (bytes, gzip.compress, bz2.compress, lzma.compress, zstandard.compress)
WORDS = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=12)
RECORDS = st.lists(
    st.tuples(
        WORDS,
        st.lists(WORDS, max_size=3).map(" ".join),
        st.text(DNA_IUPAC.decode(), min_size=1, max_size=200),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda record: record[0],
)
IN_TMP = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def wrap(sequence, width, end):
    return end.join(sequence[i : i + width] for i in range(0, len(sequence), width))


@st.composite
def layouts(draw):
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    width = draw(st.integers(1, 250))
    blank = draw(st.sampled_from(["", end, " " + end]))
    return end, width, blank, draw(st.booleans())


@pytest.fixture(params=[7, 64, 1 << 20], ids=lambda size: f"blocks-of-{size}")
def small_blocks(request, monkeypatch):
    monkeypatch.setattr(compression, "BLOCK_BYTES", request.param)


@IN_TMP
@given(records=RECORDS, layout=layouts(), pack=st.sampled_from(PACKERS), cut=st.integers(0, 500))
def test_fasta_in_any_layout_and_compression_is_read_back(tmp_path, small_blocks, records, layout, pack, cut):
    end, width, blank, ends_well = layout
    text = blank.join(f">{name} {more}{end}{wrap(seq, width, end)}{end}" for name, more, seq in records)
    raw = text.encode()[: None if ends_well else -len(end)]
    path = tmp_path / "input"
    path.write_bytes(pack(raw[:cut]) + (pack(raw[cut:]) if raw[cut:] else b""))
    found = [(r.id, r.description, r.sequence.decode()) for r in read_sequences(path)]
    assert found == records


@IN_TMP
@given(records=RECORDS, layout=layouts(), pack=st.sampled_from(PACKERS), quality=st.data())
def test_fastq_in_any_layout_is_read_back(tmp_path, small_blocks, records, layout, pack, quality):
    end, width, blank, _ = layout
    rows = []
    for name, more, seq in records:
        scores = quality.draw(st.text("!@+>I~;", min_size=len(seq), max_size=len(seq)))
        rows.append(f"@{name} {more}{end}{wrap(seq, width, end)}{end}+{end}{wrap(scores, width, end)}{end}")
    path = tmp_path / "input"
    path.write_bytes(pack(blank.join(rows).encode()))
    assert [(r.id, r.description, r.sequence.decode()) for r in read_sequences(path)] == records


@pytest.mark.parametrize("name", ["tiny.gb", "tiny.embl", "ok.fa"])
def test_small_blocks_change_nothing(small_blocks, name):
    records = list(read_sequences(CASES / name))
    assert records
    assert all(record.sequence for record in records)


OPTIONS = st.fixed_dictionaries(
    {
        "invalid": st.sampled_from(["error", "skip", "mask"]),
        "duplicates": st.sampled_from(["error", "suffix"]),
        "empty": st.sampled_from(["error", "skip"]),
        "gaps": st.sampled_from(["error", "strip"]),
        "keep_case": st.booleans(),
    }
)


@st.composite
def damaged_files(draw):
    """A real file with a few bytes changed, taken out or put in."""
    content = bytearray(draw(st.sampled_from([seed for seed in SEEDS if len(seed) < 5000])))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(content)))
        content[at : at + draw(st.integers(0, 9))] = draw(st.binary(max_size=4))
    return bytes(content)


@settings(IN_TMP, max_examples=400)
@given(
    content=damaged_files()
    | st.binary(max_size=300)
    | st.builds(
        bytes.__add__, st.sampled_from([b">", b"@", b">a\n", b"@a\n", b";", b"LOCUS  "]), st.binary()
    ),
    options=OPTIONS,
)
@example(content=b"\x1f\x8b", options={})
@example(content=b">\xff", options={})
@example(content=b"LOCUS ", options={})
@example(content=b"ID   ;\n", options={})
def test_any_bytes_give_records_or_our_own_error(tmp_path, content, options):
    path = tmp_path / "input"
    path.write_bytes(content)
    message = str(path)
    try:
        records = list(read_sequences(path, **options))
    except GenoembedError as error:
        records, message = [], str(error)
    assert str(path) in message
    allowed = set(DNA_IUPAC + DNA_IUPAC.lower()) if options.get("keep_case") else set(DNA_IUPAC)
    assert len({record.id for record in records}) == len(records)
    for record in records:
        assert isinstance(record, SequenceRecord)
        assert record.sequence
        assert set(record.sequence) <= allowed
        cores = [(w.core_start, w.core_end) for w in iter_windows(len(record.sequence), window_bp=5)]
        assert sum(end - start for start, end in cores) == len(record.sequence)


@settings(IN_TMP, max_examples=200)
@given(
    rows=st.binary(max_size=80)
    | st.lists(
        st.lists(
            st.sampled_from(
                ["chr1", "chr2", "0", "5", "11", "-3", "1e3", "9" * 30, "٣", ".", "+", "-", "ID=a", ""]
            ),
            max_size=10,
        ).map("\t".join),
        max_size=4,
    ).map(lambda lines: "\n".join(lines).encode())
)
def test_any_region_file_gives_records_or_our_own_error(tmp_path, rows):
    reference = tmp_path / "ok.fa"
    reference.write_bytes((CASES / "ok.fa").read_bytes())
    path = tmp_path / "rows"
    path.write_bytes(rows)
    message = str(path)
    try:
        records = list(read_sequences(reference, regions=path, duplicates="suffix", flank=3))
    except GenoembedError as error:
        records, message = [], str(error)
    assert str(path) in message
    assert all(record.core_end > record.core_start for record in records)
