"""Which ribosomal RNA is this? A map of windows, and how well embeddings and k-mers tell the kinds apart.

The layer and the penalty are chosen on the first quarter of the rows; scores are cross-validated on the
others. The map is t-SNE of the same features.

    python examples/gallery/rrna_map.py rrna.tsv
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from matplotlib.figure import Figure
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

import genoembed

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")
DEFAULT = "blocks.28.mlp.l3", "blocks.24.mlp.l3", "norm"  # what `extract` takes of the bundled model
NEAREST = make_pipeline(StandardScaler(with_std=False), KNeighborsClassifier(5, metric="cosine"))


def words_of(sequence: str, k: int) -> list[str]:
    strands = sequence, sequence[::-1].translate(str.maketrans("ACGT", "TGCA"))
    return [one[at : at + k] for one in strands for at in range(len(one) - k + 1)]


def kmer_shares(sequences: list[str], k: int) -> np.ndarray:
    """Share of each k-mer, both strands counted (as the embeddings are means over both strands)."""
    counter = TfidfVectorizer(analyzer=lambda one: words_of(one, k), use_idf=False, norm="l1")
    return counter.fit_transform(sequences).toarray().astype(np.float32)


def embed(sequences: list[str], layers: tuple[int, ...], folder: Path) -> dict[str, np.ndarray]:
    """One pass over both strands for all layers; a second run finds the file and embeds nothing."""
    (folder / "windows.fa").write_text("".join(f">{n}\n{one}\n" for n, one in enumerate(sequences)))
    files = {"output": folder / "windows.h5", "resume": True, "overwrite": True}
    genoembed.extract(folder / "windows.fa", layers=layers or ("all", "final"), rc="mean", **files)
    with genoembed.open_embeddings(files["output"]) as file:
        found = {layer: file[layer][:] for layer in file.layers}
    if set(DEFAULT) <= set(found):
        found["layers 28, 24 and final"] = np.hstack([found[layer] for layer in DEFAULT])
    return found


def choose(features: np.ndarray, labels: np.ndarray) -> tuple[float, Pipeline]:
    """The best linear probe on rows that are not scored later: its score, and the probe to fit anew."""
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
        {"logisticregression__C": (1e-3, 1e-2, 1e-1)},
        scoring="matthews_corrcoef",
        cv=StratifiedKFold(3, shuffle=True, random_state=0),
    ).fit(features, labels)
    return search.best_score_, search.best_estimator_


def draw(matrices: dict[str, np.ndarray], labels: np.ndarray, titles: dict[str, str], file: Path) -> None:
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    panels = figure.subplots(1, len(matrices))
    for panel, (name, matrix) in zip(panels, matrices.items(), strict=True):
        centered = matrix - matrix.mean(axis=0)
        perplexity = min(30, len(labels) // 4)
        plane = TSNE(metric="cosine", perplexity=perplexity, init="pca", random_state=0).fit_transform(
            centered
        )
        for label, color in zip(np.unique(labels), COLORS, strict=False):
            rows = labels == label
            panel.scatter(*plane[rows].T, s=11, color=color, label=label, linewidth=0, alpha=0.8)
        panel.set(xticks=(), yticks=(), xlabel="t-SNE 1", ylabel="t-SNE 2")
        panel.set_title(titles[name], fontsize=10)
    handles, words = panels[0].get_legend_handles_labels()
    figure.legend(handles, words, loc="outside lower center", ncols=5, frameon=False, markerscale=2)
    figure.savefig(file, dpi=100)


@click.command()
@click.argument("table", type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("rrna"), help="Folder.")
@click.option("--layer", "layers", multiple=True, type=int, help="A block, such as 28; all without it.")
@click.option("--rows", default=400, show_default=True, help="Rows of the table.")
def main(table: Path, output: Path, layers: tuple[int, ...], rows: int) -> None:
    """Map and classify the windows of TABLE (sequence, tab, label)."""
    output.mkdir(parents=True, exist_ok=True)
    lines = [line.split("\t") for line in table.read_text().splitlines()[1 : rows + 1]]
    sequences, labels = [line[0] for line in lines], np.array([line[1] for line in lines])
    aside = len(labels) // 4
    by_layer = embed(sequences, layers, output)
    chosen = {layer: choose(matrix[:aside], labels[:aside]) for layer, matrix in by_layer.items()}
    best = max(chosen, key=lambda layer: chosen[layer][0])
    ours = f"embedding, {best}"
    features = {ours: by_layer[best]}
    features |= {name: kmer_shares(sequences, k) for name, k in (("6-mers", 6), ("4-mers", 4), ("GC", 1))}
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    print(f"{len(labels) - aside} windows scored; layer and penalties chosen on {aside} others")
    print("features\tMCC, linear probe\tMCC, 5 nearest")
    titles = {}
    for name, matrix in features.items():
        probe = choose(matrix[:aside], labels[:aside])[1]
        scores = [
            cross_val_score(one, matrix[aside:], labels[aside:], cv=folds, scoring="matthews_corrcoef")
            for one in (probe, NEAREST)
        ]
        print("\t".join([name, *(f"{score.mean():.3f} ± {score.std(ddof=1):.3f}" for score in scores)]))
        titles[name] = f"{name}: MCC {scores[0].mean():.2f} (linear), {scores[1].mean():.2f} (5 nearest)"
    shown = {name: features[name] for name in (ours, "6-mers")}
    draw(shown, labels, titles, output / "rrna_map.png")


if __name__ == "__main__":
    main()
