"""Run the training loop: steps, and callbacks between them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from allometry.configs.errors import RankError, UserError
from allometry.data.sources import Sources
from allometry.laws.areas import LearningRateAreas
from allometry.optim.offload.swap import StatesLost
from allometry.parallel.apply import Parallel
from allometry.parallel.mesh import Mesh
from allometry.scaling.count import DocumentFlops
from allometry.scaling.hdp.plan import Plan
from allometry.scaling.plan import RunPlan
from allometry.trainer.feed import StepInput
from allometry.trainer.record.callbacks import Callback, Reporter
from allometry.trainer.record.columns import FinishedStep, row_of
from allometry.trainer.record.hardware import peak_bytes, reset_peak_bytes
from allometry.trainer.record.timing import Span, StepTimer
from allometry.trainer.record.writer import Recorder, Row
from allometry.trainer.save_times import SaveTimes
from allometry.trainer.skips import Reason, Skips
from allometry.trainer.state.checkpoint import optimizer_state
from allometry.trainer.state.planners import State
from allometry.trainer.step import StepOutcome, TrainStep
from allometry.trainer.stop import StopRequest, StopSignals


@dataclass
class Progress:
    """Progress of a run apart from its tensors; ``facts`` go into a checkpoint.

    ``saved_step``: step of the newest complete checkpoint, None without one. ``held_out_before``:
    losses by source before the first step with ``data.replay``, if set. ``rates_since``: see
    ``state/resume.py``. ``skipped``: see ``Skips``.
    """

    step: int
    areas: LearningRateAreas
    flops: int = 0
    saved_step: int | None = None
    held_out_before: dict[str, float] = field(default_factory=dict)
    rates_since: dict[str, Any] = field(default_factory=lambda: {"step": 0, "s1": 0.0})
    skipped: dict[int, Reason] = field(default_factory=dict)

    @property
    def kept(self) -> str:
        """Phrase that names the checkpoint from which an ended run would continue."""
        saved = self.saved_step
        return (
            "no checkpoint had been made" if saved is None else f"checkpoint step-{saved} is kept"
        )

    def lost(self, error: StatesLost) -> UserError:
        """Return the error of a run that lost optimizer states in or before step ``step`` + 1."""
        return UserError(
            f"step {self.step + 1}: {error}; {self.kept}: mend that or name another place, then "
            "run again"
        )

    def facts(self, plan: RunPlan, stream: Sources, seed: int) -> dict[str, Any]:
        """Return the facts of a checkpoint (JSON).

        Randomness (data order, dropout) is a function of (seed, position), so these two values are
        the complete state of the random generators.
        """
        position = plan.batch.sequences_before(self.step + 1)
        return {
            "step": self.step,
            "position_sequences": position,
            "tokens": stream.tokens(position),
            "flops": self.flops,
            "reading": stream.state(position),
            "seed": seed,
            "data": stream.fingerprints(),
            "areas": self.areas.state_dict(),
            "held_out_before": self.held_out_before,
            "rates_since": self.rates_since,
            "skipped": {str(step): reason for step, reason in self.skipped.items()},
        }


@dataclass(frozen=True)
class RunResult:
    """Result of a launch; ``go_back``: bad steps for which the run rewinds to a checkpoint."""

    step: int
    tokens: int
    loss: float | None
    stopped_by: str | None
    go_back: tuple[int, ...] = ()


class _Queued(NamedTuple):
    """A step queued on the device; its numbers can be read once its spans have ended."""

    outcome: StepOutcome
    plan: Plan | None
    spans: list[Span]


@dataclass
class Loop:
    """Takes the steps of a launch; everything else is done by ``callbacks``.

    Every rank runs the loop. ``recorder`` is None except on the main rank; ``peak_flops_per_s`` is
    the sum over all ranks.
    """

    plan: RunPlan
    mesh: Mesh
    train_step: TrainStep
    skips: Skips
    stream: Sources
    progress: Progress
    timer: StepTimer
    callbacks: Sequence[Callback]
    report: Reporter
    signals: StopSignals
    recorder: Recorder | None
    record_every_steps: int
    document_flops: DocumentFlops
    peak_flops_per_s: float
    save_times: SaveTimes
    _queued: deque[_Queued] = field(default_factory=deque)
    _last_loss: float | None = None

    def run(self, batches: Iterator[StepInput], stop_at_step: int | None = None) -> RunResult:
        """Train from the current progress to the end of the plan, or until a stop request.

        The plan may cover one training stage, after which the run continues.
        """
        if self.progress.step >= self.plan.run.steps:
            self.report("already_finished", step=self.progress.step)
        self.timer.start()
        reset_peak_bytes(self.mesh.device)
        try:
            stopped = self._steps(batches, stop_at_step)
        except StatesLost as error:
            self._abort(self.mesh.timeout.total_seconds())  # the other ranks go on
            raise self.progress.lost(error) from None
        except RankError:
            self._abort(self.mesh.timeout.total_seconds())  # the other ranks go on
            raise
        except UserError:
            self._abort(None)  # a checkpoint being written is still valid
            raise
        except Exception:  # other ranks may have died
            self._abort(self.mesh.timeout.total_seconds())
            raise
        self._finish()
        step = self.progress.step
        if stopped:
            self.report("stopped", step=step, signal=stopped)
        elif step >= self.plan.run.steps and not self.skips.go_back:
            self.report("finished", step=step)
        tokens = self.stream.tokens(self.plan.batch.sequences_before(step + 1))
        return RunResult(step, tokens, self._last_loss, stopped, self.skips.go_back)

    def _finish(self) -> None:
        for callback in self.callbacks:
            callback.finish()

    def _abort(self, seconds: float | None) -> None:
        for callback in self.callbacks:
            callback.abort(seconds)

    def _steps(self, batches: Iterator[StepInput], stop_at_step: int | None) -> str | None:
        """Take steps to the end of the plan; return the reason of an earlier stop, else None."""
        total, end = self.plan.total_steps, self.plan.run.steps
        with StopRequest(self.mesh, self.signals, self.save_times) as stop:
            if (stopped := stop.agreed(now=True)) and self.progress.step < end:
                return stopped  # requested while the launch was being prepared
            for step in range(self.progress.step + 1, total + 1):
                self._take(step, next(batches))
                stopped = stop.agreed() if step < end else None
                if step == stop_at_step and step < end:
                    stopped = f"--stop-at-step {step}"
                last = step == total or stopped is not None
                # A GPU's numbers are read during the next step unless a callback needs them at
                # once.
                now = any(each.needs_numbers(step, last=last) for each in self.callbacks)
                while len(self._queued) > (0 if now or last else self.timer.lag):
                    self._finish_step(self._queued.popleft())
                if self.skips.go_back:
                    return None
                for callback in self.callbacks:
                    callback.between_steps(step, last=last)
                if stopped:
                    return stopped
        return None

    def _take(self, step: int, given: StepInput) -> None:
        if self.skips.passes_over(step):
            outcome = self.train_step.pass_over(step)
        else:
            for callback in self.callbacks:
                callback.before_step(step)
            outcome = self.train_step(step, given.batches)
            for callback in self.callbacks:
                callback.after_step(step)
        self._queued.append(_Queued(outcome.to_host(), given.plan, self.timer.lap()))
        self.progress.step = step

    def _finish_step(self, queued: _Queued) -> None:
        """Read and record the numbers of a step; raise UserError if the run may not continue."""
        outcome = queued.outcome
        seconds = self.timer.seconds(queued.spans)  # synchronizes with the step
        loss_S, count_S = outcome.sums_2S.tolist()
        loss = sum(loss_S) / max(1.0, sum(count_S))
        norm = float(outcome.grad_norm)
        skipped = self._is_skipped(outcome, loss, norm)
        flops = self.document_flops(int(outcome.tokens), int(outcome.squared_lengths))
        self.progress.flops += flops
        by_source = zip(self.stream.sources, loss_S, count_S, strict=True)
        finished = FinishedStep(
            outcome=outcome,
            plan=queued.plan,
            loss=loss,
            grad_norm=norm,
            losses={name: total / count for name, total, count in by_source if count},
            seconds=seconds,
            flops=flops,
            areas=self.progress.areas,
            total_flops=self.progress.flops,
            peak_flops_per_s=self.peak_flops_per_s,
            peak_bytes=peak_bytes(self.mesh.device),
            stream=self.stream,
            batch=self.plan.batch,
            stage=self.plan.stage.number if self.plan.stage else None,
            recorded=self.recorder is not None
            and (skipped or outcome.step % self.record_every_steps == 0),
            skipped=skipped,
        )
        additions: Row = {}
        for callback in self.callbacks:
            if skipped and not callback.adds_to_skipped:
                continue
            added = callback.additions(finished)
            finished.recorded |= self.recorder is not None and bool(added)
            additions |= added
        if self.recorder is not None and finished.recorded:
            row = row_of(finished) | additions
            self.recorder.row(row)
            for callback in self.callbacks:
                callback.on_row(row)

    def _is_skipped(self, outcome: StepOutcome, loss: float, norm: float) -> bool:
        """Return True if the step made no update; raise UserError if the run may not continue."""
        skipped = self.skips.look(outcome, loss) is not None
        beyond = self.skips.beyond(outcome.step)
        if not (math.isfinite(loss) and math.isfinite(norm)) and (beyond or not skipped):
            self._not_finite(outcome.step, loss, norm, beyond)
        if beyond:
            self._too_many_spikes(outcome.step, loss, norm, beyond)
        if skipped:
            self.progress.areas.skip()
        else:
            self.progress.areas.update(outcome.lr)
            self._last_loss = loss
        return skipped

    def _too_many_spikes(self, step: int, loss: float, norm: float, beyond: str) -> NoReturn:
        self._finish()
        self.report("too_many_bad_steps", step=step, limit=beyond)
        raise UserError(
            f"step {step}: {beyond}, the last with loss {loss} and gradient norm {norm}; "
            f"{self.progress.kept}; lower optimizer.lr, check the data of these steps, raise "
            "that limit, or pass them over with training.skip_steps, then run again"
        )

    def _not_finite(
        self, step: int, loss: float, norm: float, beyond: str | None = None
    ) -> NoReturn:
        # Pipeline ranks have different parameter groups, so names are gathered instead of flags.
        ranks = self.mesh.gather_objects(self.train_step.groups_not_finite())
        names = dict.fromkeys(name for rank in ranks for name in rank)
        groups = ", ".join(names) or "none is left: only the loss"
        self._finish()
        self.report("not_finite", step=step, loss=str(loss), grad_norm=str(norm), groups=groups)
        raise UserError(
            f"step {step}: the loss is {loss} and the gradient norm {norm}, first not finite in "
            f"parameter group(s) {groups}; {f'these are {beyond}; ' if beyond else ''}"
            f"{self.progress.kept}; lower optimizer.lr, lengthen the "
            "warm-up or check the data of that step, then run again"
        )


def state_tensors(parallel: Parallel, optimizer: torch.optim.Optimizer) -> State:
    """Return all tensors of a run by name: parameters, buffers and optimizer states."""
    names: dict[Tensor, str] = {p: name for name, p in parallel.named_parameters()}
    parameters: State = {f"model.{name}": p.detach() for p, name in names.items()}
    buffers: State = {f"model.{name}": buffer for name, buffer in parallel.named_buffers()}
    return parameters | buffers | optimizer_state(optimizer, names)
