"""Whether the best learning rate stays where it is as a model or its run grows."""

# L tokens in a sequence, P sequences of a pool, H held-out sequences

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, pairwise
from typing import Any, Literal

import numpy as np

from allometry.configs.errors import UserError
from allometry.configs.model import ModelConfig, ParameterizationConfig
from allometry.configs.optimization import LinearSchedule, OptimizerConfig
from allometry.laws.optimum import Optimum, Sweep, drift, drift_interval
from allometry.optim.schedule import Schedule
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.parameterizations.base import RunScale
from allometry.scaling.shapes import Axis, resize
from allometry.studies.sweeps.probe import Probe, Sequences, order, sample
from allometry.studies.sweeps.stacked import StackedProbe
from allometry.studies.sweeps.workers import Workers

Engine = Literal["processes", "stacked"]
EXTENSIONS = 12
LOSS_TOLERANCE = 0.01
AFTER_WARMUP = 2
"""Steps of a run after its warm-up, at least: with a single one no rate near the peak is used."""


@dataclass(frozen=True, slots=True, order=True)
class Trial:
    """One run of a sweep: a size of the axis, log2 of the peak learning rate, a seed."""

    size: int
    log2_lr: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferSweep:
    """Trains a model at several sizes and learning rates and finds the best rate at each.

    A seed decides the initial values and the order of the sequences of ``pool_PL`` [P, L+1], of
    which a run reads ``steps`` x ``sequences``, each once. The rate falls on a straight line to a
    tenth after ``warmup_steps``; gradients are clipped to norm ``clip``. The loss of a run is that
    on ``held_out_HL`` after its last step, infinite where it is not finite. All in fp32.

    On the axis ``horizon`` a size is the number of steps, and the parameterization is told the
    run's tokens and batch; elsewhere it scales from the base by the model alone.
    """

    model: ModelConfig
    parameterization: ParameterizationConfig
    optimizer: OptimizerConfig
    pool_PL: Sequences
    held_out_HL: Sequences
    axis: Axis
    steps: int
    sequences: int
    warmup_steps: int = 0
    clip: float | None = 1.0

    def loss(self, trial: Trial) -> float:
        """Train one model and return its final held-out loss."""
        steps = trial.size if self.axis == Axis.HORIZON else self.steps
        optimizer = self.optimizer.model_copy(update={"lr": 2.0**trial.log2_lr})
        model = resize(self.model, self.axis, trial.size)
        scale = self._scale(steps)
        probe = Probe(model, self.parameterization, optimizer, trial.seed, scale=scale)
        schedule = Schedule(LinearSchedule(final_fraction=0.1), steps, self.warmup_steps)
        chosen_PL = sample(self.pool_PL, steps * self.sequences, trial.seed)
        for step in range(1, steps + 1):
            batch_BL = chosen_PL[(step - 1) * self.sequences : step * self.sequences]
            before = probe.step(batch_BL, fraction=schedule.fraction(step), clip=self.clip)
            if not math.isfinite(before):
                return math.inf
        loss = probe.loss(self.held_out_HL)
        return loss if math.isfinite(loss) else math.inf

    def losses(self, trials: Sequence[Trial], device: str = "cpu") -> list[float]:
        """Train the models of trials of one size as one; return what ``loss`` returns of each, but
        for rounding. Raises UserError: see ``check_stackable``."""
        (size,) = {trial.size for trial in trials}
        steps = size if self.axis == Axis.HORIZON else self.steps
        optimizers = [
            self.optimizer.model_copy(update={"lr": 2.0**trial.log2_lr}) for trial in trials
        ]
        seeds = [trial.seed for trial in trials]
        model = resize(self.model, self.axis, size)
        scale = self._scale(steps)
        probe = StackedProbe(
            model, self.parameterization, optimizers, seeds, scale=scale, device=device
        )
        schedule = Schedule(LinearSchedule(final_fraction=0.1), steps, self.warmup_steps)
        places = [order(self.pool_PL, steps * self.sequences, seed) for seed in seeds]
        fractions = [schedule.fraction(step) for step in range(1, steps + 1)]
        probe.train(self.pool_PL, np.stack(places), fractions, self.clip)
        return probe.final_losses(self.held_out_HL, self.sequences)

    @property
    def guessing(self) -> float:
        """The loss of a model to which all tokens are equally likely."""
        return math.log(self.model.vocab_size)

    def settings(self) -> dict[str, Any]:
        """What decides a trial's loss, as JSON: results of equal settings may be joined."""
        digest = hashlib.sha256()
        for tokens in (self.pool_PL, self.held_out_HL):
            digest.update(np.ascontiguousarray(tokens, np.int64).tobytes())
        optimizer = self.optimizer.model_dump(mode="json")
        return {
            "model": self.model.model_dump(mode="json"),
            "parameterization": self.parameterization.model_dump(mode="json"),
            "optimizer": {key: value for key, value in optimizer.items() if key != "lr"},
            "axis": self.axis.value,
            "steps": self.steps,
            "sequences": self.sequences,
            "warmup_steps": self.warmup_steps,
            "clip": self.clip,
            "tokens": digest.hexdigest()[:16],
        }

    def check(self, sizes: Iterable[int], seeds: Sequence[int]) -> None:
        """Raise UserError for a size that cannot be run."""
        for size in sizes:
            steps = size if self.axis == Axis.HORIZON else self.steps
            least = self.warmup_steps + AFTER_WARMUP
            if steps < least:
                flag = "--sizes" if self.axis == Axis.HORIZON else "--steps"
                raise UserError(
                    f"{flag}={steps} is too short for a sweep, whose runs end {AFTER_WARMUP} steps "
                    f"or more after their warm-up of {self.warmup_steps}; choose {least} or more"
                )
            model = resize(self.model, self.axis, size)
            Parameterization(self.parameterization, model, self.optimizer, self._scale(steps))
            Schedule(LinearSchedule(final_fraction=0.1), steps, self.warmup_steps)
            sample(self.pool_PL, steps * self.sequences, seeds[0])

    def _scale(self, steps: int) -> RunScale | None:
        if self.axis != Axis.HORIZON:
            return None
        batch = self.sequences * (self.pool_PL.shape[1] - 1)
        return RunScale(batch_tokens=batch, total_tokens=batch * steps)


@dataclass(frozen=True, slots=True)
class Transfer:
    """What a sweep found: losses by trial, complete over sizes' own rates and all seeds.

    A size has no best rate where no mean over seeds is below ``guessing`` by 0.01: runs of models
    that diverged to finite weights, or learned nothing yet, have optima that mean nothing.
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
        """Return the losses of one size."""
        rates = sorted({trial.log2_lr for trial in self.losses if trial.size == size})
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
        """Return how many octaves the best rates are apart (NaN: a size has none)."""
        if not all(optimum.interior for optimum in self.optima().values()):
            return math.nan
        return drift({size: self.sweep(size) for size in self.sizes})

    def drift_interval(self) -> tuple[float, float]:
        """Return its 95 % interval over seeds, see ``laws.optimum`` (NaN where it has none)."""
        if math.isnan(self.drift()):
            return math.nan, math.nan
        return drift_interval({size: self.sweep(size) for size in self.sizes})

    def failures(self, bound: float) -> list[str]:
        """Return a sentence for each thing that forbids to carry the rate over; none: passed.

        Best rates further than ``bound`` octaves apart (unless that is ``undecided``), an optimum
        at an edge and, over widths, a loss that rises by more than 0.01 with the size.
        """
        optima = self.optima()
        reasons = [
            f"{self.axis} {size}: {optimum.problem}"
            for size, optimum in optima.items()
            if optimum.problem is not None
        ]
        if self.drift() > bound and not self.undecided(bound):
            reasons.append(
                f"the best rate drifts by {self.drift():.2f} octaves, more than {bound:g}"
            )
        if self.axis == Axis.WIDTH:
            sizes = self.sizes
            reasons += [
                f"the best loss rises from {optima[a].loss:.3f} at {self.axis} {a} to "
                f"{optima[b].loss:.3f} at {b}"
                for a, b in pairwise(sizes)
                if optima[b].loss > optima[a].loss + LOSS_TOLERANCE
            ]
        return reasons

    def undecided(self, bound: float) -> list[str]:
        """Return a sentence for each size whose best rate one seed does not tell; none: it does.

        Rates ``bound`` octaves from its best one lose less than 0.01 nats, and with a single seed
        nothing says how much of the losses is luck.
        """
        if len(self.seeds) > 1:
            return []
        reasons = []
        for size, best in self.optima().items():
            sweep = self.sweep(size)
            places = (best.log2_lr - bound, best.log2_lr + bound)
            beside = np.interp(places, sweep.log2_lrs, sweep.losses_RS.mean(axis=1))
            lost = float(beside.min() - best.loss)
            if best.interior and lost < LOSS_TOLERANCE:
                reasons.append(
                    f"{self.axis} {size}: a rate {bound:g} octaves from the best one loses "
                    f"{max(0.0, lost):.4f} nats, and one seed does not say what is luck"
                )
        return reasons

    def describe(self) -> dict[str, Any]:
        """JSON; what is not finite is null."""
        sweeps = {size: self.sweep(size) for size in self.sizes}
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
                    "spread_of_seeds_octaves": _finite(sweeps[size].spread()),
                    "log2_lrs": list(sweeps[size].log2_lrs),
                    "mean_losses": [_finite(m) for m in sweeps[size].losses_RS.mean(axis=1)],
                }
                for size, optimum in self.optima().items()
            ],
        }


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs a sweep, over processes, from where ``known`` left it.

    Rates start at ``log2_lrs`` for every size; while a size's best rate is the least or the
    largest of its own, one more is tried beyond it, ``step`` away, up to 12 times; below the least
    where no rate does better than guessing. ``done`` hears of each new loss at once.

    ``engine`` stacked: a task is all missing runs of one size, as one model on ``device`` (at most
    ``runs_at_once`` of them), else one run.
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

    def run(self, sizes: Sequence[int], seeds: Sequence[int]) -> Transfer:
        """Return the complete sweep.

        Raises UserError: a size cannot be run, or the rates are too few.
        """
        if len(set(self.log2_lrs)) < 3:
            raise UserError("a sweep needs three learning rates or more; give more of them")
        self.sweep.check(sizes, seeds)
        rates = {size: set(self.log2_lrs) for size in sizes}
        known = dict(self.known)
        with Workers(self.processes) as workers:
            for _ in range(EXTENSIONS + 1):
                wanted = {Trial(s, r, seed) for s in sizes for r in rates[s] for seed in seeds}
                # The largest first, so that no process is left with a long one at the end.
                missing = sorted(wanted - set(known), reverse=True)
                ended = self._train(workers, missing)
                known.update(zip(missing, ended, strict=True))
                losses = {t: known[t] for t in wanted}
                transfer = Transfer(self.sweep.axis, tuple(seeds), losses, self.sweep.guessing)
                beyond = {size: self._beyond(transfer.sweep(size)) for size in sizes}
                if all(rate is None for rate in beyond.values()):
                    break
                for size, rate in beyond.items():
                    rates[size] |= set() if rate is None else {rate}
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

    def _beyond(self, sweep: Sweep) -> float | None:
        """Return the next rate to try if the best one is at an edge."""
        means = sweep.losses_RS.mean(axis=1)
        if not np.isfinite(means).any():
            return sweep.log2_lrs[0] - self.step
        best = int(np.argmin(means))
        if best == len(means) - 1:
            return sweep.log2_lrs[-1] + self.step
        # A best rate inside of what all diverged (to finite weights) is none.
        if best == 0 or means[best] > self.sweep.guessing - LOSS_TOLERANCE:
            return sweep.log2_lrs[0] - self.step
        return None


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
