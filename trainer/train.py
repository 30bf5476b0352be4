"""Putting a run together from its description, and training it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from allometry.configs.errors import UserError
from allometry.configs.model import MoEModel
from allometry.configs.run import RunConfig
from allometry.data.documents import DocumentStream
from allometry.data.run_tokenizer import tokenizer_of_run
from allometry.data.sources import Sources
from allometry.data.stream import Stream, open_stream
from allometry.data.tokenizer import check_vocabulary
from allometry.laws.areas import LearningRateAreas
from allometry.models.build import torch_dtype
from allometry.optim.build import init_states, settle
from allometry.optim.deepspeed import DeepSpeedOptimizer
from allometry.optim.schedule import Schedule, resolve_schedule
from allometry.optim.tiered import TieredOptimizer
from allometry.parallel.agree import on_all_ranks, on_main_rank
from allometry.parallel.deepspeed.engine import check_available
from allometry.parallel.graphs import choose_graphs
from allometry.parallel.mesh import Mesh, launched_world_size, open_mesh
from allometry.scaling.advice import NODE_RANKS, advice
from allometry.scaling.count import DocumentFlops
from allometry.scaling.plan import RunPlan
from allometry.trainer.assemble import (
    make_model,
    make_optimizer,
    make_train_step,
    with_measured_stages,
)
from allometry.trainer.auto_layout import settled
from allometry.trainer.collection import GarbageCollection
from allometry.trainer.deterministic import algorithms
from allometry.trainer.evaluate import (
    Evaluation,
    Evaluator,
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
from allometry.trainer.kernels import choose_kernels
from allometry.trainer.loop import Loop, Progress, RunResult, state_tensors
from allometry.trainer.record import hardware
from allometry.trainer.record import writer as record
from allometry.trainer.record.callbacks import Callback, Reporter, standard_callbacks
from allometry.trainer.record.disk import SlowDisk
from allometry.trainer.record.facts import Invocation, launch_facts, run_facts
from allometry.trainer.record.forecast import Forecaster
from allometry.trainer.record.monitors import Monitors
from allometry.trainer.record.rows import GraphEvents, OffloadRows, PlanRows, RoutingRows
from allometry.trainer.record.sample import Sample
from allometry.trainer.record.states import CompressedStates
from allometry.trainer.record.timing import StepTimer, clock_of
from allometry.trainer.save import Saver
from allometry.trainer.state import checkpoint
from allometry.trainer.state.finite import check_finite
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.planners import State
from allometry.trainer.state.reading import continued, data_events, read_again
from allometry.trainer.state.resume import Start, begin
from allometry.trainer.state.room import checkpoint_bytes
from allometry.trainer.state.states import load
from allometry.trainer.stop import StopSignals

MANY_EPOCHS = 4
_log = logging.getLogger(__name__)


def train(
    config: RunConfig,
    *,
    device: torch.device | None = None,
    callbacks: Sequence[Callback] | None = None,
    invocation: Invocation | None = None,
    stop_at_step: int | None = None,
    signals: StopSignals | None = None,
) -> RunResult:
    """Train the run that ``config`` describes, from where its folder says it is.

    Every rank of a torchrun calls this. ``device`` defaults to this rank's GPU, or the CPU without
    one; ``callbacks`` (on the main rank) to what ``config.record`` asks for. ``stop_at_step`` ends
    this launch there, with a checkpoint, as a signal would; ``signals``: watched since before.
    Raises UserError on all ranks alike.
    """
    # What a layout cannot do is said before any group starts.
    config, invocation = settled(config, device, invocation)
    plan = RunPlan.of(config, launched_world_size())
    watched = nullcontext(signals) if signals else StopSignals()
    exact = algorithms(deterministic=config.training.deterministic)
    with watched as signals, exact, open_mesh(config.parallel, device) as mesh:
        choose_graphs(config, mesh)  # what cannot be is said before the folder is touched
        on_all_ranks(mesh, lambda: check_available(config), "looking for DeepSpeed")
        plan = with_measured_stages(config, plan, mesh)
        schedule = resolve_schedule(config, plan.batch)
        stream = on_all_ranks(mesh, lambda: _open_stream(config), "opening the data")
        folder = RunFolder(config.run.folder)
        if callbacks is None:
            callbacks = on_main_rank(
                mesh, lambda: standard_callbacks(config.record, folder), "making callbacks"
            )
        start = begin(
            folder, config, stream, mesh, stop_at_step, lambda found: _check_data(found, plan)
        )
        stream = continued(stream, start.facts)
        present = list(callbacks or ()) if mesh.is_main else []
        recorder = record.Recorder(folder) if mesh.is_main else None
        try:
            run = _Run(config, plan, schedule, mesh, stream, folder, start, recorder, present)
            result = run.train(invocation, stop_at_step, signals)
        finally:
            lost = _close(recorder, present)
            folder.withdraw()
        if lost is not None:
            raise UserError(f"{lost}; the last checkpoint is whole")
        return result


def _close(recorder: record.Recorder | None, callbacks: Sequence[Callback]) -> str | None:
    """End what the main rank writes; what of the record could not be written."""
    if recorder is None:
        return None
    try:
        for callback in callbacks:
            callback.on_end()
    finally:
        lost = recorder.close()
    return lost


@dataclass
class _Run:
    """A launch and what it is made of: each part once, from those above it."""

    config: RunConfig
    plan: RunPlan
    schedule: Schedule
    mesh: Mesh
    stream: Stream | DocumentStream
    folder: RunFolder
    start: Start
    recorder: record.Recorder | None
    callbacks: list[Callback]

    def __post_init__(self) -> None:
        config, plan, mesh = self.config, self.plan, self.mesh
        self.report = Reporter(self.recorder, self.callbacks)
        self.timer = StepTimer(clock_of(mesh.device))
        documents = isinstance(self.stream, DocumentStream)
        self.planner = DocumentPlanner(config, plan.layout) if documents else None
        self.kernels, self.kernel_changes = choose_kernels(
            config, plan, self.stream, self.folder, self.start, mesh
        )
        self.parallel = make_model(config, plan, mesh, self.kernels)
        self.optimizer = on_all_ranks(
            mesh,
            lambda: make_optimizer(config, plan, self.parallel, mesh, self.kernels),
            "making the optimizer",
        )
        self.converted: dict[str, int] = {}
        self.progress = self._restore()
        if isinstance(self.optimizer, TieredOptimizer | DeepSpeedOptimizer):
            init_states(self.optimizer)  # what finds no room is found before the first step
        self.peak = hardware.peak(mesh.device, torch_dtype(config.training.compute_dtype))

    def _restore(self) -> Progress:
        """Load what the launch begins with; return how far that is."""
        start, areas = self.start, LearningRateAreas(self.plan.warmup_steps)
        progress = Progress(start.step, areas, saved_step=start.step or None)
        if start.checkpoint is None or start.facts is None:
            return progress
        names = {parameter: name for name, parameter in self.parallel.named_parameters()}
        if start.weights_only:  # converted from elsewhere: training itself begins afresh
            state: State = {f"model.{name}": p.detach() for p, name in names.items()}
            if start.facts.get("optimizer", False):
                init_states(self.optimizer)
            state |= checkpoint.optimizer_state(self.optimizer, names)
        else:
            init_states(self.optimizer)
            state = state_tensors(self.parallel, self.optimizer)
            areas.load_state_dict(start.facts["areas"])
            progress.flops = start.facts["flops"]
            progress.held_out_before.update(start.facts.get("held_out_before", {}))
        self.converted = load(start.checkpoint, state, names, self.mesh)
        settle(self.optimizer)
        check_finite(start.checkpoint, state, self.mesh)
        return progress

    def train(
        self, invocation: Invocation, stop_at_step: int | None, signals: StopSignals
    ) -> RunResult:
        """Train to the end of the plan or to a stop."""
        self.callbacks.insert(0, GarbageCollection(self.start.step))
        # Those that ask for a row of a step come before those that only add to one.
        self.callbacks[:0] = [*self._monitors(), self._evaluation(), *self._rows()]
        self.callbacks.append(self._saver())
        loop = self._loop(signals)
        for name in self.start.cleaned:
            self.report("removed_unfinished_checkpoint", name=name)
        for name in self.start.abandoned:
            self.report("abandoned_checkpoint", name=name)
        # Files may be slow, and a service's page is opened over the network.
        on_main_rank(self.mesh, lambda: self._open_record(invocation), "opening the record")
        if invocation.layout_choice is not None:
            self.report("layout_chosen", step=self.start.step, **invocation.layout_choice)
        self._report_start()
        try:
            with closing(self._batches()) as batches:
                return loop.run(batches, stop_at_step)
        finally:
            self.parallel.sync.leave()

    def _open_record(self, invocation: Invocation) -> None:
        first_step = self.start.step + 1
        facts = run_facts(
            *(self.config, self.plan, self.stream, self.mesh, self.peak, invocation),
            self.kernels.describe(),
        )
        if first_step <= self.plan.total_steps:
            tokenizer = tokenizer_of_run(self.folder.path, self.config.data)
            tokenizer.keep(self.folder.path)
            facts["tokenizer"] = tokenizer.describe()
            facts |= self._origin()
            record.write_run(self.folder, facts, launch_facts(facts, first_step))
        for callback in self.callbacks:
            callback.on_start(facts, first_step)

    def _origin(self) -> dict[str, Any]:
        """Where the first weights of a new run, or of the one it branches from, were imported."""
        parent = self.config.run.parent
        if self.start.branched and parent is not None:
            return RunFolder(parent.folder).origin()
        known = self.start.facts if self.start.weights_only else None
        return {key: value for key, value in (known or {}).items() if key == "origin"}

    def _loop(self, signals: StopSignals) -> Loop:
        return Loop(
            plan=self.plan,
            mesh=self.mesh,
            train_step=make_train_step(
                self.config, self.plan, self.parallel, self.optimizer, self.schedule, self.mesh
            ),
            stream=self.stream,
            progress=self.progress,
            timer=self.timer,
            callbacks=self.callbacks,
            report=self.report,
            signals=signals,
            recorder=self.recorder,
            record_every_steps=self.config.record.every_steps,
            document_flops=DocumentFlops.of(self.config.model),
            peak_flops_per_s=self.peak.flops_per_s * self.mesh.world_size,
        )

    def _monitors(self) -> Iterator[Callback]:
        config, wanted = self.config, self.config.record.monitors
        if wanted.every_steps is None and wanted.singular_values_every_steps is None:
            return
        if isinstance(self.optimizer, DeepSpeedOptimizer):
            self.report("monitors_limited", step=self.start.step, to="activations and outputs")
        longest = config.parallel.context.capacity_tokens
        yield Monitors(
            wanted,
            self.parallel,
            self.optimizer,
            Sample(self.stream, wanted.sequences, longest, self.mesh),
            self.plan.batch,
            self.mesh,
            self.report,
            num_layers=config.model.num_layers,
            clip_grad_norm=config.training.clip_grad_norm,
        )
        fp8 = self.optimizer.param_groups[0].get("fp8")
        if fp8 is not None:
            yield CompressedStates(wanted, self.optimizer, fp8, self.mesh, self.report)

    def _evaluation(self) -> Evaluation:
        evaluation, mesh = self.config.evaluation, self.mesh
        count = evaluation.sequences_per_source
        if isinstance(self.stream, DocumentStream):
            assert self.planner is not None
            pieces = self.stream.validation_pieces(count)
            held_out = held_out_documents(pieces, self.planner, mesh)
        else:
            at_once = self.config.batch.micro_batch_sequences
            held_out = held_out_sequences(self.stream.validation(count, at_once), mesh)
        evaluator = Evaluator(held_out, self.parallel, mesh)
        replay = self.config.data.replay
        return Evaluation(
            *(evaluator, evaluation.every_steps, self.plan.total_steps, self.timer, self.report),
            replayed=replay.sources if replay else (),
            before=self.progress.held_out_before,
        )

    def _rows(self) -> Iterator[Callback]:
        if self.recorder is None:
            return
        if isinstance(self.config.model, MoEModel):
            yield RoutingRows(self.config.model, self.recorder)
        if isinstance(self.optimizer, TieredOptimizer) and self.optimizer.folder is not None:
            yield SlowDisk(self.optimizer, self.report)
        if self.parallel.graphs is not None:
            yield GraphEvents(self.parallel.graphs, self.report)
        if self.parallel.stores:
            yield OffloadRows(self.parallel.stores)
        if self.planner is not None:
            yield PlanRows(self.planner, self.recorder, self.report)
        every = self.config.record.forecast.every_steps
        if every is not None:
            peak_lr = self.config.optimizer.lr
            yield Forecaster(every, self.schedule, peak_lr, self.folder, self.report)

    def _saver(self) -> Saver:
        writer = checkpoint.Checkpointer(
            *(self.folder, self.config.checkpoint, self.mesh, self.report),
            checkpoint_bytes(self.config),
        )

        def state() -> tuple[State, dict[str, Any]]:
            facts = self.progress.facts(self.plan, self.stream, self.config.run.seed)
            return state_tensors(self.parallel, self.optimizer), facts

        return Saver(writer, self.progress, state, self.timer, self.mesh)

    def _batches(self) -> Iterator[StepInput]:
        """This rank's micro-batches, step by step."""
        if isinstance(self.stream, DocumentStream):
            assert self.planner is not None
            return document_steps(self.stream, self.plan, self.planner, self.mesh, self.start.step)
        return sequence_steps(self.stream, self.plan, self.mesh, self.start.step)

    def _report_start(self) -> None:
        start, report = self.start, self.report
        parent = self.config.run.parent
        if self.mesh.device.type == "cuda":  # estimates are of one
            here = os.environ.get("LOCAL_WORLD_SIZE", "")
            node_ranks = int(here) if here.isdecimal() else NODE_RANKS
            for rule, text in advice(self.config, self.plan, node_ranks).items():
                report("advice", rule=rule, text=text)
        again = read_again(start.facts, self.stream)
        if again:
            report("same_documents", sources=again, seed=self.config.run.seed)
        if start.checkpoint is None:
            report("started", step=0, dropped_rows=start.dropped_rows)
        elif start.branched and parent is not None:
            report("branched", step=start.step, parent=parent.folder)
        else:
            name, dropped = start.checkpoint.name, start.dropped_rows
            report("resumed", step=start.step, checkpoint=name, dropped_rows=dropped)
        if isinstance(self.optimizer, TieredOptimizer | DeepSpeedOptimizer):
            held = {f"{tier}_bytes": size for tier, size in self.optimizer.held_bytes().items()}
            place = self.optimizer.place()
            masters = self.optimizer.parameters_bytes
            report("optimizer_states", step=start.step, **held, parameters_bytes=masters, **place)
            if "note" in place:
                report("states_disk", **place)
        for kind, facts in data_events(start.facts, self.stream):
            report(kind, step=start.step, **facts)
        for change in self.kernel_changes:
            report("kernels_changed", step=start.step, **change)
        for change, states in self.converted.items():
            report("states_converted", step=start.step, change=change, states=states)


def _open_stream(config: RunConfig) -> Stream | DocumentStream:
    """The data, after checking that tokenizer and vocabulary fit it."""
    stream = open_stream(config.data, config.run.seed)
    check_vocabulary(config.model.vocab_size, stream.stores)
    return stream


def _check_data(stream: Sources, plan: RunPlan) -> None:
    """Check that the data are enough for the run as it goes on with them."""
    if isinstance(stream, DocumentStream):
        check_steps(stream, plan)
    sequences = plan.batch.sequences_before(plan.total_steps + 1)
    stream.check_run(sequences)
    for name, epochs in stream.epochs(sequences).items():
        if epochs > MANY_EPOCHS:
            _log.warning(
                "source %s will be read %.1f times; past about %d the repetition costs (arXiv "
                "2305.16264): add data, lower its weight or shorten the run",
                *(name, epochs, MANY_EPOCHS),
            )
