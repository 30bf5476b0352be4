"""Compute the loss on held-out tokens of each source."""

# S sources

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from allometry.configs.run import RunConfig
from allometry.data.batch import IGNORE, Batch
from allometry.data.documents import DocumentStream, Pieces
from allometry.data.stream import Stream
from allometry.parallel.apply import Parallel
from allometry.parallel.mesh import Mesh
from allometry.trainer.feed import DeviceBatch, DocumentPlanner
from allometry.trainer.record.callbacks import Callback, Reporter
from allometry.trainer.record.columns import FinishedStep
from allometry.trainer.record.timing import StepTimer
from allometry.trainer.record.writer import Row
from allometry.trainer.step import source_sums


@dataclass(frozen=True)
class HeldOut:
    """This rank's micro-batches of held-out tokens; their ``sources`` index ``names``.

    All ranks have the same number of micro-batches.
    """

    names: tuple[str, ...]
    batches: list[DeviceBatch]


def held_out_sequences(validation: Mapping[str, list[Batch]], mesh: Mesh) -> HeldOut:
    """Distribute each source's micro-batches over the hdp ranks; all ranks pass the same ones."""
    mine = []
    for index, batches in enumerate(validation.values()):
        rounds = -(-len(batches) // mesh.hdp.size)
        for turn in range(rounds):
            place = turn * mesh.hdp.size + mesh.hdp.rank
            idle = place >= len(batches)
            # All ranks gather sharded parameters together, so a rank without a micro-batch runs one
            # without targets.
            batch = batches[0] if idle else batches[place]
            held = DeviceBatch.of(batch, mesh.device, position=place)
            if idle:
                held.targets_BL.fill_(IGNORE)
            held.sources.fill_(index)
            mine.append(held)
    return HeldOut(tuple(validation), mine)


def held_out_documents(
    validation: Mapping[str, Pieces], planner: DocumentPlanner, mesh: Mesh
) -> HeldOut:
    """Distribute each source's held-out documents over the hdp ranks as in a training step."""
    mine = []
    for index, pieces in enumerate(validation.values()):
        plan = planner.plan(pieces.lengths.tolist(), mode="lockstep")
        for batch in planner.batches(plan, pieces, mesh.hdp.rank, mesh.device, position=0):
            batch.sources.fill_(index)
            mine.append(batch)
    return HeldOut(tuple(validation), mine)


def held_out_of(
    config: RunConfig,
    stream: Stream | DocumentStream,
    planner: DocumentPlanner | None,
    mesh: Mesh,
) -> HeldOut:
    """Return ``evaluation.sequences_per_source`` samples of each source; every rank calls this."""
    count = config.evaluation.sequences_per_source
    if isinstance(stream, DocumentStream):
        assert planner is not None
        return held_out_documents(stream.validation_pieces(count), planner, mesh)
    at_once = config.batch.micro_batch_sequences
    return held_out_sequences(stream.validation(count, at_once), mesh)


@contextmanager
def evaluating(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Put the parts into eval mode (no dropout), and restore their earlier modes afterwards."""
    training = [part.training for part in parts]
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for part, mode in zip(parts, training, strict=True):
            part.train(mode)


class Evaluator:
    """Evaluates the model on the validation split of each source, distributed over the ranks."""

    drafts: float | None = None
    """Share of multi-token prediction's drafts that equal the main head's most likely token, in the
    last evaluation; None without multi-token prediction.
    """

    def __init__(self, held_out: HeldOut, parallel: Parallel, mesh: Mesh) -> None:
        self.names = list(held_out.names)
        self._mine = held_out.batches
        self._parallel = parallel
        self._mesh = mesh

    def __call__(self) -> dict[str, float]:
        """Return the mean loss in nats per token by source, the same on all ranks."""
        if not self.names:
            return {}
        total = torch.zeros(2, len(self.names), dtype=torch.float64, device=self._mesh.device)

        def observe(index: int, nll_BL: Tensor) -> None:
            batch = self._mine[index]
            nonlocal total
            total += source_sums(nll_BL, batch.targets_BL, batch.sources, len(self.names))

        parts = list(self._parallel.parts.values())
        drafts_2 = torch.zeros(2, dtype=torch.float64, device=self._mesh.device)
        depths = [part.mtp for part in parts if part.mtp is not None]
        with evaluating(parts), ExitStack() as stack:
            for one in depths:
                stack.enter_context(one.compared())
            self._parallel.execution.evaluate(self._mine, observe)
        for one in depths:
            drafts_2 += one.take_drafts()
        for sums in (total, drafts_2):
            self._mesh.all_reduce_sum(sums, "hdp")
            self._mesh.all_reduce_sum(sums, "pp")
        equal, compared = drafts_2.tolist()
        self.drafts = equal / compared if compared else None
        loss, count = total.tolist()
        return {name: loss[i] / count[i] for i, name in enumerate(self.names) if count[i]}


class Evaluation(Callback):
    """Adds ``validation/SOURCE`` to the rows of evaluated steps and of the run's last step.

    For sources in ``replayed`` the row also has ``forgetting/SOURCE``: the loss minus its earlier
    value in ``before`` (losses by source). If ``before`` lacks a replayed source, all sources are
    evaluated before the launch's first step, stored in ``before`` and reported. For example,
    ``before={"web": 2.5}`` and a loss of 2.7 give ``forgetting/web`` = 0.2.
    """

    adds_to_skipped = True

    def __init__(
        self,
        evaluator: Evaluator,
        every_steps: int | None,
        total_steps: int,
        timer: StepTimer,
        report: Reporter,
        replayed: Sequence[str] = (),
        before: dict[str, float] | None = None,
    ) -> None:
        self._evaluator, self._timer = evaluator, timer
        self._every, self._total = every_steps, total_steps
        self._replayed = [name for name in replayed if name in evaluator.names]
        self._before = {} if before is None else before
        self._report = report

    @override
    def before_step(self, step: int) -> None:
        if all(name in self._before for name in self._replayed):
            return
        with self._timer.paused():
            losses = self._evaluator()
        for name, loss in losses.items():
            self._before.setdefault(name, loss)
        self._report("held_out_before", step=step - 1, losses=losses)

    @override
    def needs_numbers(self, step: int, *, last: bool) -> bool:
        return step == self._total or bool(self._every and step % self._every == 0)

    @override
    def additions(self, finished: FinishedStep) -> Row:
        if not self.needs_numbers(finished.step, last=False):
            return {}
        with self._timer.paused():
            losses = self._evaluator()
        forgotten = {
            f"forgetting/{name}": losses[name] - self._before[name] for name in self._replayed
        }
        drafts = self._evaluator.drafts
        accepted = {} if drafts is None else {"drafts_accepted": drafts}
        return {f"validation/{name}": loss for name, loss in losses.items()} | forgotten | accepted
