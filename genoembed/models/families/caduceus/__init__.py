"""Caduceus and PlantCaduceus: Mamba in both directions over single bases.

The *ph* models read one strand, at width ``d_model``. The *ps* models (``rcps``) carry both strands, at width
``2 * d_model``: the second half holds the states of the reverse complement, with positions and channels
reversed, so that the reverse complement of an input gives the reversed output.

Block ``i`` gives what its mixer adds to the residual stream, not the stream itself, as the official
``hidden_states[i + 1]``; ``final`` is the normed sum of the stream and what the last block gives. There is no
mask. Padding is read like any base, on either side since one direction starts there, so that batches must
hold sequences of one length.

Schiff et al. 2024 (Caduceus), Zhai et al. 2025 (PlantCaduceus), Gu and Dao 2023 (Mamba).
"""

from genoembed.models.families.caduceus.configuration import CaduceusConfig
from genoembed.models.families.caduceus.modeling import (
    Caduceus,
    CaduceusForMaskedLM,
    CaduceusForSequenceClassification,
    CaduceusForTokenClassification,
)

AUTO_CLASSES = {
    "AutoConfig": CaduceusConfig,
    "AutoModel": Caduceus,
    "AutoModelForMaskedLM": CaduceusForMaskedLM,
    "AutoModelForSequenceClassification": CaduceusForSequenceClassification,
    "AutoModelForTokenClassification": CaduceusForTokenClassification,
}
