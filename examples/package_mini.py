"""Package a trained model as the bundled one is: float16 weights, tokenizer, and a known answer.

The known answer is a vector that `genoembed doctor` compares with. docs/PRETRAINING.md has the commands that
train the bundled model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
from safetensors.torch import save_file

import genoembed
from genoembed.doctor.checks import embed_sequences
from genoembed.doctor.results import KNOWN_ANSWER
from genoembed.models.provenance import weights_digest
from genoembed.models.registry import BUNDLED_FACTS, read_bundled_facts

if TYPE_CHECKING:
    from collections.abc import Sequence

KNOWN_SEQUENCE = (
    "GAGTTTTATCGCTTCCATGACGCAGAAGTTAACACTTTCGGATATTTCTGATGAGTCGAAAAATTATCTTGATAAAGCAGGAATTACTACTGCTTGTTTAC"
)
"""The first 101 bases of phage phiX174 (NC_001422)."""
KNOWN_LAYER = "blocks.28.mlp.l3"
FLOAT32_TENSORS = ("log_poles", "residues", "inv_freq")


def package(
    trained: Path,
    target: Path,
    *,
    layer: str = KNOWN_LAYER,
    context: int | None = None,
    vectors: Sequence[str] = (),
) -> None:
    """Write the model in `trained` to `target` as float16, with its tokenizer and a known answer.

    Weights that are there already become earlier ones, whose files genoembed recognizes.
    """
    facts, replaced = read_bundled_facts(target), weights_digest(target)
    model = genoembed.StripedHyena2ForCausalLM.from_pretrained(trained, dtype=torch.float32)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.contiguous() if name.endswith(FLOAT32_TENSORS) else tensor.half()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)
    if context is not None:
        model.config.max_position_embeddings = context
    model.config.architectures = ["StripedHyena2ForCausalLM"]
    model.config.save_pretrained(target)
    genoembed.CharTokenizer().save_pretrained(target)
    if vectors:
        fusion = "concat" if len(vectors) > 1 else "none"
        facts["vectors"] = {"layers": list(vectors), "pooling": "mean", "fusion": fusion}
    if replaced not in ("", weights_digest(target), *facts["earlier_weights"]):
        facts["earlier_weights"].append(replaced)
    (target / BUNDLED_FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    loaded = genoembed.load_model(str(target), device="cpu", dtype="float32")
    vector = embed_sequences(loaded, [KNOWN_SEQUENCE.encode()], layer)[0]
    answer = {
        "sequence": KNOWN_SEQUENCE,
        "layer": layer,
        "pooling": "mean",
        "weights_sha256": weights_digest(target),
        "vector": [float(f"{value:.7g}") for value in vector.tolist()],
    }
    (target / KNOWN_ANSWER).write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")


@click.command()
@click.argument("trained", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--layer", default=KNOWN_LAYER, show_default=True, help="Layer of the known answer.")
@click.option("--context", type=int, help="Longest input to state, in tokens: the rows of the training.")
@click.option(
    "--vectors",
    multiple=True,
    metavar="LAYER",
    help="Layer of the vectors where none is named; several are concatenated.",
)
def main(trained: Path, target: Path, *, layer: str, context: int | None, vectors: tuple[str, ...]) -> None:
    """Package the model in the folder TRAINED as the folder TARGET."""
    package(trained, target, layer=layer, context=context, vectors=vectors)
    click.echo(f"{target}: {sum(path.stat().st_size for path in target.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
