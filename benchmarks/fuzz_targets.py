"""One target for every reader of what users hand in: bytes in, records or a ``GenoembedError`` out.

A target takes bytes, lays them down as the file that a reader expects and reads all of it. Whatever it raises
besides a ``GenoembedError`` is a finding. Where there is a second way to the same answer (other block sizes,
another decompressor), the target compares both. ``benchmarks/fuzz.py`` runs them, and so do the tests.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import resource
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from genoembed.errors import GenoembedError, InputError, StoreFormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LENIENT = {"invalid": "mask", "gaps": "strip", "duplicates": "suffix", "empty": "skip"}
DNA = b"ACGTNRYSWKMBDHV"


class TrialFailedError(StoreFormatError):
    """A file that would have taken the process with it."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A reader to be tried."""

    name: str
    run: Callable[[bytes, Path], None]
    """Reads bytes, with a private folder for files."""
    corpus: str = ""
    """Folder of the seeds, below ``tests/fuzz/corpus``; empty where ``fuzz.py`` makes them."""
    tokens: tuple[bytes, ...] = ()
    """Pieces of the format, for mutation."""
    share: float = 1.0
    """Executions, relative to the other targets: less where each is slow."""


def outcome_of(target: Target, content: bytes, folder: Path) -> str:
    """Run a target once.

    Args:
        target: The reader.
        content: What it reads.
        folder: For its files.

    Returns:
        ``records``, or the name of the ``GenoembedError``.

    Raises:
        Exception: What a reader must never raise.
    """
    try:
        target.run(content, folder)
    except GenoembedError as error:
        if not str(error).strip() or "\n" in str(error):
            message = f"expected one line, found {error!r}"
            raise AssertionError(message) from error
        return type(error).__name__
    return "records"


def _put(folder: Path, name: str, content: bytes) -> str:
    path = folder / name
    path.write_bytes(content)
    return str(path)


def _policies(content: bytes) -> dict[str, str]:
    """Half of the inputs are read strictly, half leniently, to get past the first odd letter."""
    return {} if content[-1:] and content[-1] % 2 else LENIENT


# ------------------------------------------------------------------------------------------------ sequences


def _sequences(content: bytes, folder: Path) -> None:
    from genoembed.sequences import InputCounts, read_sequences

    counts = InputCounts()
    path = _put(folder, "input", content)
    ids = set()
    bases = 0
    for record in read_sequences(path, counts=counts, **_policies(content)):
        assert record.id, "an id is empty"
        assert record.id not in ids, f"id {record.id!r} twice"
        assert not record.sequence.translate(None, DNA), f"not DNA: {record.sequence[:50]!r}"
        assert record.sequence, "a record without bases"
        ids.add(record.id)
        bases += len(record.sequence)
    assert (len(ids), bases) == (counts.records, counts.bases), f"miscounted: {counts}"


def _any_blocks(parser: str) -> Callable[[bytes, Path], None]:
    """Read through the door, and again in blocks of a few bytes: the outcome must be the same."""

    def run(content: bytes, folder: Path) -> None:
        from genoembed.sequences import formats as fasta

        parse = getattr(fasta, parser)
        mark = {"iter_fasta": (b">", b";"), "iter_fastq": (b"@",)}[parser]
        if content.startswith(mark):
            size = 1 + (zlib.crc32(content) % 37)
            pieces = [content[start : start + size] for start in range(0, len(content), size)]
            with mock.patch.object(fasta, "_MAX_HEADER_BYTES", 64):  # so that small inputs reach it
                whole = _parsed(parse, [content])
                assert _parsed(parse, pieces) == whole, f"blocks of {size} bytes read differently"
        _sequences(content, folder)

    return run


def _parsed(parse: Callable[..., Iterator], blocks: list[bytes]) -> list[object]:
    from genoembed.sequences.compression import WHITESPACE, iter_text_blocks

    found: list[object] = []
    try:
        for record in parse("f", iter_text_blocks(iter(blocks))):
            body = b"".join(raw for raw, _ in record.body).translate(None, WHITESPACE)
            found.append((record.id, record.description, record.line, body))
    except InputError as error:
        found.append((type(error), error.line))
    return found


def _compressed(content: bytes, folder: Path) -> None:
    from genoembed.sequences.compression import iter_decompressed

    found = b"".join(iter_decompressed(_put(folder, "input", content)))
    if content.startswith(b"\x1f\x8b"):
        try:
            expected = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            message = f"gzip refuses what was read: {error}"
            raise AssertionError(message) from error
        assert found == expected, "gzip reads something else"


def _intervals(content: bytes, folder: Path) -> None:
    from genoembed.sequences.annotation import iter_features

    for feature in iter_features(_put(folder, "rows", content)):
        for start, end, _ in feature.parts:
            assert 0 <= start < end, f"not an interval: {feature}"


def _regions(content: bytes, folder: Path) -> None:
    from genoembed.sequences import read_sequences

    reference = folder / "reference.fa"
    if not reference.exists():
        reference.write_bytes(b">chr1 a\n" + b"ACGTACGTAC\n" * 30 + b">chr2\n" + b"GGGTTTAAAC\n" * 2)
    rows = _put(folder, "rows", content)
    options = {**_policies(content), "duplicates": "suffix"}
    for record in read_sequences(str(reference), regions=rows, flank=len(content) % 7, **options):
        assert record.core_end - record.core_start == record.end - record.start, f"wrong core: {record}"


def _reference(content: bytes, folder: Path) -> None:
    """A FASTA and, after ``@@INDEX@@``, its index: both from a stranger."""
    from genoembed.sequences import read_sequences

    text, mark, index = content.partition(b"@@INDEX@@")
    suffix = ".fa.gz" if text.startswith(b"\x1f\x8b") else ".fa"
    for old in folder.glob("hostile*"):
        old.unlink()
    path = _put(folder, f"hostile{suffix}", text)
    if mark:
        _put(folder, f"hostile{suffix}.fai", index)
    list(read_sequences(path, regions=["chr1:1-7", "a:2-5(-)"], duplicates="suffix"))


def _contigs(content: bytes, folder: Path) -> None:
    """One file, two readers: regions have the letters that reading the whole file gives."""
    from genoembed.sequences import read_sequences

    path = _put(folder, "contigs.fa", content)
    whole = {}
    for record in read_sequences(path, **LENIENT | {"gaps": "error"}):
        whole[record.id] = record.sequence
    for name, letters in whole.items():
        if "_" in name:  # perhaps a duplicate, which is an error where regions are looked up
            continue
        start = zlib.crc32(content) % len(letters)
        end = start + 1 + zlib.crc32(letters) % (len(letters) - start)
        (found,) = read_sequences(path, regions=f"{name}:{start + 1}-{end}", **LENIENT | {"gaps": "error"})
        assert found.sequence == letters[start:end], f"{name}:{start + 1}-{end} is another stretch"


def _variants(content: bytes, folder: Path) -> None:
    from genoembed.sequences.variants import VariantCounts, read_variants

    reference = folder / "variants.fa"
    if not reference.exists():
        reference.write_bytes(b">chr1 a\n" + b"ACGTACGTAC\n" * 13 + b">chr2\nGGGTTTNNAAC\n")
    counts = VariantCounts()
    vcf = _put(folder, "calls.vcf", content)
    contexts = list(read_variants(vcf, str(reference), flank=3, counts=counts, check_first=True))
    assert len(contexts) == counts.alleles, f"miscounted: {counts}"
    for context in contexts:
        both = context.ref_sequence + context.alt_sequence
        assert not both.translate(None, DNA), f"not DNA: {both!r}"


def _bgzip(content: bytes, folder: Path) -> None:
    """What ends as BGZF is read only if its last block is empty, and as gzip reads it."""
    from genoembed.sequences.compression import is_bgzip

    _compressed(content, folder)
    last, plain = b"", b""
    while content.startswith(b"\x1f\x8b"):
        decoder, last = zlib.decompressobj(31), content
        plain, content = decoder.decompress(content), decoder.unused_data.lstrip(b"\0")
    assert not is_bgzip(last[:18]) or not plain, "BGZF without its end block was read"


_END_BLOCK = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


# --------------------------------------------------------------------------------------------------- tables


def _table(content: bytes, folder: Path) -> None:
    from genoembed.config.labeled import LabeledConfig
    from genoembed.finetuning.labeled import iter_labeled
    from genoembed.sequences.tables import iter_rows

    path = _put(folder, "rows", content)
    for row in iter_rows(path):
        assert row.values is not None
    kind = ("class", "multilabel", "regression", "token")[len(content) % 4]
    delimiter = "|" if kind == "multilabel" else None
    list(iter_labeled(path, config=LabeledConfig(kind=kind, label_delimiter=delimiter)))


def _label_table(content: bytes, folder: Path) -> None:
    from genoembed.finetuning.labeled import iter_labeled

    sequences = folder / "two.fa"
    if not sequences.exists():
        sequences.write_bytes(b">a\nACGT\n>b\nGG\n")
    list(iter_labeled(str(sequences), labels=_put(folder, "labels", content)))


def _pairs(content: bytes, folder: Path) -> None:
    from genoembed.finetuning.pairs import read_pairs

    for example in read_pairs(_put(folder, "pairs.jsonl", content)):
        assert example.query, "an empty query"


# --------------------------------------------------------------------------------------------- configurations


def _run_config(content: bytes, folder: Path) -> None:
    from genoembed.config.pretrain import train_config

    suffix = ".json" if content.lstrip()[:1] in (b"{", b"[") else ".toml"
    json.dumps(train_config({}, file=_put(folder, f"run{suffix}", content)).to_dict(), default=str)


def _finetune_config(content: bytes, folder: Path) -> None:
    from genoembed.config.finetune import finetune_config

    suffix = ".json" if content.lstrip()[:1] in (b"{", b"[") else ".toml"
    finetune_config({}, file=_put(folder, f"run{suffix}", content)).to_flat()


def _vortex_config(content: bytes, folder: Path) -> None:
    from genoembed.models.striped_hyena2.convert import read_vortex_config

    read_vortex_config(Path(_put(folder, "config.yml", content)))


# ---------------------------------------------------------------------------------------------- model folders


def _facts(content: bytes, folder: Path) -> None:
    from genoembed.models.trained_folder import FACTS_FILE, read_finetuned

    _put(folder, FACTS_FILE, content)
    read_finetuned(folder)


def _model_card(content: bytes, folder: Path) -> None:
    from genoembed.models.provenance import read_license

    _put(folder, "README.md", content)
    assert read_license(folder)


def _weights(suffix: str) -> Callable[[bytes, Path], None]:
    def run(content: bytes, folder: Path) -> None:
        from genoembed.models.striped_hyena2.convert import read_tensors

        path = Path(_put(folder, f"weights{suffix}", content))
        for read in read_tensors(path, path=path).values():
            assert read().ndim >= 0

    return run


def _heads(content: bytes, folder: Path) -> None:
    from genoembed.models.trained_folder import HEADS_FILE, read_heads

    _put(folder, HEADS_FILE, content)
    read_heads(folder, "pooler")


def _model_config(content: bytes, folder: Path) -> None:
    from genoembed.models.architecture import read_config
    from genoembed.models.registry import ModelSource

    _put(folder, "config.json", content)
    source = ModelSource(name="fuzzed", location=str(folder), is_local=True)
    read_config(source, {"trust_remote_code": False})


def _model_build(content: bytes, folder: Path) -> None:
    """Build a small model with weights of its own from a stranger's configuration."""
    from genoembed.models.describe import describe_layers
    from genoembed.models.load import load_model
    from tests.tiny_models import build_tiny

    model = folder / "built"
    if not model.exists():
        build_tiny("bert", model)
    _put(model, "config.json", content)
    load = load_model if zlib.crc32(content) % 2 else describe_layers
    load(str(model))


# ------------------------------------------------------------------------------------------------- embeddings


def _embeddings(content: bytes, folder: Path) -> None:
    """As ``open_embeddings`` and every way to read do, with a fork for the child process: quicker."""
    from genoembed.store import seal
    from genoembed.store.reader import open_embeddings

    seal.check_in_child = _trial
    with open_embeddings(_put(folder, "vectors.h5", content)) as embeddings:
        _read_all(embeddings)


def _trial(path: Path) -> None:
    """What ``check_in_child`` does, of a process with one thread and less time."""
    from genoembed.store.seal import walk

    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
            walk(path)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if status:
        problem = f"HDF5 crashed or hung (status {status})"
        raise TrialFailedError(problem, path=str(path))


def _read_all(embeddings: object) -> None:
    embeddings.ids  # noqa: B018
    embeddings.provenance  # noqa: B018
    embeddings.feature_names  # noqa: B018
    for name in embeddings.obs:
        embeddings.obs[name]
    for name in embeddings.layers:
        embeddings[name][:]


def _transform_file(content: bytes, folder: Path) -> None:
    """As every command that takes a transform does; half of the time without its seal, so HDF5 reads it."""
    import numpy as np

    from genoembed.pipeline.embedding_file import load_transform
    from genoembed.store import seal

    seal.check_in_child = _trial
    if zlib.crc32(content) % 2 and content.endswith(b"genoembed-seal-1"):
        content = content[:-64]
    found = load_transform(_put(folder, "transform.h5", content)).transform
    assert found.apply(np.ones((2, found.input_width), np.float32)).shape == (2, found.output_width)


SECRET = b"what only the owner of this machine may read, in a file of its own"


def _storage(content: bytes, folder: Path) -> None:
    """Each byte changes a sound file in one strange way; nothing of another file may ever come out."""
    import h5py

    from genoembed.store import seal
    from genoembed.store.reader import open_embeddings
    from tests.store.blocks import pooled_block, write_file

    seal.check_in_child = str  # no trial: what is made here is strange, not damaged
    sound, secret, other = folder / "sound.h5", folder / "secret", folder / "other.h5"
    if not other.exists():
        write_file(sound, pooled_block(["a", "b"], ("l", "m")))
        secret.write_bytes(SECRET)
        with h5py.File(other, "w") as hdf5:
            hdf5["X"] = [[float(byte) for byte in SECRET[:4]]] * 2
            hdf5["text"] = [SECRET, SECRET]
    path = folder / "strange.h5"
    path.write_bytes(sound.read_bytes())
    with h5py.File(path, "r+") as hdf5:
        for place, change in zip(content[:12:2], content[1:12:2], strict=False):
            with contextlib.suppress(ValueError, RuntimeError, OSError, KeyError, TypeError):
                _STRANGE[change % len(_STRANGE)](hdf5, _PLACES[place % len(_PLACES)], secret)
    with open_embeddings(path, untrusted=bool(content[-1:] and content[-1] % 2)) as embeddings:
        found = [embeddings.ids, embeddings.provenance, embeddings.feature_names]
        found += [embeddings.obs[name].tolist() for name in embeddings.obs]
        values = [embeddings[name][:] for name in embeddings.layers]
    text = repr(found).encode() + b"".join(value.tobytes() for value in values)
    assert SECRET[:8] not in text, "text of another file was shown"
    assert not any((value[:, :4] == list(SECRET[:4])).all() for value in values), "numbers of another file"


_PLACES = (
    "X", "obs", "obs/_index", "obs/description", "obs/length", "obs/strand/codes", "obs/source/categories",
    "obsm", "obsm/m", "var", "var/_index", "uns", "uns/genoembed", "uns/genoembed/provenance_json",
    "uns/more", "/",
)  # fmt: skip


def _replaced(hdf5: Any, place: str) -> tuple[tuple[int, ...], Any]:
    """Take a data set away, and tell what it was like."""
    shape, dtype = (2,), None
    if place in hdf5:
        shape, dtype = getattr(hdf5[place], "shape", shape), getattr(hdf5[place], "dtype", dtype)
        del hdf5[place]
    return shape, "S20" if dtype is None or dtype.kind == "O" else dtype


def _made_external(hdf5: Any, place: str, secret: Path) -> None:
    shape, dtype = _replaced(hdf5, place)
    hdf5.create_dataset(place, shape, dtype, external=[(str(secret), 0, 2**40)])


def _made_virtual(hdf5: Any, place: str, secret: Path) -> None:
    import h5py

    shape, dtype = _replaced(hdf5, place)
    layout = h5py.VirtualLayout(shape, dtype)
    layout[:] = h5py.VirtualSource(
        str(secret.with_name("other.h5")), "X" if len(shape) == 2 else "text", shape
    )
    hdf5.create_virtual_dataset(place, layout)


def _linked(kind: str, to: str) -> Callable[[Any, str, Path], None]:
    def change(hdf5: Any, place: str, secret: Path) -> None:
        import h5py

        _replaced(hdf5, place)
        file = () if kind == "SoftLink" else (str(secret.with_name("other.h5")),)
        hdf5[place] = getattr(h5py, kind)(*file, to)

    return change


def _hard_link(hdf5: Any, place: str, _: Path) -> None:
    target = hdf5["/" if len(place) % 2 else "obs"]
    _replaced(hdf5, place)
    hdf5[place] = target


def _retyped(dtype: Any, *, references: bool = False, **options: Any) -> Callable[[Any, str, Path], None]:
    def change(hdf5: Any, place: str, _: Path) -> None:
        import h5py

        shape, _ = _replaced(hdf5, place)
        kind = h5py.ref_dtype if references else dtype
        hdf5.create_dataset(place, shape, kind, **options)

    return change


def _mended(hdf5: Any, place: str, _: Path) -> None:
    """Give what was replaced the attributes that readers look at."""
    hdf5[place].attrs["encoding-type"] = "string-array" if "obs" in place else "array"
    hdf5[place].attrs["encoding-version"] = "0.2.0"


def _named_type(hdf5: Any, place: str, _: Path) -> None:
    import numpy as np

    _replaced(hdf5, place)
    hdf5[place] = np.dtype("<f8")


_STRANGE = (
    _made_external, _made_virtual, _linked("ExternalLink", "/X"), _linked("ExternalLink", "/"),
    _linked("ExternalLink", "/text"), _linked("SoftLink", "/obs/_index"), _linked("SoftLink", "/nowhere"),
    _hard_link, _retyped("<f4"), _retyped("<f2", chunks=True), _retyped("S9"),
    _retyped("<i8", compression="gzip"),
    _retyped("<f4", compression="lzf", shuffle=True, fletcher32=True), _retyped("<f4", scaleoffset=2),
    _retyped([("a", "<f4"), ("b", "S4")]), _retyped("V7"), _retyped("", references=True), _retyped("?"),
    _retyped("<f4", maxshape=(None, None), chunks=(1, 1)), _mended, _mended, _named_type,
)  # fmt: skip


def _search_index(content: bytes, folder: Path) -> None:
    """Facts and, after ``@@INDEX@@``, an index: it is taken only if its answers are those of a new one."""
    import numpy as np

    from genoembed.pipeline.embedding_file import VectorSource
    from genoembed.searching import index as module
    from genoembed.searching.neighbors import exact_neighbors

    source, origin = index_source(folder)
    facts, _, body = content.partition(b"@@INDEX@@")
    path = origin.index_path()
    path.write_bytes(body)
    path.with_name(f"{path.name}.json").write_bytes(facts)
    with mock.patch.object(module, "build_index", side_effect=StoreFormatError("built again", path="index")):
        opened, _, _ = module.open_index(source, origin)
    found = opened.neighbors(source.read(0, 4), source, k=3)
    expected = exact_neighbors(
        source.read(0, 4), VectorSource(source.read(0, len(source))), k=3, metric="dot"
    )
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4)


def index_source(folder: Path) -> tuple[Any, Any]:
    """Return rows, and what their index is built from."""
    import numpy as np

    from genoembed.pipeline.embedding_file import VectorSource
    from genoembed.searching.index import Origin

    rows = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    path = folder / "rows.h5"
    if not path.exists():
        path.write_bytes(rows.tobytes())
    return VectorSource(rows), Origin(path=path, layer="a", metric="dot", transform=None)


_HEADERS = (
    b">",
    b"\n>",
    b";",
    b"\n;",
    b" ",
    b"\t",
    b"\r\n",
    b"\r",
    b"\0",
    b"N",
    b"U",
    b"-",
    b"\xc3\xa9",
    b"\x01",
)
_ROWS = (
    b"\t",
    b"\n",
    b"chr1",
    b"0",
    b"-1",
    b"999999999999999999",
    b"+",
    b".",
    b"ID=a;",
    b"%2F",
    b"##FASTA",
    b"track ",
)
_VCF = (
    b"\t", b"\n", b"chr1", b"chr2", b"0", b"1", b"130", b"N", b".", b"*", b"<DEL>", b"]chr2:3]A", b"A,C",
    b"R", b"##fileformat=VCFv4.2\n", b"#CHROM\tPOS\tID\tREF\tALT\n", b"\xc3\xa9", b"99999999999999999999",
)  # fmt: skip
_GENBANK = (
    b"LOCUS       ", b"ORIGIN\n", b"//\n", b"CONTIG      join(",
    b" bp ", b"VERSION     ", b"     gene            ", b"complement(", b"ACCESSION   ", b"        1 acgt",
)  # fmt: skip
_EMBL = (
    b"ID   ", b"SQ   Sequence ", b"//\n", b"AC   ", b"DE   ", b"FT   ", b"     acgt  4\n", b"XX\n", b"CO   join(", b"FH   Key\n",  # noqa: E501
    b"; SV 1; linear; genomic DNA; STD; PRO; 20 BP.\n", b"RN   [1]\n",
)  # fmt: skip
_TABLE = (
    b"sequence",
    b"label",
    b"\t",
    b",",
    b";",
    b'"',
    b'""',
    b"\r\n",
    b"nan",
    b"1e999",
    b'{"sequence":',
    b"[",
    b"PAR1",
)
_JSON = (
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b",",
    b"null",
    b"NaN",
    b"1e999",
    b"-0",
    b"\\ud800",
    b"\\u0000",
    b"[" * 40,
)
_TOML = (
    b"=",
    b"[",
    b"]",
    b"[[a]]\n",
    b'"',
    b"'''",
    b"inf",
    b"nan",
    b"1979-05-27",
    b"{",
    b"a.b",
    b"\n",
    b"corpus",
    b"\\u0000",
)
_YAML = (
    b"---\n",
    b": ",
    b"- ",
    b"!!python/object/apply:os.system",
    b"&a ",
    b"*a",
    b"<<: ",
    b"2001-99-99",
    b"{",
    b"[",
    b"1e-6",
    b"\n",
)

TARGETS = {
    target.name: target
    for target in (
        Target(name="fasta", run=_any_blocks("iter_fasta"), corpus="fasta", tokens=_HEADERS, share=4),
        Target(
            name="fastq",
            run=_any_blocks("iter_fastq"),
            corpus="fastq",
            tokens=(b"@", b"+", b"I", *_HEADERS),
            share=4,
        ),
        Target(name="genbank", run=_sequences, corpus="genbank", tokens=_GENBANK, share=2),
        Target(name="embl", run=_sequences, corpus="embl", tokens=_EMBL, share=2),
        Target(name="gzip", run=_compressed, corpus="gzip", share=2),
        Target(name="bzip2", run=_compressed, corpus="bzip2", share=2),
        Target(name="xz", run=_compressed, corpus="xz", share=2),
        Target(name="zstd", run=_compressed, corpus="zstd", share=2),
        Target(name="bed", run=_intervals, corpus="bed", tokens=_ROWS, share=3),
        Target(name="gff3", run=_intervals, corpus="gff3", tokens=_ROWS, share=3),
        Target(name="regions", run=_regions, corpus="bed", tokens=_ROWS, share=0.5),
        Target(
            name="reference",
            run=_reference,
            corpus="reference",
            tokens=(b"@@INDEX@@", b"\t", *_HEADERS),
            share=0.5,
        ),
        Target(name="table", run=_table, corpus="table", tokens=_TABLE, share=3),
        Target(name="label_table", run=_label_table, corpus="table", tokens=_TABLE, share=2),
        Target(name="parquet", run=_table, corpus="parquet", tokens=(b"PAR1",), share=0.5),
        Target(
            name="pairs", run=_pairs, corpus="pairs", tokens=(b'"query"', b'"pos"', b'"neg"', *_JSON), share=3
        ),
        Target(name="run_config", run=_run_config, corpus="run_config", tokens=_TOML, share=2),
        Target(name="finetune_config", run=_finetune_config, corpus="finetune_config", tokens=_TOML, share=2),
        Target(name="vortex_config", run=_vortex_config, corpus="vortex_config", tokens=_YAML, share=0.3),
        Target(name="model_card", run=_model_card, corpus="model_card", tokens=_YAML, share=0.5),
        Target(name="finetuned_facts", run=_facts, corpus="finetuned_facts", tokens=_JSON, share=2),
        Target(name="safetensors", run=_weights(".safetensors"), corpus="safetensors", tokens=_JSON, share=2),
        Target(name="heads", run=_heads, corpus="safetensors", tokens=_JSON, share=1),
        Target(name="checkpoint", run=_weights(".pt"), corpus="checkpoint", share=0.5),
        Target(name="model_config", run=_model_config, corpus="model_config", tokens=_JSON, share=0.3),
        Target(name="embeddings", run=_embeddings, share=0.25),
        Target(name="contigs", run=_contigs, corpus="fasta", tokens=_HEADERS, share=2),
        Target(name="variants", run=_variants, corpus="vcf", tokens=_VCF, share=3),
        Target(name="bgzip", run=_bgzip, corpus="gzip", tokens=(_END_BLOCK, b"BC\2\0"), share=5),
        Target(name="model_build", run=_model_build, corpus="model_build", tokens=_JSON, share=0.1),
        Target(name="search_index", run=_search_index, tokens=(b"@@INDEX@@", *_JSON), share=3),
        Target(name="transform_file", run=_transform_file, share=0.15),
        Target(name="storage", run=_storage, share=0.5),
    )
}
