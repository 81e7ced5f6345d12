"""How large one record may be, so that a decompression bomb ends in an error and not in all memory.

A few megabytes of gzip can stand for gigabytes of one letter. Whatever has to be held whole (a record, a
line, a row) is therefore counted while it is read. ``docs/SECURITY.md`` says so to users.
"""

from __future__ import annotations

import os

from genoembed.errors import ConfigError, SequenceFormatError

DEFAULT_MAX_RECORD_BYTES = 1 << 32
"""4 GiB: more than any chromosome but those of lungfish and a few plants."""
VARIABLE = "GENOEMBED_MAX_RECORD_BYTES"


def max_record_bytes() -> int:
    """Give the most bytes that one record may take, as plain text."""
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
    """Refuse a record that has grown beyond the limit."""
    if num_bytes > limit:
        problem = (
            f"one record or line of over {limit} bytes, decompressed; the file is damaged or made to "
            "fill the memory, or, if you know that it is right, set the environment variable "
            f"{VARIABLE} higher"
        )
        raise SequenceFormatError(problem, path=path, line=line, record_id=record_id)
