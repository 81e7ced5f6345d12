"""What does a model make of a variant? From a VCF and its reference to a score an allele.

Scores made-up changes of one gene of a coronavirus: the log-likelihood of the stretch around each with the
allele, less that with the reference, on both strands; and how far the allele moves the stretch's vector.
The bundled model is far too small to predict effects; with ``model="evo2_7b"`` and a longer ``flank`` the
same lines do the real thing.

    python examples/score_variants.py
"""

from __future__ import annotations

from pathlib import Path

import genoembed

DATA = Path(__file__).parent / "data"


def main() -> None:
    """Score the variants and print a line for each."""
    report = genoembed.score_variants(DATA / "variants.vcf", DATA / "virus.fa", flank=60, rc="mean", layer=28)
    print(f"{report.num_rows} alleles, vectors of {report.layer}")
    for row in report.rows:
        change = f"{row.ref}>{row.alt}"
        print(f"{row.id:8s} {row.pos} {change:8s} {row.delta:+.4f} {row.l2:.4f} {row.normalized}")


if __name__ == "__main__":
    main()
