"""Assemble a run from its config, and train it."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from allometry.configs.errors import UserError
from allometry.configs.model import MoEModel
from allometry.configs.run import RunConfig
from allometry.data.documents import DocumentStream
from allometry.data.processes import end_with_launcher
from allometry.data.run_tokenizer import tokenizer_of_run
from allometry.data.stream import Stream
from allometry.models.build import torch_dtype
from allometry.optim.deepspeed import DeepSpeedOptimizer
from allometry.optim.schedule import Schedule, schedules_of
from allometry.optim.tiered import TieredOptimizer
from allometry.parallel.agree import on_all_ranks, on_main_rank
from allometry.parallel.deepspeed.engine import check_available
from allometry.parallel.graphs import choose_graphs
from allometry.parallel.mesh import Mesh, open_mesh
from allometry.parallel.rendezvous import launched_world_size
from allometry.scaling.count import DocumentFlops
from allometry.scaling.plan import RunPlan
from allometry.scaling.stages import place_at, places_of
from allometry.trainer.assemble import (
    make_model,
    make_optimizer,
    make_train_step,
    with_measured_stages,
)
from allometry.trainer.auto_layout import settled
from allometry.trainer.bad_steps import Judge
from allometry.trainer.checks import Current, checks
from allometry.trainer.collection import GarbageCollection
from allometry.trainer.deterministic import algorithms
from allometry.trainer.evaluate import Evaluation, Evaluator, held_out_of
from allometry.trainer.feed import (
    DocumentPlanner,
    StepInput,
    document_steps,
    sequence_steps,
)
from allometry.trainer.kernels import choose_kernels
from allometry.trainer.loop import Loop, RunResult, state_tensors
from allometry.trainer.record import hardware
from allometry.trainer.record import writer as record
from allometry.trainer.record.callbacks import Callback, Reporter
from allometry.trainer.record.corruption import Response
from allometry.trainer.record.disk import SlowDisk
from allometry.trainer.record.facts import (
    Invocation,
    launch_facts,
    run_facts,
)
from allometry.trainer.record.forecast import Forecaster
from allometry.trainer.record.monitors import Monitors, NoChanges
from allometry.trainer.record.prediction import predictions
from allometry.trainer.record.present import close, present_callbacks
from allometry.trainer.record.repetition import RepetitionWatch
from allometry.trainer.record.rows import GraphEvents, OffloadRows, PlanRows, RoutingRows
from allometry.trainer.record.sample import Sample
from allometry.trainer.record.states import CompressedStates
from allometry.trainer.record.timing import StepTimer, clock_of
from allometry.trainer.restore import restore
from allometry.trainer.said import said_at_start
from allometry.trainer.save import Copier, Saver
from allometry.trainer.save_times import SaveTimes
from allometry.trainer.skips import Skips
from allometry.trainer.sources import check_data, open_sources
from allometry.trainer.state import checkpoint
from allometry.trainer.state.enter import enter
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.initial import Importer
from allometry.trainer.state.interval import Uptime
from allometry.trainer.state.local import LocalCopies
from allometry.trainer.state.planners import State
from allometry.trainer.state.reading import continued
from allometry.trainer.state.resume import Start, begin, next_stage
from allometry.trainer.state.rewinds import go_back, not_new
from allometry.trainer.state.room import checkpoint_bytes
from allometry.trainer.step import TrainStep
from allometry.trainer.stop import StopSignals
from allometry.trainer.upload import Uploads
from allometry.trainer.watch.stragglers import RankTimes
from allometry.trainer.watch.watchdog import Watchdog


def train(
    config: RunConfig,
    *,
    device: torch.device | None = None,
    callbacks: Sequence[Callback] | None = None,
    invocation: Invocation | None = None,
    stop_at_step: int | None = None,
    signals: StopSignals | None = None,
    importer: Importer | None = None,
) -> RunResult:
    """Train the run that ``config`` describes, from the newest state in its folder.

    Every rank of a torchrun calls this. ``device`` defaults to this rank's GPU, or the CPU without
    a GPU; ``callbacks`` (on the main rank) to the callbacks of ``config.record``. ``stop_at_step``
    ends this launch after that step with a checkpoint, as a signal would; ``signals`` are already
    being watched. ``importer`` reads ``run.initial.hf``
    (``interop.huggingface.model.import_model``). Raises UserError on all ranks. For example,
    ``train(load("run.yaml"), stop_at_step=10)`` trains ten steps of a new run.
    """
    end_with_launcher()
    # A layout error is raised before any process group is created.
    config, invocation = settled(config, device, invocation)
    plans = RunPlan.of_stages(config, launched_world_size())
    places = places_of(config)
    watched = nullcontext(signals) if signals else StopSignals()
    exact = algorithms(deterministic=config.training.deterministic)
    watch = Watchdog(config.parallel, RunFolder(config.run.folder))
    with watched as signals, exact, watch, open_mesh(config.parallel, device, watched=True) as mesh:
        watch.attach(mesh)
        if mesh.restart is not None:  # restarted ranks continue their own run
            config = not_new(config)
        for place in places:  # errors are raised before the folder is changed
            choose_graphs(place.config, mesh)
        on_all_ranks(mesh, lambda: check_available(config), "looking for DeepSpeed")
        plans = with_measured_stages(config, plans, mesh)
        rest = plans, mesh, watch, invocation, stop_at_step, signals, callbacks, importer
        while (result := _launch(config, *rest)).go_back:
            config = not_new(config)
            gc.collect()
        return result


def _launch(
    config: RunConfig,
    plans: tuple[RunPlan, ...],
    mesh: Mesh,
    watch: Watchdog,
    invocation: Invocation,
    stop_at_step: int | None,
    signals: StopSignals,
    callbacks: Sequence[Callback] | None,
    importer: Importer | None,
) -> RunResult:
    """Train from the state in the folder to the end, a stop, or a rewind."""
    places, schedules = places_of(config), schedules_of(config)
    stream = on_all_ranks(mesh, lambda: open_sources(config), "opening the data")
    folder = RunFolder(config.run.folder)
    local = LocalCopies.of(config, plans[0], mesh)
    present = present_callbacks(callbacks, config, folder, mesh)
    check = partial(check_data, config, plans)
    start = begin(folder, config, stream, mesh, stop_at_step, check, importer, local)
    stream = continued(stream, start.facts)
    recorder = None
    try:
        while True:
            at = place_at(places, start.step).number - 1
            run = _Run(
                *(places[at].config, plans[at], schedules[at], mesh, stream.in_stage(at)),
                *(folder, start, present, config, watch, local),
            )
            if not start.next_stage:  # the checkpoint is loaded, so the folder may change
                run.start = start = enter(folder, config, start, mesh)
                open_recorder = partial(record.Recorder, folder)
                recorder = on_main_rank(mesh, open_recorder, "opening the record")
            result = run.train(recorder, invocation, stop_at_step, signals)
            if result.go_back:
                go_back(folder, local, run.config, run.plan.batch, result.go_back, mesh, run.report)
                break
            if result.stopped_by is not None or result.step == places[-1].last_step:
                break
            del run  # a stage is built anew from the last checkpoint of the stage before
            gc.collect()
            start = next_stage(folder, start, result.step, mesh)
    finally:
        lost = close(recorder, present)
        folder.withdraw()
    if lost is not None:
        raise UserError(f"{lost}; {folder.read_latest()} is whole")
    return result


@dataclass
class _Run:
    """A training stage of a launch with its components, each built once from earlier fields."""

    config: RunConfig
    plan: RunPlan
    schedule: Schedule
    mesh: Mesh
    stream: Stream | DocumentStream
    folder: RunFolder
    start: Start
    present: Sequence[Callback]  # callbacks of the launch; callbacks of a stage are created anew
    whole: RunConfig  # the config of all training stages; ``config`` is that of this stage
    watch: Watchdog
    local: LocalCopies | None

    def __post_init__(self) -> None:
        config, plan, mesh = self.config, self.plan, self.mesh
        self.callbacks = list(self.present)
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
        self.progress, self.converted = restore(
            config, plan, self.start, self.parallel, self.optimizer, mesh
        )
        self.judge = Judge.of(config.training, mesh.device, self._earlier())
        self.peak = hardware.peak(mesh.device, torch_dtype(config.training.compute_dtype))

    def train(
        self,
        recorder: record.Recorder | None,
        invocation: Invocation,
        stop_at_step: int | None,
        signals: StopSignals,
    ) -> RunResult:
        """Train to the plan's end or a stop; ``recorder`` is None except on the main rank."""
        self.recorder, self.report = recorder, Reporter(recorder, self.callbacks)
        self.callbacks.insert(0, GarbageCollection(self.start.step))
        # Callbacks that request a row of a step come before callbacks that only extend a row.
        self.callbacks[:0] = [*self._monitors(), self._evaluation(), *self._rows()]
        train_step = make_train_step(
            *(self.config, self.plan, self.parallel, self.optimizer, self.schedule),
            *(self.mesh, self.judge),
        )
        current = Current()
        saver: Saver  # the checks read its next checkpoint step
        found, response = checks(
            *(self.config, self.parallel, self.optimizer, train_step, current),
            *(self.mesh, self.timer, self.report, lambda step: saver.times.checkpoint_due(step)),
            first=not self.start.next_stage,
        )
        saver = self._saver(response)
        uploads = Uploads.of(self.config.checkpoint, self.folder, self.mesh, self.report)
        self.callbacks += [*found, saver, *uploads]
        loop = self._loop(train_step, signals, saver)
        for name in self.start.cleaned:
            self.report("removed_unfinished_checkpoint", name=name)
        for name in self.start.abandoned:
            self.report("abandoned_checkpoint", name=name)
        # Writing files may be slow, and opening a tracking service needs the network.
        on_main_rank(self.mesh, lambda: self._begin_record(invocation), "opening the record")
        said = said_at_start(
            *(self.config, self.whole, self.plan, self.start, self.stream, self.mesh),
            *(self.optimizer, self.kernel_changes, self.converted, invocation.layout_choice),
        )
        for kind, facts in said:
            self.report(kind, **facts)
        try:
            with closing(self._batches()) as batches:
                return loop.run(current.passing(batches), stop_at_step)
        finally:
            self.parallel.sync.leave()

    def _begin_record(self, invocation: Invocation) -> None:
        try:
            self._open_record(invocation)
        except OSError as error:
            raise checkpoint.unwritable(self.folder, error) from None

    def _earlier(self) -> dict[str, Any] | None:
        """Return the facts from which bad steps are judged; None if a training stage begins."""
        stage = self.plan.stage
        anew = stage is not None and self.start.step == stage.steps_before
        return None if anew or self.start.weights_only else self.start.facts

    def _open_record(self, invocation: Invocation) -> None:
        first_step = self.start.step + 1
        facts = run_facts(
            *(self.config, self.plan, self.stream, self.mesh, self.peak, invocation),
            self.kernels.describe(),
        )
        if first_step <= self.plan.run.steps:
            tokenizer = tokenizer_of_run(self.folder.path, self.config.data)
            tokenizer.keep(self.folder.path)
            facts["tokenizer"] = tokenizer.describe()
            facts |= self._origin() | self.start.identity.describe()
            record.write_run(self.folder, facts, launch_facts(facts, first_step))
        for callback in self.callbacks:
            if not self.start.next_stage or callback not in self.present:
                callback.on_start(facts, first_step)

    def _origin(self) -> dict[str, Any]:
        """Return the imported origin of a new run's weights, or that of the parent of a branch."""
        parent = self.config.run.parent
        if self.start.branched and parent is not None:
            return RunFolder(parent.folder).origin()
        known = self.start.facts if self.start.weights_only else None
        return {key: value for key, value in (known or {}).items() if key == "origin"}

    def _loop(self, train_step: TrainStep, signals: StopSignals, saver: Saver) -> Loop:
        return Loop(
            plan=self.plan,
            mesh=self.mesh,
            train_step=train_step,
            skips=Skips.of(
                *(self.config, self.progress.skipped, self.report, self.folder, self.mesh)
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
            save_times=saver.times,
        )

    def _monitors(self) -> Iterator[Callback]:
        config, wanted = self.config, self.config.record.monitors
        if wanted.every_steps is None and wanted.singular_values_every_steps is None:
            return
        if isinstance(self.optimizer, DeepSpeedOptimizer):
            self.report("monitors_limited", step=self.start.step, **NoChanges.LIMITED)
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
        every, replay = self.config.evaluation.every_steps, self.config.data.replay
        held_out = held_out_of(self.config, self.stream, self.planner, self.mesh)
        return Evaluation(
            Evaluator(held_out, self.parallel, self.mesh),
            *(every, self.plan.total_steps, self.timer, self.report),
            replayed=replay.sources if replay else (),
            before=self.progress.held_out_before,
        )

    def _rows(self) -> Iterator[Callback]:
        yield RankTimes(self.watch.stragglers, self.watch.steps, self.report)
        yield from predictions(self.config, self.plan.layout, self.mesh, self.report)
        if self.recorder is None:
            return
        yield RepetitionWatch(self.folder, self.report)
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
        if (every := self.config.record.forecast.every_steps) is not None:
            yield Forecaster(every, self.whole, self.start.step, self.folder, self.report)

    def _saver(self, response: Response) -> Saver:
        writer = checkpoint.Checkpointer(
            *(self.folder, self.config.checkpoint, self.mesh, self.report),
            checkpoint_bytes(self.config),
            self.start.identity.run,
        )

        def state() -> tuple[State, dict[str, Any]]:
            facts = self.progress.facts(self.plan, self.stream, self.config.run.seed)
            facts |= {} if self.judge is None else self.judge.facts()
            return state_tensors(self.parallel, self.optimizer), facts

        copier = Copier.of(self.local, writer, self.folder, self.start, self.report)
        uptime = Uptime.of(self.folder)
        times = SaveTimes(self.config.checkpoint, self.mesh, lambda: writer.busy, uptime)
        return Saver(writer, self.progress, state, self.timer, self.mesh, times, copier, response)

    def _batches(self) -> Iterator[StepInput]:
        """Yield this rank's micro-batches for each step."""
        if isinstance(self.stream, DocumentStream):
            assert self.planner is not None
            return document_steps(self.stream, self.plan, self.planner, self.mesh, self.start.step)
        return sequence_steps(self.stream, self.plan, self.mesh, self.start.step)
