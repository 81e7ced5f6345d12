"""Which layer to use, for labels of your own: all of them, with k-mers and an untrained copy beside.

Cuts pieces of 90 bases out of the example genes, turns every second one to the other strand, and asks which
layer of the bundled model tells the coding strand. Pieces of one gene share a fold: a probe that has seen a
gene must not be asked about it.

    python examples/choose_a_layer.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import genoembed
from genoembed.sequences import reverse_complement

GENES = Path(__file__).parent / "data" / "bacterial_genes.fa.gz"
PIECE, PIECES = 90, 3


def write_pieces(folder: Path) -> None:
    """Write ``pieces.fa``, and ``labels.tsv`` with strand and gene of each piece.

    Args:
        folder: Where to.
    """
    fasta, labels = [], ["id\tlabel\tgroup"]
    for gene, record in enumerate(genoembed.read_sequences(GENES)):
        for number in range(PIECES):
            piece = record.sequence[number * PIECE : (number + 1) * PIECE]
            strand = "coding" if (gene + number) % 2 else "other"
            letters = piece if strand == "coding" else reverse_complement(piece)
            fasta.append(f">piece{gene}_{number}\n{letters.decode()}\n")
            labels.append(f"piece{gene}_{number}\t{strand}\t{record.id}")
    (folder / "pieces.fa").write_text("".join(fasta))
    (folder / "labels.tsv").write_text("\n".join(labels) + "\n")


def main() -> None:
    """Probe all layers, and print what came of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pieces(folder)
        report = genoembed.probe(
            folder / "pieces.fa",
            labels=folder / "labels.tsv",
            cv="grouped",
            num_folds=3,
            output=folder / "probe",
        )
    print(f"{report.num_rows} pieces of {report.num_groups} genes, {len(report.layers)} layers")
    print(report.recommendation)
    for one in report.comparisons:
        print(f"{one.name:24s} {one.score.mean:6.3f}  model {one.difference:+.3f} +- {one.difference_sd:.3f}")
    print(report.verdict)


if __name__ == "__main__":
    main()
