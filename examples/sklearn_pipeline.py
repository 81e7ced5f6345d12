"""Sequences into scikit-learn: which layer and which pooling tell resistance genes from a phage?

Embeds fragments inside a pipeline and searches over layers and poolings by cross-validation.

    python examples/sklearn_pipeline.py
"""

from __future__ import annotations

from pathlib import Path

from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import genoembed
from genoembed.sklearn import SequenceEmbedder

DATA = Path(__file__).parent / "data"
FRAGMENT_BP = 80


def fragments(name: str, number: int) -> list[str]:
    """Take one fragment from each of the first records, or many from one."""
    records = list(genoembed.read_sequences(DATA / name))
    starts = (
        range(0, number * 10 * FRAGMENT_BP, 10 * FRAGMENT_BP) if len(records) < number else [200] * number
    )
    texts = [records[index % len(records)].sequence.decode() for index in range(number)]
    return [text[start : start + FRAGMENT_BP] for text, start in zip(texts, starts, strict=True)]


def main() -> None:
    """Search, and print what each candidate reaches."""
    genes, virus = fragments("bacterial_genes.fa.gz", 14), fragments("virus.fa", 14)
    sequences, labels = genes + virus, ["gene"] * len(genes) + ["virus"] * len(virus)
    pipeline = make_pipeline(SequenceEmbedder("genoembed-mini"), StandardScaler(), LogisticRegression())
    grid = {"sequenceembedder__layer": [4, 28], "sequenceembedder__pool": ["mean", "max"]}
    search = GridSearchCV(pipeline, grid, cv=2).fit(sequences, labels)
    for settings, accuracy in zip(
        search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True
    ):
        layer, pool = settings["sequenceembedder__layer"], settings["sequenceembedder__pool"]
        print(f"layer {layer:2d}  {pool:4s}  accuracy {accuracy:.2f}")
    print(f"best: {search.best_estimator_[0].get_feature_names_out()[0].partition(':')[0]}")


if __name__ == "__main__":
    main()
