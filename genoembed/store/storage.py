"""What an HDF5 file may be made of: itself alone.

HDF5 can keep the bytes of a data set in any file that the process may read (external storage), put data sets
together from other files (virtual data sets), and lead to other files and places by links. A stranger's file
could so show what lies elsewhere on the machine. Here is the list of what is taken; all else is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import h5py

from genoembed.errors import StoreFormatError

if TYPE_CHECKING:
    from collections.abc import Iterator

_LAYOUTS = {h5py.h5d.COMPACT, h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED}
_FILTERS = {
    h5py.h5z.FILTER_DEFLATE: "gzip",
    h5py.h5z.FILTER_SHUFFLE: "shuffle",
    h5py.h5z.FILTER_FLETCHER32: "fletcher32",
    h5py.h5z.FILTER_LZF: "lzf",
}
"""Those that are part of h5py: others are loaded from a folder of plugins."""
_TYPES = {h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.STRING, h5py.h5t.ENUM}
_LINKS = {
    h5py.h5l.TYPE_SOFT: "a soft link",
    h5py.h5l.TYPE_EXTERNAL: "a link to another file",
}
_DEPTH = 32


def check_storage(hdf5: h5py.File, path: str) -> None:
    """Refuse a file that has anything but groups and data sets of its own, by hard links."""
    seen: set[int] = set()
    for where, node in _objects(hdf5.id, "", path, seen, 0):
        if isinstance(node, h5py.h5d.DatasetID):
            _check_dataset(node, where, path)


def _objects(
    group: h5py.h5g.GroupID, where: str, path: str, seen: set[int], depth: int
) -> Iterator[tuple[str, h5py.h5g.GroupID | h5py.h5d.DatasetID]]:
    if depth > _DEPTH:
        _refuse(where, "lies deeper than any group of ours", path)
    for name in group:
        place = f"{where}/{name.decode('utf-8', 'replace')}"
        kind = group.links.get_info(name).type
        if kind != h5py.h5l.TYPE_HARD:  # told before anything is opened: opening is what follows a link
            _refuse(place, f"is {_LINKS.get(kind, 'a link of an unknown kind')}", path)
        address = h5py.h5o.get_info(group, name).addr
        if address in seen:
            continue
        seen.add(address)
        node = h5py.h5o.open(group, name)
        if not isinstance(node, h5py.h5g.GroupID | h5py.h5d.DatasetID):
            _refuse(place, "is neither a group nor a data set", path)
        yield place, node
        if isinstance(node, h5py.h5g.GroupID):
            yield from _objects(node, place, path, seen, depth + 1)


def _check_dataset(dataset: h5py.h5d.DatasetID, where: str, path: str) -> None:
    plan = dataset.get_create_plist()
    if plan.get_layout() not in _LAYOUTS:
        _refuse(where, "is put together from other data sets (virtual storage)", path)
    if plan.get_external_count():
        _refuse(where, "keeps its values in another file (external storage)", path)
    filters = [plan.get_filter(number)[0] for number in range(plan.get_nfilters())]
    if strange := [number for number in filters if number not in _FILTERS]:
        _refuse(where, f"is packed by filter {strange[0]}, expected {', '.join(_FILTERS.values())}", path)
    if not _is_plain(dataset.get_type(), 0):
        _refuse(where, "has values that are no numbers or texts, such as references", path)


def _is_plain(kind: h5py.h5t.TypeID, depth: int) -> bool:
    if depth > _DEPTH:
        return False
    found = kind.get_class()
    if found == h5py.h5t.COMPOUND:
        members = (kind.get_member_type(number) for number in range(kind.get_nmembers()))
        return all(_is_plain(member, depth + 1) for member in members)
    if found in {h5py.h5t.VLEN, h5py.h5t.ARRAY}:
        return _is_plain(kind.get_super(), depth + 1)
    return found in _TYPES


def _refuse(where: str, what: str, path: str) -> NoReturn:
    problem = (
        f"{where} {what}, expected groups and data sets of the file itself; do not read it, or copy what you "
        "need of it to a new file"
    )
    raise StoreFormatError(problem, path=path)
