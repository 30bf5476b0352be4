"""The balance loss with loads of the same step gives one process's gradients in any layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from allometry.configs.run import RunConfig
from allometry.data.batch import IGNORE
from allometry.data.documents import DocumentStream
from allometry.data.synthetic import write_store
from allometry.models.init import initialize
from allometry.models.moe import begin_step, routers, set_loads
from allometry.models.transformer import Transformer
from allometry.parallel.execution import MicroBatch
from allometry.parallel.mesh import Mesh, open_mesh
from allometry.scaling.hdp.plan import Unit
from allometry.scaling.layout import Layout
from allometry.scaling.parameterization import Parameterization
from allometry.studies.certificate import step as certificate
from allometry.trainer.balance import Balancer, routing_rows
from allometry.trainer.feed import DocumentPlanner, document_batch
from test_dist_layouts import MOE, run

RunRanks = Callable[..., list[Any]]
CPU = torch.device("cpu")
ROUTER = {**MOE["router"], "balance": {"kind": "auxiliary", "coefficient": 3.0}}
STRONG = {**MOE, "router": ROUTER}
"""A balance loss that contributes much of the gradient, so that wrong loads are detected."""

Gradients = dict[str, Tensor]


def unbalance(parts: Sequence[Transformer]) -> None:
    """Set loads of the previous step that differ strongly from this step's."""
    for part in parts:
        for layer, router in routers(part).items():
            uneven = torch.arange(1.0, router.num_experts + 1).roll(layer)
            router.load.copy_(uneven / uneven.sum())


def plain_step(
    config: RunConfig, batches: Sequence[MicroBatch], counted: Sequence[MicroBatch] | None
) -> tuple[Gradients, dict[int, Tensor]]:
    """Return gradients of one process with the loads of ``counted`` (None: previous step).

    Hooks on the routers count tokens per expert. The loads are returned as well.
    """
    model = certificate.build(config).to_empty(device="cpu")
    initialize(model, Parameterization.of_run(config), config.run.seed)
    unbalance([model])
    begin_step(model, sum(batch.tokens_BL.numel() for batch in batches))
    visits: dict[int, Tensor] = {}

    def count(layer: int) -> Callable[..., None]:
        def hook(_: Any, inputs: Any, routing: Any) -> None:
            seen = torch.bincount(routing.experts_Tk.flatten(), minlength=4)
            visits[layer] = visits.get(layer, 0) + seen

        return hook

    handles = [
        router.register_forward_hook(count(layer)) for layer, router in routers(model).items()
    ]
    with torch.no_grad():
        for batch in batches if counted is None else counted:
            model(batch.tokens_BL, batch.targets_BL, batch.documents)
    for handle in handles:
        handle.remove()
    if counted is not None:
        set_loads(model, visits)
    tiny.backward_alone(model, batches)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return gradients, {layer: seen / seen.sum() for layer, seen in visits.items()}


def shared_step(
    config: RunConfig,
    mesh: Mesh,
    batches: Sequence[MicroBatch],
    mine: Sequence[MicroBatch],
    wanted: dict[int, Tensor],
) -> Gradients:
    """Return the layout's gradients with loads of the same step; check the state they leave."""
    parallel = certificate.make_parallel(config, mesh)
    parts = list(parallel.parts.values())
    unbalance(parts)
    balancer = Balancer(config.model, parts, mesh, "this_batch")
    tokens = sum(batch.tokens_BL.numel() for batch in batches)
    visits = balancer.count_visits(lambda: parallel.execution.count_visits(mine))
    assert visits is not None
    mesh.sum_together([visits])
    balancer.begin_step(tokens, visits)
    targets = sum(int((batch.targets_BL != IGNORE).sum()) for batch in batches)
    scale = torch.tensor(1.0 / targets, dtype=torch.float64)
    parallel.execution.train(mine, scale, lambda index, nll_BL: None)
    sums = balancer.observed()
    mesh.sum_together([sums])
    balancer.end_step(sums)
    assert int(sums[-1, -1]) == tokens, "counted once, not twice"
    for part in parts:
        for layer, router in routers(part).items():
            torch.testing.assert_close(
                router.load.double(), wanted[layer].double(), rtol=1e-6, atol=0
            )
    row, loads = routing_rows(config.model, sums)
    for layer, load_E in wanted.items():
        assert loads[str(layer)] == pytest.approx(load_E.tolist())
        before = np.roll(np.arange(1.0, 5.0), layer)
        expected = np.corrcoef(before, load_E.numpy())[0, 1]
        assert row[f"router/{layer}/load_correlation"] == pytest.approx(expected, rel=1e-5)
    return {name: tiny.whole(p.grad) for name, p in parallel.named_parameters()}


def errors(config: RunConfig) -> dict[str, float]:
    """(On each rank) errors of the layout against one process with exact, partial and old loads."""
    batches = tiny.micro_batches(8)
    twins = {
        name: plain_step(config, batches, counted)
        for name, counted in (("exact", batches), ("partial", batches[:1]), ("before", None))
    }
    with open_mesh(config.parallel, CPU) as mesh:
        mine = batches[mesh.hdp.rank :: mesh.hdp.size]
        found = shared_step(config, mesh, batches, mine, twins["exact"][1])
        return {
            name: max(error for _, error in certificate.relative_errors(found, gradients))
            for name, (gradients, _) in twins.items()
        }


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "hdp2": (2, {}),
    "ep2": (2, {"ep": 2}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "pp2-zbv": (2, {"pp": 2, "pipeline": {"schedule": "zbv_zero_bubble"}}),
    "pp2-hdp2-zero3": (4, {"pp": 2, "zero": {"stage": 3}}),
    "ep2-tp2-zero2-full": (4, {"ep": 2, "tp": 2, "zero": {"stage": 2}, "checkpointing": "full"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loads_of_this_batch_are_exact_on_any_layout(run_ranks: RunRanks, layout: str) -> None:
    ranks, settings = LAYOUTS[layout]
    for found in run_ranks(errors, ranks, run(STRONG, "fp64", **settings), timeout_s=200.0):
        assert found["exact"] < 1e-10, found
        assert min(found["partial"], found["before"]) > 1e-3, "the comparison can fail"


LENGTHS = (41, 3, 30, 17, 12, 9, 5, 2, 33)


def document_errors(config: RunConfig) -> tuple[int, float]:
    """(On each rank) number of micro-batches, and error against one process."""
    stream = DocumentStream(config.data, config.run.seed)
    pieces = stream.pieces(0, config.batch.sequences)
    whole = [document_batch(Unit((number,), (0,)), 0, pieces, CPU) for number in range(len(pieces))]
    wanted, loads = plain_step(config, whole, whole)
    with open_mesh(config.parallel, CPU) as mesh:
        planner = DocumentPlanner(config, Layout.of(config, mesh.world_size))
        plan = planner.plan(pieces.lengths.tolist())
        mine = planner.batches(plan, pieces, mesh.hdp.rank, mesh.device, 0)
        found = shared_step(config, mesh, whole, mine, loads)
        return len(mine), max(e for _, e in certificate.relative_errors(found, wanted))


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (3, {"zero": {"stage": 1}}),
        (2, {"zero": {"stage": 3}}),
        (4, {"pp": 2, "context": {"policy": "pipeline_balanced"}, "zero": {"stage": 2}}),
    ],
    ids=["free", "lockstep", "aligned"],
)
def test_loads_of_whole_documents(
    run_ranks: RunRanks, tmp_path: Path, ranks: int, parallel: dict[str, Any]
) -> None:
    rng = np.random.default_rng(0)
    write_store(tmp_path / "store", [rng.integers(0, tiny.VOCAB, n) for n in LENGTHS])
    context = {"capacity_tokens": 24, "min_chunk_tokens": 4, **parallel.get("context", {})}
    config = run(STRONG, "fp64", **parallel | {"context": context}).model_dump()
    config["data"] = {
        "kind": "documents",
        "sequence_length": sum(LENGTHS),
        "max_document_tokens": 48,
        "sources": [{"name": "documents", "train": str(tmp_path / "store")}],
    }
    config["batch"] = {"sequences": 1, "micro_batch_sequences": 1}
    found = run_ranks(document_errors, ranks, RunConfig.model_validate(config), timeout_s=200.0)
    assert max(error for _, error in found) < 1e-10, found
    if ranks == 3:
        assert len({number for number, _ in found}) > 1, "ranks differ in micro-batches"
