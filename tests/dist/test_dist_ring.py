"""Attention over rings of ranks equals one process, with the exact number of messages."""

# T rows, N query heads, K key/value heads, H head width

import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from allometry.configs.execution import ParallelConfig
from allometry.models.attention import attend
from allometry.models.documents import Documents
from allometry.parallel.hdp.ring import ring_attention
from allometry.parallel.hdp.shard import ring_table
from allometry.parallel.mesh import Mesh, open_mesh
from ring_oracles import Traffic, ring_traffic
from rings import Unit, counting, held, unit_of
from thinned import thinned

RunRanks = Callable[..., list[Any]]
N, K, H, SCALE = 6, 2, 4, 0.4
FILLING = 3
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 3e-2}

UNITS: dict[str, list[Unit]] = {
    "two of two": [((1, 0), (25, 6))],
    "two": [((3, 1), (37,))],
    "three": [((2, 0, 3), (41, 1, 2, 3, 30))],
    "four": [((1, 3, 0, 2), (83, 7))],
    "four, no row for some": [((3, 0, 2, 1), (1, 2))],
    "two at once": [((2, 0), (25, 1, 6)), ((1, 3), (12, 25))],
    "one": [((0,), (5, 9)), ((1,), (3,))],
}


def random_rows(lengths: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return q, k, v and the output gradient of documents, one after another."""
    generator = torch.Generator().manual_seed(sum(lengths))
    return tuple(
        torch.randn(sum(lengths), heads, H, generator=generator, dtype=torch.float64).to(dtype)
        for heads in (N, K, K, N)
    )


def alone(lengths: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return output and gradients of q, k and v on one process, with an explicit softmax."""
    q, k, v, grad = random_rows(lengths, dtype)
    inputs = [x[None].requires_grad_() for x in (q, k, v)]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    documents = Documents(bounds, max(lengths), positions)
    o = attend(*inputs, documents, SCALE, "reference")
    grads = torch.autograd.grad(o, inputs, grad[None])
    return o[0].detach(), *(g[0] for g in grads)


def ring_errors(name: str, dtype_name: str, wrong: str = "", tp: int = 1) -> dict[str, Any]:
    """Return this rank's errors against one process, gradients of padding, and messages."""
    with open_mesh(ParallelConfig(tp=tp, timeout_s=30), torch.device("cpu")) as mesh:
        return errors_on(mesh, name, getattr(torch, dtype_name), wrong)


def errors_on(mesh: Mesh, name: str, dtype: torch.dtype, wrong: str) -> dict[str, Any]:
    rank, group = mesh.hdp.rank, mesh.hdp.group
    found = unit_of(UNITS[name], rank)
    if found is None:
        return {"error": 0.0, "filling": 0.0}
    (ring, lengths), member = found
    rows = held(lengths, len(ring), member)
    if wrong == "no zig-zag":
        sizes = [len(held(lengths, len(ring), j)) for j in range(len(ring))]
        rows = torch.arange(sum(lengths)).split(sizes)[member]
    elif wrong == "chunks exchanged" and member == 1:
        rows = rows.roll(len(rows) // 2)
    table = ring_table(ring, member, lengths, tag=7 + UNITS[name].index((ring, lengths)))
    q, k, v, grad = (
        torch.cat([x[rows], torch.ones(FILLING, *x.shape[1:], dtype=dtype)])
        for x in random_rows(lengths, dtype)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    with counting() as forward:
        o, _ = ring_attention(*inputs, table, group.group_name, SCALE)
    with counting() as backward:
        grads = torch.autograd.grad(o, inputs, grad)
    wanted = alone(lengths, dtype)
    got = (o.detach(), *grads)
    pairs = zip(got, wanted, strict=True)
    errors = [float((a[: len(rows)] - b[rows]).abs().max()) for a, b in pairs if len(rows)]
    return {
        "error": max(errors, default=0.0),
        "filling": max(float(x[len(rows) :].abs().max()) for x in got),
        "forward": forward.traffic,
        "backward": backward.traffic,
        "said": ring_traffic(table, K * H, dtype),
        "said of backward": ring_traffic(table, K * H, dtype, backward=True),
        "type": str(o.dtype),
    }


@pytest.mark.parametrize(
    ("name", "dtype"),
    thinned(
        {
            *((name, "float64") for name in UNITS),
            ("three", "float32"),
            ("four, no row for some", "bfloat16"),
        },
        tuple(UNITS),
        tuple(TOLERANCE),
    ),
)
def test_rings_equal_one_process(run_ranks: RunRanks, name: str, dtype: str) -> None:
    for found in run_ranks(ring_errors, 4, name, dtype):
        assert found["error"] < TOLERANCE[dtype]
        assert found["filling"] == 0.0
        assert found.get("type", f"torch.{dtype}") == f"torch.{dtype}"


def test_ranks_are_those_of_the_group(run_ranks: RunRanks) -> None:
    """With tp, hdp ranks 0 and 1 are global ranks 0 and 2, or 1 and 3."""
    for found in run_ranks(ring_errors, 4, "two of two", "float64", "", 2):
        assert found["forward"].hops == 1
        assert found["error"] < TOLERANCE["float64"]


@pytest.mark.parametrize("wrong", ["no zig-zag", "chunks exchanged"])
def test_the_comparison_sees_misplaced_chunks(run_ranks: RunRanks, wrong: str) -> None:
    assert (
        max(found["error"] for found in run_ranks(ring_errors, 4, "four", "float64", wrong)) > 0.1
    )


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("name", list(UNITS))
def test_messages_are_as_many_and_as_long_as_said(
    run_ranks: RunRanks, name: str, dtype: str
) -> None:
    itemsize = getattr(torch, dtype).itemsize
    for rank, found in enumerate(run_ranks(ring_errors, 4, name, dtype)):
        unit = unit_of(UNITS[name], rank)
        if unit is None:
            continue
        (ring, lengths), member = unit
        # Keys and values of all members except the next, which already has its own.
        rows = [len(held(lengths, len(ring), j)) for j in range(len(ring))]
        sent = [n for j, n in enumerate(rows) if j != (member + 1) % len(ring) and n]
        if len(ring) == 1:
            sent = []
        expected = Traffic(len(sent), sum(sent) * 2 * K * H * itemsize)
        assert found["forward"] == found["said"] == expected
        # Backward: the same again, and gradients of all other members in a dtype of 4 bytes or
        # more.
        back = [n for j, n in enumerate(rows) if j != member and n]
        more = sum(back) * 2 * K * H * max(itemsize, 4)
        both = Traffic(len(sent) + len(back), expected.bytes + more)
        assert found["backward"] == found["said of backward"] == both
        if min(rows) > 0:
            assert found["forward"].hops == len(ring) - 1


def two_units(tags: tuple[int, int]) -> float:
    """Two members run two units of equal lengths in opposite orders; return the error, inf if hung.

    Plans never do that; if one did, the wrong keys must not be used.
    """
    rank, group = dist.get_rank(), dist.new_group(timeout=timedelta(seconds=2))
    lengths = [(16,), (9, 7)] if rank == 0 else [(9, 7), (16,)]
    tags = tags if rank == 0 else tags[::-1]
    worst = 0.0
    for documents, tag in zip(lengths, tags, strict=True):
        rows = held(documents, 2, rank)
        table = ring_table((0, 1), rank, documents, tag)
        q, k, v, _ = (x[rows] for x in random_rows(documents, torch.float64))
        try:
            o, _ = ring_attention(q, k, v, table, group.group_name, SCALE)
        except RuntimeError:
            return math.inf
        worst = max(worst, float((o - alone(documents, torch.float64)[0][rows]).abs().max()))
    return worst


def test_units_in_another_order_hang_rather_than_mix(run_ranks: RunRanks) -> None:
    assert run_ranks(two_units, 2, (1, 2)) == [math.inf, math.inf]
    # The tags prevent this: without them the results would be silently wrong.
    mixed = run_ranks(two_units, 2, (1, 1))
    assert all(0.1 < error < math.inf for error in mixed)
