"""The planner's cost of documents equals the time of their own plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from allometry.configs.execution import ContextConfig
from allometry.configs.loader import load
from allometry.parallel.hdp.replay import replay
from allometry.scaling.hdp.check import PlanError
from allometry.scaling.hdp.cost import CostModel
from allometry.scaling.hdp.plan import Mode, Plan, Unit, make_plan
from allometry.scaling.hdp.stretch import document_columns, makespan, mean_columns

MODEL = load("preset:dense_25m", []).model
COST = CostModel.of(MODEL, ContextConfig().costs)


def planned(seed: int, mode: Mode, ranks: int = 6) -> Plan:
    lengths = np.minimum(np.random.default_rng(seed).lognormal(6, 1.2, 80), 20000).astype(int) + 1
    context = ContextConfig(capacity_tokens=4096)
    return make_plan(lengths.tolist(), ranks, context, COST, mode, layers=MODEL.num_layers)


@pytest.mark.parametrize("mode", ["free", "aligned", "lockstep"])
@pytest.mark.parametrize("seed", range(4))
def test_the_makespan_is_the_plans(seed: int, mode: Mode) -> None:
    plan = planned(seed, mode)
    assert any(len(unit.ring) > 1 for unit in plan.units)
    assert makespan(plan) == pytest.approx(replay(plan).makespan, rel=1e-12)


def test_a_plan_that_never_ends_is_refused() -> None:
    ring = (0, 1)
    units = (Unit((0,), ring, 1.0), Unit((1,), ring, 1.0))
    plan = Plan([8, 8], 2, "free", units, ((0, 1), (1, 0)), capacity=8)
    with pytest.raises(PlanError, match="wait for each other"):
        makespan(plan)


def test_equal_documents_on_equal_ranks_stretch_nothing() -> None:
    lengths = [512] * 24
    context = ContextConfig(capacity_tokens=512)
    free = replace(COST, micro_batch_s=0.0)
    plan = make_plan(lengths, 4, context, free, "free", layers=MODEL.num_layers)
    found = document_columns(plan, free)
    assert found == {"attended": 512, "document_stretch": pytest.approx(1, rel=1e-9)}
    # The cost model's seconds for even work, times the stretch, equal the plan's makespan.
    uneven = planned(0, "lockstep")
    lengths_n = np.array(uneven.lengths, dtype=float)
    even = COST.compute(lengths_n.sum(), (lengths_n * (lengths_n + 1)).sum()) / uneven.ranks
    columns = document_columns(uneven, COST)
    assert float(even) * columns["document_stretch"] == pytest.approx(replay(uneven).makespan)
    assert columns["document_stretch"] > 1
    assert mean_columns([found, columns])["attended"] == (512 + columns["attended"]) / 2
