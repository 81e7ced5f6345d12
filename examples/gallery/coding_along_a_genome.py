"""Where are the genes? Coding probability along a stretch of a genome, from embeddings and from k-mers.

A linear probe learns coding sequence against introns and intergenic sequence from labeled pieces and is then
run over a stretch of genome that it has not seen. The layer is chosen by cross-validation among the pieces.

    python examples/gallery/coding_along_a_genome.py pieces.tsv genome.fa.gz genes.gff3.gz chr05:300001-340000
"""

from __future__ import annotations

import gzip
from pathlib import Path

import click
import numpy as np
from matplotlib.figure import Figure
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import genoembed

SHORTEST, WINDOW, BLOCK = 100, 200, 2_000  # bases: of a labeled piece, a window, a block of the bootstrap
DEFAULT = "blocks.28.mlp.l3", "blocks.24.mlp.l3", "norm"  # what `extract` takes of the bundled model


def words_of(sequence: str, k: int) -> list[str]:
    strands = sequence, sequence[::-1].translate(str.maketrans("ACGT", "TGCA"))
    return [one[at : at + k] for one in strands for at in range(len(one) - k + 1)]


def kmer_shares(sequences: list[str], k: int) -> np.ndarray:
    """Share of each k-mer, both strands counted (as the embeddings are means over both strands)."""
    counter = TfidfVectorizer(analyzer=lambda one: words_of(one, k), use_idf=False, norm="l1")
    return counter.fit_transform(sequences).toarray().astype(np.float32)


def embed(sequences: list[str], layers: tuple[int, ...], folder: Path) -> dict[str, np.ndarray]:
    """One pass over both strands for all layers; a second run finds the file and embeds nothing."""
    fasta, files = folder / "pieces.fa", {"output": folder / "pieces.h5", "resume": True, "overwrite": True}
    fasta.write_text("".join(f">{n}\n{one}\n" for n, one in enumerate(sequences)))
    genoembed.extract(fasta, layers=layers or ("all", "final"), rc="mean", **files)
    with genoembed.open_embeddings(files["output"]) as file:
        found = {layer: file[layer][:] for layer in file.layers}
    if set(DEFAULT) <= set(found):
        found["layers 28, 24 and final"] = np.hstack([found[layer] for layer in DEFAULT])
    return found


def read_region(genome: Path, genes: Path, region: str) -> tuple[str, int, list[tuple[int, int, str]]]:
    """Bases of the region, its first place, and its coding exons (start and end from there, strand)."""
    contig, first, last = region.replace(":", "-").rsplit("-", 2)
    whole = next(one.sequence for one in genoembed.read_sequences(genome) if contig in one.id.split(":"))
    stretch, first = whole[int(first) - 1 : int(last)].decode(), int(first)
    with gzip.open(genes, "rt") if genes.suffix == ".gz" else genes.open() as lines:
        rows = [line.split("\t") for line in lines if line.startswith(f"{contig}\t")]
    spans = [(int(row[3]) - first, int(row[4]) - first + 1, row[6]) for row in rows if row[2] == "CDS"]
    inside = [span for span in spans if span[0] < len(stretch) and span[1] > 0]
    return stretch, first, [(max(start, 0), min(end, len(stretch)), strand) for start, end, strand in inside]


def read_pieces(table: Path, stretch: str, rows: int) -> tuple[list[str], np.ndarray, list]:
    """Labeled pieces that share no 24-mer with the stretch, on either strand; with groups, where known."""
    lines = [line.split("\t") for line in table.read_text().splitlines()[1:]]
    groups_file = table.with_suffix(".groups")
    groups = groups_file.read_text().split() if groups_file.exists() else range(len(lines))
    known = set(words_of(stretch, 24))
    kept = [(*line, group) for line, group in zip(lines, groups, strict=True) if len(line[0]) >= SHORTEST]
    apart = [row for row in kept if known.isdisjoint(words_of(row[0], 24))]
    sequences, labels, numbers = zip(*apart[:rows], strict=True)
    print(f"{len(sequences)} pieces; left out {len(kept) - len(apart)} that share 24-mers with the stretch")
    return list(sequences), np.array(labels) == "cds", list(numbers)


def fit(features: np.ndarray, is_coding: np.ndarray, groups: list) -> GridSearchCV:
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500, class_weight="balanced"))
    folds = StratifiedGroupKFold(3, shuffle=True, random_state=0)
    scores = {"scoring": ("neg_log_loss", "roc_auc"), "refit": "neg_log_loss"}
    search = GridSearchCV(model, {"logisticregression__C": (1e-4, 1e-3, 1e-2, 1e-1)}, cv=folds, **scores)
    return search.fit(features, is_coding, groups=groups)


def interval(truth: np.ndarray, pair: list[np.ndarray], blocks: np.ndarray) -> np.ndarray:
    """95 % of the first one's AUROC less the second's, over 300 draws of whole blocks of windows."""
    rng, found = np.random.default_rng(0), []
    members = [np.flatnonzero(blocks == block) for block in np.unique(blocks)]
    while len(found) < 300:
        rows = np.concatenate([members[at] for at in rng.integers(len(members), size=len(members))])
        if 0 < truth[rows].mean() < 1:
            found.append(np.subtract(*(roc_auc_score(truth[rows], curve[rows]) for curve in pair)))
    return np.quantile(found, (0.025, 0.975))


def draw(curves: dict, places: np.ndarray, spans: list, region: str, file: Path) -> None:
    figure = Figure(figsize=(11, 1 + 1.35 * len(curves)), layout="constrained")
    rows = figure.subplots(len(curves) + 1, sharex=True, height_ratios=[0.55] + [1] * len(curves))
    for start, end, strand in spans:
        rows[0].broken_barh([(start, end - start)], (0.55 if strand == "+" else 0, 0.45), color="#35608d")
        for row in rows[1:]:
            row.axvspan(start, end, color="#35608d", alpha=0.17, linewidth=0)
    rows[0].set(
        yticks=(0.22, 0.77), yticklabels=("- strand", "+ strand"), title="coding exons", ylim=(-0.05, 1.05)
    )
    for row, (name, values) in zip(rows[1:], curves.items(), strict=True):
        row.plot(places, values, color="#b2182b", linewidth=1.2)
        row.set(title=name, ylim=(0, 1), yticks=(0, 0.5, 1), ylabel="P(coding)", xlim=(places[0], places[-1]))
    rows[-1].set_xlabel(f"{region.partition(':')[0]}, kb")
    figure.savefig(file, dpi=85)


@click.command()
@click.argument("pieces", type=click.Path(exists=True, path_type=Path))
@click.argument("genome", type=click.Path(exists=True, path_type=Path))
@click.argument("genes", type=click.Path(exists=True, path_type=Path))
@click.argument("region")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("coding"), help="Folder.")
@click.option("--layer", "layers", multiple=True, type=int, help="A block, such as 28; all without it.")
@click.option("--rows", default=600, show_default=True, help="Labeled pieces to learn from.")
def main(pieces, genome, genes, region, output, layers, rows) -> None:
    """Learn from PIECES, predict along REGION of GENOME, compare with GENES."""
    output.mkdir(parents=True, exist_ok=True)
    stretch, first, exons = read_region(genome, genes, region)
    sequences, is_coding, groups = read_pieces(pieces, stretch, rows)
    starts = np.arange(0, len(stretch) - WINDOW + 1, WINDOW)
    sequences += [stretch[start : start + WINDOW] for start in starts]
    is_exon = np.zeros(len(stretch), dtype=bool)
    for start, end, _ in exons:
        is_exon[start:end] = True
    truth = np.array([is_exon[start : start + WINDOW].mean() >= 0.5 for start in starts])
    matrices, curves, split = embed(sequences, layers, output), {}, len(is_coding)
    best = max(matrices, key=lambda layer: fit(matrices[layer][:split], is_coding, groups).best_score_)
    features = {f"embedding, {best}": matrices[best]}
    features |= {name: kmer_shares(sequences, k) for name, k in (("6-mers", 6), ("4-mers", 4), ("GC", 1))}
    print(f"{region}: {len(starts)} windows of {WINDOW} bases, {truth.mean():.0%} coding")
    print("features\tAUROC, pieces\tAUROC, region\tembedding less this (95 % interval)")
    for name, matrix in features.items():
        model = fit(matrix[:split], is_coding, groups)
        curve = model.predict_proba(matrix[split:])[:, 1]
        score, inner = roc_auc_score(truth, curve), model.cv_results_["mean_test_roc_auc"][model.best_index_]
        curves[f"{name} (AUROC {score:.2f})"] = curve
        pair = [next(iter(curves.values())), curve]
        low, high = interval(truth, pair, starts // BLOCK)
        gain = f"{roc_auc_score(truth, pair[0]) - score:+.3f} ({low:+.3f} to {high:+.3f})"
        print(f"{name}\t{inner:.3f}\t{score:.3f}\t{gain}")
    kb = [((first + start) / 1000, (first + end) / 1000, strand) for start, end, strand in exons]
    draw(curves, (first + starts + WINDOW / 2) / 1000, kb, region, output / "coding_along_a_genome.png")


if __name__ == "__main__":
    main()
