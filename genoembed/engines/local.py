"""Run work units one after the other in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from genoembed.contracts import EmbeddingBlock, TokenBlock
    from genoembed.engines.units import WorkUnit


def run_units(
    units: Iterable[WorkUnit], embed: Callable[[WorkUnit], EmbeddingBlock | TokenBlock]
) -> Iterator[EmbeddingBlock | TokenBlock]:
    """Embed each unit.

    Args:
        units: In input order.
        embed: Turns a unit into rows.

    Yields:
        Blocks in input order.
    """
    for unit in units:
        yield embed(unit)
