"""``SequenceEmbedder``: sequences to vectors as a scikit-learn transformer.

In: a list, array or Series of sequences. Out: one row per sequence. Works in a ``Pipeline`` and in a search
over ``layer`` and ``pool``; models that were loaded are kept for the next candidate.

N sequences, D features.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genoembed.config.embed import DEFAULT_MODEL
from genoembed.config.fields import named_options
from genoembed.embedding import Embedded, embed, load_for_embedding
from genoembed.errors import ConfigError, MissingExtraError
from genoembed.sequences.reading import list_sequences

try:
    from sklearn.base import BaseEstimator, TransformerMixin
    from sklearn.utils.validation import check_is_fitted
except ImportError as _error:
    raise MissingExtraError(package="scikit-learn", extra="analysis", purpose="genoembed.sklearn") from _error

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from genoembed.models.genomic_model import GenomicModel
    from genoembed.sequences.reading import SequenceInput

__all__ = ["SequenceEmbedder", "clear_models"]

_MODELS_KEPT = 2
_kept: OrderedDict[tuple[object, ...], GenomicModel] = OrderedDict()
_lock = threading.Lock()


class SequenceEmbedder(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Turns sequences into vectors of a layer of a genomic language model.

    Nothing is learned from the data: ``fit`` checks the parameters, loads the model and finds the width. The
    model is kept in this process, not in the estimator, so that estimators are small to copy and to pickle.

    Args:
        model: Bundled or registry name, local folder, or Hugging Face id.
        layer: Block number, module path, glob, ``final`` or ``all``; several in a list. None takes what a
            fine-tuned model was trained with, and ``final`` of any other.
        pool: ``mean``, ``max``, ``first``, ``last``, ``cls``, ``weighted_mean`` or ``mean_std``. None: as
            trained, else ``mean``.
        fuse: How several layers become one vector: ``concat``, ``mean``, ``max`` or ``weighted``. None: as
            trained, else ``concat``.
        fusion_weights: One per layer, for ``weighted``.
        rc: Whether and how the reverse complement takes part: ``none``, ``mean`` or ``concat``.
        skip_first: Bases at the start that pooling leaves out. None: as trained, else 0.
        window: Bases of a window; None is what the model's context holds.
        stride: Bases from window to window.
        carry_state: Run each base once, with the state of the model going on from window to window.
        invalid: SequenceInput outside IUPAC DNA: ``error``, or ``mask`` to N.
        gaps: Gap letters: ``error``, or ``strip``.
        keep_case: Leave soft-masked bases in lower case.
        batch_tokens: Slots of a forward pass; None takes what is fast on the device.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        fp8: FP8 input projections of Evo 2: ``auto``, ``emulate`` or ``off``.
        device: Torch device; None is CUDA if present, else the CPU.
        revision: Branch, tag or commit of a Hugging Face repository.
        trust_remote_code: Run code that the model's repository brings.

    Example:
        >>> SequenceEmbedder(layer=2).fit_transform(["ACGTACGT", "GGCC", "TTTT"]).shape
        (3, 128)
    """

    @named_options()
    def __init__(  # noqa: PLR0913 - a parameter is an argument here, by scikit-learn's rule
        self,
        model: str = DEFAULT_MODEL,
        *,
        layer: int | str | Sequence[int | str] | None = None,
        pool: str | None = None,
        fuse: str | None = None,
        fusion_weights: Sequence[float] | None = None,
        rc: str = "none",
        skip_first: int | None = None,
        window: int | None = None,
        stride: int | None = None,
        carry_state: bool = False,
        invalid: str = "error",
        gaps: str = "error",
        keep_case: bool = False,
        batch_tokens: int | None = None,
        dtype: str = "auto",
        fp8: str = "auto",
        device: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        # scikit-learn copies an estimator by its arguments, so they are kept as they are, and checked in fit
        self.model = model
        self.layer = layer
        self.pool = pool
        self.fuse = fuse
        self.fusion_weights = fusion_weights
        self.rc = rc
        self.skip_first = skip_first
        self.window = window
        self.stride = stride
        self.carry_state = carry_state
        self.invalid = invalid
        self.gaps = gaps
        self.keep_case = keep_case
        self.batch_tokens = batch_tokens
        self.dtype = dtype
        self.fp8 = fp8
        self.device = device
        self.revision = revision
        self.trust_remote_code = trust_remote_code

    def fit(self, X: Iterable[SequenceInput], y: object = None) -> SequenceEmbedder:
        """Check the parameters, load the model, and find what a vector is.

        Args:
            X: Sequences; only the first is embedded, to find the width.
            y: Not looked at.

        Returns:
            The estimator.

        Raises:
            ConfigError: If a parameter is wrong, or X is no list of sequences.
            GenoembedError: If a sequence or the model fails.
        """
        found = self._embed(_sequences(X)[:1])
        self.layers_ = found.layers
        self._feature_names = found.feature_names
        self.n_features_out_ = len(found.feature_names)
        return self

    def transform(self, X: Iterable[SequenceInput]) -> NDArray[np.float32]:
        """Embed sequences.

        Args:
            X: Sequences.

        Returns:
            float32, ``(N, D)``, one row per sequence, in the given order.

        Raises:
            ConfigError: If X is no list of sequences.
            GenoembedError: If a sequence or the model fails.
        """
        check_is_fitted(self, "layers_")
        return self._embed(_sequences(X)).X

    def get_feature_names_out(self, input_features: object = None) -> NDArray[np.object_]:
        """Return the column names.

        Args:
            input_features: Not looked at: the names do not follow from those of the input.

        Returns:
            Such as ``blocks.28.mlp.l3:0``, ``(D,)``.
        """
        check_is_fitted(self, "layers_")
        return np.array(self._feature_names, dtype=object)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        tags.transformer_tags.preserves_dtype = []  # texts have no type of numbers to preserve
        return tags

    def _embed(self, sequences: Sequence[SequenceInput]) -> Embedded:
        if not isinstance(self.model, str):
            message = (
                f"model is {type(self.model).__name__}, expected a name or a folder: estimators are copied; "
                "set model to the name that it was loaded by"
            )
            raise ConfigError(message)
        several = (
            not (self.layer is None or isinstance(self.layer, str | int | np.integer)) or self.layer == "all"
        )
        # an estimator gives one matrix, so several layers become one where nobody says how
        found = embed(
            sequences,
            model=self._loaded(),
            layers=self.layer,
            pooling=self.pool,  # type: ignore[arg-type]
            fusion=self.fuse or ("concat" if several else None),  # type: ignore[arg-type]
            fusion_weights=self.fusion_weights,
            rc=self.rc,
            skip_first=self.skip_first,
            window=self.window,
            stride=self.stride,
            carry_state=self.carry_state,
            invalid=self.invalid,
            gaps=self.gaps,
            keep_case=self.keep_case,
            batch_tokens=self.batch_tokens,
        )
        if len(found.matrices) > 1:
            message = (
                f"layer {self.layer!r} means {len(found.matrices)} layers; set fuse to 'concat' or 'mean'"
            )
            raise ConfigError(message)
        return found

    def _loaded(self) -> GenomicModel:
        """Take the model from those that are kept, or load it."""
        key = (
            self.model,
            _state(self.model),
            self.revision,
            self.dtype,
            self.fp8,
            self.device,
            self.trust_remote_code,
        )
        # threads of a search share the models; without the lock each would load its own
        with _lock:
            if key not in _kept:
                _kept[key] = load_for_embedding(
                    self.model,
                    dtype=self.dtype,
                    fp8=self.fp8,
                    device=self.device,
                    revision=self.revision,
                    trust_remote_code=self.trust_remote_code,
                )
            _kept.move_to_end(key)
            while len(_kept) > _MODELS_KEPT:
                _kept.popitem(last=False)
            return _kept[key]


def clear_models() -> None:
    """Free the models that were kept for the next estimator."""
    with _lock:
        _kept.clear()


def _state(model: str) -> tuple[tuple[str, int, int], ...]:
    """Return what identifies the content of a local folder: a model trained further is loaded again."""
    folder = Path(model)
    if not folder.is_dir():
        return ()
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)


def _sequences(X: object) -> list[Any]:
    found = list_sequences(X, "X")
    if not found:
        message = "X is empty, expected one sequence or more; give one"
        raise ConfigError(message)
    return found
