"""Nucleotide Transformer v3, pre-trained: convolutions down, a transformer on a short sequence, and up again.

In: ids of any length, without a mask: there is none. The network halves a sequence ``num_downsamples`` times,
so it is filled up with ``<pad>`` on the right to a multiple of ``2**num_downsamples``, and what that adds is
cut off the outputs. The fill is read like any base and moves the vectors near it, so that batches must hold
sequences of one length; a sequence gives the same alone.

Layer ``i`` is transformer block ``i``. One of its vectors stands for ``2**num_downsamples`` bases, and one of
``core.conv_tower_blocks.i`` (before the pooling) or ``core.deconv_tower_blocks.i`` for fewer. Wherever
layers are captured, each is repeated over its bases, so that every base has a vector. ``final`` is the last
block up: a vector of each base, before the head's GELU.
"""

from genoembed.models.families.ntv3.configuration import Ntv3Config
from genoembed.models.families.ntv3.modeling import (
    Ntv3ForMaskedLM,
    Ntv3ForSequenceClassification,
    Ntv3ForTokenClassification,
    Ntv3Model,
)

AUTO_CLASSES = {
    "AutoConfig": Ntv3Config,
    "AutoModel": Ntv3Model,
    "AutoModelForMaskedLM": Ntv3ForMaskedLM,
    "AutoModelForSequenceClassification": Ntv3ForSequenceClassification,
    "AutoModelForTokenClassification": Ntv3ForTokenClassification,
}
