"""Flat gradient buckets of ZeRO stage 0, without a model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from allometry.parallel.reduce import FlatReducer

RunRanks = Callable[..., list[Any]]


class Branches(nn.Module):
    """Parameters of different sizes; each call selects those that take part."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.parts = nn.ParameterList(
            nn.Parameter(torch.linspace(-1, 1, n, dtype=torch.float64).to(dtype))
            for n in (5, 3, 8, 2, 7)
        )
        self.frozen = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)

    def forward(self, weight: float, active: tuple[int, ...]) -> Tensor:
        return sum(
            (weight * (i + 1) * self.parts[i].square().sum() for i in active), torch.zeros(())
        )


def expected(model: Branches, weights: dict[int, float]) -> list[Tensor]:
    """Return the gradients of sum over i of weights[i] * (i + 1) * part_i**2."""
    return [
        2 * weights.get(i, 0.0) * (i + 1) * part.detach().double()
        for i, part in enumerate(model.parts)
    ]


def check(model: Branches, wanted: list[Tensor], tolerance: float = 1e-6) -> None:
    for part, gradient in zip(model.parts, wanted, strict=True):
        assert part.grad is not None
        assert part.grad.dtype == part.dtype
        torch.testing.assert_close(part.grad.double(), gradient, rtol=tolerance, atol=0.0)
    assert model.frozen.grad is None


def steps(overlap: bool, bucket_bytes: int, set_to_none: bool) -> None:
    with tiny.mesh() as mesh:
        model = Branches(torch.float32)
        reducer = FlatReducer(
            lambda: [(list(model.parameters()), mesh.hdp)], mesh.tp, bucket_bytes, overlap
        )
        optimizer = torch.optim.SGD(model.parts, lr=0.01)
        everything = (0, 1, 2, 3, 4)
        for step in range(3):
            optimizer.zero_grad(set_to_none=set_to_none)
            for i in range(2):
                reducer.micro_batch(last=i == 1)
                model(mesh.hdp.rank + i + step + 1.0, everything).backward()
            reducer.finish()
            total = sum(rank + i + step + 1.0 for rank in range(mesh.hdp.size) for i in range(2))
            check(model, expected(model, dict.fromkeys(everything, total)))
            flat = {p.grad.untyped_storage().data_ptr() for p in model.parts if p.grad is not None}
            assert len(flat) == (5 if bucket_bytes == 1 else 1), "gradients are views of buckets"
            optimizer.step()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("bucket_bytes", [1, 2**20])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_sums_over_ranks_and_micro_batches(
    run_ranks: RunRanks, overlap: bool, bucket_bytes: int, set_to_none: bool
) -> None:
    run_ranks(steps, 2, overlap, bucket_bytes, set_to_none)


def missing(overlap: bool) -> None:
    with tiny.mesh() as mesh:
        model = Branches(torch.float64)
        reducer = FlatReducer(lambda: [(list(model.parameters()), mesh.hdp)], mesh.tp, 1, overlap)
        rank = mesh.hdp.rank
        # In the last micro-batch, some parameters are missing on one rank and one on both.
        for last, active in ((False, (0, 1, 2)), (True, (0, 2, 4) if rank == 0 else (2, 1))):
            reducer.micro_batch(last)
            model(1.0, active).backward()
        reducer.finish()
        check(model, expected(model, {0: 3.0, 1: 3.0, 2: 4.0, 4: 1.0}), 1e-15)


@pytest.mark.parametrize("overlap", [False, True])
def test_missing_gradients_count_as_zero_and_keep_the_order(
    run_ranks: RunRanks, overlap: bool
) -> None:
    run_ranks(missing, 2, overlap)


def half() -> list[Tensor]:
    with tiny.mesh() as mesh:
        model = Branches(torch.bfloat16)
        reducer = FlatReducer(
            lambda: [(list(model.parameters()), mesh.hdp)], mesh.tp, 2**20, overlap=True
        )
        reducer.micro_batch(last=True)
        # 1 and three times 2**-9: a sum in bf16 would lose all small terms.
        weight = 1.0 if mesh.hdp.rank == 0 else 2.0**-9
        model(weight, (0, 1, 2, 3, 4)).backward()
        reducer.finish()
        return [part.grad.clone() for part in model.parts if part.grad is not None]


def test_bf16_gradients_are_reduced_in_fp32(run_ranks: RunRanks) -> None:
    of_ranks = run_ranks(half, 4)
    model = Branches(torch.bfloat16)
    for i, (part, gradient) in enumerate(zip(model.parts, of_ranks[0], strict=True)):
        whole, small = ((2 * w * (i + 1) * part.detach().double()).bfloat16() for w in (1.0, 2**-9))
        assert gradient.dtype == torch.bfloat16
        assert torch.equal(gradient, (whole.float() + 3 * small.float()).bfloat16())
        narrow = whole + small + small + small
        assert not torch.equal(gradient, narrow)
    assert all(
        torch.equal(a, b) for other in of_ranks[1:] for a, b in zip(of_ranks[0], other, strict=True)
    )
