"""Read YAML text and record the place of each value."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning
from ruamel.yaml.scalarbool import ScalarBoolean

from allometry.configs.errors import ConfigError

KeyPath = tuple[str | int, ...]
MOST_BYTES, MOST_VALUES, MOST_DEPTH = 1 << 19, 100_000, 64
"""Limits of a YAML file, with its aliases (``*name``) expanded."""


@dataclass
class Tree:
    """Plain data, and the place (file and line) at which each path in it was written.

    ``left_out``: keys of a section that were dropped because its ``kind`` was replaced.
    """

    data: dict[str, Any]
    origin: dict[KeyPath, str] = field(default_factory=dict)
    left_out: dict[KeyPath, tuple[str, ...]] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """Return the place of ``path``, or of the nearest enclosing section with a place."""
        inside = [place for known, place in self.origin.items() if _in(known, path)]
        if path and path not in self.origin and inside:
            return inside[-1]
        while path and path not in self.origin:
            path = path[:-1]
        return self.origin.get(path, "the configuration")

    def overlay(self, top: Tree) -> Tree:
        """Return this tree with ``top`` over it: mappings merge; lists and other kinds replace."""
        result = Tree(dict(self.data), dict(self.origin), dict(self.left_out))
        _merge(result, top, result.data, top.data, ())
        return result

    def set(self, path: KeyPath, value: Any, place: str) -> None:
        """Write ``value`` at ``path``; missing mappings are created, list indices must exist.

        Raises:
            ConfigError: a list index does not exist, or a value on the way is neither a mapping nor
                a list.
        """
        holder: Any = self.data
        for depth, key in enumerate(path[:-1]):
            if isinstance(holder, list):
                holder = holder[_index(holder, key, path, place)]
                continue
            inner = {} if holder.get(key) is None else holder[key]
            if not isinstance(inner, dict | list):
                name = ".".join(map(str, path[: depth + 1]))
                raise ConfigError(f"{place}: {name} is a single value and has no key {path[-1]!r}")
            holder[key] = list(inner) if isinstance(inner, list) else inner
            holder = holder[key]
        last = path[-1]
        if isinstance(holder, list):
            last = _index(holder, last, path, place)
        self._forget(path)
        holder[last] = value
        self.origin[path] = place

    def get(self, path: KeyPath) -> Any:
        """Return the value at ``path``, None if there is none."""
        value: Any = self.data
        for key in path:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def has(self, path: KeyPath) -> bool:
        """Return True if a mapping contains the last key of ``path``."""
        section = self.get(path[:-1])
        return isinstance(section, dict) and path[-1] in section

    def take(self, path: KeyPath) -> tuple[Any, dict[KeyPath, str]]:
        """Remove ``path`` and the mappings that become empty.

        Returns the value, and the place of each path inside it.
        """
        inside = {known[len(path) :]: at for known, at in self.origin.items() if _in(known, path)}
        value = self.get(path)
        while path:
            section = self.get(path[:-1])
            del section[path[-1]]
            self._forget(path)
            path = path[:-1]
            if section or not isinstance(section, dict):
                break
        return value, inside

    def leave_out(self, path: KeyPath, old: dict[str, Any], new: dict[str, Any]) -> None:
        """Record the keys of ``old`` that ``new``, its replacement of another kind, lacks."""
        lost = [str(key) for key in old if key not in new]
        if lost:
            self.left_out[path] = (*self.left_out.get(path, ()), *lost)

    def _forget(self, path: KeyPath) -> None:
        for known in [p for p in self.origin if _in(p, path)]:
            del self.origin[known]


def _in(path: KeyPath, section: KeyPath) -> bool:
    return path[: len(section)] == section


def _index(holder: list[Any], key: str | int, path: KeyPath, place: str) -> int:
    try:
        index = int(key)
        holder[index]
    except (ValueError, IndexError):
        name = ".".join(map(str, path))
        raise ConfigError(
            f"{place}: {name} does not exist; the list has items 0 to {len(holder) - 1}"
        ) from None
    return index


def _merge(
    result: Tree, top: Tree, below: dict[str, Any], above: dict[str, Any], path: KeyPath
) -> None:
    for key, value in above.items():
        here = (*path, key)
        old = below.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and _same_kind(old, value):
            below[key] = dict(old)
            result.origin[here] = top.origin.get(here, result.origin.get(here, ""))
            _merge(result, top, below[key], value, here)
        else:
            if isinstance(old, dict) and isinstance(value, dict):
                result.leave_out(here, old, value)
            result._forget(here)
            below[key] = value
            for known, place in top.origin.items():
                if _in(known, here):
                    result.origin[known] = place


def _same_kind(below: dict[str, Any], above: dict[str, Any]) -> bool:
    """Return True if the keys of ``below`` remain valid under ``above``."""
    return "kind" not in above or above["kind"] == below.get("kind", above["kind"])


def _loaded(text: str) -> Any:
    """Parse YAML; deep brackets are counted first, as ruamel's parser takes seconds to fail."""
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth += 1 if bracket in "[{" else -1
        if depth > 4 * MOST_DEPTH:
            raise RecursionError
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReusedAnchorWarning)  # YAML allows it
        return YAML(typ="rt").load(StringIO(text))


def parse_value(text: str, place: str) -> Any:
    """Parse one YAML 1.2 value: ``3e-4`` is a float, ``null`` is None, ``[1, 2]`` a list.

    Raises:
        ConfigError: the text is not valid YAML.
    """
    try:
        return _plain(_loaded(text), Tree({}), "", ())
    except Exception as error:  # grammar, numbers, tags: many types
        shown = text if len(text) <= 100 else f"{text[:100]}..."
        raise ConfigError(f"{place}: cannot read the value {shown!r}: {_reason(error)}") from None


def parse_file(path: Path) -> Tree:
    """Return the mapping in a YAML file, with file and line of each key.

    Raises:
        ConfigError: the file is missing or unreadable, has a syntax error or a duplicate key, or is
            not a mapping at the top.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(
                f"{path} has more than {MOST_BYTES >> 10} KiB; give the YAML file of a description"
            )
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the path of a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    try:
        raw = _loaded(text)
    except MarkedYAMLError as error:
        problem = f"not valid YAML: {_reason(error)}"
        if isinstance(error, DuplicateKeyError):
            key = str(error.problem).split('"')[1] if '"' in str(error.problem) else "?"
            problem = f"key {key!r} stands twice in this section; remove one"
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise ConfigError(f"{path}:{line}: {problem}") from None
    except Exception as error:  # numbers, tags, depth: many types
        raise ConfigError(f"{path}: not valid YAML: {_reason(error)}") from None
    if not isinstance(raw, dict):
        kind = "a list" if isinstance(raw, CommentedSeq) else "a single value"
        held = "nothing" if raw is None else kind
        raise ConfigError(f"{path}: expected 'section: ...' lines, found {held}")
    tree = Tree({})
    tree.data = _plain(raw, tree, str(path), ())
    return tree


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it nests too deeply"
    if isinstance(error, LookupError):  # an unknown word under a tag
        return f"{error} does not fit its tag"
    return str(getattr(error, "problem", None) or error).strip().split("\n")[0]


def _plain(raw: Any, tree: Tree, file: str, path: KeyPath) -> Any:
    """Convert ruamel's containers and scalars to plain ones, and record the line of each key.

    Aliases are expanded at each place, so that a short file may expand to many values.
    """
    within = f"{file}: " if file else ""
    if len(path) > MOST_DEPTH:
        raise ConfigError(f"{within}it nests too deeply")
    if len(tree.origin) > MOST_VALUES:
        raise ConfigError(
            f"{within}it has more than {MOST_VALUES:,} values, with those that aliases repeat; "
            "write less into one file"
        )
    if isinstance(raw, CommentedMap):
        result = {}
        for key, value in raw.items():
            place = f"{file}:{_line(raw, key)}"
            if not isinstance(key, str):
                raise ConfigError(f"{place}: the key {key!r} is no text; put it into quotes")
            here = (*path, str(key))
            tree.origin[here] = place
            result[str(key)] = _plain(value, tree, file, here)
        return result
    if isinstance(raw, CommentedSeq):
        for index in range(len(raw)):
            tree.origin[(*path, index)] = f"{file}:{_line(raw, index)}"
        return [_plain(value, tree, file, (*path, index)) for index, value in enumerate(raw)]
    if raw is None or isinstance(raw, bool):
        return raw
    for kind, held in ((bool, ScalarBoolean), (int, int), (float, float), (str, str)):
        if isinstance(raw, held):
            return kind(raw)
    place = f"{tree.where(path)}: {'.'.join(map(str, path))}" if path else "it"
    raise ConfigError(
        f"{place} is a {type(raw).__name__} of YAML; put it into quotes if it is text"
    )


def _line(section: CommentedMap | CommentedSeq, key: Any) -> int:
    """Return the line of a key or item; for a key merged by ``<<``, that of its section."""
    known = section.lc.data or {}
    return int(known[key][0] if key in known else section.lc.line or 0) + 1
