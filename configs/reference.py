"""Generate the configuration reference, every key of a run as Markdown, from the models.

``python -m allometry.configs.reference docs/configuration.md`` writes the page.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from allometry.configs.paths import expanded
from allometry.configs.renamed import RENAMED, Renamed
from allometry.configs.run import RunConfig

HEADER = """\
# Configuration reference

All keys of a run's YAML file, generated from the models in `configs/` by `make reference`. Keys are
written with dots, as in `allometry train x.yaml optimizer.lr=2e-3`; in YAML they are nested. N is
the number of an entry in a list, from 0, NAME a name of your choice. A section with `kind` has
other keys for each kind. Unknown keys are errors. `allometry train x.yaml --print-config` prints
every key of a run with its value.
"""
RENAMED_HEADER = """\
## Renamed keys

The old name is accepted with a warning until the version in the last column, from which it is an
error that gives the new name ([releases](releases.md#renamed-keys)).

| old name | new name | file | renamed in | error from |
|---|---|---|---|---|"""
_PLAIN: Mapping[Any, str] = {
    int: "integer",
    float: "number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    Any: "any value",
}
_BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


def page() -> str:
    """Return the complete page."""
    parts = [HEADER]
    for name, field in RunConfig.model_fields.items():
        parts.append(f"## {name}\n")
        if field.description:
            parts.append(f"{_sentence(field.description)}.\n")
        parts += _section_text(name, field)
    return "\n".join([*parts, RENAMED_HEADER, *map(_renamed, RENAMED)]) + "\n"


def _renamed(row: Renamed) -> str:
    """Return the table row of a renamed key."""
    names = (f"`{name.replace('*', 'N')}`" for name in (row.old, row.new))
    return "| " + " | ".join((*names, row.of, row.since, row.until)) + " |"


def _section_text(name: str, field: FieldInfo) -> Iterator[str]:
    """Yield the text of a section of the run, for each of its kinds."""
    path = f"{name}.N" if get_origin(_without_none(field.annotation)) is tuple else name
    models = list(_models(field.annotation))
    shared = _shared(models)
    yield _presence(field) + (" Keys of every kind:\n" if shared else "\n")
    if shared:
        yield _table(path, {key: models[0].model_fields[key] for key in shared})
    for model in models:
        own = {k: f for k, f in model.model_fields.items() if k != "kind" and k not in shared}
        if len(models) > 1:
            yield f"### {name}: kind: {_kind(model)}\n"
        yield f"{_docstring(model)}\n"
        yield _table(path, own) if own else "It has no further keys.\n"


def _presence(field: FieldInfo) -> str:
    """Return whether the section is required, or its default."""
    if field.is_required():
        return "Required."
    kind = getattr(field.get_default(call_default_factory=True), "kind", None)
    return f"Optional; without it `kind: {kind}`." if kind else "Optional."


def _kind(model: type[BaseModel]) -> str | None:
    """Return the ``kind`` of a section, None for a section without kinds."""
    field = model.model_fields.get("kind")
    return None if field is None else str(get_args(field.annotation)[0])


def _shared(models: list[type[BaseModel]]) -> list[str]:
    """Return the keys that are equal in all kinds of a section."""
    if len(models) < 2:
        return []
    first, *others = models

    def same(key: str) -> bool:
        rows = {_row("", key, m.model_fields[key]) for m in models if key in m.model_fields}
        return len(rows) == 1 and all(key in model.model_fields for model in others)

    return [key for key in first.model_fields if key != "kind" and same(key)]


def _table(path: str, fields: dict[str, FieldInfo]) -> str:
    """Return the table rows of these keys and of all nested keys."""
    rows = "\n".join(line for key, field in fields.items() for line in _rows(path, key, field))
    head = "| key | type | default | what it sets |\n|---|---|---|---|\n"
    return head + rows + "\n"


def _rows(path: str, key: str, field: FieldInfo, note: str = "") -> Iterator[str]:
    """Yield the row of a key and the rows of its nested section."""
    yield _row(path, key, field, note)
    inner = f"{path}.{key}"
    bare = _without_none(field.annotation)
    if get_origin(bare) is tuple:
        inner += ".N"
    elif get_origin(bare) is dict:
        inner += ".NAME"
    models = list(_models(field.annotation))
    if _section_of(models) is not None:
        return
    shared = _shared(models)
    for name in shared:
        yield from _rows(inner, name, models[0].model_fields[name])
    for model in models:
        said = f"(kind: {_kind(model)}) " if len(models) > 1 else ""
        for name, each in model.model_fields.items():
            if name not in shared and name != "kind":
                yield from _rows(inner, name, each, said)


def _section_of(models: list[type[BaseModel]]) -> str | None:
    """Return the section of a run that also contains these models, None if there is none."""
    sections = RunConfig.model_fields.items()
    tables = ((name, set(_models(field.annotation))) for name, field in sections)
    return next((name for name, own in tables if own.intersection(models)), None)


def _row(path: str, key: str, field: FieldInfo, note: str = "") -> str:
    name = f"{path}.{key}"
    said = note + (field.description or _described_by(field))
    if elsewhere := _section_of(list(_models(field.annotation))):
        said += f"; keys as in [{elsewhere}](#{elsewhere})"
    cells = (f"`{name}`", _type(field), _default(field), _marked(said))
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _marked(text: str) -> str:
    """Return a text as Markdown: code in single backticks, literal asterisks escaped."""
    parts = text.replace("``", "`").split("`")
    parts[::2] = [part.replace("*", "\\*") for part in parts[::2]]
    return "`".join(parts)


def _described_by(field: FieldInfo) -> str:
    """Return the summary of a nested section as the description of its key."""
    models = list(_models(field.annotation))
    return _docstring(models[0]).partition("\n")[0] if len(models) == 1 else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        kind = _kind(type(default))
        return f"`kind: {kind}`" if kind is not None else "its defaults"
    return f"`{json.dumps(default, default=list)}`"


def _type(field: FieldInfo) -> str:
    """Return the type of a key's values, with bounds."""
    return _named(field.annotation, field.metadata)


def _named(annotation: Any, metadata: Any = ()) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        own = [one for m in inner[1:] for one in getattr(m, "metadata", [m])]
        return _named(inner[0], [*own, *metadata])
    if origin in (Union, types.UnionType):
        kinds = [f"`{_kind(model)}`" for model in _models(annotation) if _kind(model)]
        if len(kinds) > 1:
            ending = " or null" if type(None) in inner else ""
            return f"section of kind {', '.join(kinds)}{ending}"
        names = list(dict.fromkeys(_named(one, metadata) for one in inner))
        return " or ".join(sorted(names, key=lambda name: name == "null"))
    if origin is Literal:
        return ", ".join(f"`{json.dumps(one).strip(chr(34))}`" for one in inner)
    if origin is tuple:
        return f"list of {_named(inner[0])}" + _lengths(metadata)
    if origin is dict:
        return f"mapping of names to {_named(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section" if _kind(annotation) is None else f"section of kind `{_kind(annotation)}`"
    if any(isinstance(m, AfterValidator) and m.func is expanded for m in metadata):
        return "path"
    return _PLAIN.get(annotation, str(annotation)) + _bounds(annotation, metadata)


def _bounds(annotation: Any, metadata: Any) -> str:
    """Return the bounds of a number, or the pattern of a text."""
    if annotation is str:
        patterns = [m.pattern for m in metadata if getattr(m, "pattern", None)]
        return f" like `{patterns[0]}`" if patterns else ""
    found = [
        f"{sign} {getattr(m, name):g}"
        for name, sign in _BOUNDS
        for m in metadata
        if annotation in (int, float) and getattr(m, name, None) is not None
    ]
    return f" {', '.join(found)}" if found else ""


def _lengths(metadata: Any) -> str:
    least = [m.min_length for m in metadata if getattr(m, "min_length", None)]
    return f", {least[0]} or more" if least else ""


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the section classes in an annotation, in order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _without_none(annotation: Any) -> Any:
    inner = [one for one in get_args(annotation) if one is not type(None)]
    if get_origin(annotation) in (Union, types.UnionType) and len(inner) == 1:
        return inner[0]
    return annotation


def _docstring(model: type[BaseModel]) -> str:
    return _marked(" ".join((model.__doc__ or "").split()))


def _sentence(text: str) -> str:
    return _marked(text[0].upper() + text[1:].rstrip("."))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
