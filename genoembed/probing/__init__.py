"""``probe``: which layer of a model carries a label, measured beside what plain sequence features reach.

``extract (all layers, one pass) -> rows with a label -> folds -> sweep -> baselines -> report``. The vectors
stay in their file, and layers are read from it one at a time.
"""

from __future__ import annotations
