"""Rehearsal of a step in any layout on one process, for each pipeline rank: memory and messages.

The model is built, cut and sharded by the code that trains it, over a mesh of the real size whose
ranks are simulated (``parallel/simulate.py``). All numbers are exact unless stated otherwise.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from allometry.configs.model import MoEModel
from allometry.configs.run import RunConfig
from allometry.models.build import torch_dtype
from allometry.models.head import Losses
from allometry.models.moe import begin_step
from allometry.models.transformer import Transformer
from allometry.optim.build import init_states
from allometry.optim.clip import clip_by_global_norm
from allometry.parallel.apply import Parallel, parallelize
from allometry.parallel.mesh import Mesh
from allometry.parallel.simulate import (
    Collective,
    CollectiveLog,
    dtype_name,
    even_experts,
    simulated_rank,
    without_storage,
)
from allometry.scaling.deepspeed import check_other_engine
from allometry.scaling.layout import Layout
from allometry.scaling.plan import RunPlan
from allometry.trainer.assemble import build_part, make_optimizer


@dataclass(frozen=True)
class RankReport:
    """Memory and messages of one rank of a pipeline stage, or of the run without pipeline.

    ``bytes_held`` by kind, exact: fp32 parameters, their gradients after the step's last backward
    (both with the copy of a tied head on another rank than its embedding), optimizer states and
    buffers, on any device. ``collectives``: those of one step with ``micro_batches`` micro-batches,
    with their number; largest first. Loads of experts are assumed to be even.
    """

    rank: int
    stages: tuple[int, ...]
    micro_batches: int
    bytes_held: dict[str, int]
    collectives: tuple[tuple[Collective, int], ...]

    def describe(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return {
            "rank": self.rank,
            "stages": list(self.stages),
            "micro_batches": self.micro_batches,
            "bytes_held": self.bytes_held,
            "collectives": [
                {**asdict(call), "per_step": number} for call, number in self.collectives
            ],
        }


def rehearse(config: RunConfig, world_size: int) -> list[RankReport]:
    """Return the reports of one rank of each pipeline rank for the last step of the run.

    Compilation is left out, because it changes neither shapes nor messages. Documents are assumed
    to be full micro-batches on one rank each: rings, which every step plans, are not counted.
    Raises UserError: the layout is not possible. For example,
    ``rehearse(config, 8)[0].bytes_held``.
    """
    check_other_engine(config.parallel.zero, "a rehearsal of ranks")
    plain = config.training.model_copy(update={"compile": False})
    plan = RunPlan.of(config, world_size)
    # Fusion of collectives with products sends the same messages, cut into smaller ones.
    overlap = "chunked" if config.parallel.tp_overlap == "chunked" else "off"
    parallel = config.parallel.model_copy(update={"tp_overlap": overlap})
    config = config.model_copy(update={"training": plain, "parallel": parallel})
    degrees = plan.layout.degrees
    return [
        _rehearse_rank(config, plan, pp_rank * degrees.hdp * degrees.tp)
        for pp_rank in range(degrees.pp)
    ]


def _rehearse_rank(config: RunConfig, plan: RunPlan, rank: int) -> RankReport:
    with simulated_rank(config.parallel, rank, plan.world_size) as mesh:
        parallel = parallelize(
            lambda part: build_part(config, plan, part), config, plan.layout, mesh
        )
        with without_storage():
            parallel.materialize(mesh.device)
            for part in parallel.parts.values():
                even_experts(part)
            micro_batches = plan.micro_batches(plan.total_steps)
            calls, gradients = _step(config, plan, parallel, mesh, micro_batches)
            states = _update(config, plan, parallel, mesh, calls)
            return RankReport(
                rank=rank,
                stages=tuple(parallel.parts),
                micro_batches=micro_batches,
                bytes_held={
                    "parameters": _nbytes(_parameters(parallel)),
                    "gradients": gradients,
                    "optimizer states": states,
                    "buffers": _nbytes(b for _, b in parallel.named_buffers()),
                },
                collectives=tuple(sorted(calls.items(), key=lambda item: -item[0].bytes * item[1])),
            )


def _step(
    config: RunConfig, plan: RunPlan, parallel: Parallel, mesh: Mesh, micro_batches: int
) -> tuple[Counter[Collective], int]:
    """Run the first, one middle and the last micro-batch; count each as often as it occurs."""
    if isinstance(config.model, MoEModel):
        for part in parallel.parts.values():
            begin_step(part, plan.batch.sequences(plan.total_steps) * plan.batch.sequence_length)
    total: Counter[Collective] = Counter()
    if plan.balance_loads is not None and plan.balance_loads.loads == "this_batch":
        with CollectiveLog(mesh) as log, torch.no_grad():
            for stage, part in parallel.parts.items():
                part(*_inputs(config, part, mesh), blocks_only=True)
                part.take_statistics()
                sent = _handed_on(config, mesh, plan.layout, stage, micro_batches)
                total.update({call: n for call, n in sent.items() if call.kind == "send forward"})
        total.update({call: n * micro_batches for call, n in Counter(log.calls).items()})
    shapes = [(1, False)] * (micro_batches > 1) + [(micro_batches - 2, False)] * (micro_batches > 2)
    for number, last in [*shapes, (1, True)]:
        with CollectiveLog(mesh) as log:
            parallel.sync.micro_batch(last)
            for stage, part in parallel.parts.items():
                made = part(*_inputs(config, part, mesh))
                loss = made.total if isinstance(made, Losses) else made.float().sum()
                if loss.requires_grad:  # a frozen first stage has no backward
                    loss.backward()
                part.take_statistics()
                total.update(_handed_on(config, mesh, plan.layout, stage, number))
            if last:
                parallel.sync.finish()
        for call, times in Counter(log.calls).items():
            total[call] += times * number
    total.update(_tied(config, plan, parallel))
    parameters = [p for _, p in parallel.named_parameters()]
    gradients = _nbytes(p.grad for p in _parameters(parallel))
    with CollectiveLog(mesh) as log:
        clip_by_global_norm(parameters, config.training.clip_grad_norm, mesh)
    total.update(log.calls)
    return total, gradients


def _inputs(
    config: RunConfig, part: Transformer, mesh: Mesh
) -> tuple[Tensor, Tensor, None, Tensor | None]:
    """Return the inputs of a part's forward for one micro-batch."""
    B, L = _shape(config, mesh)
    tokens_BL = torch.zeros(B, L, dtype=torch.int64)
    if part.embedding is not None:
        return tokens_BL, tokens_BL, None, None
    dtype = torch_dtype(config.training.compute_dtype)
    shape_BlD = B, L // mesh.tp.size, config.model.width
    return tokens_BL, tokens_BL, None, torch.zeros(shape_BlD, dtype=dtype, requires_grad=True)


def _shape(config: RunConfig, mesh: Mesh) -> tuple[int, int]:
    """Return sequences per micro-batch and tokens per sequence; for documents, the maximum."""
    if config.data.kind == "documents":
        capacity = config.parallel.context.capacity_tokens
        return 1, capacity // mesh.tp.size * mesh.tp.size
    return config.batch.micro_batch_sequences, config.data.sequence_length


def _handed_on(
    config: RunConfig, mesh: Mesh, layout: Layout, stage: int, number: int
) -> dict[Collective, int]:
    """Return the messages of a stage: activations to the next, gradients to the previous one.

    Nothing is sent to a stage on the same rank.
    """
    B, L = _shape(config, mesh)
    tokens = B * L // mesh.tp.size
    dtype = torch_dtype(config.training.compute_dtype)
    size = tokens * config.model.width * dtype.itemsize
    sent: dict[Collective, int] = {}
    here, last = layout.rank_of(stage), len(layout.stages) - 1
    if stage < last and layout.rank_of(stage + 1) != here:
        sent[Collective("send forward", "pp", 2, size, dtype_name(dtype))] = number
    if stage > 0 and layout.rank_of(stage - 1) != here:
        sent[Collective("send backward", "pp", 2, size, dtype_name(dtype))] = number
    return sent


def _tied(config: RunConfig, plan: RunPlan, parallel: Parallel) -> dict[Collective, int]:
    """Return the messages of copies of the embedding on another rank: weight and gradient.

    The copies, a tied head and the table of multi-token prediction, share the messages. A pass that
    counts the loads of this batch needs the table as well.
    """
    layout, loads = plan.layout, plan.balance_loads
    counts = config.model.num_depths > 0 and loads is not None and loads.loads == "this_batch"
    last = len(layout.stages) - 1
    copied = config.model.tied_embeddings or config.model.num_depths > 0
    if not copied or layout.rank_of(0) == layout.rank_of(last):
        return {}
    sent: dict[Collective, int] = {}
    for stage, kind, times in (
        (0, "send tied weight", 1 + counts),
        (last, "send tied gradient", 1),
    ):
        part = parallel.parts.get(stage)
        module = None
        if part is not None:
            table = part.mtp["embedding"] if stage and part.mtp is not None else part.head
            module = part.embedding if stage == 0 else table
        if module is not None and (stage == 0 or module.weight.requires_grad):
            weight = module.weight
            sent[Collective(kind, "pp", 2, _nbytes([weight]), dtype_name(weight.dtype))] = times
    return sent


def _update(
    config: RunConfig, plan: RunPlan, parallel: Parallel, mesh: Mesh, calls: Counter[Collective]
) -> int:
    """Take an optimizer step, add its messages to ``calls`` and return the bytes of its states."""
    optimizer = make_optimizer(config, plan, parallel, mesh, still=True)
    init_states(optimizer)  # messages of the initialization are sent once in a run
    for _, parameter in parallel.named_parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with CollectiveLog(mesh) as log:
        optimizer.step()
    calls.update(log.calls)
    return _nbytes(
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def _parameters(parallel: Parallel) -> list[Tensor]:
    """Return all parameters on this rank, copies of other ranks' parameters included."""
    return [p for part in parallel.parts.values() for p in part.parameters()]


def _nbytes(tensors: Any) -> int:
    held = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
