"""How likely a causal model finds sequences, and what variants change: files in, tables out.

``read -> windows -> batches -> model with its head -> table``. Public calls are in ``sequences`` and
``variants``; ``scorer`` runs the model for both.
"""
