"""Train models: packed corpora and the trainer."""
