"""Result of a sweep over sizes and learning rates, and whether the rate transfers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from allometry.laws.optimum import Optimum, Sweep, drift, drift_interval
from allometry.laws.regret import PERCENT, Regret, regrets, verdict
from allometry.scaling.shapes import Axis

LOSS_TOLERANCE = 0.01


@dataclass(frozen=True, slots=True, order=True)
class Trial:
    """One run of a sweep: a size of the axis, log2 of the peak learning rate, a seed."""

    size: int
    log2_lr: float
    seed: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """Result of a sweep: losses by trial, at the rates of each size that all ``seeds`` have.

    The transferred rate is the best one of the smallest size, and its cost at each other size is a
    regret (``laws.regret``). A size has no best rate if no mean over seeds is below ``guessing`` by
    0.01: optima of models that diverged to finite weights, or have not learned yet, are
    meaningless.
    """

    axis: Axis
    seeds: tuple[int, ...]
    losses: Mapping[Trial, float]
    guessing: float = math.inf

    @property
    def sizes(self) -> list[int]:
        """The sizes, ascending."""
        return sorted({trial.size for trial in self.losses})

    def sweep(self, size: int) -> Sweep:
        """Return the losses of one size, of the rates that all seeds have."""
        tried = {trial.log2_lr for trial in self.losses if trial.size == size}
        rates = sorted(
            rate
            for rate in tried
            if all(Trial(size, rate, seed) in self.losses for seed in self.seeds)
        )
        losses = [[self.losses[Trial(size, rate, seed)] for seed in self.seeds] for rate in rates]
        return Sweep(tuple(rates), np.array(losses, np.float64))

    def optima(self) -> dict[int, Optimum]:
        """Return the best rate at each size, of the mean over seeds."""
        return {size: self._optimum(self.sweep(size)) for size in self.sizes}

    def _optimum(self, sweep: Sweep) -> Optimum:
        optimum = sweep.optimum()
        means = sweep.losses_RS.mean(axis=1)
        best = int(np.argmin(means))
        inside = 0 < best < len(means) - 1
        if not inside or means[best] < self.guessing - LOSS_TOLERANCE:
            return optimum
        problem = f"no rate does better than guessing, whose loss is {self.guessing:.4f}"
        return Optimum(sweep.log2_lrs[best], float(means[best]), problem)

    def drift(self) -> float:
        """Return the range of the best rates in octaves (NaN: a size has none)."""
        if not all(optimum.interior for optimum in self.optima().values()):
            return math.nan
        return drift({size: self.sweep(size) for size in self.sizes})

    def drift_interval(self) -> tuple[float, float]:
        """Return the drift's 95 % interval over seeds, see ``laws.optimum`` (NaN if unknown)."""
        if math.isnan(self.drift()):
            return math.nan, math.nan
        return drift_interval({size: self.sweep(size) for size in self.sizes})

    def regrets(self) -> dict[int, Regret]:
        """Return the regret of the smallest size's best rate at each other size."""
        optima = self.optima()
        found = regrets({size: self.sweep(size) for size in self.sizes})
        base = optima[self.sizes[0]]
        for size in found:
            problem = base.problem or optima[size].problem
            if problem is not None and found[size].nats != math.inf:
                found[size] = Regret.unknown(base.log2_lr, optima[size].loss, problem)
        return found

    def failures(self, percent: float = PERCENT, octaves: float | None = None) -> list[str]:
        """Return a sentence for each reason against transferring the rate; [] if passed.

        Reasons are a regret above ``percent`` of the loss by its full interval, an optimum at an
        edge and, over widths, a loss that rises by more than 0.01 with the size. With ``octaves``
        also a larger drift of the best rates, by its full interval. For example,
        ``transfer.failures(percent=0.5)``.
        """
        optima = self.optima()
        reasons = [
            f"{self.axis} {size}: {optimum.problem}"
            for size, optimum in optima.items()
            if optimum.problem is not None
        ]
        reasons += [
            f"{self.axis} {size}: the rate of {self.axis} {self.sizes[0]} "
            + (
                "diverges"
                if regret.nats == math.inf
                else f"loses {regret.percent:.2f} % ({_range(regret)}), more than {percent:g} %"
            )
            for size, regret in self.regrets().items()
            if regret.verdict(percent) == "missed"
        ]
        if octaves is not None and verdict(self.drift_interval(), octaves) == "missed":
            reasons.append(
                f"the best rate drifts by {self.drift():.2f} octaves, more than {octaves:g}"
            )
        if self.axis == Axis.WIDTH:
            reasons += [
                f"the best loss rises from {optima[a].loss:.3f} at {self.axis} {a} to "
                f"{optima[b].loss:.3f} at {b}"
                for a, b in pairwise(self.sizes)
                if optima[b].loss > optima[a].loss + LOSS_TOLERANCE
            ]
        return reasons

    def undecided(self, percent: float = PERCENT, octaves: float | None = None) -> list[str]:
        """Return a sentence for each bound that the seeds do not decide; [] if all are decided.

        Sizes without a best rate are not included: they are failures.
        """
        if not all(optimum.interior for optimum in self.optima().values()):
            return []
        reasons = []
        for size, regret in self.regrets().items():
            if regret.verdict(percent) != "undecided":
                continue
            said = f"the rate of {self.axis} {self.sizes[0]} loses {regret.percent:.2f} %"
            if regret.problem is not None:
                said = regret.problem
            elif len(self.seeds) == 1:
                said += ", and one seed does not say what is luck"
            elif math.isnan(regret.percent_interval[0]):
                said += ", and without one of the seeds there is no best rate"
            else:
                said += f" ({_range(regret)}): {percent:g} % is inside"
            reasons.append(f"{self.axis} {size}: {said}")
        if octaves is not None and verdict(self.drift_interval(), octaves) == "undecided":
            low, high = self.drift_interval()
            luck = "one seed does not say what is luck"
            if math.isfinite(low):
                luck = f"over seeds it is {low:.2f} to {high:.2f}"
            reasons.append(
                f"the best rate drifts by {self.drift():.2f} octaves, {octaves:g} are asked, and "
                f"{luck}"
            )
        return reasons

    def describe(self) -> dict[str, Any]:
        """Return JSON, with null for numbers that are not finite."""
        sweeps = {size: self.sweep(size) for size in self.sizes}
        regrets_of = self.regrets()
        return {
            "axis": self.axis.value,
            "seeds": list(self.seeds),
            "drift_octaves": _finite(self.drift()),
            "drift_interval_95": [_finite(end) for end in self.drift_interval()],
            "sizes": [
                {
                    "size": size,
                    "log2_lr": optimum.log2_lr,
                    "lr": 2.0**optimum.log2_lr,
                    "loss": _finite(optimum.loss),
                    "problem": optimum.problem,
                    "regret": regrets_of[size].describe() if size in regrets_of else None,
                    "spread_of_seeds_octaves": _finite(sweeps[size].spread()),
                    "log2_lrs": list(sweeps[size].log2_lrs),
                    "mean_losses": [_finite(m) for m in sweeps[size].losses_RS.mean(axis=1)],
                }
                for size, optimum in self.optima().items()
            ],
        }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _range(regret: Regret) -> str:
    low, high = regret.percent_interval
    return f"95 % over seeds: {low:.2f} to {high:.2f} %"
