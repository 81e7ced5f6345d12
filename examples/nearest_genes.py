"""From FASTA to nearest neighbours in twenty lines of Python: which gene is most like which?

Embeds the example genes at block 28, centres the vectors (those of a language model share a large common
part) and prints each gene's nearest neighbour by cosine.

    python examples/nearest_genes.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import genoembed

GENES = Path(__file__).parent / "data" / "bacterial_genes.fa.gz"


def main() -> None:
    """Embed the genes and print their neighbours."""
    with tempfile.TemporaryDirectory() as folder:
        report = genoembed.extract(GENES, layers=28, pooling="mean", output=Path(folder, "genes.h5"))
        with genoembed.open_embeddings(report.output) as file:
            ids, vectors = file.ids, file.X[:]
    centred = vectors - vectors.mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -1)
    print(f"{report.num_rows} genes, {report.width} features from {', '.join(report.layers)}")
    for row, name in enumerate(ids):
        nearest = int(cosine[row].argmax())
        print(f"{name:24s} {ids[nearest]:24s} {cosine[row, nearest]:.3f}")


if __name__ == "__main__":
    main()
