"""The values that options with a few choices take, one name for each set."""

from __future__ import annotations

from typing import Literal, TypeAlias

FindingPolicy: TypeAlias = Literal["keep", "drop", "error"]
"""Report only; leave out, counted; or stop."""

BaseLabels: TypeAlias = Literal["error", "first"]
"""Labels of bases where a token has several bases: refuse, or take that of its first base."""

LabelKind: TypeAlias = Literal["class", "multilabel", "regression", "token", "none"]
"""One class per sequence; any number of them; one number or several; one class per base; no label."""

UnlabeledPolicy: TypeAlias = Literal["error", "skip"]

FalseNegativePolicy: TypeAlias = Literal["error", "drop", "keep"]
"""A negative that is the query or a positive of its own row, on either strand."""

SplitMethod: TypeAlias = Literal["random", "stratified", "homology", "column"]

TableFormat: TypeAlias = Literal["auto", "tsv", "csv", "parquet"]

TokenPooling: TypeAlias = Literal["mean", "max", "first", "last", "cls", "weighted_mean", "mean_std"]

Fusion: TypeAlias = Literal["none", "concat", "mean", "max", "weighted"]

Strands: TypeAlias = Literal["none", "mean", "concat"]

TransformMethod: TypeAlias = Literal["center", "whiten", "remove-top"]

TransformAxes: TypeAlias = Literal["pca", "zca"]

ContrastScope: TypeAlias = Literal["one_way", "symmetric", "full"]

Distance: TypeAlias = Literal["euclidean", "cosine"]

M3Mode: TypeAlias = Literal["all", "fix_encoder", "dense"]

Distillation: TypeAlias = Literal["m3", "kl"]

Metric: TypeAlias = Literal["cosine", "dot", "euclidean"]

SearchMode: TypeAlias = Literal["vectors", "kmer", "hybrid"]
"""Rank by vectors, by shared k-mers, or by both."""

MapMethod: TypeAlias = Literal["pca", "umap", "tsne"]

Theme: TypeAlias = Literal["light", "dark"]

StartChoice: TypeAlias = Literal["auto", "none"]

ScoreStrands: TypeAlias = Literal["none", "mean"]

ScorePooling: TypeAlias = Literal["mean", "max", "last"]

ComputeDtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]

Fp8Choice: TypeAlias = Literal["auto", "emulate", "off"]

UnsupportedPolicy: TypeAlias = Literal["skip", "error"]

InvalidPolicy: TypeAlias = Literal["error", "skip", "mask"]

DuplicatePolicy: TypeAlias = Literal["error", "suffix"]

EmptyPolicy: TypeAlias = Literal["error", "skip"]

GapPolicy: TypeAlias = Literal["error", "strip"]

RegionPolicy: TypeAlias = Literal["error", "skip"]

ExportFormat: TypeAlias = Literal["h5ad", "npz", "parquet", "csv", "uniprot-h5"]

StorageDtype: TypeAlias = Literal["float32", "float16"]

ProbeTask: TypeAlias = Literal["classification", "regression"]

Folding: TypeAlias = Literal["stratified", "grouped", "homology", "chromosome"]

Preset: TypeAlias = Literal["none", "geneb"]

UnmatchedPolicy: TypeAlias = Literal["error", "warn"]

Pooling: TypeAlias = Literal["mean", "max", "first", "last", "cls", "weighted_mean", "mean_std", "none"]

FailurePolicy: TypeAlias = Literal["stop", "skip"]

Engine: TypeAlias = Literal["local", "ray"]

Packing: TypeAlias = Literal["stream", "bins"]

Optim: TypeAlias = Literal["adamw", "adamw_8bit", "adafactor", "sgd"]

Reporter: TypeAlias = Literal["auto", "none", "tensorboard", "wandb"]

Distributed: TypeAlias = Literal["ddp", "fsdp"]

Task: TypeAlias = Literal[
    "classification", "multilabel", "regression", "token", "lm", "contrastive", "triplet", "retrieval"
]

Tuning: TypeAlias = Literal["full", "frozen", "last_n", "lora"]

Contrast: TypeAlias = Literal["examples", "labels", "views"]

ContrastChoice: TypeAlias = Literal["auto", "examples", "labels", "views"]

ScopeChoice: TypeAlias = Literal["auto", "one_way", "symmetric", "full"]

HomologPolicy: TypeAlias = Literal["ignore", "keep", "drop", "error"]

Schedule: TypeAlias = Literal["cosine", "linear", "constant", "plateau"]

ClassWeights: TypeAlias = Literal["none", "balanced"]
