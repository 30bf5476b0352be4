"""Putting a run together from its description, and training it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from allometry.configs.errors import UserError
from allometry.configs.model import MoEModel
from allometry.configs.run import RunConfig
from allometry.data.documents import DocumentStream
from allometry.data.stream import Stream, open_stream
from allometry.data.tokenizer import check_vocabulary
from allometry.laws.areas import LearningRateAreas
from allometry.models.build import torch_dtype
from allometry.optim.build import init_states
from allometry.optim.schedule import Schedule, resolve_schedule
from allometry.parallel.apply import Parallel
from allometry.parallel.mesh import Mesh, launched_world_size, open_mesh
from allometry.scaling.plan import RunPlan
from allometry.trainer.assemble import (
    make_model,
    make_optimizer,
    with_measured_stages,
)
from allometry.trainer.balance import Balancer
from allometry.trainer.evaluate import (
    Evaluator,
    HeldOut,
    held_out_documents,
    held_out_sequences,
)
from allometry.trainer.feed import (
    DocumentPlanner,
    StepInput,
    check_steps,
    document_steps,
    sequence_steps,
)
from allometry.trainer.loop import Loop, Progress, RunResult, state_tensors
from allometry.trainer.record import hardware
from allometry.trainer.record import writer as record
from allometry.trainer.record.callbacks import Callback, standard_callbacks
from allometry.trainer.record.forecast import Forecaster
from allometry.trainer.record.monitors import Monitors
from allometry.trainer.record.sample import Sample
from allometry.trainer.state import checkpoint
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.resume import Start, begin
from allometry.trainer.step import TrainStep

T = TypeVar("T")
MANY_EPOCHS = 4
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Surroundings:
    """What the process was started with, for the record; the library reads no environment."""

    allocator: str = "unknown"
    command: list[str] = field(default_factory=list)


def train(
    config: RunConfig,
    *,
    device: torch.device | None = None,
    callbacks: Sequence[Callback] | None = None,
    surroundings: Surroundings | None = None,
    stop_at_step: int | None = None,
) -> RunResult:
    """Train the run that ``config`` describes, from where its folder says it is.

    Every rank of a torchrun calls this. ``device`` defaults to this rank's GPU, or the CPU without
    one; ``callbacks`` to what ``config.record`` asks for. ``stop_at_step`` ends this launch there,
    with a checkpoint, as a signal would. Raises UserError on all ranks alike.
    """
    # What a layout cannot do is said before any group starts.
    plan = RunPlan.of(config, launched_world_size())
    with open_mesh(config.parallel, device) as mesh:
        plan = with_measured_stages(config, plan, mesh)
        return _train(config, plan, mesh, callbacks, surroundings or Surroundings(), stop_at_step)


def _train(
    config: RunConfig,
    plan: RunPlan,
    mesh: Mesh,
    callbacks: Sequence[Callback] | None,
    surroundings: Surroundings,
    stop_at_step: int | None,
) -> RunResult:
    schedule = resolve_schedule(config, plan.batch)
    stream = together(mesh, lambda: _open_stream(config, plan))
    folder = RunFolder(config.run.folder)
    if callbacks is None:
        callbacks = on_main(mesh, lambda: _callbacks(config, schedule, folder)) or ()
    start = shared(mesh, lambda: begin(folder, config, stream.fingerprints(), stop_at_step))
    recorder = record.Recorder(folder) if mesh.is_main else None
    try:
        loop = _assemble(config, plan, schedule, mesh, stream, start)
        loop.attach(recorder, callbacks, folder)
        facts = _facts(config, loop, surroundings)
        if recorder is not None:
            if start.step < plan.total_steps:
                record.write_run(folder, facts, _launch(loop, start, surroundings))
            for callback in callbacks:
                callback.on_start(facts, start.step + 1)
        _report_start(loop, start)
        with closing(_feed(loop, start.step)) as batches:
            return loop.run(batches, stop_at_step)
    finally:
        if recorder is not None:
            for callback in callbacks:
                callback.on_end()
            recorder.close()
        folder.release()


def _callbacks(config: RunConfig, schedule: Schedule, folder: RunFolder) -> list[Callback]:
    """What the record section asks for."""
    found = standard_callbacks(config.record, folder)
    if config.record.forecast.every_steps is not None:
        every = config.record.forecast.every_steps
        found.append(Forecaster(every, schedule, config.optimizer.lr, folder))
    return found


def _open_stream(config: RunConfig, plan: RunPlan) -> Stream | DocumentStream:
    """The data, after checking that tokenizer and vocabulary fit it."""
    stream = open_stream(config.data, config.run.seed)
    check_vocabulary(config.model.vocab_size, stream.stores)
    if isinstance(stream, DocumentStream):
        check_steps(stream, plan)
    sequences = plan.batch.sequences_before(plan.total_steps + 1)
    for name, epochs in stream.epochs(sequences).items():
        if epochs > MANY_EPOCHS:
            _log.warning(
                "source %s will be read %.1f times; past about %d the repetition costs (arXiv "
                "2305.16264): add data, lower its weight or shorten the run",
                *(name, epochs, MANY_EPOCHS),
            )
    return stream


def _assemble(
    config: RunConfig,
    plan: RunPlan,
    schedule: Schedule,
    mesh: Mesh,
    stream: Stream | DocumentStream,
    start: Start,
) -> Loop:
    """The model on the device and all that trains it, in the state that ``start`` says."""
    parallel = make_model(config, plan, mesh)
    optimizer = make_optimizer(config, plan, parallel, mesh)
    progress = Progress(start.step, LearningRateAreas(plan.warmup_steps))
    if start.checkpoint is not None and start.facts is not None:
        if start.weights_only:  # converted from elsewhere: training itself begins afresh
            state = {f"model.{name}": p.detach() for name, p in parallel.named_parameters()}
        else:
            init_states(optimizer)
            state = state_tensors(parallel, optimizer)
            progress.areas.load_state_dict(start.facts["areas"])
            progress.flops = start.facts["flops"]
        checkpoint.load(start.checkpoint, state, mesh)
    planner = DocumentPlanner(config, plan.layout) if config.data.kind == "documents" else None
    return Loop(
        config=config,
        plan=plan,
        mesh=mesh,
        parallel=parallel,
        optimizer=optimizer,
        train_step=TrainStep(
            parallel,
            optimizer,
            schedule,
            mesh,
            peak_lr=config.optimizer.lr,
            sources=len(config.data.sources),
            clip_grad_norm=config.training.clip_grad_norm,
            dropout_seed=config.run.seed if config.model.dropout else None,
            balancer=Balancer(config.model, list(parallel.parts.values()), mesh)
            if isinstance(config.model, MoEModel)
            else None,
        ),
        evaluator=Evaluator(_held_out(config, stream, planner, mesh), parallel, mesh),
        planner=planner,
        monitors=_monitors(config, plan, parallel, optimizer, stream, mesh),
        stream=stream,
        progress=progress,
        peak=hardware.peak(mesh.device, torch_dtype(config.training.compute_dtype)),
    )


def _monitors(
    config: RunConfig,
    plan: RunPlan,
    parallel: Parallel,
    optimizer: torch.optim.Optimizer,
    stream: Stream | DocumentStream,
    mesh: Mesh,
) -> Monitors | None:
    wanted = config.record.monitors
    if wanted.every_steps is None and wanted.singular_values_every_steps is None:
        return None
    longest = config.parallel.context.capacity_tokens
    return Monitors(
        wanted,
        parallel,
        optimizer,
        Sample(stream, wanted.sequences, longest, mesh),
        plan.batch,
        mesh,
        num_layers=config.model.num_layers,
        clip_grad_norm=config.training.clip_grad_norm,
    )


def _held_out(
    config: RunConfig, stream: Stream | DocumentStream, planner: DocumentPlanner | None, mesh: Mesh
) -> HeldOut:
    count = config.evaluation.sequences_per_source
    if isinstance(stream, DocumentStream):
        assert planner is not None
        return held_out_documents(stream.validation_pieces(count), planner, mesh)
    return held_out_sequences(stream.validation(count, config.batch.micro_batch_sequences), mesh)


def _feed(loop: Loop, steps_taken: int) -> Iterator[StepInput]:
    """This rank's micro-batches, step by step."""
    if isinstance(loop.stream, DocumentStream):
        assert loop.planner is not None
        return document_steps(loop.stream, loop.plan, loop.planner, loop.mesh, steps_taken)
    return sequence_steps(loop.stream, loop.plan, loop.mesh, steps_taken)


def _facts(config: RunConfig, loop: Loop, surroundings: Surroundings) -> dict[str, Any]:
    """What run.json says of the run as a whole."""
    mesh = loop.mesh
    return {
        "versions": record.versions(),
        "commit": record.commit(),
        "command": surroundings.command,
        "allocator": surroundings.allocator,
        "hardware": hardware.describe(mesh.device),
        "peak": {"flops_per_s": loop.peak.flops_per_s, "source": loop.peak.source},
        "compute_dtype": config.training.compute_dtype,
        "parent": config.run.parent.model_dump() if config.run.parent else None,
        "layout": layout(config, loop.plan),
        "plan": loop.plan.describe(),
        "data": loop.stream.describe(),
        "conventions": {
            "step": "counted from 1; a row's lr is what that step used",
            "s1": "sum of lr over steps, warm-up included",
            "s2": "sum of lr annealing with momentum 0.999, from the end of warm-up (arXiv "
            "2408.11029)",
            "loss": "mean over target tokens of the step's global batch, nats, before its update",
            "flops": "model FLOPs so far: forward and backward, causal attention, no recomputation",
            "peak_bytes": "most memory of the main rank so far, allocated (GPU) or resident (CPU)",
            "mfu": "model FLOPs per second over peak of all ranks",
        },
    }


def layout(config: RunConfig, plan: RunPlan) -> dict[str, Any]:
    """The parallel layout, for the record."""
    return {
        "world_size": plan.world_size,
        **plan.layout.describe(),
        "zero_stage": config.parallel.zero.stage,
        "offload": config.parallel.zero.offload,
        "activation_checkpointing": config.training.activation_checkpointing,
        "compile": config.training.compile,
        "micro_batch_sequences": config.batch.micro_batch_sequences,
    }


def _launch(loop: Loop, start: Start, surroundings: Surroundings) -> dict[str, Any]:
    return {
        "first_step": start.step + 1,
        "layout": layout(loop.config, loop.plan),
        "commit": record.commit(),
        "allocator": surroundings.allocator,
    }


def _report_start(loop: Loop, start: Start) -> None:
    for name in start.cleaned:
        loop.report("removed_unfinished_checkpoint", name=name)
    for name in start.abandoned:
        loop.report("abandoned_checkpoint", name=name)
    if start.checkpoint is None:
        loop.report("started", step=0, dropped_rows=start.dropped_rows)
    elif start.branched and loop.config.run.parent is not None:
        loop.report("branched", step=start.step, parent=loop.config.run.parent.folder)
    else:
        loop.report(
            "resumed",
            step=start.step,
            checkpoint=start.checkpoint.name,
            dropped_rows=start.dropped_rows,
        )


def together(mesh: Mesh, work: Callable[[], T]) -> T:
    """Do ``work`` on every rank; if any rank cannot, all of them raise the first one's error."""
    result: list[T] = []
    failure: str | None = None
    try:
        result.append(work())
    except UserError as error:
        failure = str(error)
    failures = [text for text in mesh.gather_objects(failure) if text is not None]
    if failures:
        raise UserError(failures[0])
    return result[0]


def on_main(mesh: Mesh, work: Callable[[], T]) -> T | None:
    """Do ``work`` on the main rank; its UserError is raised on all ranks."""
    return together(mesh, lambda: work() if mesh.is_main else None)


def shared(mesh: Mesh, work: Callable[[], T]) -> T:
    """Do ``work`` on the main rank and hand its result to all ranks."""
    found = mesh.broadcast_object(on_main(mesh, work))
    assert found is not None
    return found
