"""The training loop: steps, and what happens between them."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.configs.model import MoEModel
from allometry.configs.run import RunConfig
from allometry.data.sources import Sources
from allometry.laws.areas import LearningRateAreas
from allometry.parallel.apply import Parallel
from allometry.parallel.hdp.plan import Plan
from allometry.parallel.mesh import Mesh
from allometry.scaling.count import document_flops
from allometry.scaling.plan import RunPlan
from allometry.trainer.balance import routing_rows
from allometry.trainer.evaluate import Evaluator
from allometry.trainer.feed import DocumentPlanner, StepInput
from allometry.trainer.record.callbacks import Callback
from allometry.trainer.record.hardware import Peak, peak_bytes, reset_peak_bytes
from allometry.trainer.record.monitors import Monitors
from allometry.trainer.record.plans import plan_record, plan_rows
from allometry.trainer.record.writer import Recorder, Row
from allometry.trainer.state.checkpoint import Checkpointer, optimizer_state
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.step import StepOutcome, TrainStep
from allometry.trainer.stop import StopRequest

_log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run is, besides its tensors; ``facts`` of a checkpoint."""

    step: int
    areas: LearningRateAreas
    flops: int = 0

    def facts(self, plan: RunPlan, stream: Sources, seed: int) -> dict[str, Any]:
        """JSON for a checkpoint.

        What is random (data order, dropout) is a function of (seed, position), so these two are
        the whole state of the random generators.
        """
        position = plan.batch.sequences_before(self.step + 1)
        return {
            "step": self.step,
            "position_sequences": position,
            "tokens": stream.tokens(position),
            "flops": self.flops,
            "ledger_tokens": stream.ledger(position),
            "seed": seed,
            "data": stream.fingerprints(),
            "areas": self.areas.state_dict(),
        }


@dataclass(frozen=True)
class RunResult:
    """How a launch ended."""

    step: int
    tokens: int
    loss: float | None
    stopped_by: str | None


class Clock:
    """Seconds of training alone: what is paused (evaluation, saving) does not count."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        passed, self._start = now - self._start, now
        return passed

    def leave_out(self, work: Callable[[], Any]) -> Any:
        """Do ``work`` off the clock."""
        begun = time.perf_counter()
        try:
            return work()
        finally:
            self._start += time.perf_counter() - begun


@dataclass
class Loop:
    """Everything a launch needs, put together by ``train``."""

    config: RunConfig
    plan: RunPlan
    mesh: Mesh
    parallel: Parallel
    optimizer: torch.optim.Optimizer
    train_step: TrainStep
    evaluator: Evaluator
    stream: Sources
    progress: Progress
    peak: Peak
    planner: DocumentPlanner | None = None
    monitors: Monitors | None = None
    recorder: Recorder | None = None
    callbacks: Sequence[Callback] = ()
    clock: Clock = field(default_factory=Clock)
    checkpointer: Checkpointer = field(init=False)
    _pending: deque[tuple[StepOutcome, Plan | None]] = field(default_factory=deque)
    _last_loss: float | None = None
    _begun_step: int | None = None  # the step whose state was saved or is being saved
    _said_idle: bool = False
    _kept_step: int | None = None  # the newest checkpoint that is known to be whole

    def attach(
        self, recorder: Recorder | None, callbacks: Sequence[Callback], folder: RunFolder
    ) -> None:
        """Connect the loop to where its record and its checkpoints go."""
        self.recorder = recorder
        self.callbacks = callbacks
        self.checkpointer = Checkpointer(folder, self.config.checkpoint, self.mesh, self.report)
        self._begun_step = self._kept_step = self.progress.step or None

    def run(self, batches: Iterator[StepInput], stop_at_step: int | None = None) -> RunResult:
        """Train from the progress made to the end of the plan, or until asked to stop."""
        if self.progress.step >= self.plan.total_steps:
            self.report("already_finished", step=self.progress.step)
        self.clock.lap()
        reset_peak_bytes(self.mesh.device)
        try:
            stopped = self._steps(batches, stop_at_step)
        except UserError:
            self.checkpointer.join()  # what is being saved is still good
            self.checkpointer.poll()
            raise
        except Exception:  # other ranks may be gone
            self.checkpointer.join(self.config.parallel.timeout_s)
            raise
        self.checkpointer.wait()
        if stopped:
            self.report("stopped", step=self.progress.step, signal=stopped)
        else:
            self.report("finished", step=self.progress.step)
        return RunResult(
            step=self.progress.step,
            tokens=self._tokens_after(self.progress.step),
            loss=self._last_loss,
            stopped_by=stopped,
        )

    def _steps(self, batches: Iterator[StepInput], stop_at_step: int | None) -> str | None:
        """Take steps to the end of the plan; the reason, if the run was stopped before."""
        total = self.plan.total_steps
        with StopRequest(self.mesh) as stop:
            for step in range(self.progress.step + 1, total + 1):
                given = next(batches)
                if self.monitors is not None:
                    self.monitors.before(step)
                self._pending.append((self.train_step(step, given.batches), given.plan))
                if self.monitors is not None:
                    self.monitors.after(step)
                self.progress.step = step
                stopped = stop.agreed() if step < total else None
                if step == stop_at_step and step < total:
                    stopped = f"--stop-at-step {step}"
                self._between(step, last=step == total or stopped is not None)
                if stopped:
                    return stopped
        return None

    def _between(self, step: int, *, last: bool) -> None:
        """After a step: read what it measured, evaluate, save, as far as due."""
        every = self.config.evaluation.every_steps
        evaluating = (last and step == self.plan.total_steps) or bool(every and step % every == 0)
        saving = last or self.checkpointer.due(step)
        # On a GPU a step's numbers are read while the next step runs; before anything is saved
        # they are read first, so that no checkpoint is made of a run that has gone wrong.
        lag = 1 if self.mesh.device.type == "cuda" and not (evaluating or saving) else 0
        while len(self._pending) > max(lag, int(evaluating)):
            self._settle(*self._pending.popleft(), {})
        if evaluating:
            float(self._pending[-1][0].grad_norm)  # the step ends on the clock, before it stops
            held_out = self.clock.leave_out(lambda: self.evaluator())
            validation = {f"validation/{name}": loss for name, loss in held_out.items()}
            self._settle(*self._pending.popleft(), validation)
        if saving:
            self.clock.leave_out(lambda: self._save(step))
        self.clock.leave_out(self.checkpointer.poll)

    def _settle(self, outcome: StepOutcome, documents: Plan | None, extra: Row) -> None:
        """Turn what a step measured into a row; end the run if it is not finite."""
        step, plan = outcome.step, self.plan
        loss_S, count_S = outcome.sums_2S.tolist()
        norm = float(outcome.grad_norm)
        loss = sum(loss_S) / max(1.0, sum(count_S))
        self.progress.areas.update(outcome.lr)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._not_finite(step, loss, norm)
        self._last_loss = loss
        flops = self._flops_of(step, documents)
        self.progress.flops += flops
        seconds = self.clock.lap()
        extra = extra | self._monitored(step, norm)
        if self.recorder is None or (step % self.config.record.every_steps and not extra):
            return
        tokens = self._tokens_after(step)
        ledger = self.stream.ledger(plan.batch.sequences_before(step + 1))
        row: Row = {
            "step": step,
            "tokens": tokens,
            "flops": self.progress.flops,
            "loss": loss,
            "lr": outcome.lr,
            "s1": self.progress.areas.s1,
            "s2": self.progress.areas.s2,
            "grad_norm": norm,
            "tokens_per_s": (tokens - self._tokens_after(step - 1)) / seconds,
            "mfu": flops / seconds / (self.peak.flops_per_s * self.mesh.world_size),
            "peak_bytes": peak_bytes(self.mesh.device),
            "time_s": seconds,
        }
        for index, (name, seen) in enumerate(ledger.items()):
            if count_S[index]:
                row[f"loss/{name}"] = loss_S[index] / count_S[index]
            row[f"tokens/{name}"] = seen
        if outcome.routing is not None and isinstance(self.config.model, MoEModel):
            observed, loads = routing_rows(self.config.model, outcome.routing)
            row.update(observed)
            self.recorder.loads(step, loads)
        if documents is not None and self.planner is not None:
            row.update(plan_rows(documents, self.planner.cost, self.planner.replay(documents)))
            self.recorder.plan(step, plan_record(documents, plan.layout))
            self._say_idle(step, documents)
        row.update(extra)
        for callback in self.callbacks:
            row.update(callback.additions(row, self.report))
        self.recorder.row(row)
        for callback in self.callbacks:
            callback.on_row(row)

    def _monitored(self, step: int, norm: float) -> Row:
        """What monitors add to the row of a step; their alarms are reported."""
        if self.monitors is None:
            return {}
        row, alarms = self.monitors.row(step, norm)
        for kind, details in alarms.items():
            self.report("alarm", step=step, alarm=kind, **details)
        return row

    def _say_idle(self, step: int, documents: Plan) -> None:
        """Say once in a launch that ranks have nothing to do."""
        idle = documents.ranks - len({rank for unit in documents.units for rank in unit.ring})
        if idle and not self._said_idle:
            self._said_idle = True
            self.report("idle_ranks", step=step, ranks=idle)
            _log.warning(
                "step %d leaves %d of %d hdp ranks without a document; raise batch.sequences, "
                "lower parallel.context.min_chunk_tokens or use fewer hdp ranks",
                *(step, idle, documents.ranks),
            )

    def _tokens_after(self, step: int) -> int:
        return self.stream.tokens(self.plan.batch.sequences_before(step + 1))

    def _flops_of(self, step: int, documents: Plan | None) -> int:
        """Model FLOPs of a step: those of its documents, or of sequences that are one each."""
        if documents is not None:
            return document_flops(self.config.model, documents.lengths)
        batch = self.plan.batch
        return batch.sequences(step) * batch.sequence_length * self.plan.flops_per_token.total

    def _not_finite(self, step: int, loss: float, norm: float) -> None:
        groups = ", ".join(self._broken_groups()) or "none is left: only the loss"
        self.checkpointer.wait()
        self.report("not_finite", step=step, loss=str(loss), grad_norm=str(norm), groups=groups)
        kept = (
            f"checkpoint step-{self._kept_step} is kept"
            if self._kept_step is not None
            else "no checkpoint had been made"
        )
        raise UserError(
            f"step {step}: the loss is {loss} and the gradient norm {norm}, first not finite in "
            f"parameter group(s) {groups}; {kept}; lower optimizer.lr, lengthen the warm-up or "
            "check the data of that step, then run again"
        )

    def _broken_groups(self) -> list[str]:
        """Names of the parameter groups whose gradients or values are not finite, on any rank."""
        mine = [
            str(group["name"])
            for group in self.optimizer.param_groups
            if any(
                not _local(tensor).isfinite().all()
                for parameter in group["params"]
                for tensor in (parameter.grad, parameter)
                if tensor is not None
            )
        ]
        # Pipeline ranks have different groups, so names are gathered rather than flags summed.
        return list(
            dict.fromkeys(name for names in self.mesh.gather_objects(mine) for name in names)
        )

    def _save(self, step: int) -> None:
        if self._begun_step == step:
            return
        facts = self.progress.facts(self.plan, self.stream, self.config.run.seed)
        self._begun_step = step
        self.checkpointer.save(step, state_tensors(self.parallel, self.optimizer), facts)

    def report(self, kind: str, **details: Any) -> None:
        """Write an event and tell the callbacks (on the main rank)."""
        if kind == "checkpoint_saved":
            self._kept_step = details["step"]
        if kind == "checkpoint_failed" and self._begun_step == details["step"]:
            self._begun_step = None
        if self.recorder is None:
            return
        self.recorder.event(kind, **details)
        for callback in self.callbacks:
            callback.on_event(kind, details)


def _local(tensor: Tensor) -> Tensor:
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor


def state_tensors(parallel: Parallel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a run by name: parameters, buffers, what the optimizer remembers of each."""
    names: dict[Tensor, str] = {p: name for name, p in parallel.named_parameters()}
    parameters = {f"model.{name}": p.detach() for p, name in names.items()}
    buffers = {f"model.{name}": buffer for name, buffer in parallel.named_buffers()}
    return parameters | buffers | optimizer_state(optimizer, names)
