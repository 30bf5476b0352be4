"""Callbacks for rows about routers, documents, activation offload and CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from typing_extensions import override

from allometry.configs.model import MoEModel
from allometry.parallel.graphs import MicroBatchGraphs
from allometry.parallel.offload.store import ActivationStore
from allometry.trainer.balance import routing_rows
from allometry.trainer.feed import DocumentPlanner
from allometry.trainer.record.callbacks import Callback, Reporter
from allometry.trainer.record.columns import FinishedStep
from allometry.trainer.record.plans import plan_record, plan_rows
from allometry.trainer.record.writer import Recorder, Row

_log = logging.getLogger(__name__)


class RoutingRows(Callback):
    """Adds ``router/`` to rows and writes expert_load.jsonl."""

    def __init__(self, model: MoEModel, recorder: Recorder) -> None:
        self._model, self._recorder = model, recorder

    @override
    def additions(self, finished: FinishedStep) -> Row:
        routing = finished.outcome.routing
        if routing is None or not finished.recorded:
            return {}
        row, loads = routing_rows(self._model, routing)
        self._recorder.loads(finished.step, loads)
        return row


class PlanRows(Callback):
    """Adds ``hdp/`` to rows and writes plans.jsonl; warns once per launch about idle ranks."""

    def __init__(self, planner: DocumentPlanner, recorder: Recorder, report: Reporter) -> None:
        self._planner, self._recorder, self._report = planner, recorder, report
        self._said_idle = False

    @override
    def additions(self, finished: FinishedStep) -> Row:
        plan = finished.plan
        if plan is None or not finished.recorded:
            return {}
        self._recorder.plan(finished.step, plan_record(plan, self._planner.layout))
        idle = plan.ranks - len({rank for unit in plan.units for rank in unit.ring})
        if idle and not self._said_idle:
            self._said_idle = True
            self._report("idle_ranks", step=finished.step, ranks=idle)
            _log.warning(
                "step %d leaves %d of %d hdp ranks without a document; raise batch.sequences, "
                "lower parallel.context.min_chunk_tokens or use fewer hdp ranks",
                *(finished.step, idle, plan.ranks),
            )
        return plan_rows(plan, self._planner.cost, self._planner.replay(plan))


class OffloadRows(Callback):
    """Adds ``offload/`` to rows: the bytes of activations that a step moved."""

    def __init__(self, stores: Sequence[ActivationStore]) -> None:
        self._stores, self._moved = stores, (0, 0)
        self._rows: dict[int, Row] = {}  # of steps whose numbers are not read yet

    @override
    def after_step(self, step: int) -> None:
        moved = (
            sum(store.bytes_out for store in self._stores),
            sum(store.bytes_in for store in self._stores),
        )
        self._rows[step] = {
            "offload/bytes_out": moved[0] - self._moved[0],
            "offload/bytes_in": moved[1] - self._moved[1],
            "offload/host_bytes": sum(store.pool.held_bytes for store in self._stores),
        }
        self._moved = moved

    @override
    def additions(self, finished: FinishedStep) -> Row:
        row = self._rows.pop(finished.step)
        return row if finished.recorded else {}


class GraphEvents(Callback):
    """Reports once how many CUDA graphs were recorded, or why recording failed."""

    def __init__(self, graphs: MicroBatchGraphs, report: Reporter) -> None:
        self._graphs, self._report = graphs, report
        self._told = False

    @override
    def after_step(self, step: int) -> None:
        failure, recorded = self._graphs.failure, self._graphs.recorded
        if self._told or (failure is None and not recorded):
            return
        self._told = True
        if failure is not None:
            self._report("cuda_graphs_failed", step=step, reason=failure)
        else:
            self._report("cuda_graphs_recorded", step=step, graphs=recorded)
