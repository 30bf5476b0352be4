"""Number of small messages in a step: a rank's measurements are sent together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

import tiny
from allometry.optim.schedule import resolve_schedule
from allometry.parallel.simulate import Collective, CollectiveLog
from allometry.scaling.plan import RunPlan
from allometry.studies.certificate import step as certificate
from allometry.trainer.assemble import make_optimizer, make_train_step
from allometry.trainer.stop import StopRequest, StopSignals
from test_dist_layouts import DENSE, MOE, run

RunRanks = Callable[..., list[Any]]

OF_THE_STEP = ("float64", "int32")
"""Dtypes of counts and measurements; gradients and activations of these runs are float32."""


def step_messages(model: dict[str, Any], layout: dict[str, Any]) -> list[Collective]:
    """Return the messages of one trainer step that carry counts or measurements."""
    config = run(model, "fp32", **layout)
    with tiny.mesh(config) as mesh:
        plan = RunPlan.of(config, mesh.world_size)
        parallel = certificate.make_parallel(config, mesh)
        optimizer = make_optimizer(config, plan, parallel, mesh)
        schedule = resolve_schedule(config, plan.batch)
        take = make_train_step(config, plan, parallel, optimizer, schedule, mesh)
        count = plan.micro_batches(1)
        batches = tiny.device_batches(count * mesh.hdp.size)[mesh.hdp.rank :: mesh.hdp.size]
        take(1, batches)  # ranks of a pipeline synchronize
        with StopRequest(mesh, StopSignals()) as stop, CollectiveLog(mesh) as log:
            outcome = take(2, batches)
            stop.agreed()
        assert float(outcome.tokens) == count * mesh.hdp.size * tiny.LENGTH
        return [call for call in log.calls if call.dtype in OF_THE_STEP]


@pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize(
    "layout",
    [{"tp": 2}, {"pp": 2}, {"hdp": 2}, {"hdp": 2, "tp": 2, "zero": {"stage": 2}}],
    ids=["tp2", "pp2", "hdp2", "hdp2-tp2-zero2"],
)
def test_a_step_sends_at_most_three_small_messages(
    run_ranks: RunRanks, model: dict[str, Any], layout: dict[str, Any]
) -> None:
    world_size = math.prod(layout.get(axis, 1) for axis in ("pp", "hdp", "tp"))
    for calls in run_ranks(step_messages, world_size, model, layout):
        assert len(calls) <= 3, calls
        assert {call.kind for call in calls} == {"all-reduce"}
