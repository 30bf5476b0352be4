"""Derived columns, row selection and groups: ``--map``, ``--where`` and ``--group``."""

# n: rows

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.laws.expressions import Condition, Expression
from allometry.laws.observations import Column, Observations

HELD_OUT = "held out"
"""Column added by ``mark_held_out``."""
_WRITTEN_OTHERWISE = re.compile(r"[-+]?[\d.,'_\s]*\d[\d.,'_\s]*([eE][-+]?\d+)?\s*[^\W\d]*%?")
"""Number with a decimal comma, thousands separators, or a unit."""


class Rows(Protocol):
    """Rows of a file, or observations, as read by expressions."""

    @property
    def name(self) -> str:
        """Name of the rows in messages."""

    @property
    def header(self) -> Sequence[str]:
        """Names of the columns."""

    def __len__(self) -> int: ...

    def numbers(self, name: str) -> Column:
        """Return a column's numbers [n], NaN for cells without a number."""

    def texts(self, name: str) -> NDArray[np.str_]:
        """Return a column's cells [n] as text."""

    def place(self, row: int) -> str:
        """Return the location of a row, for messages."""


@dataclass
class Derived:
    """Rows with a mapping of names to columns or arithmetic, each computed at its first use.

    In arithmetic a name refers to another name of the mapping, else to a column; an expression that
    equals the full name of a column is that column.
    """

    rows: Rows
    mapping: Mapping[str, str]
    _mapped: dict[str, Column] = field(default_factory=dict)
    _columns: dict[str, Column] = field(default_factory=dict)

    def meeting(self, conditions: Sequence[Condition], flag: str = "--where") -> NDArray[np.bool_]:
        """Return a mask [n] of the rows that satisfy all conditions.

        Raises UserError: unknown column.
        """
        kept = np.ones(len(self.rows), dtype=bool)
        for condition in conditions:
            asked = f"{flag} {condition.text!r}"
            column = partial(self._value, inside=(), asked=asked)
            kept &= condition.evaluate(column, partial(self._texts, asked=asked))
        return kept

    def checked(self, name: str, kept: NDArray[np.bool_], *, positive: bool = False) -> Column:
        """Return the values of the kept rows, all of them finite (and ``positive``).

        Raises UserError: a value is not, or the column is missing; the message has row and column.
        """
        values = self._value(name, (), f"--map {name}=COLUMN")
        broken = kept & ~np.isfinite(values)
        if broken.any():
            row = int(np.argmax(broken))
            for column in self._read_for(name):
                if not np.isfinite(self._column(column)[row]):
                    cell = str(self.rows.texts(column)[row])
                    raise UserError(
                        f"{self.rows.place(row)}, column {column!r}: {cell!r} "
                        + (
                            "is no plain number; write it with a decimal point and without "
                            "separators or units, as 0.5 or 1e7"
                            if _WRITTEN_OTHERWISE.fullmatch(cell)
                            else "is not a finite number; mend it or leave such rows out, as "
                            f"--where '`{column}` > 0' does"
                        )
                    )
            raise UserError(
                f"{self.rows.place(row)}: {name} = {self.mapping.get(name, name)} is not a finite "
                "number; mend the row or leave it out with --where"
            )
        below = kept & (values <= 0.0)
        if positive and below.any():
            row = int(np.argmax(below))
            made = f" ({name}={self.mapping[name]})" if name in self.mapping else ""
            raise UserError(
                f"{self.rows.place(row)}: {name} is {values[row]:g}{made}, and the law takes "
                "positive numbers; mend the row or leave it out with --where"
            )
        return values[kept]

    def groups(self, group: str, kept: NDArray[np.bool_]) -> list[str]:
        """Return the kept rows' cells of the group column.

        Raises UserError: the column is missing.
        """
        return [str(text) for text in self._texts(group, "--group")[kept]]

    def _texts(self, name: str, asked: str) -> NDArray[np.str_]:
        return self.rows.texts(self._known(name, asked))

    def _value(self, name: str, inside: tuple[str, ...], asked: str) -> Column:
        """Return the values of a mapped name or of a column."""
        if name in inside:
            raise UserError(
                f"--map {name}={self.mapping[name]} needs itself by way of "
                f"{' and '.join(inside[1:]) or name}; name the columns of {self.rows.name}"
            )
        if name not in self.mapping:
            return self._column(self._known(name, asked))
        if name not in self._mapped:
            self._mapped[name] = self._computed(name, inside)
        return self._mapped[name]

    def _computed(self, name: str, inside: tuple[str, ...]) -> Column:
        text = self.mapping[name]
        if text in self.rows.header:
            return self._column(text)

        def column(part: str) -> Column:
            if part == name and part in self.rows.header:
                return self._column(part)  # N=N*1e6: the file's own N
            return self._value(part, (*inside, name), f"--map {name}={text}")

        values = Expression.parse(text, f"--map {name}").evaluate(column)
        return np.broadcast_to(values, (len(self.rows),)).astype(np.float64)

    def _read_for(self, name: str) -> list[str]:
        """Return the columns that a name is computed from."""
        text = self.mapping.get(name, name)
        if text in self.rows.header:
            return [text]
        names: list[str] = []
        for part in Expression.parse(text, f"--map {name}").names:
            own = part == name or part not in self.mapping
            names += [part] if own else self._read_for(part)
        return names

    def _column(self, name: str) -> Column:
        if name not in self._columns:
            self._columns[name] = self.rows.numbers(name)
        return self._columns[name]

    def _known(self, name: str, asked: str) -> str:
        if name not in self.rows.header:
            raise UserError(
                f"no column of {self.rows.name} is called {name!r} ({asked}); there are "
                f"{', '.join(self.rows.header)}"
            )
        return name


@dataclass(frozen=True)
class _ObservedRows:
    """Observations as ``Rows``; ``group`` is a column of texts."""

    observations: Observations
    name: str

    @property
    def header(self) -> tuple[str, ...]:
        return (*self.observations.columns, "group")

    def __len__(self) -> int:
        return len(self.observations)

    def numbers(self, name: str) -> Column:
        if name == "group":
            return np.full(len(self), np.nan)
        return self.observations[name]

    def texts(self, name: str) -> NDArray[np.str_]:
        if name == "group":
            return np.array(self.observations.groups, dtype=np.str_)
        return np.array([f"{value:.12g}" for value in self.observations[name]], dtype=np.str_)

    def place(self, row: int) -> str:
        return f"{self.observations.place(row)} of {self.name}"


def derive(
    observations: Observations,
    *,
    mapping: Mapping[str, str] | None = None,
    where: Sequence[str] = (),
    group: str | None = None,
    name: str = "the runs",
) -> Observations:
    """Return observations with added columns, fewer rows or other groups, as ``read_table`` does.

    In ``where``, ``group`` is a column of texts with the current groups. ``name``: name of the rows
    in messages. Raises UserError: an expression is invalid or names no column, no row is left, or a
    value is not finite. For example, ``derive(rows, mapping={"C": "6*N*D"}, where=["N > 1e8"])``.
    """
    mapping = dict(mapping or {})
    derived = Derived(_ObservedRows(observations, name), mapping)
    kept = derived.meeting([Condition.parse(text) for text in where])
    if not kept.any():
        raise UserError(f"no row of {name} is left by --where {' --where '.join(map(repr, where))}")
    made = {name: derived.checked(name, kept) for name in mapping}
    groups = None if group is None else tuple(derived.groups(group, kept))
    if groups is not None and observations.curves:
        raise UserError(
            "--group does not go with curves, each of which has learning rates of its own; leave "
            "it out"
        )
    taken = observations.take(kept)
    return replace(
        taken,
        columns={**taken.columns, **made},
        groups=taken.groups if groups is None else groups,
        conventions={**taken.conventions, **mapping},
    )


def mark_held_out(observations: Observations, condition: str) -> Observations:
    """Return observations with a column ``HELD_OUT``: 1 if the row satisfies the condition, else 0.

    Rows of a table may have the column already, because the table has more columns than the
    observations (``read_table``). Raises UserError: the condition is invalid, names no column, or
    is true for all rows or for no row.
    """
    if HELD_OUT not in observations.columns:
        derived = Derived(_ObservedRows(observations, "the observations"), {})
        met = derived.meeting([Condition.parse(condition, "--hold-out")], "--hold-out")
        columns = {**observations.columns, HELD_OUT: met.astype(np.float64)}
        observations = replace(observations, columns=columns)
    met = observations[HELD_OUT] > 0.0
    if met.all() or not met.any():
        raise UserError(
            f"--hold-out {condition!r} holds for {'all' if met.all() else 'none'} of "
            f"{len(met)} rows; some must be held out and some remain"
        )
    return observations
