"""Files in, clean records out.

:func:`read_sequences` reads FASTA, FASTQ, GenBank and EMBL, compressed or not, whole or by region, in
constant memory.
"""

from __future__ import annotations

from genoembed.sequences.reading import begin_reading, read_sequences
from genoembed.sequences.records import DNA_IUPAC, InputCounts, Policies, reverse_complement

__all__ = [
    "DNA_IUPAC",
    "InputCounts",
    "Policies",
    "begin_reading",
    "read_sequences",
    "reverse_complement",
]
