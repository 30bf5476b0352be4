"""Fewer experts than ranks: ZeRO shards rows or columns of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard, _StridedShard

import placed
import test_dist_optimizers as optimizers
import tiny
from allometry.configs.run import RunConfig
from allometry.models.moe import begin_step
from allometry.optim.clip import clip_by_global_norm
from allometry.parallel import zero
from thinned import thinned

RunRanks = Callable[..., list[Any]]
# (D, F): 2 and 4 ranks shard up and gate [F, D] by rows, down [D, F] by columns; or vice versa.
ROWS, COLUMNS = (21, 20), (24, 10)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero1": (2, {"zero": {"stage": 1}}),
    "zero2-4": (4, {"zero": {"stage": 2}}),
    "zero3-4": (4, {"zero": {"stage": 3}}),
    "replicas2-zero3": (4, {"zero": {"stage": 3, "replicas": 2}}),
    "zero3-offloaded": (2, {"zero": {"stage": 3, "offload": "cpu"}}),
    "tp2-zero2": (4, {"tp": 2, "zero": {"stage": 2}}),
    "pp2-zero1": (4, {"pp": 2, "zero": {"stage": 1}}),
    "alone": (1, {}),
    "zero0": (2, {}),
}


def model(widths: tuple[int, int], experts: int = 3) -> dict[str, Any]:
    return placed.MOE | {
        "width": widths[0],
        "experts": {
            "kind": "swiglu",
            "num_experts": experts,
            "experts_per_token": 2,
            "width": widths[1],
        },
    }


def config(layout: dict[str, Any], widths: tuple[int, int] = ROWS, experts: int = 3) -> RunConfig:
    given = tiny.config(0, "fp64").model_dump()
    given |= {"model": model(widths, experts), "parallel": layout}
    return RunConfig.model_validate(given)


def step(run: RunConfig, check: Callable[[DTensor], None] | None = None) -> dict[str, float]:
    """Return errors of gradients, their norm and initial values against one process."""
    with tiny.mesh(run) as mesh:
        batches = tiny.micro_batches(2 * mesh.hdp.size)
        sharded, sync = tiny.distributed(run, mesh)
        alone = tiny.initialized(run, mesh.device)
        started = tiny.values(sharded)
        for name, value in tiny.values(alone).items():
            assert torch.equal(started[name], value), name
        for each in (sharded, alone):
            begin_step(each, sum(batch.tokens_BL.numel() for batch in batches))
        tiny.backward_shared(sharded, sync, batches, mesh)
        tiny.backward_alone(alone, batches)
        for name, parameter in sharded.named_parameters():
            if ".experts." in name and check is not None:
                assert isinstance(parameter, DTensor)
                check(parameter)
        norms = [
            clip_by_global_norm(m.parameters(), None, on)
            for m, on in ((sharded, mesh), (alone, None))
        ]
        return {
            "gradients": tiny.worst_error(tiny.gradients(sharded), tiny.gradients(alone)),
            "norm": float((norms[0] / norms[1] - 1).abs()),
        }


def equal_shares(parameter: DTensor) -> None:
    """Assert that all ranks of a replica have equal shards, not of the first dimension."""
    placements = dict(
        zip(parameter.device_mesh.mesh_dim_names or (), parameter.placements, strict=True)
    )
    copies = parameter.device_mesh["replicas"].size() if "replicas" in placements else 1
    ranks = parameter.device_mesh.size() // copies
    assert parameter.to_local().numel() == parameter.numel() // ranks
    (cut,) = (placements[name] for name in ("shard", "expert_shard") if name in placements)
    assert isinstance(cut, (Shard, _StridedShard))
    assert cut.dim > 0


def sharded_errors(run: RunConfig) -> dict[str, float]:
    return step(run, equal_shares)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("world_size", "widths"), [(2, ROWS), (4, COLUMNS)])
def test_gradients_and_initial_values_equal_one_process(
    run_ranks: RunRanks, world_size: int, widths: tuple[int, int], stage: int
) -> None:
    run = config({"zero": {"stage": stage}}, widths)
    for of_rank in run_ranks(sharded_errors, world_size, run):
        assert max(of_rank.values()) < 1e-12


@pytest.mark.parametrize(
    ("world_size", "experts", "layout"),
    [
        (4, 2, {"zero": {"stage": 3}}),
        (4, 3, {"zero": {"stage": 3, "replicas": 2}}),
        (4, 3, {"tp": 2, "zero": {"stage": 2}}),
        (4, 3, {"zero": {"stage": 2, "offload": "cpu"}}),
        (4, 2, {"ep": 2, "zero": {"stage": 2}}),
        pytest.param(8, 2, {"tp": 2, "ep": 2, "zero": {"stage": 3}}, marks=pytest.mark.slow),
    ],
)
def test_with_other_ways_to_cut(
    run_ranks: RunRanks, world_size: int, experts: int, layout: dict[str, Any]
) -> None:
    for of_rank in run_ranks(sharded_errors, world_size, config(layout, experts=experts)):
        assert max(of_rank.values()) < 1e-12


def misplaced_error(run: RunConfig) -> dict[str, float]:
    """Return the errors if a rank uses another rank's rows."""
    right = zero.sum_over_tp

    def exchanged(parameters: Iterator[Tensor], tp: Any) -> None:
        for parameter in parameters:
            if isinstance(parameter, DTensor) and parameter.dim() == 3:
                assert isinstance(parameter.grad, DTensor)
                part = parameter.grad.to_local()
                part.copy_(part.flip(1))

    zero.sum_over_tp = exchanged
    try:
        return step(run)
    finally:
        zero.sum_over_tp = right


def test_the_comparison_sees_rows_in_another_order(run_ranks: RunRanks) -> None:
    for of_rank in run_ranks(misplaced_error, 2, config({"zero": {"stage": 2}})):
        assert of_rank["gradients"] > 0.1
        assert of_rank["norm"] < 1e-12


@contextmanager
def three_experts() -> Iterator[None]:
    """Make the shared helpers of the optimizer tests build this file's model."""
    own, optimizers.MOE = optimizers.MOE, model(ROWS)
    try:
        yield
    finally:
        optimizers.MOE = own


def differences(layout: dict[str, Any]) -> dict[str, Any]:
    with three_experts():
        return optimizers.differences(layout, list(optimizers.KINDS))


def save(layout: dict[str, Any], folder: Path) -> None:
    with three_experts():
        optimizers.save(layout, list(optimizers.KINDS), folder)


def differences_after_loading(layout: dict[str, Any], folder: Path) -> dict[str, Any]:
    with three_experts():
        return optimizers.differences_after_loading(layout, list(optimizers.KINDS), folder)


@pytest.mark.parametrize("name", thinned({"zero3-4", "tp2-zero2"}, list(LAYOUTS)))
def test_every_optimizer_updates_such_shards_as_whole_parameters(
    run_ranks: RunRanks, name: str
) -> None:
    world_size, layout = LAYOUTS[name]
    for of_rank in run_ranks(differences, world_size, layout):
        assert of_rank == {kind: {} for kind in optimizers.KINDS}


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    thinned(
        {("zero3-4", "tp2-zero2"), ("zero0", "zero3-4")},
        [
            ("zero3-4", "tp2-zero2"),
            ("tp2-zero2", "alone"),
            ("zero0", "zero3-4"),
            ("zero3-4", "zero0"),
            ("pp2-zero1", "replicas2-zero3"),
            ("zero3-offloaded", "zero1"),
        ],
    ),
)
def test_states_move_between_layouts_to_the_bit(
    run_ranks: RunRanks, tmp_path: Path, saved_by: str, loaded_by: str
) -> None:
    world_size, layout = LAYOUTS[saved_by]
    run_ranks(save, world_size, layout, tmp_path)
    world_size, layout = LAYOUTS[loaded_by]
    for of_rank in run_ranks(differences_after_loading, world_size, layout, tmp_path):
        assert of_rank == {kind: {} for kind in optimizers.KINDS}
