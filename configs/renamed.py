"""Renamed config keys: the table of old and new names, and their translation.

A key has two names for a while: from version ``since`` to version ``until``, the old name is
accepted with a warning. Afterwards it is an error that gives the new name. Rows are never removed
from the table, because the config.yaml of an old run keeps the names of its version.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from allometry.configs.errors import ConfigError, RenamedKeyWarning
from allometry.configs.source import KeyPath, Tree, parse_file
from allometry.configs.version import VERSION, release

Description = Literal["run", "ladder", "tree", "hardware"]
"""Type of a YAML file; each has its own keys."""

MORE = {"run": (("stages", "*"),)}
"""Sections that contain the sections of a run again."""


@dataclass(frozen=True)
class Renamed:
    """A key or section ``old`` that is called ``new`` since version ``since``.

    From version ``until``, ``old`` is an error. ``*`` in both names is the number of a list entry:
    ``Renamed("data.sources.*.share", "data.sources.*.weight", since="0.2.0", until="0.4.0")``.
    """

    old: str
    new: str
    since: str
    until: str
    of: Description = "run"

    @property
    def is_removed(self) -> bool:
        """True if this version no longer accepts the old name."""
        return release(VERSION) >= release(self.until)


RENAMED: tuple[Renamed, ...] = (
    Renamed("kernels.quantise", "kernels.quantize", since="0.1.0", until="0.2.0"),
)
"""All renamed keys, the oldest first."""


def parse(path: Any, of: Description = "run", *, recorded: bool = False) -> Tree:
    """Return ``parse_file(path)`` with the present names of all keys; see ``use_new_names``."""
    tree = parse_file(path)
    use_new_names(tree, of, recorded=recorded)
    return tree


def use_new_names(
    tree: Tree, of: Description = "run", under: KeyPath = (), *, recorded: bool = False
) -> None:
    """Replace old names of keys in ``tree`` at and below ``under`` by their new names.

    ``recorded``: the file was written by a run, so that old names are accepted without a warning,
    also after ``until``.

    Raises:
        ConfigError: an old name is no longer accepted, or a key is given by both names.
    """
    for row, old, new in _rows(of):
        for path in list(_found(tree.data, old, ())):
            if path[: len(under)] != under:
                continue
            place, target = tree.where(path), _filled(new, path)
            if not recorded:
                _report(row, path, target, place)
            value, origins = tree.take(path)
            if target[: len(under)] == under and tree.has(target):
                raise ConfigError(
                    f"{place}: {_dotted(path)} is the old name of {_dotted(target)}, which is "
                    f"given as well; remove {_dotted(path)}"
                )
            tree.set(target, value, place)
            tree.origin |= {(*target, *rest): where for rest, where in origins.items()}
    if of == "run":
        _use_new_names_of_changes(tree, recorded)


def new_name(path: KeyPath, place: str, of: Description = "run") -> KeyPath:
    """Return the present name of a key: ``("kernels", "quantise")`` is now ``quantize``.

    Raises:
        ConfigError: the old name is no longer accepted.
    """
    for row, old, new in _rows(of):
        start = path[: len(old)]
        if len(start) == len(old) and all(map(_matches, old, start)):
            _report(row, start, _filled(new, start), place)
            return (*_filled(new, start), *path[len(old) :])
    return path


def new_names(recorded: dict[str, Any], section: str) -> dict[str, Any]:
    """Return the mapping that a run recorded for a section with the present names of its keys."""
    names = {row.old: row.new for row in RENAMED if row.of == "run"}
    known = {key: names.get(f"{section}.{key}", key) for key in recorded}
    return {known[key].removeprefix(f"{section}."): value for key, value in recorded.items()}


def _use_new_names_of_changes(tree: Tree, recorded: bool) -> None:
    """Replace old names in ``run.parent.changes``, a list of names of keys."""
    path: KeyPath = ("run", "parent", "changes")
    names = tree.get(path)
    for index, name in enumerate(names if isinstance(names, list) else ()):
        for row in RENAMED:
            if row.of == "run" and row.old == name:
                if not recorded:
                    _report(
                        row, tuple(name.split(".")), tuple(row.new.split(".")), tree.where(path)
                    )
                tree.set((*path, index), row.new, tree.where((*path, index)))


def _rows(of: Description) -> Iterator[tuple[Renamed, KeyPath, KeyPath]]:
    """Yield each row of the table with its old and its new path, wherever the key may occur."""
    for row in RENAMED:
        if row.of == of:
            for start in ((), *MORE.get(of, ())):
                yield row, (*start, *row.old.split(".")), (*start, *row.new.split("."))


def _matches(part: str | int, key: str | int) -> bool:
    return part == key or (part == "*" and isinstance(key, int))


def _found(node: Any, pattern: Sequence[str | int], path: KeyPath) -> Iterator[KeyPath]:
    """Yield the paths in ``node`` that match ``pattern``."""
    if not pattern:
        yield path
    elif pattern[0] == "*":
        for index, item in enumerate(node if isinstance(node, list) else ()):
            yield from _found(item, pattern[1:], (*path, index))
    elif isinstance(node, dict) and pattern[0] in node:
        yield from _found(node[pattern[0]], pattern[1:], (*path, pattern[0]))


def _filled(pattern: KeyPath, path: KeyPath) -> KeyPath:
    """Return ``pattern`` with the list indices of ``path`` in place of ``*``."""
    indices = (key for key in path if isinstance(key, int))
    return tuple(next(indices) if part == "*" else part for part in pattern)


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def _report(row: Renamed, path: KeyPath, target: KeyPath, place: str) -> None:
    """Warn about an old name, or raise ConfigError if it is no longer accepted."""
    said = f"{place}: {_dotted(path)} was renamed in version {row.since}"
    if row.is_removed:
        raise ConfigError(f"{said}; write {_dotted(target)}")
    message = f"{said} and is an error from version {row.until} on; write {_dotted(target)}"
    warnings.warn(RenamedKeyWarning(message, row.old), stacklevel=2)
