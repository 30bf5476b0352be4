"""Loss curves under learning-rate annealing (Tissue et al., arXiv 2408.11029)."""

# S parameter sets, n rows, M memories of the table, P parameters

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.laws.forms.base import Form, Parameter, Predictions, Slopes, Values, Variable
from allometry.laws.observations import LearningRates, Observations

SHORTEST, LONGEST = 2.0, 1e5
STEP = Variable("step", "steps", "step of the curve, from 1")
CURVE_LOSS = Variable("loss", "nats per token", "training loss, averaged over neighbouring steps")
POWER_OF_S1 = (
    Parameter("L0", "nats per token", 0.0, 1e3, (0.5, 4.0), linear=True),
    Parameter("A", "nats per token x lr^alpha", 0.0, 1e6, (0.05, 2.0), linear=True),
)
_STENCIL = 6  # points of the table for one interpolation
_SPACING = 0.2  # between memories of the table, in natural logs


@dataclass(frozen=True, slots=True)
class Areas:
    """Inputs of the law from a curve: ``s1_n`` and S2 / memory at ``log_memories_M`` [M, n]."""

    s1_n: NDArray[np.float64]
    log_memories_M: NDArray[np.float64]
    annealed_Mn: NDArray[np.float64]

    def s2(self, memory: Any) -> tuple[Any, Any]:
        """Return S2 [..., n] and dS2/dmemory at these memories in steps ([S, 1], or a float).

        Between the memories of the table S2/memory is a polynomial through the 6 nearest ones in
        log memory; its error is below 5e-6 of the largest S2 of a curve (2e-5 for memories below
        5).
        """
        place, grid = np.log(memory), self.log_memories_M
        first = np.searchsorted(grid, np.real(place)) - _STENCIL // 2
        first = np.clip(first, 0, len(grid) - _STENCIL)
        value, slope = 0.0, 0.0
        for j in range(_STENCIL):
            weight, change = _lagrange((place - grid[first]) / _SPACING, j)
            rows = self.annealed_Mn[(first[..., 0] if np.ndim(first) else first) + j]
            value, slope = value + weight * rows, slope + change * rows
        return memory * value, value + slope / _SPACING


def _lagrange(x: Any, j: int) -> tuple[Any, Any]:
    """Return the polynomial that is 1 at j and 0 at the stencil's other points, and its slope."""
    others = [k for k in range(_STENCIL) if k != j]
    scale = float(np.prod([j - k for k in others]))
    value = np.prod([x - k for k in others], axis=0)
    slope = sum(np.prod([x - k for k in others if k != left], axis=0) for left in others)
    return value / scale, slope / scale


def check_curve(form: Form, observations: Observations) -> NDArray[np.int64]:
    """Return the step of each row, after checking that its group has a rate for this step.

    Raises UserError: a group has no curve, or a row's step is not one of its steps.
    """
    steps = observations["step"]
    for row, (group, step) in enumerate(zip(observations.groups, steps, strict=True)):
        curve = observations.curves.get(group)
        if curve is None:
            raise UserError(
                f"{form.name} needs the learning rate of each step and {group} has none; give run "
                "folders, whose schedule is known, or choose a law of single numbers"
            )
        if not (1 <= step <= len(curve.rates) and step == int(step)):
            raise UserError(
                f"step of row {row + 1} ({group}) is {step:g}, and its learning rates are known "
                f"for steps 1 to {len(curve.rates)}; mend or drop it"
            )
    return steps.astype(np.int64)


def curves_of(observations: Observations) -> list[tuple[LearningRates, NDArray[np.intp]]]:
    """Return each curve with its rows; groups that share one curve are combined."""
    curves = [observations.curves[group] for group in observations.groups]
    rows: dict[int, list[int]] = {}
    for row, curve in enumerate(curves):
        rows.setdefault(id(curve), []).append(row)
    return [(curves[its[0]], np.array(its, np.intp)) for its in rows.values()]


def annealing(
    curve: LearningRates, steps_n: NDArray[np.int64], memories: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return S2 / memory [M, n] of one curve: S2 of ``laws/areas.py`` with momentum 1 − 1/memory.

    S2(s)/M = Σ_{k<=s} (η_{k−1} − η_k) (1 − λ^{s−k+1}) over the steps after warm-up.
    """
    from scipy.signal import lfilter

    first = max(1, curve.warmup_steps)
    falls = np.zeros_like(curve.rates)
    falls[first:] = curve.rates[first - 1 : -1] - curve.rates[first:]
    last = int(steps_n.max())
    falls, gains = falls[:last], np.zeros((len(memories), len(steps_n)))
    if not falls.any():
        return gains
    total = np.cumsum(falls)[steps_n - 1]
    for row, memory in enumerate(memories):
        momentum = 1.0 - 1.0 / memory
        gains[row] = total - momentum * lfilter([1.0], [1.0, -momentum], falls)[steps_n - 1]
    return gains


def areas(observations: Observations, steps_n: NDArray[np.int64]) -> Areas:
    """Return the areas of all rows."""
    number = int(np.ceil(np.log(LONGEST / SHORTEST) / _SPACING)) + 1
    log_memories = np.log(SHORTEST) + _SPACING * np.arange(number)
    s1_n = np.empty(len(observations))
    annealed_Mn = np.empty((number, len(observations)))
    for curve, rows in curves_of(observations):
        s1_n[rows] = np.cumsum(curve.rates)[steps_n[rows] - 1]
        annealed_Mn[:, rows] = annealing(curve, steps_n[rows], np.exp(log_memories))
    return Areas(s1_n, log_memories, annealed_Mn)


class Tissue(Form):
    """L(s) = L0 + A·S1^−alpha − C·S2, a law of complete curves.

    S1 is the sum of the rates up to and with step s, warm-up included. S2 is the annealing since
    the end of the warm-up, with a memory of ``memory`` = 1/(1−λ) steps: m_i = λ m_{i−1} + (η_{i−1}
    − η_i), S2 = Σ m_i. The paper sets λ = 0.999, a memory of 1000 steps. C and memory are not
    identified without a change of rate after the warm-up.
    """

    name = "tissue"
    equation = "L = L0 + A·S1^-alpha - C·S2"
    source = "Tissue et al., arXiv 2408.11029, equation 1; Huber of log residuals"
    inputs = (STEP,)
    target = CURVE_LOSS
    parameters = (
        *POWER_OF_S1,
        Parameter("C", "nats per token per lr", 0.0, 1e6, (0.0, 1.0), linear=True),
        Parameter("alpha", "1", 0.01, 5.0, (0.1, 1.5), "log"),
        Parameter("memory", "steps", SHORTEST, LONGEST, (10.0, 1e4), "log"),
    )
    valid = "after the warm-up; shown for 25M to 2B parameters, any schedule, up to 3 times longer"

    def prepare(self, observations: Observations) -> Areas:
        """Return S1 and the table of S2. Raises UserError like ``check_curve``."""
        super().prepare(observations)
        return areas(observations, check_curve(self, observations))

    def predict(self, values: Values, prepared: Areas) -> Predictions:
        """See ``Form.predict``."""
        s2, _ = prepared.s2(values["memory"])
        power = np.exp(-values["alpha"] * np.log(prepared.s1_n))
        return np.asarray(values["L0"] + values["A"] * power - values["C"] * s2)

    def derivatives(self, values: Values, prepared: Areas) -> Slopes:
        """See ``Form.derivatives``."""
        s2, slope = prepared.s2(values["memory"])
        log_s1 = np.log(prepared.s1_n)
        power = np.exp(-values["alpha"] * log_s1)
        fall = -values["A"] * log_s1 * power
        parts = (np.ones_like(power), power, -s2, fall, -values["C"] * slope)
        predicted = values["L0"] + values["A"] * power - values["C"] * s2
        return predicted, np.stack(np.broadcast_arrays(*parts), axis=-2)


FORMS = (Tissue(),)
