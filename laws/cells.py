"""Rows that are not independent measurements: copies, repetitions, checkpoints of one run."""

# n: rows

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from allometry.laws.forms.base import Variable
from allometry.laws.observations import Observations

SMALL = 1e4
"""Bound below which counts of parameters and tokens are probably in millions or billions."""
COUNTED = ("parameters", "tokens")


def by_cell(observations: Observations, names: Sequence[str]) -> Observations:
    """Return observations in which rows with equal values in these columns form one group.

    Such rows are repetitions (seeds) of one cell, whose deviations from a wrong law have the same
    sign. A group has the name of its first row's group.
    """
    first_n = _first_alike(observations, names)
    return replace(observations, groups=tuple(observations.groups[first] for first in first_n))


def row_notes(
    observations: Observations, inputs: Sequence[Variable], target: str, *, grouped: bool
) -> list[str]:
    """Return sentences about unusual rows of a table, with advice.

    ``grouped``: True if the user has named a group column.
    """
    names = [one.name for one in inputs if one.name in observations.columns]
    notes = [note for one in inputs if (note := unit_note(one, observations)) is not None]
    if (note := copies_note(observations, [*names, target])) is not None:
        notes.append(note)
    if grouped:
        return notes
    first_n = _first_alike(observations, names)
    repeated = int((first_n != np.arange(len(observations))).sum())
    if repeated:
        notes.append(
            f"{repeated} of {len(observations)} rows have the {', '.join(names)} of others and are "
            "one group with them; --group COLUMN says otherwise"
        )
    if (column := observations.conventions.get("run column")) is not None:
        notes.append(
            f"column {column!r} names several rows alike, which are taken as runs of their own; if "
            f"they are of one run, --group {column!r} takes them together"
        )
    elif "N" in names and len(names) > 1:
        sizes, rows = len(np.unique(observations["N"])), len(np.unique(first_n))
        if 2 * sizes <= rows:
            notes.append(
                f"{sizes} values of N are in {rows} rows, which are taken as runs of their own; if "
                "they are checkpoints of one run for each N, --group COLUMN takes them together"
            )
    return notes


def copies_note(observations: Observations, names: Sequence[str]) -> str | None:
    """Return a sentence if rows equal other rows in all of these columns, bit by bit."""
    known = [name for name in names if name in observations.columns]
    first_n = _first_alike(observations, known)
    again_n = first_n != np.arange(len(observations))
    if not again_n.any():
        return None
    row = int(np.argmax(again_n))
    first = int(first_n[row])
    return (
        f"{int(again_n.sum())} of {len(observations)} rows are copies of others in "
        f"{', '.join(known[:-1])} and {known[-1]} (row {row + 1} is row {first + 1} again, "
        f"{observations.groups[first]}), and count twice; remove them unless they are runs of "
        "their own"
    )


def unit_note(variable: Variable, observations: Observations) -> str | None:
    """Return a sentence if counts of parameters or tokens are too small for their unit."""
    if variable.unit not in COUNTED or variable.name not in observations.columns:
        return None
    low, high = (float(end(observations[variable.name])) for end in (np.min, np.max))
    if high >= SMALL:
        return None
    name, span = variable.name, f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return (
        f"{name} is {span}: in millions or billions? {name} counts {variable.unit}; as billions it "
        f"is {name}={low * 1e9:g}, in a table --map {name}={name}*1e9"
    )


def _first_alike(observations: Observations, names: Sequence[str]) -> NDArray[np.intp]:
    """Return, for each row [n], the index of the first row that is equal in these columns."""
    known = [observations[name] for name in names if name in observations.columns]
    if not known:
        return np.arange(len(observations))
    _, first, index_n = np.unique(np.stack(known), axis=1, return_index=True, return_inverse=True)
    return np.asarray(first[index_n.reshape(-1)])
