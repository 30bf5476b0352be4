"""What a law is: a form with named parameters, the units it consumes, its source and its range."""

# S parameter sets, n rows, P parameters

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.laws.observations import Observations

Values = Mapping[str, Any]
"""Value of each parameter: a float, or an array [S, 1] for S sets at once; complex too."""
Predictions = NDArray[Any]
Slopes = tuple[Predictions, NDArray[np.float64]]
"""Predictions [S, n] and their derivatives [S, P, n] by parameter value."""

LOSS_UNIT = "nats per token"
"""Of losses of run folders and of published coefficients; no law depends on it (see ``Fit.unit``).
"""


@dataclass(frozen=True, slots=True)
class Variable:
    """A column that a law reads or predicts: ``N``, its unit and what it counts.

    ``positive``: only positive numbers make sense; ``least``, ``most``: only those in this range.
    """

    name: str
    unit: str
    description: str
    positive: bool = True
    least: float = -np.inf
    most: float = np.inf

    def bad(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which values the law cannot take."""
        outside = ~np.isfinite(values) | (values < self.least) | (values > self.most)
        return outside | (values <= 0.0) if self.positive else outside

    def clip(self, values: Any) -> NDArray[np.float64]:
        """Return predictions kept within ``least`` and ``most``: an accuracy never passes 1."""
        return np.clip(np.asarray(values, np.float64), self.least, self.most)

    def hint(self, values: NDArray[np.float64]) -> str:
        """Return words that follow a complaint: that a share looks like one in percent, if so."""
        known = values[np.isfinite(values)]
        if self.most != 1.0 or not len(known) or not 1.0 < known.max() <= 100.0 or known.min() < 0:
            return ""
        return f" (if it is in percent: --map {self.name}=COLUMN/100)"

    @property
    def demand(self) -> str:
        """What values must be, in words."""
        if (self.least, self.most) == (0.0, 1.0):
            return "a share from 0 to 1"
        kind = "a positive number" if self.positive else "a number"
        limits = (("at least", self.least), ("at most", self.most))
        edges = [f"{word} {edge:g}" for word, edge in limits if np.isfinite(edge)]
        return " ".join([kind, *([f"of {' and '.join(edges)}"] if edges else [])])


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number that a fit finds.

    ``low``, ``high``: bounds of the value. ``scale``: whether a fit moves the value itself or its
    natural log (then the value is positive). ``start``: where blind starts are drawn from, evenly
    on the scale, and given as values; ``grid``: instead a grid of starts, as values. ``linear``:
    the prediction is a linear function of this parameter and the other linear ones together, so
    that a fit solves for them.
    """

    name: str
    unit: str
    low: float
    high: float
    start: tuple[float, float]
    scale: Literal["linear", "log"] = "linear"
    grid: tuple[float, ...] | None = None
    linear: bool = False

    def __post_init__(self) -> None:
        assert self.low <= self.start[0] <= self.start[1] <= self.high, self
        assert self.scale == "linear" or self.start[0] > 0.0, self


class Form(ABC):
    """One law. Forms hold no fitted state: a ``Fit`` is a form with values.

    ``name``: as typed by users. ``equation``: one line. ``source``: paper and equation.
    ``inputs``/``target``: columns it reads and predicts. ``parameters``: in the order of a fit's
    vectors. ``valid``: the range of what it was shown on, in words. ``published``: named sets of
    coefficients from papers, for predictions without a fit and for tests; fits never start there.
    ``residual``: on which scale a fit compares, by default: of logs (for a positive target) or of
    the values.
    """

    name: ClassVar[str]
    equation: ClassVar[str]
    source: ClassVar[str]
    inputs: ClassVar[tuple[Variable, ...]]
    target: ClassVar[Variable]
    parameters: ClassVar[tuple[Parameter, ...]]
    valid: ClassVar[str]
    published: ClassVar[Mapping[str, Mapping[str, float]]] = {}
    residual: ClassVar[Literal["log", "linear"]] = "log"

    def prepare(self, observations: Observations) -> Any:
        """Return what ``predict`` needs of the rows, computed once for many predictions.

        Here: the input columns, checked. Forms of curves also precompute sums. Raises UserError if
        a column is missing, not finite, or outside of what the law can take.
        """
        columns = {}
        for variable in self.inputs:
            values = observations[variable.name]
            bad = variable.bad(values)
            if bad.any():
                row = int(np.argmax(bad))
                raise UserError(
                    f"{variable.name} of {observations.place(row)} is "
                    f"{values[row]}, and {self.name} needs {variable.demand}; mend or drop it"
                    f"{variable.hint(values)}"
                )
            columns[variable.name] = values
        return columns

    @abstractmethod
    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the target [S, n] (or [n] for plain floats).

        Written with numpy operations that broadcast [S, 1] against [n] and hold for complex
        values, as derivatives are taken by complex steps where ``derivatives`` is not overridden.
        """

    def cautions(self, values: Mapping[str, float], observations: Observations) -> list[str]:
        """Return what to be warned of where the law is asked about these rows, a sentence each."""
        return []

    def restated(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the paper's coefficients, where the parameters are other functions of them."""
        return {}

    def for_columns(self, columns: Sequence[str]) -> Form:
        """Return this law over columns of these names: for laws of any number of domains.

        Users write ``NAME:COLUMN,COLUMN``, which is then the name of the form. Raises UserError if
        this law reads fixed columns.
        """
        raise UserError(
            f"{self.name} reads {', '.join(variable.name for variable in self.inputs)} and takes "
            f"no names of columns, not {','.join(columns)!r}; write {self.name} alone"
        )

    def derivatives(self, values: Values, prepared: Any) -> Slopes | None:
        """Return predictions and derivatives, or None: the fit then takes complex steps.

        Override where speed matters.
        """
        return None


class LogForm(Form):
    """A law of the logs of its inputs."""

    def prepare(self, observations: Observations) -> Any:
        """Return the natural log [n] of each input, in their order."""
        columns = super().prepare(observations)
        return tuple(np.log(columns[variable.name]) for variable in self.inputs)
