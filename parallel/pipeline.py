"""Pipeline parallelism: a rank runs some stages of the model, torch's schedules order them.

Stages hand [B, L, D] on to one another ([B, L / tp, D] with tensor parallelism, where every rank
has a shard of the sequence). Tokens, targets and documents do not travel: each rank holds the
batch and looks a micro-batch up by its number. So micro-batches of one step may be of any shapes,
with every schedule.

With ZeRO 1 to 3 parameters are gathered once in a step, and gradients stay whole until a stage's
last backward: it reduces those of a block while it goes through the blocks before. Where the last
half of a backward computes no more than weights' gradients (``SPLIT_BACKWARD``), it is followed by
the reduction. So are buckets of ZeRO 0 launched. ``regather: micro_batch`` (stage 3) frees a block
after its forward; it is gathered for its backward and stays until the stage's next forward. The
schedules that split backward cannot: they keep all parameters of a stage throughout the step.

Where attention runs in rings over hdp ranks, pipelines wait for one another inside their stages. A
ring has then the same number among the micro-batches of all its members, so that all come to it in
the same order. If pipelines run different numbers of micro-batches (``uneven``), nothing but rings
may make them wait: parameters are gathered before the first micro-batch and gradients reduced after
the last. That needs a schedule that runs the micro-batches that pipelines have in common in orders
that do not contradict each other. Those that interleave in rounds (``INTERLEAVED_ROUNDS``) do for
multiples of pp, the others for all numbers that they take.
"""

# B sequences of a micro-batch, L tokens in a sequence, D width

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import pipelining
from torch.distributed.fsdp import FSDPModule
from typing_extensions import override

from allometry.configs.model import ModelConfig
from allometry.models.head import Losses
from allometry.models.loss import GradientSum
from allometry.models.products import stacks
from allometry.models.transformer import Transformer
from allometry.parallel.execution import Execution, MicroBatch, Observe, cast_weights
from allometry.parallel.mesh import Mesh
from allometry.parallel.reduce import GradientSync
from allometry.parallel.stage import Stage, StepInputs
from allometry.parallel.tied import TiedHead
from allometry.scaling.layout import ONE_STAGE_SCHEDULES, SPLIT_BACKWARD, Layout

SCHEDULES: Mapping[str, Any] = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved_1f1b": pipelining.ScheduleInterleaved1F1B,
    "looped_bfs": pipelining.ScheduleLoopedBFS,
    "interleaved_zero_bubble": pipelining.ScheduleInterleavedZeroBubble,
    "zbv_zero_bubble": pipelining.ScheduleZBVZeroBubble,
    "dualpipe_v": pipelining.ScheduleDualPipeV,
}

KEPT_SCHEDULES = 16
"""Numbers of micro-batches whose schedules are kept. A ramp has one at a time, whole documents some
at random; a schedule is a list of actions and small tensors for each micro-batch."""


@dataclass(frozen=True)
class _Prepared:
    """A schedule for some number of micro-batches, and the stages it runs on this rank."""

    schedule: Any
    stages: tuple[Stage, ...]


class PipelineExecution(Execution):
    """``Execution`` over the ranks of ``mesh.pp``.

    ``parts`` are this rank's stages by number; they may be without values, but what shards or
    compiles them has been applied. ``sync.finish()`` completes the reduction of gradients where
    torch's schedules do not: at ZeRO stage 0. ``mirrors`` are parameters of this rank that belong
    to another (see ``tied.py``); their gradient is None after ``train``.

    ``uneven``: each pipeline, one for each hdp rank, has a number of micro-batches of its own, one
    or more, in every step. That is for ZeRO stages 0 to 2, whose parameters stay gathered, and
    without expert parallelism. All ranks of a pipeline have the same number.

    Each number of micro-batches has a schedule, of which the last used are kept; their shapes
    are looked at when they run. ``Layout`` refuses what a schedule cannot take.
    """

    def __init__(
        self,
        parts: Mapping[int, Transformer],
        model: ModelConfig,
        layout: Layout,
        mesh: Mesh,
        sync: GradientSync,
        compute_dtype: torch.dtype,
        *,
        uneven: bool = False,
    ) -> None:
        assert tuple(parts) == layout.stages_of(mesh.pp.rank), (tuple(parts), layout)
        self._parts, self._layout, self._mesh, self._sync = parts, layout, mesh, sync
        self._width, self._dtype = model.width, compute_dtype
        self._count = len(layout.stages)
        self._uneven = uneven
        self._prepared: dict[int, _Prepared] = {}  # by number of micro-batches, last used last
        self._tied = TiedHead(
            parts,
            first=layout.rank_of(0),
            last=layout.rank_of(self._count - 1),
            axis=mesh.pp,
            tied=model.tied_embeddings,
        )
        self.mirrors = self._tied.mirrors
        self._head_gradient = GradientSum()
        for part in parts.values():
            if part.head is not None:
                part.head.gradient_sum = self._head_gradient
        if layout.schedule in SPLIT_BACKWARD:
            _prepare_for_split(parts.values())

    @override
    def train(
        self,
        batches: Sequence[MicroBatch],
        scale: Tensor,
        observe: Observe,
        before: Callable[[int], None] | None = None,
    ) -> None:
        # ``before(i)`` runs on every rank, once, before its first forward.
        self._head_gradient.begin()
        self._tied.send_value()
        prepared = self._prepare(len(batches))
        inputs = StepInputs(
            batches,
            scale,
            observe,
            before,
            first=min(self._parts),
            empty=lambda i: self._empty(batches[i]),
            begin=self._sync.begin_uneven if self._uneven else lambda: None,
            sync=None if self._uneven else self._sync,
        )
        index = torch.arange(len(batches))
        given: dict[str, Any] = {"mb": index}
        if self._count - 1 in self._parts:
            given["target"] = index
        for stage in prepared.stages:
            stage.inputs = inputs
        try:
            with cast_weights(self._parts.values(), self._sync):
                prepared.schedule.step(
                    *((index,) if 0 in self._parts else ()), return_outputs=False, **given
                )
        finally:
            for stage in prepared.stages:
                stage.inputs = None
        self._sync.finish()
        self._tied.return_gradient()

    @override
    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch], observe: Observe) -> None:
        # Micro-batches may be any number, each of any shape.
        self._tied.send_value()
        with cast_weights(self._parts.values(), self._sync):
            self._forward(batches, observe)

    @override
    @torch.no_grad()
    def count_visits(
        self, batches: Sequence[MicroBatch], before: Callable[[int], None] | None = None
    ) -> None:
        # ``before(i)`` runs on every rank, before its first stage's forward.
        gathered = self._sync.gathered() if self._uneven else nullcontext()
        with gathered, cast_weights(self._parts.values(), self._sync):
            self._forward(batches, None, before)

    def _forward(
        self,
        batches: Sequence[MicroBatch],
        observe: Observe | None,
        before: Callable[[int], None] | None = None,
    ) -> None:
        """Run forward passes; without ``observe`` those of the blocks alone."""
        sent: list[tuple[dist.Work, Tensor]] = []
        held: dict[int, Tensor] = {}  # by micro-batch: what this rank hands on to itself
        # A round of micro-batches goes through a stage, then through the rank's next one; a round
        # is received before it is computed and sent. So two ranks agree on the order of all that
        # passes between them, in both directions, as NCCL needs.
        size = 1 if len(self._parts) == 1 else self._mesh.pp.size
        for start in range(0, len(batches), size):
            indices = range(start, min(start + size, len(batches)))
            for stage, part in self._parts.items():
                inputs: dict[int, Tensor] = held if stage - 1 in self._parts else {}
                if stage > 0 and not inputs:
                    inputs = {i: self._receive(stage - 1, batches[i]) for i in indices}
                held = {}
                for index in indices:
                    batch = batches[index]
                    if before is not None and stage == min(self._parts):
                        before(index)
                    made = part(
                        batch.tokens_BL,
                        batch.targets_BL,
                        batch.documents,
                        inputs.pop(index, None),
                        blocks_only=observe is None,
                    )
                    if isinstance(made, Losses):
                        assert observe is not None
                        observe(index, made.nll_BL)
                    elif stage + 1 < self._count:
                        held[index] = made
                if stage + 1 not in self._parts:
                    sent += [(self._send(x_BLD, stage + 1), x_BLD) for x_BLD in held.values()]
                    held = {}
            while len(sent) > 2 * size:  # bounds what is kept for those that wait for it
                sent.pop(0)[0].wait()
        for work, _ in sent:
            work.wait()

    def _send(self, x_BLD: Tensor, stage: int) -> dist.Work:
        return self._mesh.pp.send(x_BLD, self._layout.rank_of(stage))

    def _receive(self, stage: int, batch: MicroBatch) -> Tensor:
        x_BLD = self._empty(batch)
        self._mesh.pp.receive(x_BLD, self._layout.rank_of(stage))
        return x_BLD

    def _empty(self, batch: MicroBatch) -> Tensor:
        """Return a tensor for what stages hand on of this micro-batch, without values."""
        B, L = batch.tokens_BL.shape
        assert L % self._mesh.tp.size == 0, (L, self._mesh.tp.size)
        shape_BlD = B, L // self._mesh.tp.size, self._width
        return torch.empty(shape_BlD, dtype=self._dtype, device=self._mesh.device)

    def _prepare(self, count: int) -> _Prepared:
        prepared = self._prepared.pop(count, None)
        if prepared is None:
            # Stages of its own for each: a schedule leaves its number of micro-batches in them.
            stages = tuple(self._make_stage(number) for number in self._parts)
            prepared = _Prepared(self._make_schedule(stages, count), stages)
            if self._uneven:
                _gather_first_and_reduce_last(prepared.schedule)
        self._prepared[count] = prepared
        while len(self._prepared) > KEPT_SCHEDULES:
            del self._prepared[next(iter(self._prepared))]
        return prepared

    def _make_stage(self, number: int) -> Stage:
        # Said rather than found out: torch would run a micro-batch to see. It makes a buffer of
        # this size for each micro-batch, and the stage another of the right size when it comes.
        hidden = torch.empty(1, 1, self._width, dtype=self._dtype, device="meta").requires_grad_()
        wide = torch.promote_types(self._dtype, torch.float32)
        total = torch.empty((), dtype=wide, device="meta", requires_grad=True)
        return Stage(
            self._parts[number],
            number,
            self._count,
            self._mesh.device,
            input_args=torch.empty(1, dtype=torch.int64, device="meta") if number == 0 else hidden,
            output_args=total if number == self._count - 1 else hidden,
            group=self._mesh.pp.group,
        )

    def _make_schedule(self, stages: tuple[Stage, ...], number: int) -> Any:
        kind = SCHEDULES[self._layout.schedule]
        single = self._layout.schedule in ONE_STAGE_SCHEDULES
        last = stages[-1]
        # The sum of all losses is differentiated, so nothing is averaged over micro-batches.
        return kind(
            last if single else list(stages), number, loss_fn=last.scaled_loss, scale_grads=False
        )


def _gather_first_and_reduce_last(schedule: Any) -> None:
    """Move this rank's gathers to the front, its reductions and what frees parameters to the end.

    Torch's schedules of several stages reduce a stage's gradients before another's last backward.
    A rank whose pipeline is shorter would wait there for one that waits for it in a ring. Those of
    one stage reduce at the end, and gather nothing themselves.
    """
    orders = getattr(schedule, "pipeline_order_with_comms", None)
    if orders is None:
        return
    moved: dict[str, dict[int, Any]] = {"UNSHARD": {}, "REDUCE_GRAD": {}, "RESHARD": {}}
    others = []
    for action in orders[schedule.rank]:
        kind = action.computation_type.name
        if kind in moved:
            moved[kind][action.stage_index] = action  # more than once where stages take turns
        else:
            others.append(action)
    first, reduced, last = ([actions[s] for s in sorted(actions)] for actions in moved.values())
    orders[schedule.rank] = [*first, *others, *reduced, *last]


def _prepare_for_split(parts: Iterable[Transformer]) -> None:
    """Set what the two halves of a backward need."""
    for part in parts:
        for stacked in stacks(part):
            stacked.plain = True
        for module in part.modules():
            assert module._compiled_call_impl is None, "compiled code has no halves"
            if isinstance(module, FSDPModule):
                # torch looks for a stage's parameters before backward would gather them again.
                module.set_reshard_after_forward(False, recurse=False)
