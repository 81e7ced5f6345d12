"""``probe``: which layer of a model predicts a label, compared with plain sequence features.

``extract (all layers, one pass) -> rows with a label -> folds -> sweep -> baselines -> report``. The vectors
stay in their file, and layers are read from it one at a time.
"""

from __future__ import annotations
