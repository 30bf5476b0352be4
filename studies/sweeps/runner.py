"""Runner of a sweep's trials: choice of trials, engines, and resumption from a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.laws.optimum import Sweep
from allometry.studies.sweeps.outcome import LOSS_TOLERANCE, Transfer, Trial
from allometry.studies.sweeps.transfer import TransferSweep
from allometry.studies.sweeps.workers import Workers

Engine = Literal["processes", "stacked"]
EXTENSIONS = 12


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs a sweep, over processes, continuing from ``known``.

    Rates start at ``log2_lrs`` for every size; while a size's best rate, with all seeds or without
    one of them, has no neighbour, one more rate is tried beyond it, ``step`` away, up to 12 times;
    below the least rate if no rate does better than guessing. Each size except the smallest also
    gets the rates around the transferred one. ``done`` is called with each new loss immediately.

    ``place_first``: only the first seed searches for the best rates, at the smallest size from
    ``log2_lrs`` and at the others from the best one of the smallest; further seeds are trained only
    at the best rates, their neighbours, and the rates around the transferred rate.

    ``engine``: "stacked": a task is all missing runs of one size, as one model on ``device`` (at
    most ``runs_at_once`` of them); "processes": a task is one run.
    """

    sweep: TransferSweep
    log2_lrs: tuple[float, ...]
    step: float = 0.5
    processes: int = 1
    known: Mapping[Trial, float] = field(default_factory=dict)
    done: Callable[[Trial, float], None] | None = None
    engine: Engine = "processes"
    device: str = "cpu"
    runs_at_once: int | None = None
    place_first: bool = False

    def run(self, sizes: Sequence[int], seeds: Sequence[int]) -> Transfer:
        """Return the complete sweep.

        Raises UserError: a size cannot be run, or the rates are too few. For example,
        ``Runner(sweep, (-9.0, -8.5, -8.0)).run([64, 128], [0, 1, 2])``.
        """
        if len(set(self.log2_lrs)) < 3:
            raise UserError("a sweep needs three learning rates or more; give more of them")
        self.sweep.check(sizes, seeds)
        rates = {size: set(self.log2_lrs) for size in sizes}
        known = dict(self.known)
        with Workers(self.processes) as workers:
            if self.place_first and len(seeds) > 1:
                placed = self._placed(workers, known, sizes, seeds[:1])
                rates = {size: self._around_best(placed, size) for size in sizes}
            return self._complete(workers, known, rates, seeds)

    def _placed(
        self,
        workers: Workers,
        known: dict[Trial, float],
        sizes: Sequence[int],
        seeds: Sequence[int],
    ) -> Transfer:
        """Train one seed: the smallest size at all rates, the others around its best one."""
        base = min(sizes)
        rates = {base: set(self.log2_lrs)}
        best = self._complete(workers, known, rates, seeds).optima()[base].log2_lr
        middle = round((best - self.log2_lrs[0]) / self.step)
        start = {self.log2_lrs[0] + n * self.step for n in range(middle - 1, middle + 2)}
        rates |= {size: set(start) for size in sizes if size != base}
        return self._complete(workers, known, rates, seeds)

    def _complete(
        self,
        workers: Workers,
        known: dict[Trial, float],
        rates: Mapping[int, set[float]],
        seeds: Sequence[int],
    ) -> Transfer:
        """Train the missing trials, and further rates as long as they are needed."""
        for _ in range(EXTENSIONS + 1):
            wanted = {Trial(s, r, seed) for s in rates for r in rates[s] for seed in seeds}
            # Largest first, so that no process is left with a long trial at the end.
            missing = sorted(wanted - set(known), reverse=True)
            ended = self._train(workers, missing)
            known.update(zip(missing, ended, strict=True))
            losses = {t: known[t] for t in wanted}
            transfer = Transfer(self.sweep.axis, tuple(seeds), losses, self.sweep.guessing)
            further = {size: _new(self._further(transfer, size), rates[size]) for size in rates}
            if not any(further.values()):
                break
            for size, some in further.items():
                rates[size].update(some)
        return transfer

    def _train(self, workers: Workers, trials: Sequence[Trial]) -> list[float]:
        """Return the losses of trials that are sorted by size."""
        if self.engine == "processes":
            return workers.run(self.sweep.loss, trials, self.done)

        def done(stack: tuple[Trial, ...], losses: list[float]) -> None:
            for trial, loss in zip(stack, losses, strict=True):
                if self.done is not None:
                    self.done(trial, loss)

        stacks: list[tuple[Trial, ...]] = []
        for _, of_size in groupby(trials, key=lambda trial: trial.size):
            left, most = [*of_size], self.runs_at_once or len(trials)
            stacks += [tuple(left[start : start + most]) for start in range(0, len(left), most)]
        train = partial(self.sweep.losses, device=self.device)
        return [loss for losses in workers.run(train, stacks, done) for loss in losses]

    def _further(self, transfer: Transfer, size: int) -> set[float]:
        """Return the rates that a size needs: neighbours of its own and the base's best rates."""
        sweep = transfer.sweep(size)
        wanted = set().union(*(self._beyond(sweep, some) for some in _leaving_out(sweep)))
        if size == transfer.sizes[0]:
            return wanted
        base = transfer.sweep(transfer.sizes[0])
        optima = [base.optimum(some) for some in _leaving_out(base)]
        places = [optimum.log2_lr for optimum in optima if optimum.interior]
        return wanted.union(*(self._around(place, sweep) for place in places))

    def _beyond(self, sweep: Sweep, seeds: Sequence[int]) -> set[float]:
        """Return the next rate to try if the best one of these seeds lacks a neighbour."""
        rates, means = sweep.log2_lrs, sweep.losses_RS[:, list(seeds)].mean(axis=1)
        if not np.isfinite(means).any():
            return {rates[0] - self.step}
        best = int(np.argmin(means))
        reach = self._gap()
        if best == len(means) - 1 or rates[best + 1] - rates[best] > reach:
            return {rates[best] + self.step}
        # If all runs diverged (to finite weights), an interior minimum is not a best rate.
        if best == 0 or means[best] > self.sweep.guessing - LOSS_TOLERANCE:
            return {rates[0] - self.step}
        return {rates[best] - self.step} if rates[best] - rates[best - 1] > reach else set()

    def _around(self, place: float, sweep: Sweep) -> set[float]:
        """Return the rates on both sides of ``place``, and the next one towards the best rate.

        Empty if ``place`` is already between neighbours.
        """
        rates = np.array(sweep.log2_lrs)
        right = int(np.searchsorted(rates, place))
        if right < len(rates) and rates[right] == place:
            return set()
        if 0 < right < len(rates) and rates[right] - rates[right - 1] <= self._gap():
            return set()
        below = math.floor((place - self.log2_lrs[0]) / self.step)
        best = rates[int(np.argmin(sweep.losses_RS.mean(axis=1)))]
        inner = below - 1 if best < place else below + 2
        return {self.log2_lrs[0] + n * self.step for n in (below, below + 1, inner)}

    def _around_best(self, placed: Transfer, size: int) -> set[float]:
        """Return the best rate of one seed with its neighbours, and the rates around the base's."""
        sweep = placed.sweep(size)
        best = int(np.argmin(sweep.losses_RS.mean(axis=1)))
        chosen = set(sweep.log2_lrs[max(0, best - 1) : best + 2])
        carried = placed.optima()[placed.sizes[0]]
        if size == placed.sizes[0] or not carried.interior:
            return chosen
        return chosen | self._around(carried.log2_lr, Sweep(*_some(sweep, chosen)))

    def _gap(self) -> float:
        """Return the largest distance between neighbours."""
        rates = sorted(set(self.log2_lrs))
        return max(self.step, *(b - a for a, b in pairwise(rates))) * (1.0 + 1e-9)


def _new(wanted: set[float], tried: set[float]) -> set[float]:
    """Return the rates that were not tried, up to rounding."""
    return {rate for rate in wanted if all(abs(rate - other) > 1e-9 for other in tried)}


def _leaving_out(sweep: Sweep) -> list[list[int]]:
    """Return the list of all seeds, and lists that leave out one of several seeds."""
    seeds = [*range(sweep.losses_RS.shape[1])]
    without = [[seed for seed in seeds if seed != left] for left in seeds]
    return [seeds, *without] if len(seeds) > 1 else [seeds]


def _some(sweep: Sweep, rates: set[float]) -> tuple[tuple[float, ...], NDArray[np.float64]]:
    """Return the rates and losses of a sweep that are among ``rates``."""
    kept = [n for n, rate in enumerate(sweep.log2_lrs) if rate in rates]
    return tuple(sweep.log2_lrs[n] for n in kept), sweep.losses_RS[kept]
