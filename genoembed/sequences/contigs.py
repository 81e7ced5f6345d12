"""Contigs of a FASTA file, of which stretches are read; a file is never held whole.

In: one FASTA file, plain or bgzip, or a GFF3 file that ends with its sequences. Out: lengths of contigs, and
stretches of them as the file has their letters.

The contigs are read by the parser that reads whole files, laid out in any way. One pass notes where the
pieces of each contig stand; a stretch is then parsed again from its pieces. Nothing is assumed of the lines,
and no index of another program is believed: a blank, a comment or another line end would shift every place
behind it. A file that changes in the meantime is an error.
"""

from __future__ import annotations

import os
import re
from array import array
from bisect import bisect_right
from collections import OrderedDict
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from genoembed.errors import (
    ConfigError,
    DuplicateIdError,
    InputFileError,
    SequenceFormatError,
)
from genoembed.sequences.compression import (
    BLOCK_BYTES,
    STDIN,
    WHITESPACE,
    check_readable,
    decompress,
    find_codec,
    is_bgzip,
    iter_blocks,
    iter_text_blocks,
    joined,
)
from genoembed.sequences.formats import Header, blank_comments, is_gff3, iter_fasta_parts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO

    from genoembed.sequences.compression import InputDigests


_PIECES_KEPT = 16  # of about a block (1 MiB) each: sorted regions find theirs here again
_TO_BLANK = bytes.maketrans(b"\v\f", b"  ")


class Contigs(Protocol):
    """Sequences that stretches are read from, by name."""

    path: str

    def length(self, contig: str) -> int | None:
        """Return the length of a contig; None if there is no such contig."""

    def no_such(self, contig: str) -> str:
        """Say that there is no such contig, and what may be meant."""

    def fetch(self, contig: str, start: int, end: int) -> bytes:
        """Read a stretch, as the file has its letters."""


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
            problem = "is not a regular file, but places are looked up in it; save it to a file first"
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

    def no_such(self, contig: str) -> str:
        """Say that there is no such contig, and which may be meant."""
        names = self.names
        # "1" and "chr1": the commonest reason; near spellings are slow to look for among millions of contigs
        same = [name for name in names if name.removeprefix("chr") == contig.removeprefix("chr")]
        near = same or get_close_matches(contig, names[:10_000], n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else "correct the name"
        hint += " Rename the contigs of one of the two" if same else ""
        shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        problem = f"contig {contig!r} is not in {self.path} ({shown}); {hint}"
        return problem

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
        text = next(filter(bytes.strip, self._plain(iter_blocks(stream, self.path))), b"")
        head = text.lstrip(WHITESPACE)
        self._is_annotation = is_gff3(head)
        if not self._is_annotation and not head.startswith((b">", b";")):
            problem = "not FASTA, which regions are read from; convert it to FASTA"
            if head.startswith((b"LOCUS ", b"ID   ")):
                problem += ", or leave regions out and choose its own features with feature"
            raise SequenceFormatError(problem, path=self.path)

    def _scan(self) -> None:
        blocks: Iterable[bytes] = iter_blocks(self._stream, self.path)
        if self._digests is not None:
            blocks = self._digests.watch(self.path, blocks)
        name, first, num_bases = "", 0, 0
        for part in iter_fasta_parts(
            self.path, _from_first_header(self._plain(blocks, members=self._members))
        ):
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
        if self._is_annotation and not self._contigs:
            problem = (
                "the GFF3 file has no sequences after its rows (##FASTA); give the FASTA as input and this "
                "file as regions"
            )
            raise SequenceFormatError(problem, path=self.path)

    def _plain(
        self, blocks: Iterable[bytes], members: list[tuple[int, int]] | None = None
    ) -> Iterator[bytes]:
        """Decompress blocks; no byte of the text moves, so that places count as in the file."""
        if self._codec is not None:
            blocks = joined(decompress(self.path, self._codec, blocks, members=members))
        return iter_text_blocks(blocks, keep_places=True)

    def _add(self, name: str, first: int, num_bases: int) -> None:
        if name:
            self._contigs[name] = _Contig(first, len(self._bases), num_bases)

    # ------------------------------------------------------------------------------------- pieces, read again

    def _letters(self, number: int, contig: str) -> bytes:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        self._check_unchanged()
        raw = self._read_text(self._starts[number], self._sizes[number])
        letters = blank_comments(b"".join(iter_text_blocks([raw]))).translate(None, WHITESPACE)
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


_SEQUENCES = re.compile(rb"\n(##FASTA|>)")
_LONGEST = len(b"\n##FASTA")
_BLANK = bytes(byte if byte == ord("\n") else ord(" ") for byte in range(256))


def _from_first_header(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Blank what stands before the first header: white space, or the rows of a GFF3 file."""
    held, in_rows = b"", False
    for following in blocks:
        block = held + following
        if not in_rows:
            head = block.lstrip(WHITESPACE)
            in_rows = is_gff3(head)
            if not in_rows:
                yield block[: len(block) - len(head)].translate(_TO_BLANK) + head
                if not head:
                    continue
                yield from blocks
                return
        match = _SEQUENCES.search(block)
        found = match.start() if match else -1
        # the specification allows to leave the line ##FASTA out: then the first header ends the rows
        end = block.find(b"\n", found + 1) if match and match[1] != b">" else found
        if end >= 0:
            yield block[:end].translate(_BLANK) + block[end:]
            yield from blocks
            return
        # the line may go on in the next block
        cut = found if found >= 0 else max(0, len(block) - _LONGEST)
        yield block[:cut].translate(_BLANK)
        held = block[cut:]
    yield held.translate(_BLANK)


class RecordContigs:
    """The one contig of a record that is in memory, such as one of a GenBank file."""

    def __init__(self, path: str, name: str, sequence: bytes) -> None:
        self.path = path
        self._name, self._sequence = name, sequence

    def length(self, contig: str) -> int | None:
        """Return the length of the record; None if another contig is asked for."""
        return len(self._sequence) if contig == self._name else None

    def no_such(self, contig: str) -> str:
        """Say that there is no such contig."""
        return f"contig {contig!r} is not this record; correct the location"

    def fetch(self, contig: str, start: int, end: int) -> bytes:
        """Cut a stretch out."""
        assert contig == self._name, "length is asked for first"
        return self._sequence[start:end]
