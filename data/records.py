"""The text of a record: a line of JSON, or a row of parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from allometry.data.corpus import BadText


class Key(NamedTuple):
    """A field of records, and the option that names it; ``numbers``: integers are allowed."""

    name: str
    option: str
    numbers: bool = False


def text_key(name: str) -> Key:
    """Return the key of the text."""
    return Key(name, "--text-key")


def split_key(name: str) -> Key:
    """Return the key that determines a document's split: the parent's text, or an id."""
    return Key(name, "--split-key", numbers=True)


_ROWS_AT_ONCE = 256  # rows may be large
_KEYS_NAMED = 20
NULL = "text is null"


def json_record(line: bytes) -> dict[str, Any]:
    """Parse the JSON object on one line. Raises BadText."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadText("text is not UTF-8", f"is not UTF-8 ({error}); convert it") from error
    except RecursionError as error:
        raise BadText(
            "JSON is nested too deeply", "is nested too deeply to be read; repair or remove it"
        ) from error
    except ValueError as error:
        pretty = line.strip() in (b"[", b"{")
        advice = "write one JSON object on each line" if pretty else "repair or remove it"
        raise BadText("line is not JSON", f"is not JSON ({error}); {advice}") from error
    if not isinstance(record, dict):
        raise BadText("line is no JSON object", "is no JSON object; write one object on each line")
    return record


def text_of(record: dict[str, Any], key: Key) -> str | None:
    """Return the text under ``key``, or None if the value is null. Raises BadText.

    For example, ``text_of({"meta": {"text": "a"}}, text_key("meta.text"))`` returns "a".
    """
    text = _value_at(record, key)
    if text is None:
        return None
    if key.numbers and isinstance(text, int) and not isinstance(text, bool):
        return str(text)
    if not isinstance(text, str):
        raise _other_type(key, type(text).__name__)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadText(
            "text is not Unicode", f"has text that is not Unicode ({error}); repair it"
        ) from error
    return text


def _value_at(record: dict[str, Any], key: Key) -> Any:
    """Return ``record[key]``; if that is absent, follow the dots of ``key`` into nested objects."""
    if key.name in record:
        return record[key.name]
    value: Any = record
    for name in key.name.split("."):
        if value is None:
            return None
        if not isinstance(value, dict) or name not in value:
            raise _no_key(key, list(_names(record)))
        value = value[name]
    return value


def _names(record: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in sorted(record.items()):
        if isinstance(value, dict) and value and prefix.count(".") < 3:
            yield from _names(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def parquet_texts(path: Path, key: Key) -> Iterator[tuple[int, str | BadText | None]]:
    """Yield the row number, counted from 1, and the text in column ``key`` of each row.

    The text is None if the value is null. ``key`` may name a field of a struct: ``meta.text``. If
    the file has no such column, one BadText is yielded for all rows, under row number 0. Raises
    OSError for a damaged file.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = _column(file.schema_arrow, key)
            if isinstance(names, BadText):
                yield 0, names
                return
            number = 0
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[key.name]):
                for value in _strings(batch, names).to_pylist():
                    number += 1
                    yield number, value if value is None else _decoded(value)
    except pyarrow.ArrowException as error:
        raise OSError(f"it is not parquet that can be read: {error}") from error


def parquet_rows(path: Path) -> int:
    """Return the number of rows in a parquet file, from its metadata."""
    from pyarrow import parquet

    return int(parquet.read_metadata(path).num_rows)


def _column(schema: Any, key: Key) -> list[str] | BadText:
    """Return the path of field names to a text column, or BadText if there is no such column."""
    from pyarrow import types

    names = [key.name] if key.name in schema.names else key.name.split(".")
    fields = {field.name: field for field in schema}
    for at, name in enumerate(names):
        if name not in fields:
            return _no_key(key, list(_leaves(schema)))
        kind = fields[name].type
        if at < len(names) - 1:
            fields = {f.name: f for f in kind.fields} if types.is_struct(kind) else {}
    if types.is_dictionary(kind):
        kind = kind.value_type
    is_text = (
        types.is_string, types.is_large_string, types.is_string_view, types.is_binary,
        types.is_large_binary, types.is_binary_view, types.is_null,
    )  # fmt: skip
    taken = any(test(kind) for test in is_text) or (key.numbers and types.is_integer(kind))
    return names if taken else _other_type(key, str(kind))


def _leaves(fields: Any, prefix: str = "") -> Iterator[str]:
    from pyarrow import types

    for field in fields:
        if types.is_struct(field.type):
            yield from _leaves(field.type.fields, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def _strings(batch: Any, names: list[str]) -> Any:
    """Return the column as bytes, because arrow strings may contain invalid UTF-8."""
    import pyarrow
    from pyarrow import compute, types

    column = batch.column(0)
    for name in names[1:]:
        column = compute.struct_field(column, name)
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_integer(column.type):
        column = column.cast(pyarrow.string())
    return column.cast(pyarrow.large_binary())


def _decoded(value: bytes) -> str | BadText:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        return BadText("text is not UTF-8", f"has text that is not UTF-8 ({error}); convert it")


def _no_key(key: Key, names: list[str]) -> BadText:
    more = ", ..." if len(names) > _KEYS_NAMED else ""
    known = ", ".join(names[:_KEYS_NAMED]) + more if names else "none"
    return BadText(
        f"no text under {key.name!r}",
        f"has no {key.name!r} (it has: {known}); name the field with {key.option}",
    )


def _other_type(key: Key, kind: str) -> BadText:
    return BadText(
        f"no text under {key.name!r}",
        f"has no text under {key.name!r} but {kind}; name the field with {key.option}",
    )
