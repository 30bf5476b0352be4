"""Sums and functions of full matrices in every layout: exact, once per matrix, shared work."""

# M logical matrices of a parameter

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import tiny
from allometry.configs.run import RunConfig
from allometry.optim import owners
from allometry.optim.exchange import ShardedMatrixOps
from allometry.optim.matrix_ops import Matrix, one_by_one, partial_sums
from allometry.parallel.apply import Parallel
from placed import LAYOUTS, MOE, given, like

RunRanks = Callable[..., list[Any]]


def config(layout: dict[str, Any]) -> RunConfig:
    run = tiny.config(0, "fp32").model_dump()
    return RunConfig.model_validate(run | {"model": MOE, "parallel": layout})


def matrices(parallel: Parallel) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in parallel.named_parameters() if p.dim() > 1}


def bend(matrix: Tensor, _: Matrix) -> Tensor:
    """Return a function of a matrix that depends on all its elements."""
    return (matrix @ matrix.mT / matrix.norm()) @ matrix


def work(rows: int, columns: int) -> float:
    return min(rows, columns) ** 2 * max(rows, columns)


def whole_errors(layout: dict[str, Any]) -> dict[str, Any]:
    run = config(layout)
    with tiny.mesh(run) as mesh:
        parallel = tiny.parallel(run, mesh)
        named = matrices(parallel)
        values = {name: given(name, p.shape) for name, p in named.items()}
        parts = [like(values[name], p).clone() for name, p in named.items()]
        groups = len(dist.distributed_c10d._world.pg_map)
        ops, calls = ShardedMatrixOps(mesh), []

        def function(matrix: Tensor, which: Matrix) -> Tensor:
            calls.append((list(named)[which.parameter], which.expert))
            return bend(matrix, which)

        parameters = list(named.values())
        got = ops.map(parameters, parts, one_by_one(function), work)
        assert ops.owned(parameters, work) == [
            Matrix(list(named).index(name), e) for name, e in calls
        ]
        wrong = [
            name
            for (name, p), part in zip(named.items(), got, strict=True)
            if not torch.equal(part, like(_bent(values[name]), p))
        ]
        norms = ops.squared_norms(parameters, parts)
        sums = ops.sums(parameters, [partial_sums(part) for part in parts])
        factors = ops.factors(parameters, norms)
        exact = [values[name].double().view(-1, *p.shape[-2:]) for name, p in named.items()]
        error = max(
            float((a / b.sum((1, 2)) - 1).abs().max())
            for found, of in ((norms, [x.square() for x in exact]), (sums, exact))
            for a, b in zip(found, of, strict=True)
        )
        for part, factor, x, p in zip(parts, factors, exact, parameters, strict=True):
            scaled = (x * x.square().sum((1, 2), True)).view(p.shape).float()
            torch.testing.assert_close(part * factor, like(scaled, p), rtol=1e-6, atol=0.0)
        held = {name: p.shape for name, p in named.items()}
        assert len(dist.distributed_c10d._world.pg_map) == groups, "the mesh has all groups"
        return {
            "wrong": wrong,
            "error": error,
            "calls": calls,
            "held": held,
            "stage": mesh.pp.rank,
        }


def _bent(whole: Tensor) -> Tensor:
    if whole.dim() == 2:
        return bend(whole, Matrix(0, 0))
    return torch.stack([bend(matrix.clone(), Matrix(0, 0)) for matrix in whole])


@pytest.mark.parametrize("name", LAYOUTS)
def test_sums_and_functions_of_whole_matrices(run_ranks: RunRanks, name: str) -> None:
    world_size, layout = LAYOUTS[name]
    found = run_ranks(whole_errors, world_size, layout)
    for rank in found:
        assert rank["wrong"] == []
        assert rank["error"] < 1e-12
    for stage in {rank["stage"] for rank in found}:
        ranks = [rank for rank in found if rank["stage"] == stage]
        calls = [call for rank in ranks for call in rank["calls"]]
        wanted = [
            (name, e)
            for name, shape in ranks[0]["held"].items()
            for e in range(shape[0] if len(shape) == 3 else 1)
        ]
        assert sorted(calls) == sorted(wanted), "each matrix once"
        costs = [[work(*rank["held"][name][-2:]) for name, _ in rank["calls"]] for rank in ranks]
        loads = [sum(of_rank) for of_rank in costs]
        dearest = max(cost for of_rank in costs for cost in of_rank)
        assert max(loads) <= max(1.1 * sum(loads) / len(loads), dearest), "work is shared"


def order_of_events(buckets: int) -> str:
    """Return the events of an exchange in order: t(ransfer) starts, or
    c(omputation) of a matrix."""
    events: list[str] = []
    begin, usual = dist.all_to_all_single, owners.NUM_BUCKETS

    def all_to_all_single(*arguments: Any, **settings: Any) -> Any:
        events.append("t")
        return begin(*arguments, **settings)

    def function(matrix: Tensor, which: Matrix) -> Tensor:
        events.append("c")
        return bend(matrix, which)

    run = config({"zero": {"stage": 3}})
    with tiny.mesh(run) as mesh:
        named = matrices(tiny.parallel(run, mesh))
        parts = [like(given(name, p.shape), p).clone() for name, p in named.items()]
        try:
            owners.NUM_BUCKETS, dist.all_to_all_single = buckets, all_to_all_single
            ShardedMatrixOps(mesh).map(list(named.values()), parts, one_by_one(function), work)
        finally:
            owners.NUM_BUCKETS, dist.all_to_all_single = usual, begin
    return "".join(events)


@pytest.mark.parametrize(
    ("buckets", "order"), [(1, "tc+t"), (2, "ttc+tc+t"), (4, "ttc+ttc+ttc+tc+t")]
)
def test_pieces_travel_while_others_are_computed(
    run_ranks: RunRanks, buckets: int, order: str
) -> None:
    """The next bucket arrives before a bucket is computed, which is sent before the next."""
    for events in run_ranks(order_of_events, 2, buckets):
        assert re.fullmatch(order, events), events
