"""The metrics of each task, and measuring a model by them on held-out rows, as ``predict`` would use it.

In: a model in eval mode and rows, or predictions and truth. Out: metrics by name. Promised: sequences longer
than the context are seen whole, in windows; nothing is augmented, except where two views of a sequence are
compared, and these are the same at each evaluation; vectors that are all alike do not rank well, since a tie
counts against the relevant passage. N rows, C classes, K targets, Q queries, P passages.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from genoembed.contracts import IGNORE_INDEX
from genoembed.errors import ConfigError
from genoembed.finetuning.collate import EncodedExample, PaddedCollator, encode_example
from genoembed.finetuning.rows import check_sequences, group_numbers
from genoembed.finetuning.sampling import ClassSampler
from genoembed.pipeline.batches import run_in_parts
from genoembed.retrieval.candidates import UNKNOWN, sequence_identity
from genoembed.retrieval.m3 import M3Vectors, add_scores, head_scores, join_vectors
from genoembed.retrieval.models import RetrievalModel
from genoembed.retrieval.weights import ChosenWeights, choose_weights
from genoembed.training.augment import Augmented, augment, augmentation_rng

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from genoembed.config.labeled import AugmentConfig
    from genoembed.finetuning.collate import GroupCollator
    from genoembed.finetuning.labeled import LabeledSequence
    from genoembed.finetuning.labels import LabelSpace
    from genoembed.finetuning.models import CausalModel, PredictionModel
    from genoembed.finetuning.pairs import RetrievalExample
    from genoembed.finetuning.rows import LabelEncoder
    from genoembed.retrieval.models import ComparingModel, ContrastModel
    from genoembed.training.inference import SequenceRunner
    from genoembed.training.start import TokenRules


ModelT_contra = TypeVar("ModelT_contra", contravariant=True)

_AT_ONCE = 256
"""Sequences whose windows are in memory together."""


class Measure(Protocol, Generic[ModelT_contra]):
    """Something that measures a model."""

    def __call__(self, model: ModelT_contra) -> dict[str, float]:
        """Measure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionMeasure:
    """Measures predictions, of sequences or of bases."""

    rows: Sequence[LabeledSequence]
    space: LabelSpace
    runner: SequenceRunner

    def __call__(self, model: PredictionModel) -> dict[str, float]:
        """Measure."""
        if model.per_token:
            logits, predictions, labels = self._tokens(model)
        else:
            labels = torch.from_numpy(np.stack([self.space.encode(row.label) for row in self.rows]))
            found = [
                model(vectors=self.runner.vectors(model, part), want="predict")
                for part in _parts([row.sequence for row in self.rows])
            ]
            logits, predictions = (
                torch.cat([output[name].float().cpu() for output in found])
                for name in ("logits", "predictions")
            )
        head = model.head
        device = head.output.weight.device
        loss = float(head.loss(logits.to(device), labels.to(device)))
        if not math.isfinite(loss):
            return {"loss": loss}  # the trainer ends the run; metrics have no answer to NaN
        if self.space.kind == "regression":
            metrics = number_metrics(labels.numpy(), predictions.numpy())
        elif self.space.kind == "multilabel":
            metrics = multilabel_metrics(labels.numpy(), predictions.numpy())
        else:
            metrics = class_metrics(labels.numpy(), predictions.numpy())
        return _known({**metrics, "loss": loss})

    def _tokens(self, model: PredictionModel) -> tuple[Tensor, Tensor, Tensor]:
        logits, predictions, labels = [], [], []
        for part in _parts(self.rows):
            outputs = self.runner.tokens(model, [row.sequence for row in part])
            for row, output in zip(part, outputs, strict=True):
                # a token of several bases is judged by its first, as it learns (several_bases)
                of_bases = self.space.encode(row.label)[output.spans[:, 0]]
                kept = torch.from_numpy(np.flatnonzero(of_bases != IGNORE_INDEX))
                logits.append(output.values["logits"][kept])
                predictions.append(output.values["predictions"][kept])
                labels.append(torch.from_numpy(of_bases)[kept])
        return torch.cat(logits), torch.cat(predictions), torch.cat(labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class CausalMeasure:
    """Measures a causal model; sequences longer than the context are cut, each piece on its own."""

    rows: Sequence[LabeledSequence]
    rules: TokenRules
    max_tokens: int | None
    rows_at_once: int

    def __call__(self, model: CausalModel) -> dict[str, float]:
        """Measure."""
        device = next(model.parameters()).device
        nats, tokens = 0.0, 0
        pieces = [piece for row in self.rows for piece in self._pieces(row.sequence)]
        # equal lengths together, so little is padded; the longest first, so short memory shows at once
        pieces.sort(key=len, reverse=True)
        collate = PaddedCollator(pad_token_id=self.rules.pad_token_id, target="causal")

        @torch.no_grad()
        def measured(batch: Sequence[EncodedExample]) -> dict[str, Tensor]:
            inputs = {name: tensor.to(device) for name, tensor in collate(batch).items()}
            output: dict[str, Tensor] = model(**inputs, want="predict")
            return output

        for start in range(0, len(pieces), self.rows_at_once):
            for output in run_in_parts(pieces[start : start + self.rows_at_once], measured):
                nats, tokens = nats + float(output["nats"]), tokens + int(output["tokens"])
        # sums over all pieces: a mean of batch means would weigh short batches more
        loss = nats / max(tokens, 1)
        return {"loss": loss, "bits_per_token": loss / math.log(2)}

    def _pieces(self, sequence: bytes) -> list[EncodedExample]:
        ids = self.rules.encode_document(sequence)
        step = self.max_tokens or len(ids)
        return [EncodedExample.of_ids(ids[start : start + step]) for start in range(0, len(ids), step)]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelMeasure:
    """Measures whether the closest other sequences have the same label."""

    rows: Sequence[LabeledSequence]
    runner: SequenceRunner
    batch_rows: int
    """Rows that the loss compares, as in training."""

    def __call__(self, model: ContrastModel) -> dict[str, float]:
        """Measure."""
        vectors = _vectors(model, self.runner, [row.sequence for row in self.rows])
        _, numbers = np.unique([str(row.label) for row in self.rows], return_inverse=True)
        labels = torch.from_numpy(numbers)
        # batches of several rows of several classes, as training has them
        order = torch.tensor(list(ClassSampler(numbers.tolist(), batch_size=self.batch_rows, seed=0)))
        loss = _mean_loss(
            model,
            [({"rows": vectors[part]}, {"labels": labels[part]}) for part in _even(order, self.batch_rows)],
        )
        is_same = labels[:, None] == labels[None]
        others = ~torch.eye(len(labels), dtype=torch.bool)  # a sequence finds itself first
        return ranking_metrics(_similarities(model, vectors, vectors), is_same, allowed_QP=others) | loss


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewMeasure:
    """Measures whether the second view of a sequence finds the first."""

    rows: Sequence[LabeledSequence]
    runner: SequenceRunner
    other: AugmentConfig
    seed: int
    batch_rows: int
    """Sequences that the loss compares, as in training."""

    def __call__(self, model: ContrastModel) -> dict[str, float]:
        """Measure."""
        views = [
            augment(
                Augmented(row.sequence),
                augmentation_rng(seed=self.seed, epoch=0, row=index),
                config=self.other,
            ).sequence
            for index, row in enumerate(self.rows)
        ]
        first = _vectors(model, self.runner, [row.sequence for row in self.rows])
        second = _vectors(model, self.runner, views)
        identities = torch.tensor([sequence_identity(row.sequence) for row in self.rows])
        pairs = torch.stack([first, second], dim=1)
        parts = _even(torch.arange(len(pairs)), self.batch_rows)
        loss = _mean_loss(
            model, [({"rows": pairs[part].flatten(0, 1)}, {"ids": identities[part]}) for part in parts]
        )
        is_same = identities[:, None] == identities[None]
        return ranking_metrics(_similarities(model, second, first), is_same) | loss


class ExampleMeasure:
    """Measures whether queries find their positives among the passages of all rows.

    Passages of the query's own group that are not its positives take no part, and neither does the query.
    """

    def __init__(
        self,
        rows: Sequence[RetrievalExample],
        runner: SequenceRunner,
        *,
        batch_rows: int,
        group_size: int,
        encoder: LabelEncoder | None = None,
        collate: GroupCollator | None = None,
    ) -> None:
        self._runner, self._encoder, self._collate = runner, encoder, collate
        self._queries = [row.query for row in rows]
        by_identity: dict[int, bytes] = {}
        # one passage for equal sequences (strands count as one): copies would compete with each other
        for row in rows:
            for sequence in (*row.pos, *row.neg):
                by_identity.setdefault(sequence_identity(sequence), sequence)
        self._passages = list(by_identity.values())
        column = {identity: index for index, identity in enumerate(by_identity)}
        self._batch_rows = batch_rows
        self._groups = _first_passages(rows, column, size=group_size)
        self._relevant = torch.zeros(len(rows), len(column), dtype=torch.bool)
        self._allowed = torch.ones(len(rows), len(column), dtype=torch.bool)
        groups = group_numbers(rows)
        of_group: dict[int, set[int]] = {}
        for row, group in zip(rows, groups, strict=True):
            of_group.setdefault(group, set()).update(column[sequence_identity(s)] for s in row.pos)
        for index, (row, group) in enumerate(zip(rows, groups, strict=True)):
            right = [column[sequence_identity(sequence)] for sequence in row.pos]
            # positives of another row of the group: neither known to be right nor to be wrong
            out = [] if group < 0 else sorted(of_group[group] - set(right))
            itself = column.get(sequence_identity(row.query))
            self._allowed[index, [*out, *([] if itself is None or itself in right else [itself])]] = False
            self._relevant[index, right] = True
        if encoder is not None:
            check_sequences(
                [*self._queries, *self._passages],
                encoder.encoder,
                max_tokens=encoder.max_tokens,
                max_crop_bp=None,
            )

    def __call__(self, model: ContrastModel | RetrievalModel) -> dict[str, float]:
        """Measure."""
        if self._collate is None:
            query, passage = (_vectors(model, self._runner, side) for side in (self._queries, self._passages))
            loss = self._loss(model, {"query": query}, {"passage": passage})
            return self._rank(_similarities(model, query, passage)) | loss
        assert isinstance(model, RetrievalModel), "only retrieval heads collate"
        query_side, passage_side = self._sides(model)
        by_head = head_scores(query_side, passage_side)
        metrics = self._loss(
            model,
            {f"query.{name}": value for name, value in query_side.tensors().items()},
            {f"passage.{name}": value for name, value in passage_side.tensors().items()},
        )
        metrics |= self._rank(add_scores(by_head, model.hybrid_weights))
        for name, scores in by_head.items():
            found = self._rank(scores)
            metrics |= {f"{name}_{key}": found[key] for key in found if key != "ranked_queries"}
        # the sum of all scores may be perfect by one head, while another has hardly begun to learn
        return metrics | {"heads_mrr": fmean(metrics[f"{name}_mrr"] for name in by_head)}

    def choose_weights(self, model: RetrievalModel) -> tuple[ChosenWeights, dict[str, float]]:
        """Choose how scores are added by these rows; return how well the sum then ranks, too."""
        by_head = head_scores(*self._sides(model))
        chosen = choose_weights(lambda weights: self._rank(add_scores(by_head, weights))["mrr"])
        return chosen, self._rank(add_scores(by_head, chosen.weights))

    def _sides(self, model: RetrievalModel) -> tuple[M3Vectors, M3Vectors]:
        return self._represent(model, self._queries), self._represent(model, self._passages)

    def _loss(
        self,
        model: ContrastModel | RetrievalModel,
        query: Mapping[str, Tensor],
        passage: Mapping[str, Tensor],
    ) -> dict[str, float]:
        """Take the loss of batches as training has them, each query with its first passages."""
        batches = []
        for part in _even(torch.arange(len(self._queries)), self._batch_rows):
            batch = {name: value[part].flatten() for name, value in self._groups.items()}
            if "teacher_scores" in batch:
                batch["teacher_scores"] = batch["teacher_scores"].unflatten(0, (len(part), -1))
            columns = batch.pop("columns")
            chunk = {name: value[part] for name, value in query.items()}
            batches.append((chunk | {name: value[columns] for name, value in passage.items()}, batch))
        return _mean_loss(model, batches)

    def _rank(self, scores: Tensor) -> dict[str, float]:
        return ranking_metrics(scores, self._relevant, allowed_QP=self._allowed)

    @torch.no_grad()
    def _represent(self, model: ContrastModel | RetrievalModel, sequences: Sequence[bytes]) -> M3Vectors:
        collate, encoder = self._collate, self._encoder
        assert collate is not None, "only retrieval heads come here"
        assert encoder is not None, "only retrieval heads come here"
        device = next(model.parameters()).device

        def represented(part: Sequence[bytes]) -> dict[str, Tensor]:
            examples = [encode_example(s, encoder.encoder, skip_first=encoder.skip_first) for s in part]
            batch = collate.side(examples, part, "")
            output = model(**{name: value.to(device) for name, value in batch.items()}, want="hidden")
            return {name: value.cpu() for name, value in output.items()}

        order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
        chunks: list[dict[str, Tensor]] = []
        rows = self._runner.max_rows or len(order)
        for start in range(0, len(order), rows):
            part = [sequences[index] for index in order[start : start + rows]]
            chunks += run_in_parts(part, represented)
        back = torch.tensor(order).argsort()
        joined = join_vectors(chunks).tensors()
        return M3Vectors(**{name: value[back] for name, value in joined.items()})


def _first_passages(
    rows: Sequence[RetrievalExample], column: Mapping[int, int], *, size: int
) -> dict[str, Tensor]:
    """Group each query with its first positive and first negatives, in the words of :class:`PairIds`."""
    found: dict[str, list[Any]] = {name: [] for name in ("columns", "query_ids", "query_labels")}
    found |= {"passage_ids": [], "passage_labels": [], "passage_mask": [], "teacher_scores": []}
    for row, label in zip(rows, group_numbers(rows), strict=True):
        negatives = row.neg[: size - 1]
        blank = size - 1 - len(negatives)  # filled up with the positive, which the mask leaves out
        known = [sequence_identity(sequence) for sequence in (row.pos[0], *negatives)]
        found["columns"].append([column[identity] for identity in known + known[:1] * blank])
        found["query_ids"].append(sequence_identity(row.query))
        found["query_labels"].append(label)
        found["passage_ids"].append(known + [UNKNOWN] * blank)
        found["passage_labels"].append([label] + [UNKNOWN] * (size - 1))
        found["passage_mask"].append([True] * len(known) + [False] * blank)
        if row.teacher_scores:
            taught = [row.teacher_scores[0], *row.teacher_scores[len(row.pos) :][: len(negatives)]]
            found["teacher_scores"].append(taught + [0.0] * blank)
    # rows with and without a teacher cannot share a batch
    if len(found["teacher_scores"]) < len(rows):
        del found["teacher_scores"]
    return {name: torch.tensor(values) for name, values in found.items()}


def _even(order: Tensor, batch_rows: int) -> Sequence[Tensor]:
    """Cut into batches of about equal size, none above ``batch_rows``: a row by itself has no negative."""
    return order.tensor_split(-(-len(order) // batch_rows))


def _mean_loss(
    model: ContrastModel | RetrievalModel, batches: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]]
) -> dict[str, float]:
    """Average the loss over the queries that were compared with anything."""
    total, count = 0.0, 0
    for chunk, batch in batches:
        with torch.no_grad():
            output = model.contrast_loss([chunk], batch)
        if output.statistics.queries:
            total += float(output.loss) * output.statistics.queries
            count += output.statistics.queries
    return {"loss": total / count} if count else {}


def _vectors(
    model: ContrastModel | RetrievalModel, runner: SequenceRunner, sequences: Sequence[bytes]
) -> Tensor:
    with torch.no_grad():
        found = [
            model(vectors=runner.vectors(model, part), want="predict")["dense"].float().cpu()
            for part in _parts(sequences)
        ]
    return torch.cat(found)


def _similarities(model: ComparingModel, query_ND: Tensor, passage_PD: Tensor) -> Tensor:
    """Score as the loss does: minus Euclidean distances for triplets, else cosines."""
    if model.compares_lengths:
        return -torch.cdist(query_ND, passage_PD)
    if not model.normalizes:
        query_ND, passage_PD = (F.normalize(vectors, dim=-1) for vectors in (query_ND, passage_PD))
    return query_ND @ passage_PD.T


PartT = TypeVar("PartT")


def _parts(items: Sequence[PartT]) -> list[Sequence[PartT]]:
    return [items[start : start + _AT_ONCE] for start in range(0, len(items), _AT_ONCE)]


def _known(metrics: dict[str, float]) -> dict[str, float]:
    """Leave out what could not be measured, such as areas where all rows have one class."""
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


RECALL_AT = (1, 10)


def ranking_metrics(
    scores_QP: Tensor, relevant_QP: Tensor, *, allowed_QP: Tensor | None = None
) -> dict[str, float]:
    """Rank the best relevant passage of each query among the others.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5]])
        >>> ranking_metrics(scores, torch.tensor([[True, False, False], [False, False, True]]))["mrr"]
        0.75
    """
    allowed_QP = torch.ones_like(relevant_QP) if allowed_QP is None else allowed_QP
    relevant_QP = relevant_QP & allowed_QP
    has_relevant_Q = relevant_QP.any(dim=1)
    if not bool(has_relevant_Q.any()):
        message = (
            "ranking: no query has a relevant passage among the others; hold out more rows of each group"
        )
        raise ConfigError(message)
    scores_QP, relevant_QP = scores_QP[has_relevant_Q].float(), relevant_QP[has_relevant_Q]
    others_QP = allowed_QP[has_relevant_Q] & ~relevant_QP
    best_Q = scores_QP.masked_fill(~relevant_QP, -torch.inf).amax(dim=1)
    # not below, rather than above: a tie counts against the query, and so does NaN
    rank_Q = 1 + (others_QP & ~(scores_QP < best_Q[:, None])).sum(dim=1)
    metrics = {"mrr": float((1 / rank_Q.double()).mean())}
    metrics |= {f"recall_at_{k}": float((rank_Q <= k).double().mean()) for k in RECALL_AT}
    return metrics | {"ranked_queries": float(len(rank_Q))}


def class_metrics(true_N: NDArray[np.int64], probability_NC: NDArray[np.floating]) -> dict[str, float]:
    """Compare probabilities of classes with the truth.

    Example:
        >>> found = class_metrics(np.array([0, 1]), np.array([[0.9, 0.1], [0.2, 0.8]]))
        >>> found["accuracy"], found["auroc"]
        (1.0, 1.0)
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    guess_N = probability_NC.argmax(axis=1)
    # two classes have one area: that of the second, by convention the positive one
    hot_NC = np.eye(probability_NC.shape[1], dtype=np.int64)[true_N]
    columns = [1] if probability_NC.shape[1] == 2 else range(probability_NC.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes that do not occur
        return {
            "accuracy": float(accuracy_score(true_N, guess_N)),
            "macro_f1": float(f1_score(true_N, guess_N, average="macro", zero_division=0)),
            "mcc": float(matthews_corrcoef(true_N, guess_N)),
            **_areas(hot_NC, probability_NC, columns),
        }


def multilabel_metrics(
    true_NC: NDArray[np.floating], probability_NC: NDArray[np.floating]
) -> dict[str, float]:
    """Compare probabilities of labels with the truth."""
    from sklearn.metrics import accuracy_score, f1_score

    on_NC, guess_NC = (true_NC > 0.5).astype(int), (probability_NC > 0.5).astype(int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about labels that do not occur
        return {
            "accuracy": float(accuracy_score(on_NC, guess_NC)),
            "macro_f1": float(f1_score(on_NC, guess_NC, average="macro", zero_division=0)),
            **_areas(on_NC, probability_NC, range(on_NC.shape[1])),
        }


def number_metrics(true_NK: NDArray[np.floating], guess_NK: NDArray[np.floating]) -> dict[str, float]:
    """Compare predicted numbers with the true ones.

    Example:
        >>> number_metrics(np.array([[1.0], [2.0], [9.0]]), np.array([[0.0], [1.0], [2.0]]))["spearman"]
        1.0
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import r2_score

    r2 = float(r2_score(true_NK, guess_NK)) if len(true_NK) > 1 else math.nan
    pairs = list(zip(true_NK.T.astype(np.float64), guess_NK.T.astype(np.float64), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about constants
        found = {
            name: [correlation(*pair).statistic if len(true_NK) > 1 else math.nan for pair in pairs]
            for name, correlation in (("pearson", pearsonr), ("spearman", spearmanr))
        }
    # a constant correlates with nothing: 0, where scipy gives NaN, by which no best step can be chosen
    return {name: float(np.nan_to_num(values).mean()) for name, values in found.items()} | {"r2": r2}


def _areas(
    on_NC: NDArray[np.integer], probability_NC: NDArray[np.floating], columns: Sequence[int] | range
) -> dict[str, float]:
    from sklearn.metrics import average_precision_score, roc_auc_score

    # an area is defined where both answers occur; averaging in a 0 or a half for others would bend the mean
    varied = [c for c in columns if 0 < on_NC[:, c].sum() < len(on_NC)]
    if not varied:
        return {"auroc": math.nan, "auprc": math.nan}
    pairs = [(on_NC[:, c], probability_NC[:, c]) for c in varied]
    return {
        "auroc": float(np.mean([roc_auc_score(*pair) for pair in pairs])),
        "auprc": float(np.mean([average_precision_score(*pair) for pair in pairs])),
    }
