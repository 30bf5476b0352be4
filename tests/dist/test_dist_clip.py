"""The global gradient norm counts each shard once and is equal on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import pipelined
import tiny
from allometry.optim.clip import clip_by_global_norm
from allometry.parallel.simulate import CollectiveLog
from clipping import joint_norm, with_gradients


def clip_on_shards() -> None:
    expected = joint_norm(with_gradients())
    layouts = (
        [Shard(0)] * 4,  # uneven, and empty on some ranks
        [Shard(0), Shard(0), Shard(1), Replicate()],
        [Replicate()] * 4,
    )
    with tiny.mesh() as mesh:
        for placements in layouts:
            parameters, whole = with_gradients(), with_gradients()
            clip_by_global_norm(whole, 0.5)
            sharded = []
            for parameter, placement in zip(parameters, placements, strict=True):
                assert parameter.grad is not None
                over = mesh.zero_mesh
                shard = nn.Parameter(distribute_tensor(parameter.detach(), over, [placement]))
                shard.grad = distribute_tensor(parameter.grad, over, [placement])
                sharded.append(shard)
            sharded.append(nn.Parameter(torch.zeros(2)))
            sharded[-1].grad = torch.zeros(2)  # a plain gradient among sharded ones
            along = torch.tensor([1.0, float(mesh.rank)], dtype=torch.float64)
            with CollectiveLog(mesh) as log:
                norm = clip_by_global_norm(sharded, 0.5, mesh, [along])
            assert len(log.calls) == 1
            assert along.tolist() == [2.0, 1.0]
            assert abs(float(norm) / expected - 1) < 1e-6, (float(norm), expected)
            _equal_on_all_ranks(norm)
            for shard, reference in zip(sharded, whole, strict=False):
                assert isinstance(shard.grad, DTensor)
                assert reference.grad is not None
                torch.testing.assert_close(
                    shard.grad.full_tensor(), reference.grad, rtol=1e-6, atol=0
                )


def clip_in_a_pipeline() -> None:
    expected = joint_norm(with_gradients())
    with tiny.mesh(pipelined.config(2, "1f1b")) as mesh:
        # Pipeline ranks have different parameters: their squares add up.
        mine = with_gradients(scale=float(mesh.pp.rank + 1))
        norm = clip_by_global_norm(mine, 0.5, mesh)
        together = expected * (1 + 4) ** 0.5
        assert abs(float(norm) / together - 1) < 1e-6, (float(norm), together)
        _equal_on_all_ranks(norm)


def _equal_on_all_ranks(value: Tensor) -> None:
    gathered: list[Tensor | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    assert all(torch.equal(other, value) for other in gathered if other is not None)


def test_shards_count_once_and_all_ranks_agree(run_ranks: Callable[..., list[Any]]) -> None:
    run_ranks(clip_on_shards, 2)
    run_ranks(clip_in_a_pipeline, 2)
