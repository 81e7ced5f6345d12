"""Text with one kind of line end.

In: a file name. Out: blocks or lines in which every line ends in ``\\n`` (from ``\\r\\n``, ``\\r`` or
``\\n``) and no byte order mark is left. The number of lines is that of the file, so that line numbers in
errors are right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from genoembed.sequences.compression import iter_decompressed
from genoembed.sequences.limits import check_record_size, max_record_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

WHITESPACE = b" \t\n\r\v\f"
_BOM = b"\xef\xbb\xbf"


def iter_text(path: str) -> Iterator[bytes]:
    """Read a file as blocks of text, cut anywhere."""
    yield from iter_text_blocks(iter_decompressed(path))


def iter_text_blocks(raw_blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Give text one kind of line end, and take a byte order mark off.

    Example:
        >>> list(iter_text_blocks([b"a\\r", b"\\nb\\r"]))
        [b'a', b'\\nb', b'\\n']
    """
    held = b""
    bom = _BOM
    for raw in raw_blocks:
        block = (held + raw).removeprefix(bom)
        held = bom = b""
        if b"\r" in block:
            if block.endswith(b"\r"):  # its "\n" may open the next block
                block, held = block[:-1], b"\r"
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
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
