"""Bytes of a file or of standard input, decompressed on the way.

In: a file name, or ``-``. Out: blocks of about one MiB of plain bytes. The compression is recognized by the
first bytes, never by the file's name; files made of several members (bgzip, ``cat a.gz b.gz``, pzstd) are
read to their end; a stream that stops early or is damaged is an error, never a short result. Streams are
never sought, so that pipes can be read. Text comes out with one kind of line end, and no record or line may
be so large that a decompression bomb fills the memory.
"""

from __future__ import annotations

import bz2
import hashlib
import lzma
import os
import re
import sys
import zlib
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import zstandard

from genoembed.errors import ConfigError, InputError, InputFileError, SequenceFormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import BinaryIO


STDIN = "-"
BLOCK_BYTES = 1 << 20
_SHOWN_PATH = 200
_HEAD_BYTES = 18
"""Of a gzip member, to know bgzip by."""


class Codec(NamedTuple):
    """A kind of compression."""

    name: str
    magic: re.Pattern[bytes]
    new: Callable[[], Any]
    feed: Callable[[Any, bytes], Iterator[bytes]]
    """Gives a decoder compressed bytes and takes plain ones out, never many at once."""
    errors: tuple[type[Exception], ...]
    step_bytes: int = 1 << 14
    """Compressed bytes fed at once."""


def _new_zstd() -> Any:
    # Genomes are often packed with --long=31, a window of 2 GiB.
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def _feed_zlib(decoder: Any, compressed: bytes) -> Iterator[bytes]:
    while compressed and not decoder.eof:
        yield decoder.decompress(compressed, BLOCK_BYTES)
        compressed = decoder.unconsumed_tail


def _feed_counted(decoder: Any, compressed: bytes) -> Iterator[bytes]:
    yield decoder.decompress(compressed, BLOCK_BYTES)
    while not (decoder.eof or decoder.needs_input):
        yield decoder.decompress(b"", BLOCK_BYTES)


def _feed_uncounted(decoder: Any, compressed: bytes) -> Iterator[bytes]:
    # zstandard's object takes no bound on what it gives, so that little is fed to it at once (step_bytes)
    plain = decoder.decompress(compressed)
    yield from (plain[start : start + BLOCK_BYTES] for start in range(0, len(plain), BLOCK_BYTES))


_CODECS = (
    Codec("gzip", re.compile(rb"\x1f\x8b"), lambda: zlib.decompressobj(wbits=31), _feed_zlib, (zlib.error,)),
    Codec("bzip2", re.compile(rb"BZh[1-9]"), bz2.BZ2Decompressor, _feed_counted, (OSError, ValueError)),
    Codec(
        "xz",
        re.compile(rb"\xfd7zXZ\x00"),
        lambda: lzma.LZMADecompressor(format=lzma.FORMAT_XZ),
        _feed_counted,
        (lzma.LZMAError, MemoryError),
    ),
    Codec(
        "zstd",
        re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
        _new_zstd,
        _feed_uncounted,
        (zstandard.ZstdError, MemoryError),
        step_bytes=1 << 9,  # a block of 128 KiB takes four bytes at least
    ),
)


class InputDigests:
    """SHA-256 of files, taken of the bytes that were read, as they are stored, while they are read.

    A file may have another content when it is opened again.
    """

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def watch(self, path: str, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """Pass the blocks of a file on; at its end, what they were is known."""
        digest, num_bytes = hashlib.sha256(), 0
        for block in blocks:
            digest.update(block)
            num_bytes += len(block)
            yield block
        # reached at the end alone: a file that was not read to its end has no digest
        self._found[path] = (num_bytes, digest.hexdigest())

    def facts(self, path: str) -> dict[str, str | int | None]:
        """What is known of a file; a size of None means that it was not read to its end."""
        num_bytes, digest = self._found.get(path, (None, None))
        return {"name": path, "bytes": num_bytes, "sha256": digest}


def iter_decompressed(path: str, *, digests: InputDigests | None = None) -> Iterator[bytes]:
    """Read a file, or standard input, as plain bytes."""
    blocks = _iter_raw(path)
    if digests is not None:
        blocks = digests.watch(path, blocks)
    first = next(blocks, b"")
    codec = find_codec(first)
    if codec is None:
        yield from chain((first,) if first else (), blocks)
    else:
        yield from joined(decompress(path, codec, chain((first,), blocks)))


def find_codec(head: bytes) -> Codec | None:
    """Find the compression by the first bytes of a file."""
    return next((codec for codec in _CODECS if codec.magic.match(head)), None)


def check_readable(path: str) -> None:
    """Make sure that a file can be opened, before any work starts."""
    if path == STDIN:
        if sys.stdin is None:
            problem = "standard input is closed, expected sequences; pipe them in or name a file"
            raise InputFileError(problem, path=path)
        return
    try:
        if Path(path).is_dir():
            problem = "is a folder, expected a file; name the files in it"
            raise InputFileError(problem, path=path)
        if not Path(path).exists():
            problem = "file not found; check the name and the current folder"
            raise InputFileError(problem, path=path)
        if Path(path).is_file():  # a pipe such as /dev/fd/63 must not be opened twice
            Path(path).open("rb").close()
    except InputFileError:
        raise
    except OSError as error:  # a name too long, as when a sequence is given for a file, is one too
        raise _unreadable(path[:_SHOWN_PATH], error) from error


def _unreadable(path: str, error: OSError) -> InputFileError:
    problem = f"cannot be read ({error.strerror or error}); check its permissions and the disk"
    return InputFileError(problem, path=path)


def _iter_raw(path: str) -> Iterator[bytes]:
    if path == STDIN:
        yield from iter_blocks(sys.stdin.buffer, path)
        return
    try:
        stream = Path(path).open("rb")
    except OSError as error:
        raise _unreadable(path, error) from error
    with stream:
        yield from iter_blocks(stream, path)


def iter_blocks(stream: BinaryIO, path: str, block_bytes: int | None = None) -> Iterator[bytes]:
    """Read what is left of a stream."""
    while True:
        try:
            block = stream.read(block_bytes or BLOCK_BYTES)
        except OSError as error:
            raise _unreadable(path, error) from error
        if not block:
            return
        yield block


def is_bgzip(head: bytes) -> bool:
    """Tell a block of bgzip from other gzip members, as htslib does, by its first 18 bytes."""
    return head[:4] == b"\x1f\x8b\x08\x04" and head[12:16] == b"BC\x02\x00"


def decompress(
    path: str,
    codec: Codec,
    blocks: Iterable[bytes],
    *,
    members: list[tuple[int, int]] | None = None,
) -> Iterator[bytes]:
    """Decompress blocks of a file; with ``members``, note where each begins, compressed and plain."""
    decoder, head = codec.new(), b""
    num_read = num_plain = member_plain = 0
    if members is not None:
        members.append((0, 0))
    for block in blocks:
        for offset in range(0, len(block), codec.step_bytes):
            pending = block[offset : offset + codec.step_bytes]
            num_read += len(pending)
            while pending:
                if decoder.eof:
                    pending = pending.lstrip(b"\0")  # padding between members is allowed
                    if not pending:
                        break
                    decoder, head, member_plain = codec.new(), b"", 0
                    if members is not None:
                        members.append((num_read - len(pending), num_plain))
                # of the last member, whose blocks may begin anywhere in what was read
                if len(head) < _HEAD_BYTES:
                    head += pending[: _HEAD_BYTES - len(head)]
                try:
                    for plain in filter(None, codec.feed(decoder, pending)):
                        num_plain += len(plain)
                        member_plain += len(plain)
                        yield plain
                except codec.errors as error:
                    reason = str(error) or "it asks for more memory than there is"
                    problem = f"damaged {codec.name} data ({reason}); copy or download the file again"
                    raise SequenceFormatError(problem, path=path) from error
                pending = decoder.unused_data if decoder.eof else b""
    if not decoder.eof:
        problem = f"the {codec.name} data stops before its end; copy or download the file again"
        raise SequenceFormatError(problem, path=path)
    # a cut between two blocks leaves whole members: only the empty block, which bgzip puts last, tells
    if is_bgzip(head) and member_plain:
        problem = "the bgzip file is cut off: its end block is missing; copy or download the file again"
        raise SequenceFormatError(problem, path=path)


def joined(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Join small pieces to blocks of the usual size."""
    held: list[bytes] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= BLOCK_BYTES:
            yield b"".join(held)
            held.clear()
            size = 0
    if held:
        yield b"".join(held)


DEFAULT_MAX_RECORD_BYTES = 1 << 32
"""4 GiB: more than any chromosome but those of lungfish and a few plants."""
VARIABLE = "GENOEMBED_MAX_RECORD_BYTES"


def max_record_bytes() -> int:
    """Return the most bytes that one record may take, as plain text."""
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return DEFAULT_MAX_RECORD_BYTES
    if not (text.isascii() and text.isdecimal()) or len(text) > 18 or not int(text):
        problem = (
            f"environment variable {VARIABLE} is {text!r}; set it to a number of bytes, such as 8000000000"
        )
        raise ConfigError(problem)
    return int(text)


def check_record_size(
    num_bytes: int, limit: int, *, path: str, line: int | None = None, record_id: str | None = None
) -> None:
    """Raise if a record has grown beyond the limit."""
    if num_bytes > limit:
        problem = (
            f"one record or line of over {limit} bytes, decompressed; the file is damaged or made to "
            "fill the memory, or, if you know that it is right, set the environment variable "
            f"{VARIABLE} higher"
        )
        raise SequenceFormatError(problem, path=path, line=line, record_id=record_id)


PARQUET_MAGIC = b"PAR1"
WHITESPACE = b" \t\n\r\v\f"


_BOM = b"\xef\xbb\xbf"


def iter_text(path: str, *, digests: InputDigests | None = None) -> Iterator[bytes]:
    """Read a file as blocks of text, cut anywhere."""
    return iter_text_blocks(iter_decompressed(path, digests=digests))


def iter_text_blocks(raw_blocks: Iterable[bytes], *, keep_places: bool = False) -> Iterator[bytes]:
    """Convert text to one kind of line end, and remove a byte order mark.

    With ``keep_places`` no byte moves: blanks stand for what is taken out, as white space counts nowhere.

    Example:
        >>> list(iter_text_blocks([b"a\\r", b"\\nb\\r"]))
        [b'a', b'\\nb', b'\\n']
        >>> list(iter_text_blocks([b"a\\r", b"\\nb\\r"], keep_places=True))
        [b'a', b' \\nb', b'\\n']
    """
    held, bom = b"", _BOM
    line_end, no_bom = (b" \n", b" " * len(bom)) if keep_places else (b"\n", b"")
    for raw in raw_blocks:
        block = held + raw
        if bom and block.startswith(bom):
            block = no_bom + block[len(bom) :]
        held = bom = b""
        if b"\r" in block:
            if block.endswith(b"\r"):  # its "\n" may open the next block
                block, held = block[:-1], b"\r"
            block = block.replace(b"\r\n", line_end).replace(b"\r", b"\n")
        if block:
            yield block
    if held:
        yield b"\n"


def iter_lines(blocks: Iterable[bytes], *, path: str = "") -> Iterator[bytes]:
    """Cut blocks of text into lines.

    A line that runs over many blocks is joined once, so one line of 250 Mb costs one copy.

    Example:
        >>> list(iter_lines([b"ab\\nc", b"d\\n\\n", b"e"]))
        [b'ab', b'cd', b'', b'e']
    """
    limit = max_record_bytes()
    parts: list[bytes] = []
    held = 0
    for block in blocks:
        lines = block.split(b"\n")
        held += len(lines[0])
        check_record_size(held, limit, path=path)
        if len(lines) == 1:
            parts.append(block)
            continue
        held = len(lines[-1])
        parts.append(lines[0])
        yield b"".join(parts)
        yield from lines[1:-1]
        parts = [lines[-1]] if lines[-1] else []
    if parts:
        yield b"".join(parts)


def decode_text(
    raw: bytes,
    *,
    path: str,
    line: int,
    what: str = "line",
    kind: str = "",
    error: type[InputError] = SequenceFormatError,
) -> str:
    """Decode a line, or raise with the byte that is no UTF-8; ``kind`` is what only a text file can be."""
    try:
        return raw.decode()
    except UnicodeDecodeError as failure:
        byte = f"the {what} has byte 0x{raw[failure.start]:02x}"
        problem = f"{byte}, which is not UTF-8; convert the file, for example with iconv -f latin1 -t utf-8"
        if kind:
            problem = f"{byte}, expected UTF-8 text; check that it is {kind}"
        raise error(problem, path=path, line=line) from failure


_BINARY = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")


def check_text(head: bytes, *, path: str, expected: str) -> None:
    """Raise if a decompressed file begins like no text."""
    if find_codec(head) is not None:
        problem = f"the file is compressed twice, {expected}; decompress it once"
    elif found := _BINARY.search(head, 0, 1024):
        problem = f"this is a binary file (byte 0x{found[0][0]:02x}), {expected}; check the file name"
    else:
        return
    raise SequenceFormatError(problem, path=path)


def file_facts(name: str) -> dict[str, str | int | None]:
    """Return what identifies an input file."""
    path = Path(name)
    if name == "-" or not path.is_file():
        return {"name": name, "bytes": None, "sha256": None}
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": name, "bytes": path.stat().st_size, "sha256": digest}
