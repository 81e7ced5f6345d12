"""Weights of layers in a weighted mean, learned for a label with a linear model on top (a scalar mix).

The mean is ``sum_l a_l z_l`` with ``z_l`` a layer divided by its mean deviation and ``a`` a softmax. The
linear model and ``a`` take turns. With ``a`` fixed, ridge models are fitted on all but one part of the rows,
and each part gets the scores of the model that did not see it, layer by layer. With these scores fixed, the
prediction is linear in ``a``, and its softmax climbs the share of the target that the mean of the scores
explains. So no layer gains weight by fitting the rows that it is judged on.

One layer is read at a time: two readings of all layers a turn. N rows, D features, K columns, L layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from genoembed.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from genoembed.config.choices import ProbeTask


TURNS = 8
"""Turns at most; a turn that gains less than ``LEAST_GAIN`` is the last."""
LEAST_GAIN = 1e-4
PENALTY = 1e-1
"""Of the ridge models, on the mean of the squared errors of standardized features."""
_STEPS = 200
_LEAST_LOGIT = -25.0


def learn_mix(
    features: Mapping[str, NDArray[np.floating]],
    codes: NDArray[np.generic],
    folds: NDArray[np.int64],
    *,
    task: ProbeTask,
    without: int | None = None,
) -> dict[str, float]:
    """Learn how much each layer counts.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> codes = np.arange(60) % 2
        >>> told = rng.normal(size=(60, 3)) + 4 * codes[:, None]
        >>> weights = learn_mix({"noise": rng.normal(size=(60, 3)), "told": told}, codes,
        ...                     np.arange(60) // 2 % 3, task="classification")
        >>> weights["told"] > 0.9
        True
    """
    if not features:
        message = "layers: none to mix, expected at least one; name a layer"
        raise ConfigError(message)
    is_used = np.ones(len(codes), np.bool_) if without is None else folds != without
    wanted = _columns(codes, task)[is_used]
    parts = folds[is_used]
    scales = _spreads(features, is_used)
    names = list(features)
    share = np.full(len(names), 1 / len(names))
    best, best_explained, explained = share, -np.inf, -np.inf
    for _ in range(TURNS):
        scores, target = _scores(features, is_used, wanted, parts, share, scales)
        products = np.einsum("lnk,mnk->lm", scores, scores)
        towards = np.einsum("lnk,nk->l", scores, target)
        total = float((target**2).sum())
        found = _explained(share, products, towards, total)
        if found > best_explained:
            best, best_explained = share, found
        if found < explained + LEAST_GAIN:
            break
        explained = found
        share = _climb(share, products, towards, total)
    weights = best / scales
    weights = weights / weights.sum() if weights.any() else best
    return dict(zip(names, weights.tolist(), strict=True))


def mix_layers(
    features: Mapping[str, NDArray[np.floating]], weights: Mapping[str, float]
) -> NDArray[np.float32]:
    """Take the weighted mean of layers, one in memory at a time.

    Example:
        >>> mix_layers({"a": np.array([[4.0]]), "b": np.array([[8.0]])}, {"a": 0.75, "b": 0.25}).tolist()
        [[5.0]]
    """
    mixed: NDArray[np.float64] | None = None
    for name, weight in weights.items():
        if weight == 0 and mixed is not None:
            continue
        part = np.asarray(features[name]).astype(np.float64) * weight
        mixed = part if mixed is None else mixed + part
    assert mixed is not None, "a mix has at least one layer"
    return mixed.astype(np.float32)


def _columns(codes: NDArray[np.generic], task: ProbeTask) -> NDArray[np.float64]:
    if task == "regression":
        return codes.astype(np.float64)[:, None]
    classes, numbers = np.unique(codes, return_inverse=True)
    columns: NDArray[np.float64] = np.eye(len(classes))[numbers.reshape(-1)]
    return columns


def _spreads(features: Mapping[str, NDArray[np.floating]], is_used: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Compute the root mean variance of each layer's features; infinity for one that never varies."""
    sizes = []
    for name in features:
        layer = np.asarray(features[name])[is_used].astype(np.float64)
        variance = float(layer.var(axis=0).mean())
        sizes.append(np.sqrt(variance) if variance > 0 else np.inf)
    return np.array(sizes)


def _scores(
    features: Mapping[str, NDArray[np.floating]],
    is_used: NDArray[np.bool_],
    wanted: NDArray[np.float64],
    parts: NDArray[np.int64],
    share: NDArray[np.float64],
    scales: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit on all parts but one, in turn; what each layer adds to the scores of that part.

    Gives ``(L, N, K)``, and the target without the means that the models were given, ``(N, K)``.
    """
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    mixed: NDArray[np.float64] = np.zeros(1)
    for name, weight in zip(features, share / scales, strict=True):
        mixed = mixed + np.asarray(features[name])[is_used].astype(np.float64) * weight
    scaler = StandardScaler()
    mixed = scaler.fit_transform(mixed)
    target = wanted.copy()
    models = {}
    for part in np.unique(parts):
        is_fitted = parts != part
        center = wanted[is_fitted].mean(axis=0)
        target[~is_fitted] -= center
        ridge = Ridge(alpha=PENALTY * int(is_fitted.sum()), fit_intercept=False)
        weights = ridge.fit(mixed[is_fitted], wanted[is_fitted] - center).coef_
        models[part] = np.atleast_2d(weights).T / scaler.scale_[:, None]
    scores = np.zeros((len(share), *wanted.shape))
    for row, name in enumerate(features):
        layer = np.asarray(features[name])[is_used].astype(np.float64)
        layer = (layer - layer.mean(axis=0)) / scales[row]
        for part, model in models.items():
            scores[row, parts == part] = layer[parts == part] @ model
    return scores, target


def _explained(
    share: NDArray[np.float64], products: NDArray[np.float64], towards: NDArray[np.float64], total: float
) -> float:
    """Compute the share of the target that the mean of the scores explains, at its best scale."""
    along, square = float(towards @ share), float(share @ products @ share)
    return max(along, 0.0) ** 2 / (square * total) if square > 0 and total > 0 else 0.0


def _climb(
    share: NDArray[np.float64], products: NDArray[np.float64], towards: NDArray[np.float64], total: float
) -> NDArray[np.float64]:
    """Raise the explained share by steps of the softmax's logits.

    The slope is that of the logarithm by the weights themselves (exponentiated gradient); its mean under the
    weights is 0.
    """
    logits = np.maximum(np.log(share), _LEAST_LOGIT)
    now, step = _explained(share, products, towards, total), 1.0
    for _ in range(_STEPS):
        along, square = float(towards @ share), float(share @ products @ share)
        if along <= 0 or square <= 0:
            break
        slope = towards / along - products @ share / square
        tried_logits = np.maximum(logits + step * slope, _LEAST_LOGIT)
        tried_logits -= np.log(np.exp(tried_logits - tried_logits.max()).sum()) + tried_logits.max()
        tried = np.exp(tried_logits)
        found = _explained(tried, products, towards, total)
        if found > now:
            logits, share, now, step = tried_logits, tried, found, step * 1.5
        else:
            step /= 4
            if step < 1e-6:
                break
    return share
