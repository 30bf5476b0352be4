"""Pipeline parallelism: each rank runs some stages of the model, ordered by torch's schedules.

Stages send activations [B, L, D] ([B, L / tp, D] with tensor parallelism, where every rank has a
shard of the sequence); B counts the sequences of all streams (``model.streams``). Tokens, targets
and documents are not sent: each rank has the batch and looks up a micro-batch by its index. The
micro-batches of a step may therefore have any shapes, with every schedule.

With ZeRO 1 to 3 parameters are gathered once per step, and gradients stay unsharded until the last
backward of a stage, which reduces the gradients of a block while the backward continues with
earlier blocks. If the last half of a backward computes only weight gradients (``SPLIT_BACKWARD``),
the reduction follows it. The buckets of ZeRO 0 are launched in the same way. ``regather:
micro_batch`` (stage 3) frees a block after its forward; the block is gathered for its backward and
stays gathered until the stage's next forward. Schedules that split the backward do not support this
option: they keep all parameters of a stage gathered during the step.

If attention runs in rings over hdp ranks, pipelines wait for each other inside their stages. A ring
then has the same micro-batch index on all its members, so all members reach it in the same order.
If pipelines run different numbers of micro-batches (``uneven``), they may wait for each other only
in rings: parameters are gathered before the first micro-batch and gradients are reduced after the
last one. This requires a schedule that runs the common micro-batches of the pipelines in consistent
orders. Schedules that interleave in rounds (``INTERLEAVED_ROUNDS``) do so for multiples of pp, the
other schedules for all numbers that they support.
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
from allometry.parallel.tied import Mirrors
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
"""Maximum number of cached schedules, one for each number of micro-batches. A batch size ramp uses
one number at a time, complete documents several in random order. A schedule is a list of actions
with small tensors for each micro-batch.
"""


@dataclass(frozen=True)
class _Prepared:
    """Schedule for a number of micro-batches, and its stages on this rank."""

    schedule: Any
    stages: tuple[Stage, ...]


class PipelineExecution(Execution):
    """``Execution`` over the ranks of ``mesh.pp``.

    ``parts`` are this rank's stages by number. Parts may be on the meta device, but must already be
    sharded and compiled. ``sync.finish()`` completes the gradient reduction that torch's schedules
    do not perform (ZeRO stage 0). ``mirrors`` are parameters of this rank that another rank owns
    (see ``tied.py``); their gradient is None after ``train``.

    ``uneven``: each pipeline, one for each hdp rank, has its own number of micro-batches, at least
    one, in every step. This requires ZeRO stages 0 to 2, whose parameters stay gathered, and no
    expert parallelism. All ranks of a pipeline have the same number.

    A schedule is built for each number of micro-batches, and the most recently used ones are
    cached; shapes are read when micro-batches run. ``Layout`` rejects unsupported numbers.
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
        self._width, self._depths, self._dtype = model.width, model.num_depths, compute_dtype
        self._streams = model.num_streams
        self._count = len(layout.stages)
        self._uneven = uneven
        self._prepared: dict[int, _Prepared] = {}  # by number of micro-batches, least recent first
        self._tied = Mirrors(
            parts,
            first=layout.rank_of(0),
            last=layout.rank_of(self._count - 1),
            axis=mesh.pp,
            tied=model.tied_embeddings,
            depths=self._depths > 0,
        )
        self.mirrors = self._tied.names
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
        # ``before(i)`` runs once on every rank, before the first forward of micro-batch i.
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
        # Any number of micro-batches of any shapes.
        self._tied.send_value()
        with cast_weights(self._parts.values(), self._sync):
            self._forward(batches, observe)

    @override
    @torch.no_grad()
    def count_visits(
        self, batches: Sequence[MicroBatch], before: Callable[[int], None] | None = None
    ) -> None:
        # ``before(i)`` runs on every rank, before the forward of its first stage.
        if self._depths:
            self._tied.send_value()  # blocks of multi-token prediction read the table
        gathered = self._sync.gathered() if self._uneven else nullcontext()
        with gathered, cast_weights(self._parts.values(), self._sync):
            self._forward(batches, None, before)

    def _forward(
        self,
        batches: Sequence[MicroBatch],
        observe: Observe | None,
        before: Callable[[int], None] | None = None,
    ) -> None:
        """Run forward passes; without ``observe`` run only the blocks."""
        sent: list[tuple[dist.Work, Tensor]] = []
        held: dict[int, Tensor] = {}  # by micro-batch: input of this rank's next stage
        # A round of micro-batches runs through one stage, then through the rank's next stage; a
        # round is received before it is computed and sent. Two ranks thus agree on the order of all
        # messages between them, in both directions, as NCCL requires.
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
                        ahead_MBL=batch.ahead_MBL,
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
            while len(sent) > 2 * size:  # bounds the number of tensors in flight
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
        """Return an uninitialized tensor for the activation of this micro-batch between stages."""
        B, L = batch.tokens_BL.shape
        assert L % self._mesh.tp.size == 0, (L, self._mesh.tp.size)
        shape_BlD = B * self._streams, L // self._mesh.tp.size, self._width
        return torch.empty(shape_BlD, dtype=self._dtype, device=self._mesh.device)

    def _prepare(self, count: int) -> _Prepared:
        prepared = self._prepared.pop(count, None)
        if prepared is None:
            # New stages for each schedule, because a schedule stores its number of micro-batches in
            # them.
            stages = tuple(self._make_stage(number) for number in self._parts)
            prepared = _Prepared(self._make_schedule(stages, count), stages)
            if self._uneven:
                _gather_first_and_reduce_last(prepared.schedule)
        self._prepared[count] = prepared
        while len(self._prepared) > KEPT_SCHEDULES:
            del self._prepared[next(iter(self._prepared))]
        return prepared

    def _make_stage(self, number: int) -> Stage:
        # Shapes are given; otherwise torch would run a micro-batch to find them. torch allocates a
        # buffer of this size for each micro-batch, and ``Stage`` a buffer of the right size on
        # arrival.
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
        # The sum of all losses is differentiated, so gradients are not averaged over micro-batches.
        return kind(
            last if single else list(stages), number, loss_fn=last.scaled_loss, scale_grads=False
        )


def _gather_first_and_reduce_last(schedule: Any) -> None:
    """Move this rank's all-gathers to the start, and its reductions and resharding to the end.

    torch's schedules with several stages per rank reduce the gradients of one stage before the last
    backward of another stage. A rank with a shorter pipeline would wait in that reduction for a
    rank that waits for it in a ring. Schedules with one stage per rank reduce at the end and
    contain no all-gathers.
    """
    orders = getattr(schedule, "pipeline_order_with_comms", None)
    if orders is None:
        return
    moved: dict[str, dict[int, Any]] = {"UNSHARD": {}, "REDUCE_GRAD": {}, "RESHARD": {}}
    others = []
    for action in orders[schedule.rank]:
        kind = action.computation_type.name
        if kind in moved:
            moved[kind][action.stage_index] = action  # repeated if stages alternate
        else:
            others.append(action)
    first, reduced, last = ([actions[s] for s in sorted(actions)] for actions in moved.values())
    orders[schedule.rank] = [*first, *others, *reduced, *last]


def _prepare_for_split(parts: Iterable[Transformer]) -> None:
    """Configure modules for a backward in two halves."""
    for part in parts:
        for stacked in stacks(part):
            stacked.plain = True
        for module in part.modules():
            assert module._compiled_call_impl is None, "compiled code has no halves"
            if isinstance(module, FSDPModule):
                # torch collects the parameters of a stage before the backward would gather them
                # again.
                module.set_reshard_after_forward(False, recurse=False)
