"""Loss curves under any schedule: the Multi-Power law (arXiv 2503.12811)."""

# S parameter sets, n rows, K events of all rows together

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from allometry.laws.forms.base import Form, Parameter, Predictions, Slopes, Values
from allometry.laws.forms.tissue import CURVE_LOSS, POWER_OF_S1, STEP, check_curve, curves_of
from allometry.laws.observations import LearningRates, Observations

GROWTH, CLIMBING = 1.2, 1.1
"""Maximum ratio of ages within a group of older events.

CLIMBING applies if the rise of the warm-up counts, during which rates change by more.
"""

_FLOOR = 1e-9  # least rate over the peak, as a rate of 0 has no power


@dataclass(frozen=True, slots=True)
class Events:
    """Changes of the learning rate before each row.

    ``fall_K``: decrease of the rate, ``area_K``: sum of rates since the change (its own step
    included), ``log_rate_K``: log of the rate after the change. Row i has the events ``first_n[i]``
    up to ``first_n[i + 1]``; every row has at least one event, with zero fall.
    """

    s1_n: NDArray[np.float64]
    fall_K: NDArray[np.float64]
    area_K: NDArray[np.float64]
    log_rate_K: NDArray[np.float64]
    first_n: NDArray[np.intp]

    def per_row(self, values_K: Any) -> Any:
        """Return the sums over each row's events [..., n] of ``fall`` times ``values_K``."""
        return np.add.reduceat(self.fall_K * values_K, self.first_n, axis=-1)


def events_of(
    curve: LearningRates, steps_n: NDArray[np.int64], warmup: bool = False
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return (row of each event [K], (fall, area, log rate) [3, K]) of one curve.

    For a row at step t the event of step k <= t has age t − k. Young events are kept separately;
    older events are grouped so that ages in a group span a factor of 1.2. A group has the sum of
    its falls and the mean, weighted by them, of area and log rate, so the error of the law's sum is
    half its second derivative times their variance: below 5e-4 of the decay's gain, some 2e-5 of a
    loss, for rates that fall steadily or in jumps; 2.5e-3 of B·peak for the rise of a warm-up; 2 %
    of the gain for rates that jump up and down at random in every step (tests compare with the
    plain double loop). Rises and falls are in separate groups. ``warmup``: True to count the rise,
    as in the paper's code.
    """
    rates, first = curve.rates, 0 if warmup else max(1, curve.warmup_steps)
    changes = np.zeros_like(rates)
    before = np.concatenate(([0.0], rates[:-1]))
    changes[first:] = before[first:] - rates[first:]
    s1 = np.concatenate(([0.0], np.cumsum(rates)))
    log_rates = np.log(np.maximum(rates, _FLOOR * rates.max()))
    growth, ages = CLIMBING if warmup else GROWTH, [0]
    while ages[-1] <= steps_n.max():
        ages.append(max(ages[-1] + 1, int(ages[-1] * growth)))
    bounds = np.array(ages)
    stop_nG = np.maximum(steps_n[:, None] - bounds[:-1], 0)
    start_nG = np.maximum(steps_n[:, None] - bounds[1:], 0)  # steps start+1 ... stop
    part_rows, part_values = [], []
    for part in (np.maximum(changes, 0.0), np.minimum(changes, 0.0)):
        if not part.any():
            continue
        sums = [
            np.concatenate(([0.0], np.cumsum(part * factor)))
            for factor in (1.0, s1[:-1] - s1[-1] / 2, log_rates)
        ]
        mass, area, log_rate = (total[stop_nG] - total[start_nG] for total in sums)
        counts = np.concatenate(([0], np.cumsum(part != 0.0)))
        rows, groups = np.nonzero(counts[stop_nG] > counts[start_nG])
        fall = mass[rows, groups]
        since = s1[steps_n[rows]] - s1[-1] / 2 - area[rows, groups] / fall
        part_rows.append(rows)
        part_values.append(np.stack([fall, np.maximum(since, 0.0), log_rate[rows, groups] / fall]))
    if not part_values:
        return np.empty(0, np.intp), np.empty((3, 0))
    return np.concatenate(part_rows), np.concatenate(part_values, axis=1)


class MultiPower(Form):
    """L(t) = L0 + A·S1^−alpha − B Σ_k (η_{k−1} − η_k)·(1 − (1 + C·η_k^−gamma·S_k)^−beta).

    S1 is the sum of the rates up to and with step t, warm-up included; S_k the sum of steps k to t.
    The sum is over the steps k after the warm-up, without the rise to the peak. B, C, beta and
    gamma are not identified without a change of rate after the warm-up.
    """

    name = "multi_power"
    equation = "L = L0 + A·S1^-alpha - B·Σ_k (η_k-1 - η_k)·(1 - (1 + C·η_k^-gamma·S_k)^-beta)"
    source = "Luo et al., arXiv 2503.12811; events from the end of the warm-up on"
    inputs = (STEP,)
    target = CURVE_LOSS
    parameters = (
        *POWER_OF_S1,
        Parameter("B", "nats per token per lr", 0.0, 1e8, (0.0, 1e3), linear=True),
        Parameter("alpha", "1", 0.01, 5.0, (0.1, 1.5), "log"),
        Parameter("C", "lr^(gamma-1)", 1e-6, 1e6, (0.1, 30.0), "log"),
        Parameter("beta", "1", 0.01, 10.0, (0.1, 2.0), "log"),
        Parameter("gamma", "1", 0.0, 2.0, (0.0, 1.2)),
    )
    valid = "after the warm-up; shown for 25M to 400M parameters and runs up to 3 times longer"
    warmup_counts = False

    def prepare(self, observations: Observations) -> Events:
        """Return S1 and the events of each row. Raises UserError like ``check_curve``."""
        super().prepare(observations)
        steps_n = check_curve(self, observations)
        number = len(observations)
        s1_n = np.empty(number)
        # One event without a fall for each row: np.add.reduceat needs at least one event per row.
        rows, parts = [np.arange(number)], [np.zeros((3, number))]
        for curve, its_rows in curves_of(observations):
            s1_n[its_rows] = np.cumsum(curve.rates)[steps_n[its_rows] - 1]
            inside, events = events_of(curve, steps_n[its_rows], self.warmup_counts)
            rows.append(its_rows[inside])
            parts.append(events)
        row_K = np.concatenate(rows)
        order = np.argsort(row_K, kind="stable")
        fall_K, area_K, log_rate_K = np.concatenate(parts, axis=1)[:, order]
        first_n = np.searchsorted(row_K[order], np.arange(number))
        return Events(s1_n, fall_K, area_K, log_rate_K, first_n)

    def predict(self, values: Values, prepared: Events) -> Predictions:
        """See ``Form.predict``."""
        power = np.exp(-values["alpha"] * np.log(prepared.s1_n))
        x_K = values["C"] * np.exp(-values["gamma"] * prepared.log_rate_K) * prepared.area_K
        gain = prepared.per_row(1.0 - np.exp(-values["beta"] * np.log(1.0 + x_K)))
        return np.asarray(values["L0"] + values["A"] * power - values["B"] * gain)

    def derivatives(self, values: Values, prepared: Events) -> Slopes:
        """See ``Form.derivatives``."""
        log_s1 = np.log(prepared.s1_n)
        power = np.exp(-values["alpha"] * log_s1)
        x_K = values["C"] * np.exp(-values["gamma"] * prepared.log_rate_K) * prepared.area_K
        log_K = np.log1p(x_K)
        left_K = np.exp(-values["beta"] * log_K)
        by_log_x_K = values["beta"] * left_K * x_K / (1.0 + x_K)
        gain = prepared.per_row(1.0 - left_K)
        parts = (
            np.ones_like(power),
            power,
            -gain,
            -values["A"] * log_s1 * power,
            -values["B"] * prepared.per_row(by_log_x_K) / values["C"],
            -values["B"] * prepared.per_row(left_K * log_K),
            values["B"] * prepared.per_row(by_log_x_K * prepared.log_rate_K),
        )
        predicted = values["L0"] + values["A"] * power - values["B"] * gain
        return predicted, np.stack(np.broadcast_arrays(*parts), axis=-2)


class MultiPowerWithWarmup(MultiPower):
    """Multi-Power law with the rise of the warm-up among the events, as in the paper's code.

    Its coefficients are the published ones. The rise adds about B·peak to the loss of late steps,
    so that L0 is lower by this amount than in ``multi_power``.
    """

    name = "multi_power_warmup"
    source = "Luo et al., arXiv 2503.12811; events from step 1 on, as in its code"
    warmup_counts = True
    published: ClassVar[Mapping[str, Mapping[str, float]]] = {
        size: dict(zip(("L0", "A", "alpha", "B", "C", "beta", "gamma"), values, strict=True))
        for size, values in (
            ("25M", (3.040, 0.525, 0.508, 363.8, 2.066, 0.583, 0.641)),
            ("100M", (2.651, 0.601, 0.453, 437.9, 2.132, 0.598, 0.655)),
            ("400M", (2.375, 0.654, 0.429, 523.4, 2.025, 0.594, 0.635)),
        )
    }


FORMS = (MultiPower(), MultiPowerWithWarmup())
