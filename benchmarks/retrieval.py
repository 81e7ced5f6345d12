"""Finding the source, or the family, of a mutated fragment: retrieval heads before and after training.

In: ``NAME.tsv`` with sequences and ``NAME.groups`` with families beside it. A document is the first bases
of a sequence. A query is a fragment of a document at a random place, with substitutions at a rate. Whole
families are held out: a fifth for testing, some of the rest for validation; ``genoembed.finetune`` learns
from the others. Every document is in the index that test queries search. Two questions are asked of each
ranking:

- *source*: where the document that the fragment was cut from stands;
- *family*: with that document left out, where the first other one of its family stands (only queries that
  have such).

Beside the heads (dense, sparse, multi-vector, and their sum at BGE-M3's weights and at those chosen by
validation queries) stands the Jaccard index of sets of canonical k-mers, for several k, on the same queries
and documents. What is measured is kept in the cache folder.

Example::

    python benchmarks/retrieval.py labeled/amr_class.tsv --cache kept/ \
        --json benchmarks/results/retrieval.json --markdown benchmarks/results/retrieval.md
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import time
import warnings
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from describe_machine import PACKAGES, describe_machine
from finetuning import kept_once
from labelled_features import read_labeled
from measuring import row_table
from threadpoolctl import threadpool_limits

import genoembed
from genoembed import load_model
from genoembed.config.finetune import EncoderConfig
from genoembed.config.retrieval import M3HeadsConfig
from genoembed.finetuning.collate import GroupCollator, PaddedCollator, encode_example
from genoembed.finetuning.evaluation import ranking_metrics
from genoembed.models.trained_folder import read_finetuned
from genoembed.probing.cross_validation import split_folds
from genoembed.retrieval.heads import M3Heads
from genoembed.retrieval.m3 import M3Loss, M3Vectors, add_scores, head_scores, join_vectors
from genoembed.retrieval.models import RetrievalModel, saved_weights
from genoembed.retrieval.terms import NO_TERM, KmerTerms
from genoembed.retrieval.weights import HybridWeights, choose_weights
from genoembed.tokenization.hf import build_encoder
from genoembed.training.augment import Augmented, point_mutations
from genoembed.training.encoder import Encoder, load_encoder, load_heads

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from labelled_features import LabeledSet
    from numpy.typing import NDArray

logger = logging.getLogger("retrieval")

RATES = (0.05, 0.15, 0.3)
JACCARD_KS = (5, 7, 9, 11)
MODES: dict[str, dict[str, Any]] = {
    "all heads": {"mode": "all"},
    "frozen encoder": {"mode": "fix_encoder"},
    "dense only": {"mode": "dense"},
}
RECIPE: dict[str, Any] = {
    "max_epochs": 3,
    "rows_per_device": 32,
    "train_group_size": 1,
    "layers": "blocks.16.pre_norm",
    "learning_rate": 5e-4,
}
USUAL, OWN = "hybrid, 1 : 0.3 : 1", "hybrid, own weights"
"""Names of the sums: at BGE-M3's weights, and at those that validation queries chose."""
TEST_FOLDS, VALIDATION_FOLDS = 5, 8
ROWS_AT_ONCE = 32


class Query(NamedTuple):
    """A mutated fragment."""

    sequence: bytes
    document: int
    """Where it was cut from."""
    rate: float


class Sides(NamedTuple):
    """Documents by side."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def part_families(groups: NDArray[np.int64], *, seed: int) -> Sides:
    """Hold out whole families.

    Args:
        groups: Family of each document.
        seed: Decides which.

    Returns:
        Documents by side, ascending.
    """
    # families of several documents, and single ones, are spread evenly
    sizes = np.bincount(groups)[groups]
    is_shared = np.where(sizes > 1, "shared", "single")
    test = split_folds(is_shared, groups=groups, num_folds=TEST_FOLDS, seed=seed) == 0
    rest = np.flatnonzero(~test)
    inner = split_folds(is_shared[rest], groups=groups[rest], num_folds=VALIDATION_FOLDS, seed=seed)
    return Sides(rest[inner != 0], rest[inner == 0], np.flatnonzero(test))


def cut_query(document: bytes, number: int, rng: np.random.Generator, *, bases: int, rate: float) -> Query:
    """Cut a fragment at a random place and mutate it.

    Args:
        document: At least one base.
        number: Of the document.
        rng: Source of chance.
        bases: Of the fragment, or of the document if that is shorter.
        rate: Probability that a base is replaced by another one.

    Returns:
        The query.
    """
    start = int(rng.integers(max(len(document) - bases, 0) + 1))
    fragment = Augmented(document[start : start + bases])
    return Query(point_mutations(fragment, rng, rate=rate).sequence, number, rate)


def write_examples(
    path: Path,
    documents: Sequence[bytes],
    groups: NDArray[np.int64],
    rows: NDArray[np.int64],
    *,
    bases: int,
    copies: int,
    seed: int,
) -> Path:
    """Write retrieval examples: queries of several rates, each with its document.

    Args:
        path: JSON lines file.
        documents: All of them.
        groups: Their families: rows of a family are never negatives of one another.
        rows: Documents to cut queries from.
        bases: Of a query.
        copies: Queries a document; their rates take turns.
        seed: Of places and mutations.

    Returns:
        The path.
    """
    rng = np.random.default_rng(seed)
    lines = []
    for copy in range(copies):
        for place, row in enumerate(rows):
            rate = RATES[(copy + place) % len(RATES)]
            query = cut_query(documents[row], int(row), rng, bases=bases, rate=rate)
            example = {"query": query.sequence.decode(), "pos": [documents[row].decode()]}
            lines.append(json.dumps(example | {"group": str(groups[row])}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="ascii")
    return path


def kmer_set(sequence: bytes, k: int) -> frozenset[int]:
    """Collect the canonical k-mers of a sequence.

    Args:
        sequence: DNA.
        k: Bases.

    Returns:
        Their numbers.
    """
    terms = KmerTerms(k=k, num_terms=4**k).of(sequence)
    return frozenset(terms[terms != NO_TERM].tolist())


def jaccard_scores(queries: Sequence[bytes], documents: Sequence[bytes], *, k: int) -> torch.Tensor:
    """Score by the Jaccard index of k-mer sets.

    Args:
        queries: DNA.
        documents: DNA.
        k: Bases of a k-mer.

    Returns:
        float32, shape ``(Q, P)``.
    """
    theirs = [kmer_set(document, k) for document in documents]
    rows = []
    for query in queries:
        mine = kmer_set(query, k)
        shared = [len(mine & other) for other in theirs]
        rows.append([s / max(len(mine) + len(o) - s, 1) for s, o in zip(shared, theirs, strict=True)])
    return torch.tensor(rows)


def measure_ranking(
    scores_QP: torch.Tensor, queries: Sequence[Query], groups: NDArray[np.int64]
) -> dict[str, dict[str, dict[str, float]]]:
    """Measure a ranking by both criteria, over all queries together and by rate.

    Args:
        scores_QP: Of queries and documents.
        queries: The rows.
        groups: Families of the documents.

    Returns:
        Metrics by question, by rate (``all`` for all).
    """
    source_Q = torch.tensor([query.document for query in queries])
    families = torch.from_numpy(groups)
    is_source = torch.arange(len(groups)) == source_Q[:, None]
    is_relative = (families == families[source_Q][:, None]) & ~is_source
    rate_Q = torch.tensor([query.rate for query in queries])
    found: dict[str, dict[str, dict[str, float]]] = {"source": {}, "family": {}}
    for name in ("all", *(f"{rate:.0%}" for rate in RATES)):
        keep = torch.tensor([name in ("all", f"{float(rate):.0%}") for rate in rate_Q])
        if not bool(keep.any()):
            continue
        found["source"][name] = ranking_metrics(scores_QP[keep], is_source[keep])
        if bool(is_relative[keep].any()):
            found["family"][name] = ranking_metrics(
                scores_QP[keep], is_relative[keep], allowed_QP=~is_source[keep]
            )
    return found


class Retriever:
    """A model with retrieval heads, and what makes its batches.

    Args:
        name: A model to start from, or a fine-tuned folder.
        layers: Where a model to start from is cut.
    """

    def __init__(self, name: str, *, layers: str = "final") -> None:
        genomic = load_model(name, dtype="float32", device="cpu")
        facts = read_finetuned(name) if Path(name).is_dir() else None
        if facts is None:
            encoder = Encoder(genomic, EncoderConfig(model=name, tuning="frozen", layers=(layers,)))
            shape: Mapping[str, Any] = {"mode": "all", "term_bases": 9}
            pooling = encoder.pooling
        else:
            encoder, shape, pooling = load_encoder(facts, genomic), facts.values["retrieval"], facts.pooling
        config = M3HeadsConfig(
            pooling=pooling,  # type: ignore[arg-type]
            vector_width=shape.get("vector_width"),
            vector_window=shape.get("vector_window", M3HeadsConfig().vector_window),
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            heads = M3Heads(encoder.width, config, mode=shape["mode"])
        self.model = RetrievalModel(encoder, heads, M3Loss())
        if facts is not None:
            load_heads(self.model, facts)
            self.model.hybrid_weights = saved_weights(facts)
        self.model.eval()
        self._tokens = build_encoder(genomic.tokenizer)
        self._collate = GroupCollator(
            rows=PaddedCollator(pad_token_id=self._tokens.pad_token_id, target="none"),
            terms=KmerTerms(k=shape["term_bases"]),
        )

    @torch.no_grad()
    def represent(self, sequences: Sequence[bytes]) -> M3Vectors:
        """Make the representations of sequences.

        Args:
            sequences: At least one.

        Returns:
            In their order.
        """
        chunks = []
        for start in range(0, len(sequences), ROWS_AT_ONCE):
            part = sequences[start : start + ROWS_AT_ONCE]
            examples = [encode_example(sequence, self._tokens) for sequence in part]
            batch = self._collate.side(examples, part, "")
            chunks.append(self.model(**batch, want="hidden"))
        return join_vectors(chunks)


def measure_heads(
    retriever: Retriever, queries: Sequence[Query], documents: Sequence[bytes], groups: NDArray[np.int64]
) -> dict[str, Any]:
    """Rank with every head, and with all together.

    Args:
        retriever: The model.
        queries: To search with.
        documents: To search.
        groups: Their families.

    Returns:
        As :func:`measure_ranking`, by head.
    """
    by_head = score_heads(retriever, [query.sequence for query in queries], documents)
    scores = dict(by_head)
    if len(by_head) > 1:
        scores[USUAL] = add_scores(by_head, HybridWeights())
        scores[OWN] = add_scores(by_head, retriever.model.hybrid_weights)
    return {name: measure_ranking(values, queries, groups) for name, values in scores.items()}


def score_heads(
    retriever: Retriever, queries: Sequence[bytes], documents: Sequence[bytes]
) -> dict[str, torch.Tensor]:
    """Score documents with every head."""
    return head_scores(retriever.represent(queries), retriever.represent(documents))


def choose_own_weights(
    retriever: Retriever, examples: Path, documents: Sequence[bytes], rows: NDArray[np.int64]
) -> HybridWeights:
    """Choose by validation queries how heads of a model that nothing was trained of are added.

    Args:
        retriever: The model.
        examples: Of :func:`write_examples`.
        documents: All of them.
        rows: Those that the queries were cut from, and search.

    Returns:
        The weights.
    """
    asked = [json.loads(line) for line in examples.read_text().splitlines()]
    there = [documents[row] for row in rows]
    by_head = score_heads(retriever, [example["query"].encode() for example in asked], there)
    relevant = torch.tensor([[text.decode() in example["pos"] for text in there] for example in asked])
    return choose_weights(lambda w: ranking_metrics(add_scores(by_head, w), relevant)["mrr"]).weights


def test_queries(
    documents: Sequence[bytes], rows: NDArray[np.int64], *, bases: int, seed: int
) -> list[Query]:
    """Cut a query of each rate from each document that is held out."""
    rng = np.random.default_rng([seed, 1])
    return [
        cut_query(documents[row], int(row), rng, bases=bases, rate=rate) for row in rows for rate in RATES
    ]


def train_and_measure(
    labeled: LabeledSet, mode: str, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Fine-tune once and measure on held-out families.

    Args:
        labeled: Sequences and families.
        mode: A key of ``MODES``; ``before`` trains nothing.
        seed: Of split, queries and training.
        options: Of the command.

    Returns:
        As :func:`measure_heads`, and what it took.
    """
    documents, groups = documents_of(labeled, options.document_bases), labeled.groups
    assert groups is not None, "main refuses sets without families"
    sides = part_families(groups, seed=seed)
    queries = test_queries(documents, sides.test, bases=options.query_bases, seed=seed)
    if mode == "k-mers":
        texts = [query.sequence for query in queries]
        return {
            f"{k}-mer Jaccard": measure_ranking(jaccard_scores(texts, documents, k=k), queries, groups)
            for k in JACCARD_KS
        }
    recipe = RECIPE | options.recipe
    folder = options.cache / "run-retrieval"
    shutil.rmtree(folder, ignore_errors=True)
    files = {
        side: write_examples(
            folder / "examples" / f"{side}.jsonl", documents, groups, rows,
            bases=options.query_bases, copies=options.copies if side == "train" else 1, seed=seed,
        )
        for side, rows in (("train", sides.train), ("validation", sides.validation))
    }  # fmt: skip
    if mode == "before":
        retriever = Retriever(options.model, layers=recipe["layers"])
        retriever.model.hybrid_weights = choose_own_weights(
            retriever, files["validation"], documents, sides.validation
        )
        heads = measure_heads(retriever, queries, documents, groups)
        return {"heads": heads, "spent": {"hybrid_weights": astuple(retriever.model.hybrid_weights)}}
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", genoembed.errors.GenoembedWarning)
        report = genoembed.finetune(
            files["train"],
            folder / "run",
            task="retrieval",
            validation=files["validation"],
            test_fraction=0.0,
            model=options.model,
            seed=seed,
            threads=options.threads,
            **(recipe | MODES[mode]),
        )
    spent = {
        "cpu_seconds": time.process_time() - started,
        "validation": report.validation,
        "steps": report.steps,
        "best_step": report.best_step,
        "hybrid_weights": report.hybrid_weights,
    }
    found = measure_heads(Retriever(report.output), queries, documents, groups)
    shutil.rmtree(folder)
    return {"heads": found, "spent": spent}


def documents_of(labeled: LabeledSet, bases: int) -> list[bytes]:
    """Take the first bases of each sequence: places of relatives then fit one another."""
    return [sequence[:bases] for sequence in labeled.sequences]


def measure_all(labeled: LabeledSet, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Measure everything, a list item a seed.

    Args:
        labeled: Sequences and families.
        options: Of the command.

    Returns:
        Metrics by head by seed, for k-mers, before, and each mode; ``spent`` for what training took, and the
        weights that were chosen.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    told = [labeled.name, labeled.digest, options.document_bases, options.query_bases]
    for mode in ("k-mers", "before", *options.modes):
        trains = mode in MODES
        settings = RECIPE | options.recipe | (MODES[mode] if trains else {})
        for seed in options.seeds:
            run = kept_once(
                f"retrieval-{mode.replace(' ', '_')}-{seed}",
                [*told, mode, seed, settings, options.copies if trains else 0],
                options,
                lambda m=mode, s=seed: train_and_measure(labeled, m, s, options),
            )
            has_model = "spent" in run
            found.setdefault(mode, []).append(run["heads"] if has_model else run)
            if has_model:
                found.setdefault(f"{mode}, spent", []).append(run["spent"])
            best = {head: values["source"]["all"]["mrr"] for head, values in found[mode][-1].items()}
            logger.info("%s, seed %d: MRR %s", mode, seed, best)
    return found


def to_markdown(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Format results as tables, one per criterion, and one by rate.

    Args:
        found: Of :func:`measure_all`.

    Returns:
        Markdown.
    """
    lines = []
    for question in ("source", "family"):
        rows = []
        for mode, head, runs in _rows(found):
            metrics = [run[head][question]["all"] for run in runs]
            row = {"model": mode, "head": head}
            for title, name in (("recall@1", "recall_at_1"), ("recall@10", "recall_at_10"), ("MRR", "mrr")):
                row[title] = _cell([metric[name] for metric in metrics])
            for rate in (f"{rate:.0%}" for rate in RATES):
                row[f"MRR at {rate}"] = _cell([run[head][question][rate]["mrr"] for run in runs])
            rows.append(row)
        lines += [f"## {question.capitalize()}", "", *row_table(rows), ""]
    return "\n".join(lines)


def _rows(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, str, Sequence[Any]]]:
    modes = [mode for mode in found if not mode.endswith(", spent")]
    return [(mode, head, found[mode]) for mode in modes for head in found[mode][0]]


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path, help="NAME.tsv, with NAME.groups beside it")
    parser.add_argument("--cache", type=Path, required=True, help="folder for what was measured")
    parser.add_argument("--model", default="genoembed-mini")
    parser.add_argument("--modes", nargs="*", choices=list(MODES), default=list(MODES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--document-bases", type=int, default=200)
    parser.add_argument("--query-bases", type=int, default=100)
    parser.add_argument("--copies", type=int, default=2, help="queries of a document to train on")
    parser.add_argument("--max-rows", type=int, help="first sequences only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few rows and steps: does the script work?")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(arguments)
    options.recipe = {}
    if options.quick:
        options.recipe = {"max_steps": 2, "rows_per_device": 4, "layers": "final"}
        options.max_rows, options.seeds, options.modes = options.max_rows or 80, [0], options.modes[:1]
        options.document_bases, options.query_bases = 60, 40
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the files.

    Raises:
        SystemExit: If the set has no families.
    """
    options = read_options(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("genoembed").setLevel(logging.WARNING)
    torch.set_num_threads(options.threads)
    options.cache.mkdir(parents=True, exist_ok=True)
    labeled = read_labeled(options.table, max_rows=options.max_rows)
    if labeled.groups is None:
        raise SystemExit(f"{options.table}: no families; put NAME.groups beside it, a number a row")
    with threadpool_limits(options.threads):
        found = measure_all(labeled, options)
    machine = describe_machine((*PACKAGES, "scikit-learn"))
    machine |= {"threads": options.threads, "note": options.note or "none"}
    sides = part_families(labeled.groups, seed=options.seeds[0])
    told = {
        "set": labeled.name,
        "documents": {name: len(rows) for name, rows in sides._asdict().items()},
        "bases of a document and a query": [options.document_bases, options.query_bases],
        "queries of a document to train on": options.copies,
        "recipe": RECIPE | options.recipe,
        "model": options.model,
        "seeds": options.seeds,
    }
    page = to_markdown(found)
    print(page)
    if options.json:
        values = {"machine": machine, **told, "found": found}
        options.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        head = [
            "# Retrieval of mutated fragments",
            "",
            *(f"- {key}: {value}" for key, value in (machine | told).items()),
        ]
        options.markdown.write_text("\n".join([*head, "", page]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
