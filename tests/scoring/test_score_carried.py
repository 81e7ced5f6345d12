"""Scores with a state that goes on from window to window."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from genoembed import score
from genoembed.errors import ConfigError
from genoembed.models.language_model import LanguageModel
from genoembed.scoring.scorer import ScorerOptions, SequenceScorer
from tests.banded import banded
from tests.by_hand import STRIPED, model_of, random_dna, reference_of, write_fasta

RECORDS = {"long": random_dna(150, 7), "short": random_dna(30, 8)}


def log_likelihood(sequence: str, window: int, stride: int) -> float:
    """One pass from the start token on; attention sees what windows let it see."""
    ids = torch.tensor([[0, *sequence.encode()]])
    # the start token is in the first window
    windows = SimpleNamespace(window=window + 1, stride=stride)
    model = reference_of(STRIPED).model
    with torch.no_grad():
        hidden = banded(model, ids, windows).last_hidden_state[0]
        logits = hidden.double() @ model.embedding_layer.weight.double().T
    return float(logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None]).sum())


@pytest.mark.parametrize(("window", "stride"), [(40, 25), (40, 40)])
def test_each_base_is_scored_once_after_all_before_it(window, stride, tmp_path) -> None:
    fasta = write_fasta(tmp_path / "in.fa", RECORDS)
    report = score(fasta, model=model_of(STRIPED), window=window, stride=stride, carry_state=True)
    expected = [log_likelihood(text, window, stride) for text in RECORDS.values()]
    np.testing.assert_allclose([row.log_likelihood for row in report.rows], expected, rtol=1e-5)
    assert [row.scored for row in report.rows] == [150, 30]
    assert report.stats.real_tokens == 182


def test_a_model_with_a_head_of_its_own_is_refused() -> None:
    model = LanguageModel(model_of(STRIPED))
    model._whole = model.model.module
    with pytest.raises(ConfigError, match=r"it cannot .*leave carry_state out"):
        SequenceScorer(model, ScorerOptions(carry_state=True))
