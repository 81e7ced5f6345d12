"""Models: load any genomic language model, name its layers, capture what they return."""
