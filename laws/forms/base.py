"""Base class of laws: a form with named parameters, units, source and valid range."""

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
"""Value of each parameter: a float, or an array [S, 1] for S sets at once; may be complex."""
Predictions = NDArray[Any]
Slopes = tuple[Predictions, NDArray[np.float64]]
"""Predictions [S, n] and their derivatives [S, P, n] by parameter value."""

LOSS_UNIT = "nats per token"
"""Unit of losses of run folders and published coefficients; no law depends on it.

See ``Fit.unit``.
"""


@dataclass(frozen=True, slots=True)
class Variable:
    """Input or target column of a law: name, unit and description, such as ``N``.

    ``positive``: True if values must be positive; ``least``, ``most``: range of valid values.
    """

    name: str
    unit: str
    description: str
    positive: bool = True
    least: float = -np.inf
    most: float = np.inf

    def bad(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return a mask of the values that the law cannot use."""
        outside = ~np.isfinite(values) | (values < self.least) | (values > self.most)
        return outside | (values <= 0.0) if self.positive else outside

    def clip(self, values: Any) -> NDArray[np.float64]:
        """Return predictions limited to ``least`` and ``most``: an accuracy never exceeds 1."""
        return np.clip(np.asarray(values, np.float64), self.least, self.most)

    def hint(self, values: NDArray[np.float64]) -> str:
        """Return a hint to append to an error message, if a share appears to be in percent."""
        known = values[np.isfinite(values)]
        if self.most != 1.0 or not len(known) or not 1.0 < known.max() <= 100.0 or known.min() < 0:
            return ""
        return f" (if it is in percent: --map {self.name}=COLUMN/100)"

    @property
    def demand(self) -> str:
        """Requirement on values, as text."""
        if (self.least, self.most) == (0.0, 1.0):
            return "a share from 0 to 1"
        kind = "a positive number" if self.positive else "a number"
        limits = (("at least", self.least), ("at most", self.most))
        edges = [f"{word} {edge:g}" for word, edge in limits if np.isfinite(edge)]
        return " ".join([kind, *([f"of {' and '.join(edges)}"] if edges else [])])


@dataclass(frozen=True, slots=True)
class Parameter:
    """A fitted number.

    ``low``, ``high``: bounds of the value. ``scale``: "linear" or "log", the scale of the search
    (the value is positive for "log"). ``start``: range of the starts, as values, evenly drawn on
    the scale; ``grid``: a grid of starts instead, as values. ``linear``: True if the prediction is
    a linear function of this and the other linear parameters together, so that a fit solves for
    them.
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
    """Base class of all laws. A form has no fitted state: a ``Fit`` is a form with values.

    ``name``: as typed by users. ``equation``: one line. ``source``: paper and equation.
    ``inputs``/``target``: input and predicted columns. ``parameters``: in the order of a fit's
    vectors. ``valid``: the demonstrated range, as text. ``published``: named sets of coefficients
    from papers, for predictions without a fit and for tests; fits never start from them.
    ``residual``: default scale of a fit's residuals: of logs (for a positive target) or of the
    values.
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
        """Return the prepared inputs of ``predict``, computed once for many predictions.

        Here: the checked input columns. Forms of curves also precompute sums. Raises UserError: a
        column is missing, not finite, or outside of the range that the law can use.
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

        Implemented with numpy operations that broadcast [S, 1] against [n] and are valid for
        complex values, because derivatives are computed by complex steps unless ``derivatives`` is
        overridden.
        """

    def cautions(self, values: Mapping[str, float], observations: Observations) -> list[str]:
        """Return warnings about predictions for these rows, a sentence each."""
        return []

    def restated(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the paper's coefficients, if the parameters are functions of them."""
        return {}

    def for_columns(self, columns: Sequence[str]) -> Form:
        """Return this law over columns of these names, for laws of any number of domains.

        Users write ``NAME:COLUMN,COLUMN``, which becomes the name of the form. Raises UserError:
        this law reads fixed columns.
        """
        raise UserError(
            f"{self.name} reads {', '.join(variable.name for variable in self.inputs)} and takes "
            f"no names of columns, not {','.join(columns)!r}; write {self.name} alone"
        )

    def derivatives(self, values: Values, prepared: Any) -> Slopes | None:
        """Return predictions and derivatives, or None: the fit then uses complex steps.

        Override for speed.
        """
        return None


class LogForm(Form):
    """Base class of laws of the logs of their inputs."""

    def prepare(self, observations: Observations) -> Any:
        """Return the natural log [n] of each input, in their order."""
        columns = super().prepare(observations)
        return tuple(np.log(columns[variable.name]) for variable in self.inputs)
