"""Contrast by labels on imbalanced classes: the order of rows that was, and the order that is.

Two orders of the same rows are compared:

- *rounds*, the former order: a round holds four rows of each class that has rows left, classes in random
  order. Rare classes run out first, so the end of an epoch holds one class alone.
- *spread*, the order of the package: the runs of four of each class are equally far apart over the epoch, and
  a batch that still has one class only gets a row of another.

Two things are measured on each table. On all rows, over epochs and seeds: how many steps, and how many
anchors, have no negatives, by the statistics of the losses themselves (batch-hard triplets and supervised
contrast). On the first rows, after fine-tuning in either order: how near to the top the first test row of the
same class stands (MRR: each test row is a query among the others), over all queries and as the mean of
classes. Seed s tests on fold s; rows of a group (``NAME.groups`` beside the table) share a fold. What was
trained is kept in the cache folder, so that a run that was stopped goes on where it was.

Example::

    python benchmarks/contrast_by_labels.py labeled/*.tsv --cache kept/ --threads 1
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
from finetuning import Parts, folds_of, kept_once, write_tables
from labelled_features import LabeledSet, read_labeled
from measuring import Figure, file_results, option_parser, use_threads

import genoembed
from genoembed.finetuning.evaluation import ranking_metrics
from genoembed.finetuning.sampling import ClassSampler, EpochOrder, RankBatches
from genoembed.retrieval.contrastive import batch_hard_triplet, supervised_contrastive

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

logger = logging.getLogger("contrast_by_labels")

ORDERS = ("rounds", "spread")
LOSSES = {"supervised contrast": "contrastive", "batch-hard triplets": "triplet"}
"""Losses that learn from labels, and the task that has each."""
AVERAGES = {"mrr": "of queries", "macro": "of classes"}
BATCHES = (8, 16, 32)
RECIPE: dict[str, Any] = {"layers": "blocks.3", "max_epochs": 2, "rows_per_device": 16}
"""What differs from the package's defaults: an eighth of the blocks and few epochs, for time."""
ROWS_OF_A_CLASS = 4


class RoundSampler(EpochOrder):
    """Order rows in rounds of four of each class that has some left: the former order.

    Args:
        labels: Class of each row.
        seed: Random seed of the order.

    Example:
        >>> order = list(RoundSampler("aaaaaaaaab", seed=0))
        >>> order.index(9) < 5, sorted(order) == list(range(10))
        (True, True)
    """

    def __init__(self, labels: Sequence[object], *, seed: int) -> None:
        rows: dict[object, list[int]] = defaultdict(list)
        for row, label in enumerate(labels):
            rows[label].append(row)
        self._rows_by_class, self._seed = list(rows.values()), seed

    def __len__(self) -> int:
        return sum(map(len, self._rows_by_class))

    def __iter__(self) -> Iterator[int]:
        # draws as the former code did, so that batches are the very ones
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
        left = []
        for rows in self._rows_by_class:
            left.append([rows[place] for place in torch.randperm(len(rows), generator=generator)])
        while left:
            for number in torch.randperm(len(left), generator=generator):
                yield from left[number][:ROWS_OF_A_CLASS]
            left = [rows[ROWS_OF_A_CLASS:] for rows in left if len(rows) > ROWS_OF_A_CLASS]


def build_order(name: str, labels: Sequence[object], *, batch_size: int, seed: int) -> EpochOrder:
    """Make one of ``ORDERS``.

    Args:
        name: Which.
        labels: Class of each row.
        batch_size: Rows of a batch.
        seed: Of the order.

    Returns:
        The order.
    """
    if name == "rounds":
        return RoundSampler(labels, seed=seed)
    return ClassSampler(labels, batch_size=batch_size, seed=seed)


def count_negatives(
    name: str, target: NDArray[np.generic], *, batch_size: int, seeds: Sequence[int], epochs: int
) -> dict[str, float]:
    """Ask both losses how many steps and anchors have no negatives.

    Args:
        name: Of the order.
        target: Class of each row.
        batch_size: Rows of a batch.
        seeds: Of orders.
        epochs: Of each seed.

    Returns:
        ``steps`` and ``anchors``: shares of supervised contrast with positives and no negatives.
        ``steps, triplets`` and ``rows, triplets``: shares without a triplet, because either is missing.
    """
    codes = torch.from_numpy(np.unique(target, return_inverse=True)[1])
    tally: Counter[str] = Counter()
    for seed in seeds:
        order = build_order(name, codes.tolist(), batch_size=batch_size, seed=seed)
        for epoch in range(epochs):
            order.set_epoch(epoch)
            for rows in RankBatches(order, rows=batch_size, least=2):
                tally.update(_count_step(codes[rows]))
    return {
        "steps": tally["steps alone"] / tally["steps"],
        "anchors": tally["anchors alone"] / tally["anchors"],
        "steps, triplets": tally["steps without a triplet"] / tally["steps"],
        "rows, triplets": tally["rows without a triplet"] / tally["rows"],
    }


def _count_step(labels_N: torch.Tensor) -> dict[str, int]:
    """Count what each loss finds in a batch; the vectors do not matter."""
    vectors_ND = torch.eye(len(labels_N))
    contrast = supervised_contrastive(vectors_ND, labels_N).statistics
    triplets = batch_hard_triplet(vectors_ND, labels_N).statistics
    # if one anchor of a batch has negatives, all have; two rows of two classes are no anchors
    anchors_alone = 0 if contrast.negatives_per_query > 0 else contrast.queries
    return {
        "steps": 1,
        "steps alone": int(anchors_alone > 0),
        "anchors": contrast.queries,
        "anchors alone": anchors_alone,
        "steps without a triplet": int(triplets.queries == 0),
        "rows": len(labels_N),
        "rows without a triplet": triplets.left_out,
    }


def class_mrr(scores_NN: torch.Tensor, target: NDArray[np.generic]) -> dict[str, float]:
    """Rank the other rows for each row: where does the first of its class stand?

    Args:
        scores_NN: Of all pairs, higher is closer.
        target: Class of each row.

    Returns:
        ``mrr`` over all rows, ``macro`` the mean of the classes' own. A row that is alone in its class is no
        query.
    """
    codes = torch.from_numpy(np.unique(target, return_inverse=True)[1])
    is_same_NN = codes[:, None] == codes
    others_NN = ~torch.eye(len(codes), dtype=torch.bool)
    of_classes = [
        ranking_metrics(scores_NN[rows], is_same_NN[rows], allowed_QP=others_NN[rows])["mrr"]
        for rows in (codes == code for code in range(int(codes.max()) + 1))
        if int(rows.sum()) > 1
    ]
    every = ranking_metrics(scores_NN, is_same_NN, allowed_QP=others_NN)["mrr"]
    return {"mrr": every, "macro": float(np.mean(of_classes))}


def part_rows(labeled: LabeledSet, *, seed: int) -> Parts:
    """Hold out a fold; nothing is chosen on validation rows, so that both orders take the same steps."""
    is_test = folds_of(labeled) == seed
    return Parts(np.flatnonzero(~is_test), np.empty(0, np.int64), np.flatnonzero(is_test))


def embed_rows(model: str, sequences: Sequence[bytes], **layers: Any) -> torch.Tensor:
    """Embed sequences, float32, ``(N, D)``."""
    return torch.from_numpy(genoembed.embed(sequences, model=model, dtype="float32", **layers).X)


def measure_rows(vectors_ND: torch.Tensor, target: NDArray[np.generic], task: str) -> dict[str, float]:
    """Measure vectors by the distance that the task's loss uses."""
    if task == "contrastive":  # by cosine: of vectors of length 1, the closest has the largest
        vectors_ND = torch.nn.functional.normalize(vectors_ND, dim=1)
    return class_mrr(-torch.cdist(vectors_ND, vectors_ND), target)


def train_and_measure(
    labeled: LabeledSet, name: str, task: str, seed: int, options: argparse.Namespace
) -> dict[str, float]:
    """Fine-tune in one order, and measure test rows.

    Args:
        labeled: Sequences and classes.
        name: Of the order.
        task: Which has the loss.
        seed: Of split, order and training.
        options: Of the command.

    Returns:
        As :func:`class_mrr`.
    """
    folder = options.cache / "run-contrast"
    shutil.rmtree(folder, ignore_errors=True)
    parts = part_rows(labeled, seed=seed)
    files = write_tables(labeled, parts, folder / "tables")

    def new_sampler(
        _lengths: object, *, labels: Sequence[object], batch_size: int, **_: object
    ) -> EpochOrder:
        return build_order(name, labels, batch_size=batch_size, seed=seed)

    with warnings.catch_warnings(), patch("genoembed.finetuning.training.new_sampler", new_sampler):
        warnings.simplefilter("ignore", genoembed.errors.GenoembedWarning)
        report = genoembed.finetune(
            files["train"],
            folder / "run",
            task=task,
            validation_fraction=0.0,
            test_fraction=0.0,
            model=options.model,
            seed=seed,
            threads=options.threads or None,
            **options.recipe,
        )
    vectors_ND = embed_rows(report.output, [labeled.sequences[row] for row in parts.test])
    found = measure_rows(vectors_ND, labeled.target[parts.test], task)
    shutil.rmtree(folder)
    return found


def count_set(labeled: LabeledSet, options: argparse.Namespace) -> list[dict[str, object]]:
    """Compare both orders on all rows of a set, a table row a batch size."""
    counts = Counter(labeled.target.tolist())
    rows = []
    for batch_size in BATCHES:
        found = {
            name: count_negatives(
                name, labeled.target, batch_size=batch_size, seeds=options.seeds, epochs=options.epochs
            )
            for name in ORDERS
        }
        row: dict[str, object] = {
            "set": labeled.name,
            "classes": len(counts),
            "largest class": f"{max(counts.values()) / len(labeled.target):.0%}",
            "batch": batch_size,
            "steps of an epoch": -(-len(labeled.target) // batch_size),
        }
        rows.append(row | {f"{key}: {name}": found[name][key] for key in found["spread"] for name in ORDERS})
    return rows


def train_set(
    labeled: LabeledSet, options: argparse.Namespace, changes: dict[str, list[float]]
) -> list[dict[str, object]]:
    """Train in both orders on each seed, a table row a loss and a way of averaging; collect what changes."""
    told = [labeled.name, labeled.digest, labeled.target.tolist(), options.recipe]
    untrained_ND = embed_rows(options.model, labeled.sequences, layers=options.recipe["layers"])
    rows = []
    for loss in options.losses:
        task = LOSSES[loss]
        runs: dict[str, list[dict[str, float]]] = {"untrained": [], **{name: [] for name in ORDERS}}
        for seed in options.seeds:
            test = part_rows(labeled, seed=seed).test
            runs["untrained"].append(measure_rows(untrained_ND[test], labeled.target[test], task))
            for name in ORDERS:
                runs[name].append(
                    kept_once(
                        f"contrast-{labeled.name}-{task}-{name}-{seed}",
                        [*told, task, name, seed],
                        options,
                        lambda n=name, t=task, s=seed: train_and_measure(labeled, n, t, s, options),
                    )
                )
                logger.info("%s, %s, %s, seed %d: %s", labeled.name, loss, name, seed, runs[name][-1])
        for average, title in AVERAGES.items():
            values = {name: np.array([run[average] for run in found]) for name, found in runs.items()}
            change = values["spread"] - values["rounds"]
            changes[title] += change.tolist()
            row = {"set": labeled.name, "rows": len(labeled.target), "loss": loss, "MRR": title}
            rows.append(row | {name: _cell(found) for name, found in values.items()} | _changed(change))
    return rows


def _changed(change: NDArray[np.float64]) -> dict[str, object]:
    """Describe differences between pairs of runs that share set, loss and seed."""
    return {
        "spread - rounds": _cell(change, sign="+"),
        "spread better": f"{sum(change > 0)} of {len(change)}",
    }


def _cell(values: NDArray[np.float64], *, sign: str = "") -> str:
    spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.3f}{spread}"


def cut(labeled: LabeledSet, *, rows: int, bases: int) -> LabeledSet:
    """Keep the first rows, and the first bases of each."""
    return replace(
        labeled,
        sequences=tuple(sequence[:bases] for sequence in labeled.sequences[:rows]),
        target=labeled.target[:rows],
        groups=None if labeled.groups is None else labeled.groups[:rows],
    )


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = option_parser(__doc__)
    parser.add_argument("tables", type=Path, nargs="+", help="NAME.tsv, perhaps with NAME.groups beside it")
    parser.add_argument("--cache", type=Path, required=True, help="folder for what was measured")
    parser.add_argument("--model", default="genoembed-mini")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="below 5")
    parser.add_argument("--epochs", type=int, default=3, help="of each seed, to count in")
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--max-epochs", type=int, default=RECIPE["max_epochs"], help="to train for")
    parser.add_argument("--name", default="contrast_by_labels", help="of the files")
    parser.add_argument("--max-rows", type=int, default=400, help="of a set, to train on and to test")
    parser.add_argument("--max-bases", type=int, default=81, help="of a sequence")
    options = parser.parse_args(arguments)
    options.recipe = RECIPE | {"max_epochs": options.max_epochs}
    if options.quick:
        options.recipe = {"max_steps": 2, "rows_per_device": 8, "layers": "final"}
        options.seeds, options.epochs, options.max_rows, options.max_bases = [0], 1, 60, 20
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, train, print, file."""
    options = read_options(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("httpx", "genoembed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    use_threads(options.threads)
    options.cache.mkdir(parents=True, exist_ok=True)
    counted: list[dict[str, object]] = []
    trained: list[dict[str, object]] = []
    changes: dict[str, list[float]] = {title: [] for title in AVERAGES.values()}
    for path in options.tables:
        labeled = read_labeled(path)
        counted += count_set(labeled, options)
        few = cut(labeled, rows=options.max_rows, bases=options.max_bases)
        trained += train_set(few, options, changes)
    figures = [
        Figure(
            name=f"steps without negatives, {row['set']}, batches of {row['batch']}", value=share, at_most=0
        )
        for row in counted
        if isinstance(share := row["steps: spread"], float)
    ]
    together = [
        {"MRR": title, "pairs of runs": len(change)}
        | _changed(np.array(change))
        | {"standard error": float(np.std(change) / max(1, len(change) - 1) ** 0.5)}
        for title, change in changes.items()
    ]
    options.tables = [path.stem for path in options.tables]
    name = options.name
    del options.cache, options.rounds, options.name
    file_results(
        name,
        "Contrast by labels: rounds of classes, and classes spread over the epoch",
        options,
        figures=figures,
        tables={
            "Shares without negatives": counted,
            "MRR of test rows": trained,
            "MRR of test rows, all pairs of runs": together,
        },
        remarks=[
            "rounds is the former order, spread that of the package; figures are of spread.",
            "untrained: the same vectors before training.",
            "steps and anchors: supervised contrast, shares without a row of another class in the batch. "
            "steps, triplets and rows, triplets: shares without a triplet, because the batch lacks another "
            "row of the class, or any of another class.",
            "MRR: mean and standard deviation (n - 1) over seeds, each with its own test rows; differences "
            "are taken seed by seed. Training stops after the same number of steps in both orders. Pairs of "
            "one set and seed share test rows, so the standard error of all pairs is too small.",
        ],
        packages=("scikit-learn",),
    )


if __name__ == "__main__":
    main()
