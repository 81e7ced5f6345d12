"""Stretches of a FASTA file by contig and place, read by the parser that reads whole files.

In: one FASTA file, plain or bgzip, laid out in any way. Out: the letters of any stretch. One pass notes where
the pieces of each contig stand; a stretch is then parsed again from its pieces. Nothing is assumed of the
lines, and no index of another program is believed: a blank, a comment or another line end would shift
every place behind it. A file that changes in the meantime is an error.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from genoembed.errors import ConfigError, DuplicateIdError, InputFileError, SequenceFormatError
from genoembed.sequences.compression import (
    BLOCK_BYTES,
    BOM,
    STDIN,
    WHITESPACE,
    check_readable,
    decompress,
    find_codec,
    is_bgzip,
    iter_blocks,
    joined,
)
from genoembed.sequences.fasta import Header, blank_comments, iter_fasta_parts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO

    from genoembed.sequences.compression import InputDigests


_PIECES_KEPT = 16
_TO_BLANK = bytes.maketrans(b"\v\f", b"  ")


class _Contig(NamedTuple):
    first: int
    """Number of its first piece."""
    past: int
    num_bases: int


class FastaContigs:
    """The contigs of a FASTA file; a context manager, which opens and closes it."""

    def __init__(self, path: str, *, digests: InputDigests | None = None) -> None:
        if path == STDIN:
            message = "reference is '-', but places are looked up in it; save it to a file first"
            raise ConfigError(message)
        check_readable(path)
        if not Path(path).is_file():
            problem = "is no regular file, but places are looked up in it; save it to a file first"
            raise InputFileError(problem, path=path)
        self.path = path
        self._digests = digests
        self._contigs: dict[str, _Contig] = {}
        # of each piece: bases of its contig before it; its first byte and length in the decompressed text
        self._bases, self._starts, self._sizes = array("q"), array("q"), array("q")
        # of each bgzip block: its first byte in the file, and in the decompressed text
        self._members: list[tuple[int, int]] = []
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        with Path(path).open("rb") as stream:
            self._check_kind(stream)

    def __enter__(self) -> FastaContigs:
        self._stream = Path(self.path).open("rb")
        try:
            self._state = self._file_state()
            self._scan()
            self._check_unchanged()
        except BaseException:
            self._stream.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    @property
    def names(self) -> list[str]:
        """Names of the contigs, in the order of the file."""
        return list(self._contigs)

    def length(self, contig: str) -> int | None:
        """Return the length of a contig; None if there is no such contig."""
        found = self._contigs.get(contig)
        return None if found is None else found.num_bases

    def fetch(self, contig: str, start: int, end: int) -> bytes:
        """Read a stretch, as the file has its letters."""
        first, past, num_bases = self._contigs[contig]
        end = min(end, num_bases)
        if end <= start:
            return b""
        number = bisect_right(self._bases, start, first, past) - 1
        found = []
        while number < past and (before := self._bases[number]) < end:
            found.append(self._letters(number, contig)[max(0, start - before) : end - before])
            number += 1
        return b"".join(found)

    # ------------------------------------------------------------------------------------------ the one pass

    def _check_kind(self, stream: BinaryIO) -> None:
        head = stream.read(18)
        self._codec = find_codec(head)
        if self._codec is not None and not is_bgzip(head):
            problem = (
                f"{self._codec.name} data cannot be read by region, expected plain or bgzip FASTA; "
                "decompress it, or compress it with bgzip instead"
            )
            raise SequenceFormatError(problem, path=self.path)
        stream.seek(0)
        blocks: Iterable[bytes] = iter_blocks(stream, self.path)
        if self._codec is not None:
            blocks = joined(decompress(self.path, self._codec, blocks))
        text = next((block for block in _level(blocks) if block.strip(WHITESPACE)), b"")
        if not text.lstrip(WHITESPACE).startswith((b">", b";")):
            problem = "not FASTA, which regions are read from; convert it to FASTA"
            raise SequenceFormatError(problem, path=self.path)

    def _scan(self) -> None:
        blocks: Iterable[bytes] = iter_blocks(self._stream, self.path)
        if self._digests is not None:
            blocks = self._digests.watch(self.path, blocks)
        if self._codec is not None:
            blocks = joined(decompress(self.path, self._codec, blocks, members=self._members))
        name, first, num_bases = "", 0, 0
        for part in iter_fasta_parts(self.path, _from_first_header(_level(blocks))):
            if isinstance(part, Header):
                self._add(name, first, num_bases)
                name, first, num_bases = part.id, len(self._bases), 0
                if name in self._contigs:
                    problem = "two contigs have this name, so regions on it are ambiguous; rename one"
                    raise DuplicateIdError(problem, path=self.path, line=part.line, record_id=name)
                continue
            letters = part.letters.strip(WHITESPACE)
            if letters:
                # to begin at a letter: what stands before may be the end of a comment
                lead = len(part.letters) - len(part.letters.lstrip(WHITESPACE))
                self._bases.append(num_bases)
                self._starts.append(part.offset + lead)
                self._sizes.append(len(letters))
                num_bases += len(letters.translate(None, WHITESPACE))
        self._add(name, first, num_bases)

    def _add(self, name: str, first: int, num_bases: int) -> None:
        if name:
            self._contigs[name] = _Contig(first, len(self._bases), num_bases)

    # ------------------------------------------------------------------------------------- pieces, read again

    def _letters(self, number: int, contig: str) -> bytes:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        self._check_unchanged()
        text = next(_level([self._read_text(self._starts[number], self._sizes[number])]), b"")
        letters = blank_comments(text).translate(None, WHITESPACE)
        _, past, num_bases = self._contigs[contig]
        after = self._bases[number + 1] if number + 1 < past else num_bases
        if len(letters) != after - self._bases[number]:
            raise self._changed()
        self._kept[number] = letters
        if len(self._kept) > _PIECES_KEPT:
            self._kept.popitem(last=False)
        return letters

    def _read_text(self, start: int, size: int) -> bytes:
        place, skipped = start, 0
        if self._codec is not None:
            member = bisect_right(self._members, start, key=lambda pair: pair[1]) - 1
            place, skipped = self._members[member][0], start - self._members[member][1]
        self._stream.seek(place)
        blocks: Iterable[bytes] = iter_blocks(self._stream, self.path, min(size, BLOCK_BYTES))
        if self._codec is not None:
            blocks = decompress(self.path, self._codec, blocks)
        found, held = [], 0
        for block in blocks:
            found.append(block)
            held += len(block)
            if held >= skipped + size:
                break
        return b"".join(found)[skipped : skipped + size]

    def _file_state(self) -> tuple[int, int]:
        state = os.fstat(self._stream.fileno())
        return state.st_size, state.st_mtime_ns

    def _check_unchanged(self) -> None:
        if self._file_state() != self._state:
            raise self._changed()

    def _changed(self) -> InputFileError:
        problem = "has changed while it was read; run again when nothing writes to it"
        return InputFileError(problem, path=self.path)


def _level(blocks: Iterable[bytes]) -> Iterator[bytes]:
    r"""Bring lines to one kind of end and blank a byte order mark: ``iter_text_blocks``, but no byte moves.

    Example:
        >>> list(_level([b"a\r", b"\nb\r"]))
        [b'a', b' \nb', b'\n']
    """
    held, bom = b"", BOM
    for raw in blocks:
        block = held + raw
        held = b""
        if bom and block.startswith(bom):
            block = b" " * len(bom) + block[len(bom) :]
        bom = b""
        if b"\r" in block:
            if block.endswith(b"\r"):  # its "\n" may open the next block
                block, held = block[:-1], b"\r"
            block = block.replace(b"\r\n", b" \n").replace(b"\r", b"\n")
        if block:
            yield block
    if held:
        yield b"\n"


def _from_first_header(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Blank what the reader of whole files skips before the first header."""
    for block in blocks:
        head = block.lstrip(WHITESPACE)
        yield block[: len(block) - len(head)].translate(_TO_BLANK) + head
        if head:
            yield from blocks
