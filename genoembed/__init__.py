"""Embeddings from any layer of any genomic language model: FASTA in, HDF5 out.

Public names load on first use (PEP 562), so that ``import genoembed`` and the command line stay light. After
the import, ``AutoConfig``, ``AutoModel``, ``AutoModelForCausalLM`` and ``AutoTokenizer`` of transformers know
StripedHyena 2 and its tokenizer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from genoembed import registration
from genoembed._version import __version__

if TYPE_CHECKING:
    from genoembed.comparison import CompareReport, compare
    from genoembed.contracts import SequenceRecord
    from genoembed.doctor.run import run_doctor
    from genoembed.editing import AnnotateReport, JoinReport, SubsetReport, annotate, join, subset
    from genoembed.embedding import Embedded, embed
    from genoembed.errors import GenoembedError, GenoembedWarning
    from genoembed.exporting.files import ExportReport, export
    from genoembed.exporting.model_folder import ModelExportReport, export_model
    from genoembed.extraction import ExtractionReport, extract, merge
    from genoembed.finetuning.predict import PredictionReport, predict
    from genoembed.finetuning.run import FinetuneReport, finetune
    from genoembed.generation.run import GenerationReport, generate
    from genoembed.models.describe import ModelLayers, describe_layers
    from genoembed.models.geneb import PublishedModel, published_models
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.models.load import load_model
    from genoembed.models.names import check_model_name, model_names
    from genoembed.models.registry import known_models
    from genoembed.models.striped_hyena2.configuration import StripedHyena2Config
    from genoembed.models.striped_hyena2.convert import convert_checkpoint
    from genoembed.models.striped_hyena2.modeling import StripedHyena2ForCausalLM, StripedHyena2Model
    from genoembed.planning import RunPlan, plan
    from genoembed.plotting.run import PlotReport, plot
    from genoembed.pretraining.run import PretrainReport, pretrain
    from genoembed.probing.report import ProbeReport
    from genoembed.probing.run import probe
    from genoembed.scoring.mutagenesis import MutationReport, score_mutations
    from genoembed.scoring.sequences import ScoreReport, score
    from genoembed.scoring.variants import VariantReport, score_variants
    from genoembed.searching.run import SearchReport, search
    from genoembed.sequences import InputCounts, read_sequences
    from genoembed.serving.app import create_app
    from genoembed.serving.run import ServedModel, ServeReport, serve
    from genoembed.store import EmbeddingFile, Merged, open_embeddings
    from genoembed.tokenization.char import CharTokenizer
    from genoembed.transforms import TransformReport, fit_transform
    from genoembed.verification import Certificate, VerifyReport, certify, verify

_HOMES = {
    "AnnotateReport": "genoembed.editing",
    "Certificate": "genoembed.verification",
    "CharTokenizer": "genoembed.tokenization.char",
    "CompareReport": "genoembed.comparison",
    "Embedded": "genoembed.embedding",
    "EmbeddingFile": "genoembed.store",
    "ExportReport": "genoembed.exporting.files",
    "ExtractionReport": "genoembed.extraction",
    "FinetuneReport": "genoembed.finetuning.run",
    "GenerationReport": "genoembed.generation.run",
    "GenoembedError": "genoembed.errors",
    "GenoembedWarning": "genoembed.errors",
    "GenomicModel": "genoembed.models.genomic_model",
    "InputCounts": "genoembed.sequences",
    "JoinReport": "genoembed.editing",
    "Merged": "genoembed.store",
    "ModelExportReport": "genoembed.exporting.model_folder",
    "ModelLayers": "genoembed.models.describe",
    "MutationReport": "genoembed.scoring.mutagenesis",
    "PlotReport": "genoembed.plotting.run",
    "PredictionReport": "genoembed.finetuning.predict",
    "PretrainReport": "genoembed.pretraining.run",
    "ProbeReport": "genoembed.probing.report",
    "PublishedModel": "genoembed.models.geneb",
    "RunPlan": "genoembed.planning",
    "ScoreReport": "genoembed.scoring.sequences",
    "SearchReport": "genoembed.searching.run",
    "SequenceRecord": "genoembed.contracts",
    "ServeReport": "genoembed.serving.run",
    "ServedModel": "genoembed.serving.run",
    "StripedHyena2Config": "genoembed.models.striped_hyena2.configuration",
    "StripedHyena2ForCausalLM": "genoembed.models.striped_hyena2.modeling",
    "StripedHyena2Model": "genoembed.models.striped_hyena2.modeling",
    "SubsetReport": "genoembed.editing",
    "TransformReport": "genoembed.transforms",
    "VariantReport": "genoembed.scoring.variants",
    "VerifyReport": "genoembed.verification",
    "annotate": "genoembed.editing",
    "certify": "genoembed.verification",
    "check_model_name": "genoembed.models.names",
    "compare": "genoembed.comparison",
    "convert_checkpoint": "genoembed.models.striped_hyena2.convert",
    "create_app": "genoembed.serving.app",
    "describe_layers": "genoembed.models.describe",
    "embed": "genoembed.embedding",
    "export": "genoembed.exporting.files",
    "export_model": "genoembed.exporting.model_folder",
    "extract": "genoembed.extraction",
    "finetune": "genoembed.finetuning.run",
    "fit_transform": "genoembed.transforms",
    "generate": "genoembed.generation.run",
    "join": "genoembed.editing",
    "known_models": "genoembed.models.registry",
    "load_model": "genoembed.models.load",
    "merge": "genoembed.extraction",
    "model_names": "genoembed.models.names",
    "open_embeddings": "genoembed.store",
    "plan": "genoembed.planning",
    "plot": "genoembed.plotting.run",
    "predict": "genoembed.finetuning.predict",
    "pretrain": "genoembed.pretraining.run",
    "probe": "genoembed.probing.run",
    "published_models": "genoembed.models.geneb",
    "read_sequences": "genoembed.sequences",
    "run_doctor": "genoembed.doctor.run",
    "score": "genoembed.scoring.sequences",
    "score_mutations": "genoembed.scoring.mutagenesis",
    "score_variants": "genoembed.scoring.variants",
    "search": "genoembed.searching.run",
    "serve": "genoembed.serving.run",
    "subset": "genoembed.editing",
    "verify": "genoembed.verification",
}

__all__ = [
    "AnnotateReport",
    "Certificate",
    "CharTokenizer",
    "CompareReport",
    "Embedded",
    "EmbeddingFile",
    "ExportReport",
    "ExtractionReport",
    "FinetuneReport",
    "GenerationReport",
    "GenoembedError",
    "GenoembedWarning",
    "GenomicModel",
    "InputCounts",
    "JoinReport",
    "Merged",
    "ModelExportReport",
    "ModelLayers",
    "MutationReport",
    "PlotReport",
    "PredictionReport",
    "PretrainReport",
    "ProbeReport",
    "PublishedModel",
    "RunPlan",
    "ScoreReport",
    "SearchReport",
    "SequenceRecord",
    "ServeReport",
    "ServedModel",
    "StripedHyena2Config",
    "StripedHyena2ForCausalLM",
    "StripedHyena2Model",
    "SubsetReport",
    "TransformReport",
    "VariantReport",
    "VerifyReport",
    "__version__",
    "annotate",
    "certify",
    "check_model_name",
    "compare",
    "convert_checkpoint",
    "create_app",
    "describe_layers",
    "embed",
    "export",
    "export_model",
    "extract",
    "finetune",
    "fit_transform",
    "generate",
    "join",
    "known_models",
    "load_model",
    "merge",
    "model_names",
    "open_embeddings",
    "plan",
    "plot",
    "predict",
    "pretrain",
    "probe",
    "published_models",
    "read_sequences",
    "run_doctor",
    "score",
    "score_mutations",
    "score_variants",
    "search",
    "serve",
    "subset",
    "verify",
]

registration.install()


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        message = f"module 'genoembed' has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
