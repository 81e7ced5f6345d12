"""What does each base do at a gene's start? Every change of a single base, as a picture, and by codons.

`genoembed.score_mutations` scores the changes and draws the picture; the lines after it sort them by what
they do to the protein, which the model was never told about.

    python examples/gallery/every_change_of_a_gene.py phages.fa NC_007458.1:1-31903:4119-4418 --start 4178
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean, median

import click
from Bio.Data.CodonTable import standard_dna_table

import genoembed

STOP = "stop"
PROTEIN = {**standard_dna_table.forward_table, **dict.fromkeys(standard_dna_table.stop_codons, STOP)}


def effect(pos: int, alt: str, contig: str, start: int) -> str:
    """Say what a change at a position (counted from 1) does to a gene that begins at another."""
    if pos < start:
        return "before the gene"
    first = pos - (pos - start) % 3 - 1
    codon = contig[first : first + 3]
    changed = contig[first : pos - 1] + alt + contig[pos : first + 3]
    if first + 1 == start:
        return "of the start codon"
    if PROTEIN[changed] == STOP:
        return "to a stop"
    return "silent" if PROTEIN[changed] == PROTEIN[codon] else "another amino acid"


@click.command()
@click.argument("fasta")
@click.argument("region")
@click.option("--start", type=int, required=True, help="First base of the gene, counted from 1.")
@click.option("--flank", default=120, help="Bases on either side of a change.")
@click.option("-o", "--output", default="gallery", help="Folder for picture and table.")
def main(fasta: str, region: str, start: int, flank: int, output: str) -> None:
    """Score every change of REGION of FASTA."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    name = Path(__file__).stem
    table = folder / f"{name}.tsv"
    genoembed.score_mutations(
        fasta,
        regions=region,
        flank=flank,
        rc="mean",
        output=table,
        heat_map=folder / f"{name}.png",
        overwrite=True,
    )
    header, *rows = [line.split("\t") for line in table.read_text().splitlines()]
    changes = [dict(zip(header, row, strict=True)) for row in rows]
    contigs = {record.id: record.sequence.decode() for record in genoembed.read_sequences(fasta)}
    deltas: dict[str, list[float]] = defaultdict(list)
    for change in changes:
        kind = effect(int(change["pos"]), change["alt"], contigs[change["chrom"]], start)
        deltas[kind].append(float(change["delta"]))
    click.echo("changes\tnumber\tmean delta\tmedian delta")
    for kind, values in deltas.items():
        click.echo(f"{kind}\t{len(values)}\t{mean(values):.2f}\t{median(values):.2f}")


if __name__ == "__main__":
    main()
