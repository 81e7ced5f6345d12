"""Lets the site show the doctests of ``Example:`` sections as code: its parser knows ``Examples:`` only."""

from __future__ import annotations

from typing import Any

import griffe


class DoctestBlocks(griffe.Extension):
    """Renames the heading, in the site's own copy of each docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Look at one object of the package.

        Args:
            obj: A module, class, function or attribute.
        """
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
