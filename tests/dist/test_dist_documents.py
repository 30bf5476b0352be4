"""Documents on rings of any ranks have one process's gradients under every plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import tiny
from allometry.configs.run import RunConfig
from allometry.data.documents import DocumentStream
from allometry.data.synthetic import write_store
from allometry.optim.build import build_optimizer
from allometry.parallel.mesh import open_mesh
from allometry.scaling.hdp.plan import Mode, Plan, Unit
from allometry.scaling.layout import Layout
from allometry.scaling.parameterization import Parameterization
from allometry.studies.certificate import step as certificate
from allometry.trainer.feed import DeviceBatch, DocumentPlanner, document_batch
from test_dist_layouts import DENSE, LATENT, MOE
from thinned import thinned

RunRanks = Callable[..., list[Any]]
CPU = torch.device("cpu")
LENGTHS = (150, 3, 40, 97, 12, 61, 5, 2, 33)
"""Lengths of a step's documents in tokens; gradients are of order 1e-2."""

Planned = tuple[Mode, tuple[Unit, ...], tuple[tuple[int | None, ...], ...]]
MIXED: Planned = (
    "free",
    (
        Unit((0,), (0, 3, 1)),
        Unit((3,), (2, 4)),
        Unit((1, 2), (2,)),
        Unit((5, 6), (4, 0, 1, 2, 3)),
        Unit((4, 7), (4,)),
        Unit((8,), (0,)),
    ),
    ((0, 3, 5), (0, 3), (1, 2, 3), (0, 3), (1, 4, 3)),
)
"""Five ranks: rings of 3 and 2 at once, then a ring of all with two documents; unequal counts."""
IDLE: Planned = (
    "free",
    (Unit(tuple(range(1, 9)), (1,)), Unit((0,), (1, 0))),
    ((1,), (0, 1), ()),
)
"""Three ranks; the last one is idle."""


def config(
    store: str, model: dict[str, Any] = DENSE, dtype: str = "fp64", **changes: Any
) -> RunConfig:
    parallel = {"timeout_s": 60, **changes.pop("parallel", {})}
    context = {"capacity_tokens": 64, "min_chunk_tokens": 4, **changes.pop("context", {})}
    layers, precision = changes.pop("layers", 2), changes.pop("precision", {})
    return RunConfig.model_validate(
        {
            "run": {"folder": "none", "seed": tiny.SEED},
            "model": {**model, "num_layers": layers},
            "data": {
                "kind": "documents",
                "sequence_length": sum(LENGTHS),
                "max_document_tokens": 160,
                "sources": [{"name": "documents", "train": store}],
            },
            "batch": {"sequences": 1, "micro_batch_sequences": 1},
            "training": {"total_steps": 3, "compute_dtype": dtype, **changes},
            "precision": precision,
            "optimizer": {"lr": 1e-2},
            "schedule": {"kind": "constant"},
            "parallel": {**parallel, "context": context},
        }
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng = np.random.default_rng(0)
    prefix = tmp_path_factory.mktemp("documents") / "store"
    write_store(prefix, [rng.integers(0, tiny.VOCAB, length) for length in LENGTHS])
    return str(prefix)


def alone(run: RunConfig) -> tuple[Any, list[DeviceBatch]]:
    """Return the step's documents, and each as a micro-batch of one process."""
    stream = DocumentStream(run.data, run.run.seed)
    pieces = stream.pieces(0, run.batch.sequences)
    units = [Unit((number,), (0,)) for number in range(len(pieces))]
    return pieces, [document_batch(unit, 0, pieces, CPU) for unit in units]


def errors(run: RunConfig, planned: Planned | None = None, misplace: bool = False) -> float:
    """(On each rank) largest absolute difference of a gradient from one process's."""
    pieces, whole = alone(run)
    assert sorted(pieces.lengths.tolist()) == sorted(LENGTHS)
    wanted = certificate.reference_steps(run, [whole])
    with open_mesh(run.parallel, CPU) as mesh:
        planner = DocumentPlanner(run, Layout.of(run, mesh.world_size))
        if planned is None:
            plan = planner.plan(pieces.lengths.tolist())
            assert mesh.hdp.size == 1 or any(len(unit.ring) > 1 for unit in plan.units)
        else:  # indices into LENGTHS, not in the order of the stream
            place = {length: i for i, length in enumerate(pieces.lengths.tolist())}
            mode, units, orders = planned
            units = tuple(
                Unit(tuple(place[LENGTHS[d]] for d in unit.documents), unit.ring) for unit in units
            )
            plan = Plan(pieces.lengths.tolist(), mesh.hdp.size, mode, units, orders)
        mine = planner.batches(plan, pieces, mesh.hdp.rank, mesh.device, 0)
        if misplace:
            for batch in mine:
                batch.documents.positions_BL.zero_()
        groups = len(dist.distributed_c10d._world.pg_map)
        with tiny.small_activations_go() as moved:
            found = certificate.layout_steps(run, mesh, [mine])
        assert moved or not run.training.activation_offload
        assert len(dist.distributed_c10d._world.pg_map) == groups, "no group after the start"
        apart = certificate.differences(found, wanted)
        for kind in ("sums", "grad_norm", "routing", "routers"):  # padding is not counted
            assert apart[kind][1] < 1e-5 or misplace, apart
        assert found.gradients
        assert max(float(g.abs().max()) for g in wanted.gradients.values()) > 1e-3
        return max(
            float((gradient - wanted.gradients[name]).abs().max())
            for name, gradient in found.gradients.items()
        )


TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("stage", [0, 1])
def test_mixed_rings_on_five_ranks(run_ranks: RunRanks, store: str, dtype: str, stage: int) -> None:
    run = config(store, dtype=dtype, parallel={"zero": {"stage": stage}})
    assert max(run_ranks(errors, 5, run, MIXED)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("stage", [0, 1])
def test_a_rank_without_documents(run_ranks: RunRanks, store: str, stage: int) -> None:
    run = config(store, parallel={"zero": {"stage": stage}})
    assert max(run_ranks(errors, 3, run, IDLE)) <= 1e-12


def test_wrong_positions_show(run_ranks: RunRanks, store: str) -> None:
    assert max(run_ranks(errors, 3, config(store), IDLE, True)) > 1e-5


STATIC = {"policy": "static", "degree": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "hdp1": (1, {"context": {"capacity_tokens": 160}}),
    "hdp2": (2, {"context": {"capacity_tokens": 96}}),
    "hdp4": (4, {}),
    "hdp3-zero1": (3, {"parallel": {"zero": {"stage": 1}}}),
    "hdp4-zero2": (4, {"parallel": {"zero": {"stage": 2}}}),
    "hdp4-zero3": (4, {"parallel": {"zero": {"stage": 3}}}),
    "hdp4-zero3-replicas2": (4, {"parallel": {"zero": {"stage": 3, "replicas": 2}}}),
    "hdp4-naive": (4, {"context": {"policy": "naive"}}),
    "hdp4-static2": (4, {"context": STATIC | {"capacity_tokens": 96}}),
    "hdp4-static4-zero3": (
        4,
        {"context": STATIC | {"degree": 4}, "parallel": {"zero": {"stage": 3}}},
    ),
    "hdp2-tp2": (4, {"parallel": {"tp": 2}, "context": {"capacity_tokens": 96}}),
    "hdp2-tp2-zero1": (
        4,
        {"parallel": {"tp": 2, "zero": {"stage": 1}}, "context": {"capacity_tokens": 96}},
    ),
    "hdp3-selective": (3, {"activation_checkpointing": "selective"}),
    "hdp3-full": (3, {"activation_checkpointing": "full"}),
    "hdp3-compiled": (3, {"compile": True}),
    "hdp3-offload": (3, {"context": {"offload": "selective"}, "layers": 4}),
    "hdp3-all-offloaded": (
        3,
        {"activation_offload": 1.0, "activation_checkpointing": "full", "layers": 4},
    ),
    "pp2-hdp2-half-offloaded": (
        4,
        {
            "parallel": {"pp": 2, "zero": {"stage": 1}},
            "context": {"capacity_tokens": 96, "policy": "pipeline_balanced"},
            "activation_offload": 0.5,
            "layers": 8,
        },
    ),
    "pp2-hdp2": (4, {"parallel": {"pp": 2}, "context": {"capacity_tokens": 96}}),
    "pp2-hdp2-balanced-by-pipeline": (
        4,
        {
            "parallel": {"pp": 2},
            "context": {"capacity_tokens": 96, "policy": "pipeline_balanced"},
        },
    ),
    "pp2-hdp2-zero1-balanced-by-pipeline": (
        4,
        {
            "parallel": {"pp": 2, "zero": {"stage": 1}},
            "context": {"capacity_tokens": 96, "policy": "pipeline_balanced"},
        },
    ),
    "pp2-hdp2-zbv": (
        4,
        {
            "parallel": {"pp": 2, "pipeline": {"schedule": "zbv_zero_bubble"}},
            "context": {"capacity_tokens": 96},
            "layers": 4,
        },
    ),
}
EXPERTS: dict[str, tuple[int, dict[str, Any]]] = {
    "hdp3": (3, {}),
    "hdp3-zero1": (3, {"parallel": {"zero": {"stage": 1}}}),
    "ep2": (2, {"parallel": {"ep": 2}, "context": {"capacity_tokens": 96}}),
    "ep2-hdp4-zero3": (4, {"parallel": {"ep": 2, "zero": {"stage": 3}}}),
    "hdp2-tp2": (4, {"parallel": {"tp": 2}, "context": {"capacity_tokens": 96}}),
    "pp2-hdp2": (4, {"parallel": {"pp": 2}, "context": {"capacity_tokens": 96}, "layers": 3}),
    "hdp3-full": (3, {"activation_checkpointing": "full"}),
}


@pytest.mark.parametrize("name", thinned(set(LAYOUTS) - {"hdp3-compiled"}, tuple(LAYOUTS)))
def test_planned_documents(run_ranks: RunRanks, store: str, name: str) -> None:
    ranks, changes = LAYOUTS[name]
    found = run_ranks(errors, ranks, config(store, **changes), timeout_s=200.0)
    assert max(found) <= 1e-12


@pytest.mark.parametrize("name", ["hdp4", "hdp4-zero3", "hdp2-tp2"])
def test_planned_documents_in_fp32(run_ranks: RunRanks, store: str, name: str) -> None:
    ranks, changes = LAYOUTS[name]
    found = run_ranks(errors, ranks, config(store, dtype="fp32", **changes))
    assert max(found) <= 1e-5


@pytest.mark.parametrize(
    "name", ["hdp4", "hdp4-zero3", "hdp3-full", "hdp3-offload", "hdp3-all-offloaded"]
)
def test_planned_documents_with_activations_saved_in_fp8(
    run_ranks: RunRanks, store: str, name: str
) -> None:
    """Rings divide documents by tokens, and numbers that share a scale belong to one token."""
    ranks, changes = LAYOUTS[name]
    run = config(store, precision={"saved_activations": "fp8"}, **changes)
    assert max(run_ranks(errors, ranks, run)) <= 1e-12


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize(
    "model", [MOE, pytest.param(LATENT, marks=pytest.mark.slow)], ids=["moe", "latent"]
)
def test_planned_documents_with_experts(
    run_ranks: RunRanks, store: str, model: dict[str, Any], name: str
) -> None:
    ranks, changes = EXPERTS[name]
    found = run_ranks(errors, ranks, config(store, model, **changes))
    assert max(found) <= 1e-12


AHEAD = ("hdp4", "hdp4-zero3", "hdp2-tp2", "pp2-hdp2", "pp2-hdp2-zbv")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed", *AHEAD])
def test_documents_with_multi_token_prediction(run_ranks: RunRanks, store: str, name: str) -> None:
    model = DENSE | {"multi_token": {"depth": 2, "weight": 0.3}}
    ranks, changes = LAYOUTS.get(name, (5, {}))
    planned = MIXED if name == "mixed" else None
    found = run_ranks(errors, ranks, config(store, model, **changes), planned, timeout_s=200.0)
    assert max(found) <= 1e-12


def trained(run: RunConfig, planned: bool, steps: int = 3) -> dict[str, torch.Tensor]:
    """(On each rank) full parameters after some AdamW steps on the same documents."""
    with open_mesh(run.parallel, CPU) as mesh:
        parallel = certificate.make_parallel(run, mesh)
        optimizer = build_optimizer(
            parallel.named_parameters(),
            parallel.specs(),
            Parameterization(run.parameterization, run.model),
            run.optimizer,
        )
        pieces, whole = alone(run)
        planner = DocumentPlanner(run, Layout.of(run, mesh.world_size))
        mine: Sequence[DeviceBatch] = whole[mesh.hdp.rank :: mesh.hdp.size]
        if planned:
            plan = planner.plan(pieces.lengths.tolist())
            mine = planner.batches(plan, pieces, mesh.hdp.rank, mesh.device, 0)
        scale = torch.tensor(1.0 / tiny.global_count(whole), dtype=torch.float64)
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            parallel.execution.train(mine, scale, lambda *_: None)
            optimizer.step()
        return {
            name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone()
            for name, p in parallel.named_parameters()
        }


def test_three_steps_on_eight_ranks(run_ranks: RunRanks, store: str, tmp_path: Path) -> None:
    shared = config(store, parallel={"zero": {"stage": 1}}, context={"capacity_tokens": 32})
    one = config(store, context={"capacity_tokens": 160})
    (wanted,) = run_ranks(trained, 1, one, False)
    for found in run_ranks(trained, 8, shared, True, timeout_s=200.0):
        for name, parameter in found.items():
            assert float((parameter - wanted[name]).abs().max()) <= 1e-10, name
