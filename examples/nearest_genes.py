"""From FASTA to nearest neighbors in ten lines of Python: which gene is most like which?

Embeds the example genes at block 28, centers the vectors (those of a language model share a large common
part) and prints each gene's nearest neighbor by cosine.

    python examples/nearest_genes.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import genoembed

GENES = Path(__file__).parent / "data" / "bacterial_genes.fa.gz"


def main() -> None:
    """Embed the genes and print their neighbors."""
    with tempfile.TemporaryDirectory() as folder:
        report = genoembed.extract(GENES, layers=28, pooling="mean", output=Path(folder, "genes.h5"))
        centered = genoembed.fit_transform(report.output, output=Path(folder, "centered.h5"))
        found = genoembed.search(
            report.output, report.output, k=1, exclude_self=True, transform=centered.output
        )
    print(f"{report.num_rows} genes, {report.width} features from {', '.join(report.layers)}")
    for hit in found.hits:
        print(f"{hit.query:24s} {hit.subject:24s} {hit.score:.3f}")


if __name__ == "__main__":
    main()
