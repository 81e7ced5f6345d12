"""Which layer knows a promoter? A score for every layer, beside k-mers and an untrained copy of the model.

`genoembed.probe` does the work: one pass over the sequences, the same cross-validated linear probe on each
layer, on k-mers and on a copy of the model with fresh weights. Rows that share sequence share a fold, where
a file with the table's name and the ending `.groups` has a group a row.

    python examples/gallery/promoters_by_layer.py promoters.tsv
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from matplotlib.figure import Figure

import genoembed

COLORS = {
    "6-mer counts": "#1b7837",
    "4-mer counts": "#e08214",
    "GC content and length": "#8073ac",
    "one-hot letters": "#b2182b",
}


def write_input(table: Path, rows: int, folder: Path) -> bool:
    """Write sequences as FASTA and labels as a table, as the probe takes them; tell if there are groups."""
    lines = [line.split("\t") for line in table.read_text().splitlines()[1 : rows + 1]]
    groups_file = table.with_suffix(".groups")
    groups = groups_file.read_text().split()[:rows] if groups_file.exists() else [""] * len(lines)
    records = [f">row{n}\n{sequence}\n" for n, (sequence, _) in enumerate(lines)]
    labels = [
        f"row{n}\t{line[1]}\t{group}\n" for n, (line, group) in enumerate(zip(lines, groups, strict=True))
    ]
    (folder / "rows.fa").write_text("".join(records))
    (folder / "rows.tsv").write_text("id\tlabel\tgroup\n" + "".join(labels))
    return groups_file.exists()


def draw(report: genoembed.ProbeReport, file: Path) -> None:
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    for name, scores, color in (
        ("trained model", report.layers, "#1f5fa8"),
        ("untrained copy", report.untrained, "#808080"),
    ):
        means, sds = (
            np.array([getattr(one.metrics["mcc"], key) for one in scores]) for key in ("mean", "sd")
        )
        axes.fill_between(range(len(scores)), means - sds, means + sds, color=color, alpha=0.15, linewidth=0)
        axes.plot(means, color=color, marker="o", markersize=4, label=name)
    for one in report.baselines:
        score = one.metrics["mcc"].mean
        axes.axhline(score, color=COLORS[one.name], linestyle="--", label=f"{one.name}, {score:.2f}")
    axes.axhline(0, color="black", linewidth=0.8, label="chance, 0")
    axes.set(xlabel="layer", ylabel="MCC (band: 1 s.d. over folds)", ylim=(-0.05, 1))
    axes.set_xticks(range(len(report.layers)), [one.name.split(".")[1] for one in report.layers], fontsize=8)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(file, dpi=100)


@click.command()
@click.argument("table", type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("promoters"), help="Folder.")
@click.option("--layer", "layers", multiple=True, type=int, help="A block, such as 28; all without it.")
@click.option("--rows", default=1000, show_default=True, help="Rows of the table.")
@click.option("--folds", default=5, show_default=True, help="Test folds.")
def main(table: Path, output: Path, layers: tuple[int, ...], rows: int, folds: int) -> None:
    """Probe all layers on the rows of TABLE (sequence, tab, label)."""
    output.mkdir(parents=True, exist_ok=True)
    has_groups = write_input(table, rows, output)
    report = genoembed.probe(
        output / "rows.fa",
        labels=output / "rows.tsv",
        layers=layers or "all",
        cv="grouped" if has_groups else "stratified",
        num_folds=folds,
        output=output / "probe",
        overwrite=True,
    )
    for row in report.table():
        print(f"{row['name']}\t{row['mcc']:.3f} ± {row['mcc_sd']:.3f}")
    print(report.recommendation, report.verdict, sep="\n")
    draw(report, output / "promoters_by_layer.png")


if __name__ == "__main__":
    main()
