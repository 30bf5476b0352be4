"""Training for transfer of the best learning rate over sizes of a model or a run."""

# L tokens in a sequence, P sequences of a pool, H held-out sequences

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from allometry.configs.errors import UserError
from allometry.configs.model import ModelConfig, ParameterizationConfig
from allometry.configs.optimization import LinearSchedule, OptimizerConfig, ScheduleConfig
from allometry.optim.schedule import Schedule
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.parameterizations.base import RunScale
from allometry.scaling.shapes import Axis, resize
from allometry.studies.sweeps.outcome import Trial
from allometry.studies.sweeps.probe import Probe, Sequences, order, sample
from allometry.studies.sweeps.stacked import StackedProbe

AFTER_WARMUP = 2
"""Minimum number of steps after the warm-up: with a single step no rate near the peak is used."""
SCHEDULE = LinearSchedule(final_fraction=0.1)


@dataclass(frozen=True, slots=True)
class RunShape:
    """Length of a run of a sweep: steps, sequences per step, and number of warm-up steps."""

    steps: int
    sequences: int
    warmup_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferSweep:
    """Trains a model at several sizes and learning rates, for the best rate at each size.

    A seed determines the initial values and the order of the sequences of ``pool_PL`` [P, L+1], of
    which a run reads ``steps`` x ``sequences``, each once. The rate follows ``schedule``, whose
    warm-up takes ``warmup_steps``; gradients are clipped to norm ``clip``. The loss of a run is
    measured on ``held_out_HL`` after its last step, infinite if not finite. All in fp32.

    On the axis ``horizon`` a size is the number of steps. On ``batch`` it is the sequences per
    step; ``steps`` and ``warmup_steps`` then refer to steps of ``sequences`` each: every size reads
    the same tokens. On both axes the parameterization receives the run's tokens and batch; on other
    axes it scales from the base by the model only.
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
    schedule: ScheduleConfig = SCHEDULE

    def loss(self, trial: Trial) -> float:
        """Train one model and return its final held-out loss."""
        run = self.run_of(trial.size)
        optimizer = self.optimizer.model_copy(update={"lr": 2.0**trial.log2_lr})
        model = resize(self.model, self.axis, trial.size)
        scale = self._scale(run)
        probe = Probe(model, self.parameterization, optimizer, trial.seed, scale=scale)
        chosen_PL = sample(self.pool_PL, run.steps * run.sequences, trial.seed)
        for step, fraction in enumerate(self._fractions(run)):
            batch_BL = chosen_PL[step * run.sequences : (step + 1) * run.sequences]
            before = probe.step(batch_BL, fraction=fraction, clip=self.clip)
            if not math.isfinite(before):
                return math.inf
        loss = probe.loss(self.held_out_HL)
        return loss if math.isfinite(loss) else math.inf

    def losses(self, trials: Sequence[Trial], device: str = "cpu") -> list[float]:
        """Train the models of trials of one size as one; return their losses.

        Equal to ``loss`` of each trial, up to rounding. Raises UserError: see ``check_stackable``.
        """
        (size,) = {trial.size for trial in trials}
        run = self.run_of(size)
        optimizers = [
            self.optimizer.model_copy(update={"lr": 2.0**trial.log2_lr}) for trial in trials
        ]
        seeds = [trial.seed for trial in trials]
        model = resize(self.model, self.axis, size)
        scale = self._scale(run)
        probe = StackedProbe(
            model, self.parameterization, optimizers, seeds, scale=scale, device=device
        )
        places = [order(self.pool_PL, run.steps * run.sequences, seed) for seed in seeds]
        probe.train(self.pool_PL, np.stack(places), self._fractions(run), self.clip)
        return probe.final_losses(self.held_out_HL, self.sequences)

    def run_of(self, size: int) -> RunShape:
        """Return the length and batch of a run of this size.

        Raises UserError: a batch of ``size`` sequences does not divide the run's sequences.
        """
        if self.axis == Axis.HORIZON:
            return RunShape(size, self.sequences, self.warmup_steps)
        if self.axis != Axis.BATCH:
            return RunShape(self.steps, self.sequences, self.warmup_steps)
        total = self.steps * self.sequences
        if size < 1 or total % size:
            raise UserError(
                f"--sizes={size} sequences of a batch do not divide the {total:,} that a run "
                f"reads (--steps={self.steps} x --sequences={self.sequences}); choose a divisor"
            )
        return RunShape(total // size, size, round(self.warmup_steps * self.sequences / size))

    @property
    def guessing(self) -> float:
        """Loss of a model with equal probabilities of all tokens."""
        return math.log(self.model.vocab_size)

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine a trial's loss, as JSON, to merge equal sweeps."""
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
            "schedule": self.schedule.model_dump(mode="json"),
            "tokens": digest.hexdigest()[:16],
        }

    def check(self, sizes: Iterable[int], seeds: Sequence[int]) -> None:
        """Raise UserError for a size that cannot be run."""
        for size in sizes:
            run = self.run_of(size)
            least = run.warmup_steps + AFTER_WARMUP
            if run.steps < least:
                flag = "--sizes" if self.axis == Axis.HORIZON else "--steps"
                batches = f" in batches of {size} sequences" if self.axis == Axis.BATCH else ""
                raise UserError(
                    f"{flag}={run.steps}{batches} is too short for a sweep, whose runs end "
                    f"{AFTER_WARMUP} steps or more after their warm-up of {run.warmup_steps}; "
                    f"choose {least} or more"
                )
            model = resize(self.model, self.axis, size)
            Parameterization(self.parameterization, model, self.optimizer, self._scale(run))
            Schedule(self.schedule, run.steps, run.warmup_steps)
            sample(self.pool_PL, run.steps * run.sequences, seeds[0])

    def _fractions(self, run: RunShape) -> list[float]:
        schedule = Schedule(self.schedule, run.steps, run.warmup_steps)
        return [schedule.fraction(step) for step in range(1, run.steps + 1)]

    def _scale(self, run: RunShape) -> RunScale | None:
        if not self.axis.of_runs:
            return None
        batch = run.sequences * (self.pool_PL.shape[1] - 1)
        return RunScale(batch_tokens=batch, total_tokens=batch * run.steps)
