from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from allometry.optim.clip import clip_by_global_norm


def with_gradients(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in ((5, 3), (7,), (4, 4), (1,)):
        gradient = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
        parameter.grad = gradient.to(dtype)
        made.append(parameter)
    return made


def joint_norm(parameters: list[nn.Parameter]) -> float:
    gradients = [p.grad.double().flatten() for p in parameters if p.grad is not None]
    return float(torch.cat(gradients).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_clips_to_the_limit(dtype: torch.dtype) -> None:
    parameters = with_gradients(dtype)
    before = joint_norm(parameters)
    expected = [p.grad.double() * (0.5 / before) for p in parameters if p.grad is not None]
    norm = clip_by_global_norm(parameters, 0.5)
    assert norm.dtype == torch.float64
    assert norm.ndim == 0
    assert float(norm) == pytest.approx(before, rel=1e-6)
    tolerance = {torch.bfloat16: 1e-2, torch.float32: 3e-6, torch.float64: 1e-6}[dtype]
    for parameter, clipped in zip(parameters, expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(
            parameter.grad.double(), clipped, rtol=tolerance, atol=tolerance * 1e-2
        )


def test_below_the_limit_and_without_one_nothing_changes() -> None:
    for limit in (1e3, None):
        parameters, original = with_gradients(), with_gradients()
        norm = clip_by_global_norm(parameters, limit)
        assert float(norm) == pytest.approx(joint_norm(original), rel=1e-6)
        for parameter, other in zip(parameters, original, strict=True):
            assert torch.equal(parameter.grad, other.grad)  # type: ignore[arg-type]


def test_small_and_many_gradients_do_not_vanish() -> None:
    # In bf16 a sum of squares stalls at 256 terms of one; it must be taken wider.
    parameter = nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    assert float(clip_by_global_norm([parameter], None)) == pytest.approx(100_000**0.5, rel=1e-6)
    tiny = with_gradients(scale=1e-18)
    assert float(clip_by_global_norm(tiny, None)) == pytest.approx(joint_norm(tiny), rel=1e-5)


def test_parameters_without_gradient_take_no_part() -> None:
    parameters = with_gradients()
    norm = clip_by_global_norm([nn.Parameter(torch.ones(3)), *parameters], None)
    assert float(norm) == pytest.approx(joint_norm(parameters), rel=1e-6)
    with pytest.raises(AssertionError, match="no parameter has a gradient"):
        clip_by_global_norm([nn.Parameter(torch.ones(3))], 1.0)


def test_a_bad_gradient_shows_in_the_norm() -> None:
    parameters = with_gradients()
    parameters[0].grad[0, 0] = float("nan")  # type: ignore[index]
    assert torch.isnan(clip_by_global_norm(parameters, 1.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_norm_that_is_not_finite_changes_no_gradient(bad: float) -> None:
    """So that one bad gradient does not spread to all, and shows where it came from."""
    parameters, original = with_gradients(scale=10.0), with_gradients(scale=10.0)
    for each in (parameters, original):
        each[1].grad[3] = bad  # type: ignore[index]
    norm = clip_by_global_norm(parameters, 0.5)
    assert not torch.isfinite(norm)
    for parameter, other in zip(parameters, original, strict=True):
        assert parameter.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=0, equal_nan=True)


def _rank(rank: int, world: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    mesh = init_device_mesh("cpu", (world,))
    expected = joint_norm(with_gradients())
    layouts = (
        [Shard(0)] * 4,  # uneven, and empty on some ranks
        [Shard(0), Shard(0), Shard(1), Replicate()],
        [Replicate()] * 4,
    )
    for placements in layouts:
        parameters, whole = with_gradients(), with_gradients()
        clip_by_global_norm(whole, 0.5)
        sharded = []
        for parameter, placement in zip(parameters, placements, strict=True):
            shard = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement]))
            shard.grad = distribute_tensor(parameter.grad, mesh, [placement])  # type: ignore[arg-type]
            sharded.append(shard)
        sharded.append(nn.Parameter(torch.zeros(2)))
        sharded[-1].grad = torch.zeros(2)  # a plain gradient among shards
        norm = clip_by_global_norm(sharded, 0.5)
        assert abs(float(norm) / expected - 1) < 1e-6, (float(norm), expected)
        _equal_on_all_ranks(norm)
        for shard, reference in zip(sharded, whole, strict=False):
            assert isinstance(shard.grad, DTensor)
            assert reference.grad is not None
            torch.testing.assert_close(shard.grad.full_tensor(), reference.grad, rtol=1e-6, atol=0)
    # Ranks of a pipeline hold different parameters: their squares add up.
    mine = with_gradients(scale=float(rank + 1))
    norm = clip_by_global_norm(mine, 0.5, pipeline=dist.group.WORLD)
    together = expected * sum((r + 1) ** 2 for r in range(world)) ** 0.5
    assert abs(float(norm) / together - 1) < 1e-6, (float(norm), together)
    _equal_on_all_ranks(norm)
    dist.destroy_process_group()


def _equal_on_all_ranks(value: Tensor) -> None:
    gathered: list[Tensor | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    assert all(torch.equal(other, value) for other in gathered if other is not None)


def test_shards_count_once_and_all_ranks_agree(tmp_path: Path) -> None:
    world = 2
    mp.spawn(_rank, args=(world, str(tmp_path)), nprocs=world)
