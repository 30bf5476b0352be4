import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.configs.execution import ContextConfig, ContextCosts
from allometry.configs.loader import load
from allometry.configs.run import RunConfig
from allometry.data.synthetic import write_store
from allometry.parallel.hdp.replay import replay
from allometry.scaling.degrees import Degrees
from allometry.scaling.hdp.check import PlanError
from allometry.scaling.hdp.cost import CostModel
from allometry.scaling.hdp.plan import Mode, Plan, Unit, make_plan
from allometry.scaling.layout import Layout
from allometry.trainer.record.plans import plan_of, plan_record, plan_rows
from allometry.trainer.record.writer import Recorder
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.train import train

LAYOUT = Layout(Degrees(pp=1, hdp=4, tp=1, ep=1, replicas=1), "1f1b", (range(8),))
COST = CostModel.of(load("preset:dense_25m").model, ContextCosts())
LENGTHS = [7, 300, 2, 41, 40, 40, 9, 1, 250, 12]
PLAN = Plan(
    lengths=LENGTHS,
    ranks=4,
    mode="lockstep",
    units=(
        Unit((1,), (0, 2, 3), cost=0.5),
        Unit((8, 0), (1,), cost=0.7, offload=0.25),
        Unit((2, 3, 4, 5), (0,), cost=0.2),
        Unit((6, 9, 7), (2,), cost=1 / 3),
    ),
    orders=((0, 2), (1, None), (0, 3), (0, None)),
    capacity=260,
)


def planned(mode: Mode, policy: str = "balanced", documents: int = 60) -> Plan:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.pareto(1.1, documents) * 400 + 20, 8192).astype(int).tolist()
    context = ContextConfig.model_validate({"capacity_tokens": 4096, "policy": policy})
    return make_plan(lengths, 4, context, COST, mode, layers=8)


def test_a_record_says_who_did_what() -> None:
    record = json.loads(json.dumps(plan_record(PLAN, LAYOUT)))
    assert record == {
        "mode": "lockstep",
        "ranks": 4,
        "capacity": 260,
        "pp": 1,
        "schedule": None,
        "stages": 1,
        "units": [
            [1, 300, 300, [0, 2, 3], 0.5, 0.0],
            [2, 257, 250, [1], 0.7, 0.25],
            [4, 123, 41, [0], 0.2, 0.0],
            [3, 22, 12, [2], 0.333333, 0.0],
        ],
        "orders": [[0, 2], [1, None], [0, 3], [0, None]],
    }


def test_a_record_holds_the_pipeline() -> None:
    degrees = Degrees(pp=2, hdp=2, tp=1, ep=1, replicas=1)
    stages = tuple(range(2 * k, 2 * k + 2) for k in range(4))
    record = plan_record(PLAN, Layout(degrees, "interleaved_1f1b", stages))
    assert (record["pp"], record["stages"], record["schedule"]) == (2, 4, "interleaved_1f1b")


@pytest.mark.parametrize("plan", [PLAN, planned("free"), planned("lockstep")])
def test_a_plan_comes_back_from_its_record(plan: Plan) -> None:
    found = plan_of(json.loads(json.dumps(plan_record(plan, LAYOUT))))
    assert (found.ranks, found.mode, found.orders) == (plan.ranks, plan.mode, plan.orders)
    assert sorted(d for unit in found.units for d in unit.documents) == [*range(len(plan.lengths))]
    for was, now in zip(plan.units, found.units, strict=True):
        assert (now.ring, now.offload) == (was.ring, was.offload)
        assert now.cost == pytest.approx(was.cost, rel=1e-5)
        before, after = (
            [one.lengths[d] for d in unit.documents] for one, unit in ((plan, was), (found, now))
        )
        assert len(after) == len(before)
        assert sum(after) == sum(before)
        assert max(after) == max(before)
    assert replay(found).makespan == pytest.approx(replay(plan).makespan, rel=1e-5)


def test_a_record_that_was_tampered_with_does_not_replay() -> None:
    record = plan_record(PLAN, LAYOUT)
    record["orders"][0] = record["orders"][0][::-1]
    with pytest.raises(PlanError):
        replay(plan_of(record))


def test_rows_of_metrics() -> None:
    row = plan_rows(PLAN, COST, replay(PLAN))
    sent = sum(COST.ring_bytes(300, 3))
    busy = [0.7, 0.7, 0.5 + 1 / 3, 0.5]
    assert row == {
        "hdp/micro_batches": 8,
        "hdp/waves": 2,
        "hdp/dummies": 2,
        "hdp/balance": pytest.approx(max(busy) / np.mean(busy)),
        "hdp/bytes_sent": round(sent),
        "hdp/offloaded": pytest.approx(0.25 * 257 / sum(LENGTHS)),
        "hdp/degree/1": 9,
        "hdp/degree/3": 1,
    }
    assert all(isinstance(value, int | float) for value in row.values())


def test_plans_are_recorded_and_forgotten_as_rows_are(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    recorder = Recorder(folder)
    assert not folder.plans.exists()  # only some runs make plans
    for step in (2, 4, 6):
        recorder.plan(step, plan_record(PLAN, LAYOUT))
        recorder.row({"step": step})
    recorder.close()
    rows = [json.loads(line) for line in folder.plans.read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert plan_of(rows[1]).orders == PLAN.orders
    assert folder.forget_after(4) == 1
    assert [json.loads(line)["step"] for line in folder.plans.read_text().splitlines()] == [2, 4]


def test_a_step_that_begins_no_document_is_one_sentence(
    tiny: Callable[..., RunConfig], tmp_path: Path
) -> None:
    # Nearly all windows contain only documents of one token.
    write_store(tmp_path / "ones", [[1, 2], *[[3]] * 500])
    config = tiny(
        "data.kind=documents",
        "data.max_document_tokens=9",
        "data.sequence_length=9",
        f"data.sources=[{{name: ones, train: {tmp_path}/ones}}]",
        "batch.micro_batch_sequences=1",
        "batch.sequences=2",
    )
    with pytest.raises(UserError, match="no document of two tokens or more begins in step"):
        train(config)
    assert not RunFolder(config.run.folder).metrics.exists()  # found before the first step


def test_a_step_within_long_documents_of_all_sources_is_found_first(
    tiny: Callable[..., RunConfig], tmp_path: Path
) -> None:
    # Every second step has two windows, one per source, each within one document.
    for name in "ab":
        write_store(tmp_path / name, [[1] * 8] * 20)
    config = tiny(
        "data.kind=documents",
        "data.max_document_tokens=8",
        "data.sequence_length=4",
        f"data.sources=[{{name: a, train: {tmp_path}/a}}, {{name: b, train: {tmp_path}/b}}]",
        "batch.micro_batch_sequences=1",
        "batch.sequences=2",
    )
    with pytest.raises(UserError, match=r"begins in step 2 of .*batch.sequences=2 windows of 4"):
        train(config)
