"""Observations from tables: CSV files whose columns are mapped to what a law reads."""

# n rows

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.laws.expressions import Condition, Expression
from allometry.laws.observations import Column, Observations

SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")


def read_table(
    paths: str | Path | Sequence[str | Path],
    names: Collection[str],
    *,
    mapping: Mapping[str, str] | None = None,
    where: Sequence[str] = (),
    group: str | None = None,
) -> Observations:
    """Return rows of one or more CSV files (.tsv with tabs; .gz too) that have the same columns.

    ``names``: what is wanted, each a column of the files, or what ``mapping`` says of it: a column
    or arithmetic on columns, ``{"N": "Model Size", "D": "C/(6*N)"}``. In arithmetic a name is
    another one of the mapping, else a column; a column's name with other signs in it stands in
    backticks: ``"`Training FLOP`/(6*N)"``. What ``mapping`` names comes too if it is not in
    ``names``. ``where``: conditions that a row must meet, ``"loss < 3.44"``, ``"set == 'C4'"``; a
    missing number meets none. ``group``: the column that says whose a row is; without it each row
    is its own, named by file and line.

    Raises:
        UserError: a file or column is absent, an expression cannot be read, no row is left, or a
            cell that is needed is not a number; the sentence names file, line and column.
    """
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    mapping = dict(mapping or {})
    wanted = dict.fromkeys([*names, *mapping])
    conditions = [Condition.parse(text) for text in where]
    tables = [_Source(_read(Path(path)), mapping) for path in files]
    columns: dict[str, list[Column]] = {name: [] for name in wanted}
    groups: list[str] = []
    for source in tables:
        kept = source.meeting(conditions)
        for name in wanted:
            columns[name].append(source.checked(name, kept))
        groups += source.groups(group, kept)
    if not groups:
        said = "".join(f" --where {text!r}" for text in where)
        raise UserError(f"{', '.join(map(str, files))}: no row is left{said and ' by'}{said}")
    shown = ", ".join(table.table.path.name for table in tables)
    return Observations(
        columns={name: np.concatenate(parts) for name, parts in columns.items()},
        groups=tuple(groups),
        conventions={name: f"{mapping.get(name, name)} of {shown}" for name in wanted},
    )


def is_table(path: str | Path) -> bool:
    """Whether the name is that of a file that ``read_table`` reads."""
    return str(path).endswith(SUFFIXES)


@dataclass(frozen=True)
class _Table:
    """A file as read. ``lines``: the line each row ends on, as an editor counts them."""

    path: Path
    header: tuple[str, ...]
    rows: list[list[str]]
    lines: list[int]

    def texts(self, name: str) -> NDArray[np.str_]:
        place = self.header.index(name)
        return np.array([row[place] for row in self.rows], dtype=np.str_)


@dataclass
class _Source:
    """A table with the mapping of its columns; columns are computed once, when asked for."""

    table: _Table
    mapping: Mapping[str, str]
    _numbers: dict[str, Column] = field(default_factory=dict)

    def meeting(self, conditions: Sequence[Condition]) -> NDArray[np.bool_]:
        kept = np.ones(len(self.table.rows), dtype=bool)
        for condition in conditions:

            def column(name: str, text: str = condition.text) -> Column:
                return self._value(name, (), f"--where {text!r}")

            def texts(name: str, text: str = condition.text) -> NDArray[np.str_]:
                return self.table.texts(self._known(name, f"--where {text!r}"))

            kept &= condition.evaluate(column, texts)
        return kept

    def checked(self, name: str, kept: NDArray[np.bool_]) -> Column:
        """The values of kept rows, all of them finite."""
        values = self._value(name, (), f"--map {name}=COLUMN")[kept]
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(kept)[np.argmax(~np.isfinite(values))])
            where = f"{self.table.path}, line {self.table.lines[row]}"
            for column in self._read_for(name):
                cell = str(self.table.texts(column)[row])
                if not np.isfinite(self._column(column)[row]):
                    raise UserError(
                        f"{where}, column {column!r}: {cell!r} is not a finite number; mend it or "
                        f"leave such rows out, as --where '`{column}` > 0' does"
                    )
            raise UserError(
                f"{where}: {name} = {self.mapping.get(name, name)} is not a finite number; mend "
                "the row or leave it out with --where"
            )
        return values

    def groups(self, group: str | None, kept: NDArray[np.bool_]) -> list[str]:
        if group is None:
            lines = np.array(self.table.lines)[kept]
            return [f"{self.table.path.name}:{line}" for line in lines]
        texts = self.table.texts(self._known(group, f"--group {group}"))
        return [str(text) for text in texts[kept]]

    def _value(self, name: str, inside: tuple[str, ...], asked: str) -> Column:
        """A mapped name or a column of the file."""
        if name in inside:
            raise UserError(
                f"--map {name}={self.mapping[name]} needs itself by way of "
                f"{' and '.join(inside[1:]) or name}; name the file's own columns"
            )
        if name not in self.mapping:
            return self._column(self._known(name, asked))
        if name not in self._numbers:
            self._numbers[name] = self._computed(name, inside)
        return self._numbers[name]

    def _computed(self, name: str, inside: tuple[str, ...]) -> Column:
        text, flag = self.mapping[name], f"--map {name}="
        if text in self.table.header:
            return self._column(text)
        expression = Expression.parse(text, flag.rstrip("="))

        def column(part: str) -> Column:
            if part == name and part in self.table.header:
                return self._column(part)  # N=N*1e6: the file's own N
            return self._value(part, (*inside, name), flag + text)

        values = expression.evaluate(column)
        return np.broadcast_to(values, (len(self.table.rows),)).astype(np.float64)

    def _read_for(self, name: str) -> list[str]:
        """The file's columns that a name is made of."""
        text = self.mapping.get(name, name)
        if text in self.table.header:
            return [text]
        found: list[str] = []
        for part in Expression.parse(text, f"--map {name}").names:
            own = part == name or part not in self.mapping
            found += [part] if own else self._read_for(part)
        return found

    def _column(self, name: str) -> Column:
        """Numbers of the file's column; NaN where a cell holds none."""
        key = f"`{name}`"
        if key not in self._numbers:
            self._numbers[key] = np.array([_number(cell) for cell in self.table.texts(name)])
        return self._numbers[key]

    def _known(self, name: str, asked: str) -> str:
        if name not in self.table.header:
            raise UserError(
                f"{self.table.path} has no column {name!r} ({asked}); its columns are "
                f"{', '.join(self.table.header)}"
            )
        return name


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def _read(path: Path) -> _Table:
    if not path.is_file():
        raise UserError(f"{path} is no file; give a CSV file or the folder of a run")
    if not is_table(path):
        raise UserError(f"{path} is not named as a table is ({', '.join(SUFFIXES)}); rename it")
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); save it as UTF-8 text") from None
    delimiter = "\t" if ".tsv" in path.name else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        for row in reader:
            if row:
                rows.append([cell.strip() for cell in row])
                lines.append(reader.line_num)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}, is not CSV ({error}); mend it") from None
    if len(rows) < 2:
        raise UserError(f"{path} holds no row below its header; give a table with a header line")
    header = tuple(rows[0])
    for name in header:
        if header.count(name) > 1:
            raise UserError(f"{path} has two columns called {name!r}; rename one")
    for row, line in zip(rows[1:], lines[1:], strict=True):
        if len(row) != len(header):
            raise UserError(
                f"{path}, line {line}, has {len(row)} cells where the header has {len(header)}; "
                "mend that line"
            )
    return _Table(path, header, rows[1:], lines[1:])
