"""Observations from tables: CSV or JSON Lines, with columns mapped to a law's inputs."""

# n: rows

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.configs import json_file
from allometry.configs.errors import UserError
from allometry.laws.derive import HELD_OUT, Derived
from allometry.laws.expressions import Condition
from allometry.laws.observations import Column, Observations

RUN_COLUMNS = ("run", "run_id", "run_name", "name", "experiment", "exp_name", "model_name")
"""Headings, in lower case, of columns with names of runs."""
ENDINGS = (".csv", ".tsv", ".jsonl")
SUFFIXES = (*ENDINGS, *(f"{ending}.gz" for ending in ENDINGS))


def read_table(
    paths: str | Path | Sequence[str | Path],
    names: Collection[str],
    *,
    mapping: Mapping[str, str] | None = None,
    where: Sequence[str] = (),
    group: str | None = None,
    positive: Collection[str] = (),
    held_out: str | None = None,
) -> Observations:
    """Return rows of one or more tables with the same columns: CSV, .tsv, .jsonl, also .gz.

    ``names``: requested names, each a column of the files, or an entry of ``mapping``: a column or
    arithmetic on columns, ``{"N": "Model Size", "D": "C/(6*N)"}``. In arithmetic a name refers to
    another entry of the mapping, else to a column; a column's name with other characters is quoted
    by backticks: ``"`Training FLOP`/(6*N)"``. Entries of ``mapping`` are returned even if not in
    ``names``. ``where``: conditions on rows, ``"loss < 3.44"``, ``"set == 'C4'"``; missing numbers
    satisfy no condition. ``group``: the column with the group of a row; without it each row is a
    group, named by file and line. ``positive``: names whose values must be above 0. ``held_out``: a
    condition that becomes the column ``HELD_OUT``, 1 or 0. The convention "run column" is set if,
    without ``group``, a column with names of runs has repeated names. Raises UserError: a file or
    column is missing, a file is given twice, an expression is invalid, no row is left, or a
    required cell is not a number, or not positive; the message has file, line and column. For
    example, ``read_table("runs.csv", ["N", "D", "loss"], where=["N > 1e8"])``.
    """
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    mapping = dict(mapping or {})
    wanted = dict.fromkeys([*names, *mapping])
    conditions = [Condition.parse(text) for text in where]
    if len({Path(path).resolve() for path in files}) < len(files):
        raise UserError("the same table is given twice; give each once")
    tables = [_read(Path(path)) for path in files]
    named_alike = len({table.path.name for table in tables}) < len(tables)
    columns: dict[str, list[Column]] = {name: [] for name in wanted}
    groups: list[str] = []
    repeated: str | None = None
    held = [] if held_out is None else [Condition.parse(held_out, "--hold-out")]
    for table in tables:
        derived = Derived(table, mapping)
        kept = derived.meeting(conditions)
        for name in wanted:
            columns[name].append(derived.checked(name, kept, positive=name in positive))
        if held:
            met = derived.meeting(held, "--hold-out")[kept]
            columns.setdefault(HELD_OUT, []).append(met.astype(np.float64))
        if group is None:
            repeated = repeated or table.repeated_runs(kept)
            name = str(table.path) if named_alike else table.path.name
            groups += [f"{name}:{line}" for line in np.array(table.lines)[kept]]
        else:
            groups += derived.groups(group, kept)
    if not groups:
        said = "".join(f" --where {text!r}" for text in where)
        raise UserError(f"{', '.join(map(str, files))}: no row is left{said and ' by'}{said}")
    shown = ", ".join(table.path.name for table in tables)
    conventions = {name: f"{mapping.get(name, name)} of {shown}" for name in wanted}
    if repeated is not None:
        conventions["run column"] = repeated
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Observations(joined, tuple(groups), conventions=conventions)


def is_table(path: str | Path) -> bool:
    """Return True if ``read_table`` reads files with this name."""
    return str(path).lower().endswith(SUFFIXES)


@dataclass(frozen=True)
class _Table:
    """Content of a file. ``lines``: the line on which each row ends, counted from 1."""

    path: Path
    header: tuple[str, ...]
    rows: list[list[str]]
    lines: list[int]

    @property
    def name(self) -> str:
        return str(self.path)

    def __len__(self) -> int:
        return len(self.rows)

    def numbers(self, name: str) -> Column:
        return np.array([_number(cell) for cell in self.texts(name)], dtype=np.float64)

    def texts(self, name: str) -> NDArray[np.str_]:
        place = self.header.index(name)
        return np.array([row[place] for row in self.rows], dtype=np.str_)

    def repeated_runs(self, kept: NDArray[np.bool_]) -> str | None:
        """Return the column of runs' names in which kept rows have equal names, or None."""
        for name in self.header:
            cells = self.texts(name)[kept] if name.lower() in RUN_COLUMNS else np.array([], str)
            if len(np.unique(cells)) < len(cells):
                return name
        return None

    def place(self, row: int) -> str:
        return f"{self.path}, line {self.lines[row]}"


def _number(cell: str) -> float:
    """Return the number, NaN for a cell without a finite number."""
    try:
        value = float(cell)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _read(path: Path) -> _Table:
    if not path.is_file():
        raise UserError(f"{path} is no file; give a table or the folder of a run")
    if not is_table(path):
        raise UserError(
            f"{path} is not named as a table is; save it as CSV or JSON Lines under a name that "
            f"ends in one of {', '.join(SUFFIXES)}"
        )
    try:
        raw = path.read_bytes()
        zipped = path.suffix.lower() == ".gz"
        text = (gzip.decompress(raw) if zipped else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); save it as UTF-8 text") from None
    name = path.name.lower()
    cells = _json_cells(path, text) if ".jsonl" in name else _csv_cells(path, text)
    if len(cells) < 2:
        raise UserError(f"{path} holds no row below its header; give a table with a header line")
    (header, _), *below = cells
    for column in header:
        if header.count(column) > 1:
            raise UserError(f"{path} has two columns called {column!r}; rename one")
    for row, line in below:
        if len(row) != len(header):
            raise UserError(
                f"{path}, line {line}, has {len(row)} cells where the header has {len(header)}; "
                "mend that line"
            )
    return _Table(path, tuple(header), [row for row, _ in below], [line for _, line in below])


_Cells = list[tuple[list[str], int]]
"""The header and the rows, each with the line on which it ends."""


def _csv_cells(path: Path, text: str) -> _Cells:
    """Return cells between commas (.tsv: tabs), or another delimiter found in the header."""
    usual = "\t" if ".tsv" in path.name.lower() else ","
    first = text.partition("\n")[0]
    delimiter = next((one for one in (usual, ";", "\t", ",") if one in first), usual)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        return [([cell.strip() for cell in row], reader.line_num) for row in reader if row]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}, is not CSV ({error}); mend it") from None


def _json_cells(path: Path, text: str) -> _Cells:
    """Return the cells of JSON objects, one per line; a missing key is an empty cell."""
    rows: list[tuple[dict[str, Any], int]] = []
    for line, row in enumerate(text.splitlines(), start=1):
        if not row.strip():
            continue
        try:
            found = json_file.parse(row)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{path}, line {line}, is no JSON object; mend it")
        rows.append((found, line))
    header = list(dict.fromkeys(key for row, _ in rows for key in row))
    cells = [([_json_cell(row.get(key)) for key in header], line) for row, line in rows]
    return [(header, 0), *cells]


def _json_cell(value: object) -> str:
    if value is None:
        return ""
    return value.strip() if isinstance(value, str) else json.dumps(value)
