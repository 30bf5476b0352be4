"""Load a run's configuration from YAML files and overrides, validate it, and dump it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML

from allometry.configs.errors import ConfigError
from allometry.configs.paths import expanded
from allometry.configs.renamed import new_name, parse, use_new_names
from allometry.configs.run import RunConfig
from allometry.configs.source import KeyPath, Tree, parse_value
from allometry.configs.stages import InStage, NotInStages, Stage

PRESET = "preset:"
Root = TypeVar("Root", bound=BaseModel)


def presets() -> dict[str, Path]:
    """Return the files of the configurations that ship with the package, by name."""
    return _presets("*.yaml")


def ladder_presets() -> dict[str, Path]:
    """Return the files of the ladders that ship with the package, by name."""
    return _presets("ladders/*.yaml")


def _presets(pattern: str) -> dict[str, Path]:
    folder = Path(__file__).parent / "presets"
    return {path.stem: path for path in sorted(folder.glob(pattern))}


def load(path: str | Path, overrides: Sequence[str] = (), *, recorded: bool = False) -> RunConfig:
    """Return the run in ``path``, with ``section.key=value`` overrides applied.

    ``path`` is a YAML file or ``preset:NAME``. A file may name another one with ``base:``, as a
    path relative to itself or as a preset, and overrides its keys. For example,
    ``load("preset:demo", ["optimizer.lr=3e-4"])``. ``recorded``: a run wrote the file, perhaps of
    an earlier version, whose names of keys are accepted (``use_new_names``).

    Raises:
        ConfigError: one sentence with file, line and key.
    """
    tree = read(path, recorded=recorded)
    for text in overrides:
        key, equals, value = text.lstrip("-").partition("=")
        place = f"override {text!r}"
        if not equals or not key:
            hint = "; options are listed by --help" if text.startswith("-") else ""
            raise ConfigError(f"{place}: expected section.key=value{hint}")
        put(tree, key, parse_value(value, place), place)
    return validate(tree)


def read(path: str | Path, *, recorded: bool = False) -> Tree:
    """Return the merged keys of ``path`` and its base files, not validated; see ``load``."""
    return _read(str(path), (), recorded)


def validate(tree: Tree) -> RunConfig:
    """Return the run in ``tree``; a ConfigError names the place of the first error."""
    return validate_as(RunConfig, tree)


def validate_as(root: type[Root], tree: Tree) -> Root:
    """Return the configuration of type ``root`` in ``tree``; see ``validate``."""
    try:
        return root.model_validate(tree.data)
    except ValidationError as error:
        raise ConfigError(_sentence(error, tree, root)) from None


def dump(config: RunConfig) -> str:
    """Return a run as YAML with every default; ``load`` of this text returns an equal run."""
    return yaml_text(config.model_dump(mode="json"))


def yaml_text(plain: Mapping[str, Any]) -> str:
    """Return plain values as YAML, one key per line."""
    out, yaml = StringIO(), YAML(typ="rt")
    yaml.default_flow_style, yaml.width = False, 100
    yaml.dump(plain, out)
    return out.getvalue()


def _read(path: str, seen: tuple[Path, ...], recorded: bool) -> Tree:
    if path in {PRESET + name for name in ladder_presets()}:
        raise ConfigError(f"{path} is not a run but a ladder; give it to allometry ladder")
    file = locate(path, presets(), "preset")
    if file.resolve() in seen:
        chain = " -> ".join(str(p) for p in (*seen, file.resolve()))
        raise ConfigError(f"base: files name each other in a circle: {chain}")
    tree = parse(file, recorded=recorded)
    base = tree.data.pop("base", None)
    place = tree.origin.pop(("base",), str(file))
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{place}: base must be one file name or preset:NAME, not {base!r}")
    try:
        below = base if base.startswith(PRESET) else str(file.parent / expanded(base))
    except ConfigError as error:
        raise ConfigError(f"{place}: base: {error}") from None
    return _read(below, (*seen, file.resolve()), recorded).overlay(tree)


def locate(path: str, known: Mapping[str, Path], what: str) -> Path:
    """Return the file at ``path``, or for ``preset:NAME`` one of ``known``; ``what``: its type."""
    name = path.removeprefix(PRESET)
    if not path.startswith(PRESET):
        if path in known and not Path(path).exists():
            raise ConfigError(f"{path} is not a file but a preset; write {PRESET}{path}")
        return Path(expanded(path))
    if name not in known:
        raise ConfigError(f"there is no {what} {name!r}; the {what}s are {', '.join(known)}")
    return known[name]


def put(tree: Tree, key: str, value: Any, place: str) -> None:
    """Set ``section.key`` in a run's tree; ``place`` is named in errors about the value."""
    path: KeyPath = tuple(int(part) if part.isdigit() else part for part in key.split("."))
    path = new_name(path, place)
    if path[-1] == "kind" and len(path) > 1:
        section = _section(tree, path[:-1])
        kept = _of_kind(section, path[:-1], value)
        tree.leave_out(path[:-1], section, kept)
        tree.set(path[:-1], kept, place)
    tree.set(path, value, place)
    if isinstance(value, dict | list):
        use_new_names(tree, under=path)


def _section(tree: Tree, path: KeyPath) -> dict[str, Any]:
    section: Any = tree.data
    for key in path:
        if isinstance(section, list) and isinstance(key, int) and key < len(section):
            section = section[key]
        else:
            section = section.get(key, {}) if isinstance(section, dict) else {}
    return section if isinstance(section, dict) else {}


def _of_kind(section: dict[str, Any], path: KeyPath, kind: Any) -> dict[str, Any]:
    """Return the keys of a section that its new ``kind`` also has."""
    if section.get("kind") == kind:
        return section
    chosen = next((m for m in _models_at(RunConfig, path) if _kind_of(m) == kind), None)
    known = set(chosen.model_fields) if chosen else set(section)
    return {key: value for key, value in section.items() if key in known}


def _sentence(error: ValidationError, tree: Tree, root: type[BaseModel]) -> str:
    """Return the first error as one sentence: place, key, problem, remedy."""
    inner = error.errors(include_url=False)[0].get("ctx", {}).get("error")
    if not isinstance(inner, InStage):
        return ": ".join(_located(error, tree, root))
    start: KeyPath = ("stages", inner.number)
    if isinstance(inner.error, NotInStages):
        place, said = tree.where((*start, *inner.error.path)), str(inner.error)
    else:
        stage = Stage.model_validate(tree.data["stages"][inner.number])
        place, said = _located(inner.error, stage.places(tree, inner.number), root)
    return f"{place}: stage {inner.name}: {said}"


def _located(error: ValidationError, tree: Tree, root: type[BaseModel]) -> tuple[str, str]:
    """Return the place of the first error, and the rest of the sentence."""
    details = error.errors(include_url=False)
    first = next((d for d in details if d["type"] == "extra_forbidden"), details[0])
    path = _data_path(first, tree, root)
    name = ".".join(map(str, path)) or "the run"
    said, number = _explain(first, path, name, root), 1
    if first["type"] == "missing":
        # All missing keys of this section; those of other sections have other places.
        paths = [_data_path(d, tree, root) for d in details if d["type"] == "missing"]
        keys = [str(p[-1]) for p in paths if p[:-1] == path[:-1]]
        if len(keys) > 1:
            section = ".".join(map(str, path[:-1])) or "the run"
            said, number = f"{section} lacks {', '.join(keys)}; add them", len(keys)
    of_an_item = first["type"] == "value_error" and path and isinstance(path[-1], int)
    if first["type"] != "extra_forbidden" and not of_an_item:
        said += _form(path, root)
    said += _left_out(path, tree)
    more = f" ({len(details) - number} more)" if len(details) > number else ""
    return tree.where(path), f"{said}{more}"


def _left_out(path: KeyPath, tree: Tree) -> str:
    """Return the end of a sentence: the keys that were dropped with a change of ``kind``."""
    for section, lost in tree.left_out.items():
        if path[: len(section)] == section:
            name = ".".join(map(str, section))
            kind = _section(tree, section).get("kind")
            return f"; {name}.kind={kind} replaced another kind and its {', '.join(lost)}"
    return ""


def _form(path: KeyPath, root: type[BaseModel]) -> str:
    """Return the end of a sentence: how a list or mapping at ``path`` is written."""
    while path and isinstance(path[-1], int):
        path = path[:-1]
    for section in _models_at(root, path[:-1]):
        field = section.model_fields.get(str(path[-1])) if path else None
        item, name = _item(field.annotation) if field else None, ".".join(map(str, path))
        if field and "GiB" in repr((field.annotation, field.metadata)):
            return f'; write it as a share, {name}=0.5, or as {name}="20 GiB"'
        if item is not None:
            return f"; write it as {name}=[{', '.join(_examples(item))}]"
        if field and get_origin(field.annotation) is dict:
            value = _examples(get_args(field.annotation)[1])[0]
            return f"; write it as {name}={{name: {value}}}"
    return ""


def _item(annotation: Any) -> Any:
    """Return the item type of an annotation that accepts a list, else None."""
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0]
    return next((item for a in get_args(annotation) if (item := _item(a)) is not None), None)


def _examples(kind: Any) -> tuple[str, ...]:
    """Return example items of a list, as written in YAML."""
    sections = list(_sections(kind))
    if sections:
        known = sections[0].model_fields
        needed = [key for key, field in known.items() if field.is_required()] or list(known)[:2]
        return (f"{{{', '.join(f'{key}: ...' for key in needed)}}}", "...")
    if get_origin(kind) is Literal:
        return tuple(map(str, get_args(kind)[:2]))
    if float in (kind, *get_args(kind)):
        return ("0.5", "2.0")
    return ("first", "second") if str in (kind, *get_args(kind)) else ("1", "2")


def _data_path(detail: ErrorDetails, tree: Tree, root: type[BaseModel]) -> KeyPath:
    """Return pydantic's location without the union tags between its keys."""
    path: list[str | int] = []
    node: Any = tree.data
    for part in detail["loc"]:
        inside = isinstance(node, dict) and part in node
        if isinstance(node, dict) and not inside:
            # The kind of this section, or the first allowed kind if the section has none.
            sections = _models_at(root, tuple(path))
            if part == node.get("kind", _kind_of(sections[0]) if sections else None):
                continue
        named = isinstance(node, list) and not isinstance(part, int)
        if path and (named or not isinstance(node, dict | list)):
            break  # the union member that was tried
        path.append(part)
        item = isinstance(node, list) and isinstance(part, int) and part < len(node)
        node = node[part] if inside or item else None
    return tuple(path)


def _explain(detail: ErrorDetails, path: KeyPath, name: str, root: type[BaseModel]) -> str:
    kind, given, context = detail["type"], detail.get("input"), detail.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(path, name, root)
    if kind == "missing":
        return f"{name} is missing; add it"
    if kind == "value_error":
        said = detail["msg"].removeprefix("Value error, ")
        return f"{name}: {said}" if path else said  # without a path, the message names its keys
    if kind == "union_tag_invalid":
        return f"{name}.kind={context['tag']} is not known; use one of {context['expected_tags']}"
    if kind == "union_tag_not_found":
        kinds = dict.fromkeys(str(_kind_of(section)) for section in _models_at(root, path))
        return f"{name}.kind is missing; add one of {', '.join(kinds)}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{name} must be a section of 'key: value' lines, not {given!r}"
    if kind == "literal_error" and context["expected"] == "1":
        return f"{name}={given!r} is not supported yet; only 1 is"
    if kind in ("too_short", "string_too_short") and given == "":
        return f"{name} is empty; give it a value or leave it out"
    if kind == "too_short" and not context["actual_length"]:
        return f"{name} is empty: name at least one {str(path[-1]).removesuffix('s')}"
    message = detail["msg"][0].lower() + detail["msg"][1:].replace("valid tuple", "list")
    return f"{name}={given!r} is not valid: {message}"


def _unknown(path: KeyPath, name: str, root: type[BaseModel]) -> str:
    key = str(path[-1])
    sections = _models_at(root, path[:-1])
    kinds = [str(_kind_of(section)) for section in sections if key in section.model_fields]
    if kinds:
        where = ".".join(map(str, path[:-1]))
        return f"{name} goes with {where}.kind={' or '.join(kinds)}; set that or remove it"
    valid = sorted({k for model in sections for k in model.model_fields})
    for near in difflib.get_close_matches(key, valid, n=1):
        return f"{name} is not a known key; did you mean {near!r}?"
    for elsewhere in _all_keys(root, ()):
        if elsewhere[-1] == key:
            return f"{name} is not a known key here; did you mean {'.'.join(elsewhere)}?"
    return f"{name} is not a known key; valid keys here are {', '.join(valid)}"


def _models_at(model: type[BaseModel], path: KeyPath) -> list[type[BaseModel]]:
    """Return the section classes allowed at ``path`` (several for different kinds)."""
    here = [model]
    for key in path:
        if isinstance(key, int):
            continue
        here = [
            inner
            for section in here
            if key in section.model_fields
            for inner in _sections(section.model_fields[key].annotation)
        ]
    return here


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def _kind_of(model: type[BaseModel]) -> Any:
    field = model.model_fields.get("kind")
    return field.default if field else None


def _all_keys(model: type[BaseModel], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for key, field in model.model_fields.items():
        yield (*path, key)
        for section in _sections(field.annotation):
            yield from _all_keys(section, (*path, key))
