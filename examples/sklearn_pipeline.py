"""Sequences into scikit-learn: which layer and which pooling tell two phages apart?

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

PHAGES = Path(__file__).parent / "data" / "phages.fa"
FRAGMENTS, FRAGMENT_BP = 16, 100


def fragments(sequence: str) -> list[str]:
    """Cut equally spaced pieces out of a genome."""
    step = (len(sequence) - FRAGMENT_BP) // FRAGMENTS
    return [sequence[index * step :][:FRAGMENT_BP] for index in range(FRAGMENTS)]


def main() -> None:
    """Search, and print what each candidate reaches."""
    records = list(genoembed.read_sequences(PHAGES))
    first, second = records[1], records[4]
    sequences = fragments(first.sequence.decode()) + fragments(second.sequence.decode())
    labels = [first.id] * FRAGMENTS + [second.id] * FRAGMENTS
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
