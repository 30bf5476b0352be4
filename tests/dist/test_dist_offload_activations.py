"""Activation offload on ranks: the same bits and bytes with every kind of parallelism."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from allometry.configs.run import RunConfig
from allometry.models.moe import begin_step, routers
from allometry.parallel.apply import Parallel
from allometry.parallel.mesh import Mesh
from allometry.parallel.offload.store import ActivationStore
from thinned import thinned

RunRanks = Callable[..., list[Any]]
COUNT = 4
"""Micro-batches per rank: in a pipeline some of them are in flight at once."""

SMALL = 400  # bytes: below any [L, D] of half a sequence, above the document metadata
MOE = {
    "kind": "moe",
    "first_dense_layers": 1,
    "experts": {"kind": "swiglu", "num_experts": 4, "experts_per_token": 2, "width": 12},
}


def config(
    dtype: str = "fp32",
    *,
    layers: int = 4,
    moe: bool = False,
    checkpointing: str = "none",
    compiled: bool = False,
    offload: float = 0.0,
    **parallel: Any,
) -> RunConfig:
    given = tiny.config(0, dtype).model_dump()
    given["model"] |= {"num_layers": layers, "width": 24, "num_heads": 4, "num_kv_heads": 2}
    given["model"] |= MOE if moe else {}
    given["training"] |= {"activation_checkpointing": checkpointing, "compile": compiled}
    given["training"] |= {"activation_offload": offload}
    given["batch"]["sequences"] = 2 * COUNT
    given["parallel"] |= parallel
    return RunConfig.model_validate(given)


def gradients(made: Parallel, mesh: Mesh, share: float) -> dict[str, Tensor]:
    batches = [
        replace(batch, documents=replace(batch.documents, offload=share))
        for batch in tiny.micro_batches(COUNT * mesh.hdp.size)
    ]
    scale = torch.tensor(1.0 / tiny.global_count(batches), dtype=torch.float64)
    mine = batches[mesh.hdp.rank :: mesh.hdp.size]
    for part in made.parts.values():
        if routers(part):
            begin_step(part, len(batches) * tiny.LENGTH)
    made.execution.train(mine, scale, lambda index, nll_BL: None)
    found = {}
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        found[name] = tiny.whole(parameter.grad).clone()
        parameter.grad = None
    return found


def moved(run: RunConfig, share: float = 1.0, losing: bool = False) -> dict[str, Any]:
    """(On each rank) whether gradients are bitwise equal, and the bytes of each part."""
    with tiny.mesh(run) as mesh:
        made = tiny.parallel(run, mesh)
        expected = gradients(made, mesh, 0.0)
        stores = {}
        for stage, part in made.parts.items():
            store = ActivationStore(part, mesh.device, smallest_bytes=SMALL)
            if losing:
                whole = store.fetch
                store.fetch = lambda host, whole=whole: whole(torch.zeros_like(host))
            part.call_block, stores[stage] = store.call_block, store
        found = gradients(made, mesh, share)
        assert found.keys() == expected.keys()
        return {
            "same": all(torch.equal(found[name], expected[name]) for name in expected),
            "out": {stage: store.bytes_out for stage, store in stores.items()},
            "in": {stage: store.bytes_in for stage, store in stores.items()},
        }


def check(results: list[dict[str, Any]], *, halves: bool = False) -> None:
    for found in results:
        assert found["same"]
        for stage, out in found["out"].items():
            assert out > 0, stage
            assert out <= found["in"][stage] <= (2 if halves else 1) * out, stage


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_sharded_parameters_stay(run_ranks: RunRanks, dtype: str, moe: bool) -> None:
    """Replicated, gathered or regathered parameters: the same bytes are offloaded."""
    plain = run_ranks(moved, 2, config(dtype, moe=moe))
    check(plain)
    for stage in (1, 3):
        sharded = run_ranks(moved, 2, config(dtype, moe=moe, zero={"stage": stage}))
        check(sharded)
        assert [r["out"] for r in sharded] == [r["out"] for r in plain], stage


def test_lost_bytes_are_seen(run_ranks: RunRanks) -> None:
    """The control: computation uses the bytes that come back."""
    results = run_ranks(moved, 2, config(zero={"stage": 3}), 1.0, True)
    assert not any(found["same"] for found in results)


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2 moe": {"tp": 2, "moe": True},
    "ep2": {"ep": 2, "moe": True},
    "ep2 zero3 selective": {
        "ep": 2,
        "moe": True,
        "zero": {"stage": 3},
        "checkpointing": "selective",
    },
    "tp2 zero2 full": {"tp": 2, "zero": {"stage": 2}, "checkpointing": "full"},
    "zero3 compiled": {"zero": {"stage": 3}, "compiled": True},
    "pp2": {"pp": 2, "layers": 7},
    "pp2 zero2 selective": {
        "pp": 2,
        "layers": 7,
        "zero": {"stage": 2},
        "checkpointing": "selective",
    },
}

QUICK = {"tp2 moe", "ep2 zero3 selective", "zero3 compiled", "pp2 zero2 selective"}


@pytest.mark.parametrize("layout", thinned(QUICK, list(LAYOUTS)))
def test_layouts(run_ranks: RunRanks, layout: str) -> None:
    check(run_ranks(moved, 2, config(**LAYOUTS[layout]), timeout_s=120.0))


@pytest.mark.parametrize(
    "schedule",
    thinned(
        {"interleaved_1f1b", "zbv_zero_bubble"},
        ["interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble", "dualpipe_v"],
    ),
)
@pytest.mark.parametrize(
    "moe", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["dense", "moe"]
)
def test_schedules_of_many_stages(run_ranks: RunRanks, schedule: str, moe: bool) -> None:
    """Several stages per rank, and backwards in two halves."""
    run = config(pp=2, layers=12, moe=moe, pipeline={"schedule": schedule})
    halves = schedule != "interleaved_1f1b"
    check(run_ranks(moved, 2, run, timeout_s=120.0), halves=halves)


def of_every_micro_batch(run: RunConfig) -> dict[str, Any]:
    """(On each rank) the same with ``training.activation_offload``, for two steps."""
    plain = run.model_copy(
        update={"training": run.training.model_copy(update={"activation_offload": 0.0})}
    )
    with tiny.mesh(run) as mesh, tiny.small_activations_go():
        expected = gradients(tiny.parallel(plain, mesh), mesh, 0.0)
        made = tiny.parallel(run, mesh)
        steps, allocations = [], []
        for _ in range(2):
            steps.append(gradients(made, mesh, 0.0))
            allocations.append([store.pool.allocations for store in made.stores])
        gc.collect()  # torch's split backward leaves cycles
        return {
            "stores": len(made.stores),
            "same": all(torch.equal(s[name], expected[name]) for s in steps for name in expected),
            "allocations": allocations,
            "used": sum(store.pool.used_bytes for store in made.stores),
            "out": {i: store.bytes_out for i, store in enumerate(made.stores)},
            "in": {i: store.bytes_in for i, store in enumerate(made.stores)},
        }


OF_EVERY: dict[str, dict[str, Any]] = {
    "zero3 full": {"dtype": "fp64", "zero": {"stage": 3}, "checkpointing": "full", "offload": 0.5},
    "ep2 moe": {"dtype": "fp64", "ep": 2, "moe": True, "offload": 1.0},
    "pp2": {"dtype": "fp64", "pp": 2, "layers": 7, "offload": 1.0},
    "pp2 zbv": {
        "dtype": "fp64",
        "pp": 2,
        "layers": 12,
        "pipeline": {"schedule": "zbv_zero_bubble"},
        "offload": 1.0,
    },
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if "zbv" in n else n for n in OF_EVERY],
)
def test_a_share_of_every_micro_batch(run_ranks: RunRanks, name: str) -> None:
    """A pipeline has several in flight; the second step reuses the host memory of the first."""
    results = run_ranks(of_every_micro_batch, 2, config(**OF_EVERY[name]), timeout_s=120.0)
    check(results, halves="zbv" in name)
    for found in results:
        assert found["stores"] == (2 if "zbv" in name else 1)
        assert found["used"] == 0
        assert found["allocations"][0] == found["allocations"][1]
