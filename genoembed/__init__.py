"""Embeddings from any layer of any genomic language model."""
