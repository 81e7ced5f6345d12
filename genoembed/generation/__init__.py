"""Sequences that a causal model continues: prompts in, FASTA out.

``read -> tokens -> model, token by token -> draws -> FASTA``. The public call is in ``run``; ``sampler`` runs
the model and draws.
"""
