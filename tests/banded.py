"""One pass over a whole sequence whose attention sees what windows let it see, position by position."""

from __future__ import annotations

import pytest
import torch

from genoembed.models.striped_hyena2.blocks import Attention


def seen_from(position, windows):
    """Walk from window to window until one answers for the position."""
    start, answered = 0, windows.window
    while position >= answered:
        start, answered = start + windows.stride, answered + windows.stride
    return start


class Banded:
    """Attention written out: one softmax for each position, over what it sees."""

    def __init__(self, windows):
        self.windows = windows

    def __call__(self, attention, x_BLD, context):
        query, key, value = attention.split_heads(attention.Wqkv(x_BLD))
        rows = []
        for position in range(x_BLD.shape[1]):
            first = seen_from(position, self.windows)
            places = torch.arange(position + 1 - first)[None]
            now = attention.rotary_emb(query[:, position : position + 1], places[:, -1:])
            before = attention.rotary_emb(key[:, first : position + 1], places)
            scores = (now * before).sum(-1) * now.shape[-1] ** -0.5
            rows.append((scores.softmax(1)[..., None] * value[:, first : position + 1]).sum(1))
        return attention.out_proj(torch.stack(rows, dim=1).flatten(2))


def banded(model, ids, windows):
    """Run a StripedHyena at once, its attention cut to windows."""
    oracle = Banded(windows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attention, "forward", lambda self, x, context: oracle(self, x, context))
        return model(ids, output_hidden_states=True)
