"""Reading YAML text while remembering where each value was written."""

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
"""Of a YAML file, and of what it says once aliases (``*name``) are written out."""


@dataclass
class Tree:
    """Plain data and, for each path in it, the place that wrote it.

    ``left_out``: keys that a section had under a kind that another one took the place of.
    """

    data: dict[str, Any]
    origin: dict[KeyPath, str] = field(default_factory=dict)
    left_out: dict[KeyPath, tuple[str, ...]] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """The place of ``path``, or of the nearest enclosing section that was written."""
        inside = [place for known, place in self.origin.items() if known[: len(path)] == path]
        if path and path not in self.origin and inside:
            return inside[-1]
        while path and path not in self.origin:
            path = path[:-1]
        return self.origin.get(path, "the configuration")

    def overlay(self, top: Tree) -> Tree:
        """This tree with ``top`` on it: mappings merge, lists and other kinds replace."""
        result = Tree(dict(self.data), dict(self.origin), dict(self.left_out))
        _merge(result, top, result.data, top.data, ())
        return result

    def set(self, path: KeyPath, value: Any, place: str) -> None:
        """Write ``value`` at ``path``; mappings on the way are made, list indices must exist."""
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

    def leave_out(self, path: KeyPath, old: dict[str, Any], new: dict[str, Any]) -> None:
        """Note the keys of a section that its successor at ``path``, of another kind, lacks."""
        lost = [str(key) for key in old if key not in new]
        if lost:
            self.left_out[path] = (*self.left_out.get(path, ()), *lost)

    def _forget(self, path: KeyPath) -> None:
        for known in [p for p in self.origin if p[: len(path)] == path]:
            del self.origin[known]


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
                if known[: len(here)] == here:
                    result.origin[known] = place


def _same_kind(below: dict[str, Any], above: dict[str, Any]) -> bool:
    """Whether the keys of ``below`` still mean something under ``above``."""
    return "kind" not in above or above["kind"] == below.get("kind", above["kind"])


def _loaded(text: str) -> Any:
    """What YAML says; its own reader takes seconds to find that brackets nest too deeply."""
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth += 1 if bracket in "[{" else -1
        if depth > 4 * MOST_DEPTH:
            raise RecursionError
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReusedAnchorWarning)  # which YAML allows
        return YAML(typ="rt").load(StringIO(text))


def parse_value(text: str, place: str) -> Any:
    """One YAML 1.2 value: ``3e-4`` is a float, ``null`` is none, ``[1, 2]`` a list."""
    try:
        return _plain(_loaded(text), Tree({}), "", ())
    except Exception as error:  # by the grammar, by a number or a tag: of many kinds
        shown = text if len(text) <= 100 else f"{text[:100]}..."
        raise ConfigError(f"{place}: cannot read the value {shown!r}: {_reason(error)}") from None


def parse_file(path: Path) -> Tree:
    """The mapping that a YAML file holds, with file and line of each key.

    Raises ConfigError for a missing file, a syntax error, a duplicate key, or anything but a
    mapping at the top.
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
    except Exception as error:  # by a number or a tag, or by its depth: of many kinds
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
    if isinstance(error, LookupError):  # a word that its tag does not know
        return f"{error} does not fit its tag"
    return str(getattr(error, "problem", None) or error).strip().split("\n")[0]


def _plain(raw: Any, tree: Tree, file: str, path: KeyPath) -> Any:
    """ruamel's containers and scalars as plain ones, noting the line of each key.

    What an alias names is written out at each place, so that a few lines may say very much.
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
    """The line of a key or an item, of a key that ``<<`` brought in that of its section."""
    known = section.lc.data or {}
    return int(known[key][0] if key in known else section.lc.line or 0) + 1
