"""Files in, clean records out; and windows over long records.

:func:`read_sequences` reads FASTA, FASTQ, GenBank and EMBL, compressed or not, whole or by region, in
constant memory. :func:`iter_windows` cuts a long record so that each base is answered for once.
"""

from __future__ import annotations

from genoembed.sequences.reading import read_sequences
from genoembed.sequences.records import DNA_IUPAC, InputCounts, Policies, reverse_complement
from genoembed.sequences.windows import default_stride, iter_windows

__all__ = [
    "DNA_IUPAC",
    "InputCounts",
    "Policies",
    "default_stride",
    "iter_windows",
    "read_sequences",
    "reverse_complement",
]
