"""Train genoembed-mini from scratch and package it: the recipe of the bundled model.

The corpus is a FASTA of training contigs and one of held-out contigs (benchmarks/split_corpus.py makes both):

    python examples/pretrain_mini.py train train.fa heldout.fa runs/mini
    python examples/pretrain_mini.py package runs/mini/final genoembed/models/bundled

Rows are packed once and held in memory, as they were for the bundled weights; for a corpus of your own take
`genoembed pretrain --like evo2_7b --hidden-size 128` (docs/PRETRAINING.md), which reads it as a stream.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
from safetensors.torch import save_file

import genoembed
from genoembed.doctor import KNOWN_ANSWER, embed_sequences
from genoembed.models.provenance import weights_digest
from genoembed.training.datasets import PackedCorpus, cut_documents, random_strands
from genoembed.training.pretraining import PretrainConfig, pretrain_rows

KNOWN_SEQUENCE = (
    "GAGTTTTATCGCTTCCATGACGCAGAAGTTAACACTTTCGGATATTTCTGATGAGTCGAAAAATTATCTTGATAAAGCAGGAATTACTACTGCTTGTTTAC"
)
"""The first 101 bases of phage phiX174 (NC_001422)."""
KNOWN_LAYER = "blocks.28.mlp.l3"
FLOAT32_TENSORS = ("log_poles", "residues", "inv_freq")


def read_contigs(path: Path) -> list[bytes]:
    """Sequences of a FASTA file, upper-cased."""
    return [record.sequence for record in genoembed.read_sequences(path, duplicates="suffix")]


@click.group()
def main() -> None:
    """Train or package the bundled model."""


@main.command()
@click.argument("training", type=click.Path(exists=True, path_type=Path))
@click.argument("heldout", type=click.Path(exists=True, path_type=Path))
@click.argument("output_dir", type=click.Path(path_type=Path))
@click.option("--steps", default=3900, show_default=True, help="Optimizer steps of 4 x window tokens.")
@click.option("--window", default=1024, show_default=True, help="Tokens of a packed row.")
@click.option("--hidden-size", default=128, show_default=True)
@click.option("--layers", default=32, show_default=True, help="Blocks; below 32, the first of Evo 2 7B's.")
@click.option("--heldout-rows", default=96, show_default=True, help="Rows measured while training.")
@click.option("--eval-steps", default=400, show_default=True)
@click.option("--threads", type=int)
@click.option("--compile/--no-compile", "compile_blocks", default=False, help="torch.compile each block.")
@click.option("--resume", is_flag=True, help="Continue from the newest checkpoint in OUTPUT_DIR.")
def train(
    training: Path,
    heldout: Path,
    output_dir: Path,
    *,
    steps: int,
    window: int,
    hidden_size: int,
    layers: int,
    heldout_rows: int,
    eval_steps: int,
    threads: int | None,
    compile_blocks: bool,
    resume: bool,
) -> None:
    """Train on packed windows of TRAINING, measure on HELDOUT, write OUTPUT_DIR."""
    if threads:
        torch.set_num_threads(threads)
    pieces = cut_documents(read_contigs(training), max_length=8 * window, seed=0)
    train_rows = PackedCorpus(random_strands(pieces, seed=1), window=window)
    heldout_pieces = cut_documents(read_contigs(heldout), max_length=window - 1, seed=0)
    torch.manual_seed(0)
    model = genoembed.StripedHyena2ForCausalLM(mini_config(hidden_size, layers))
    pretrain_rows(
        model,
        train_rows,
        PackedCorpus(heldout_pieces[:heldout_rows], window=window),
        config=PretrainConfig(
            max_steps=steps,
            accumulation_steps=1,
            warmup_steps=min(200, steps // 10),
            save_steps=eval_steps,
            eval_steps=eval_steps,
            compile_blocks=compile_blocks,
        ),
        output_dir=output_dir,
        resume=resume,
    )


def mini_config(hidden_size: int, layers: int) -> genoembed.StripedHyena2Config:
    """The pattern of Evo 2 7B at a small width."""
    full = genoembed.StripedHyena2Config()
    idxs = {
        name: [index for index in getattr(full, name) if index < layers]
        for name in ("attn_layer_idxs", "hcl_layer_idxs", "hcm_layer_idxs", "hcs_layer_idxs")
    }
    return genoembed.StripedHyena2Config(
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=2,
        **idxs,
    )


@main.command()
@click.argument("trained", type=click.Path(exists=True, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--layer", default=KNOWN_LAYER, show_default=True, help="Layer of the known answer.")
def package(trained: Path, target: Path, *, layer: str) -> None:
    """Write the model in TRAINED to TARGET as float16, with its tokenizer and a known answer."""
    model = genoembed.StripedHyena2ForCausalLM.from_pretrained(trained, dtype=torch.float32)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.contiguous() if name.endswith(FLOAT32_TENSORS) else tensor.half()
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)
    model.config.architectures = ["StripedHyena2ForCausalLM"]
    model.config.save_pretrained(target)
    genoembed.CharTokenizer().save_pretrained(target)
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
    click.echo(f"{target}: {sum(path.stat().st_size for path in target.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
