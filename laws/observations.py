"""Input of fits: rows of numbers with their units and groups."""

# n: rows

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError

Column = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LearningRates:
    """Learning rate of each step of one run, from step 1; S1 and S2 are computed from it."""

    rates: Column
    warmup_steps: int


@dataclass(frozen=True, slots=True)
class Observations:
    """Rows to which a law may be fitted.

    ``columns``: float64 arrays [n] by name, inputs and targets, in the units of the form's
    ``Variable`` s. ``groups``: group of each row (a run, a size): rows of one group are not
    independent, so they are resampled and held out together. ``curves``: the learning rates of a
    group, for laws of complete curves, whose rows then have a column ``step``. ``conventions``:
    descriptions of columns ("N": "all parameters", "loss": "mean of the last 10 steps").
    """

    columns: Mapping[str, Column]
    groups: tuple[str, ...]
    curves: Mapping[str, LearningRates] = field(default_factory=dict)
    conventions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in self.columns.items():
            assert values.shape == (len(self.groups),), (name, values.shape, len(self.groups))

    @classmethod
    def of(
        cls, columns: Mapping[str, Sequence[float] | Column], groups: Sequence[str] | None = None
    ) -> Self:
        """Return rows from plain sequences; without ``groups`` each row is a group.

        For example, ``Observations.of({"N": [1e8, 1e9], "D": [2e9, 2e10]})``.
        """
        arrays = {name: np.asarray(values, np.float64) for name, values in columns.items()}
        number = len(next(iter(arrays.values())))
        return cls(arrays, tuple(map(str, range(number)) if groups is None else groups))

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> Column:
        """Return a column. Raises UserError: the column does not exist."""
        if name not in self.columns:
            raise UserError(
                f"the observations have no column {name!r}, only {', '.join(self.columns)}; map "
                f"one to it (--map {name}=COLUMN) or choose a law that needs none"
            )
        return self.columns[name]

    def place(self, row: int) -> str:
        """Return the location of a row, for messages: its number, and its group if named."""
        group = self.groups[row]
        return f"row {row + 1}" + (f" ({group})" if group != str(row) else "")

    def take(self, rows: NDArray[np.intp] | NDArray[np.bool_] | Sequence[int]) -> Self:
        """Return some of the rows, by index or mask, with the curves of their groups."""
        chosen = np.arange(len(self))[np.asarray(rows)]
        groups = tuple(self.groups[row] for row in chosen)
        return replace(
            self,
            columns={name: values[chosen] for name, values in self.columns.items()},
            groups=groups,
            curves={name: curve for name, curve in self.curves.items() if name in set(groups)},
        )
