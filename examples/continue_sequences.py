"""How does a sequence go on? Continue the starts of three phages, and compare what comes with its prompt.

The bundled model is small: expect the composition of the prompt, and a likelihood a little better than chance
(2 bits a base). A large model is used in the same way (``model="evo2_7b"``).

    python examples/continue_sequences.py
"""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path

import genoembed

PHAGES = Path(__file__).parent / "data" / "phages.fa"
PROMPT_BASES, LENGTH, SAMPLES = 300, 60, 2


def gc(sequence: str) -> float:
    """Return the share of G and C."""
    return (sequence.count("G") + sequence.count("C")) / max(1, len(sequence))


def main() -> None:
    """Continue the prompts and print a line per sequence."""
    records = list(islice(genoembed.read_sequences(PHAGES), 3))
    prompts = {record.id: record.sequence[:PROMPT_BASES].decode() for record in records}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prompts.fa")
        path.write_text("".join(f">{name}\n{bases}\n" for name, bases in prompts.items()))
        report = genoembed.generate(path, num_samples=SAMPLES, length=LENGTH, temperature=0.8, seed=1)
    print(f"{report.num_sequences} sequences for {report.num_prompts} prompts, {report.num_bases} bases")
    for row in report.rows:
        bits = -row.mean_log_likelihood / 0.6931471805599453
        print(
            f"{row.id:16s} GC {gc(prompts[row.prompt]):.2f} -> {gc(row.sequence):.2f}  {bits:.2f} bits a base"
        )


if __name__ == "__main__":
    main()
