"""Rows received by sender and expert, sorted by expert and back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from allometry.configs.run import RunConfig
from allometry.models.grouped import grouped_linear
from allometry.models.visits import spread_rows
from allometry.parallel.expert import AllToAll, by_expert
from allometry.parallel.mesh import open_mesh
from host_reads import host_reads


@pytest.mark.parametrize(
    "counts", [[[2, 0, 3], [1, 4, 0]], [[0, 0], [0, 0]], [[5]], [[1, 2], [0, 0], [3, 1], [0, 7]]]
)
def test_rows_by_expert_and_back(counts: list[list[int]]) -> None:
    counts_Re = torch.tensor(counts)
    runs = [
        (r, e) for r, row in enumerate(counts) for e, count in enumerate(row) for _ in range(count)
    ]
    rows = torch.tensor(runs, dtype=torch.float64).view(-1, 2)
    rows = torch.cat([rows, torch.arange(len(runs))[:, None]], 1).requires_grad_()
    there, back = by_expert(counts_Re, len(runs))
    sorted_Z3 = spread_rows(rows, there)
    wanted = sorted(rows.tolist(), key=lambda row: (row[1], row[0]))
    assert sorted_Z3.tolist() == wanted
    assert there.counts_E.tolist() == counts_Re.sum(0).tolist()
    assert torch.equal(spread_rows(sorted_Z3, back), rows)
    if runs:
        assert torch.autograd.gradcheck(lambda x: spread_rows(x, there), rows)
        assert torch.autograd.gradcheck(lambda x: spread_rows(x, back), rows)


@pytest.mark.parametrize("experts", [1, 4])
def test_an_exchange_waits_once(tiny: Callable[..., RunConfig], experts: int) -> None:
    """Forward and backward wait for the row counts once, for any number of experts."""
    x = torch.randn(12, 8, requires_grad=True)
    weight = torch.randn(experts, 8, 8, requires_grad=True)
    counts = torch.full((experts,), 12 // experts)
    with open_mesh(tiny().parallel, torch.device("cpu")) as mesh:
        exchange = AllToAll(mesh.ep)
        with host_reads() as found:
            y = exchange(x, counts)(lambda x, counts: grouped_linear(x, weight, counts))
            y.square().sum().backward()
    assert len(found) == 1
    assert found[0].startswith("tolist at parallel/expert.py")
    assert torch.equal(y, grouped_linear(x, weight, counts))
