"""Every optimizer updates sharded parameters bitwise as it updates unsharded ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

import tiny
from allometry.configs.run import RunConfig
from allometry.models.build import named_parameters, parameter_specs
from allometry.optim import newton_schulz
from allometry.optim.build import build_optimizer, init_states, set_lr
from allometry.parallel.apply import Parallel
from allometry.parallel.mesh import Mesh, local
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.update_rules import OPTIMIZER_KINDS
from allometry.trainer.loop import state_tensors
from allometry.trainer.state import checkpoint
from placed import LAYOUTS, MOE, given, like
from sealed import write_sealed
from thinned import thinned

RunRanks = Callable[..., list[Any]]

KINDS: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in OPTIMIZER_KINDS},
    "muonh-spectral": {"kind": "muonh", "step_norm": "spectral"},
    "sgd_sai": {"lr": 1e-3},
    "apollo": {"refresh_steps": 2},
    "apollo_mini": {"refresh_steps": 2},
}
STEPS = 3


def config(layout: dict[str, Any], kind: str) -> RunConfig:
    run = tiny.config(0, "fp32").model_dump()
    optimizer = {"kind": kind, "lr": 2e-2, **KINDS[kind]}
    return RunConfig.model_validate(
        run | {"model": MOE, "parallel": layout, "optimizer": optimizer}
    )


def take_steps(
    named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range
) -> None:
    """Take optimizer steps on given gradients, sharded like the parameters."""
    for step in steps:
        for name, parameter in named.items():
            whole = 0.01 * given(f"{name} {step}", parameter.shape)
            if isinstance(parameter, DTensor):
                whole = distribute_tensor(
                    whole, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            parameter.grad = whole
        set_lr(optimizer, 1.0 - 0.1 * step)
        optimizer.step()


def rules(run: RunConfig) -> Parameterization:
    return Parameterization(run.parameterization, run.model, run.optimizer)


def alone(run: RunConfig, steps: int = STEPS) -> dict[str, nn.Parameter]:
    """Return full parameters after the steps of one process."""
    model = tiny.initialized(run, torch.device("cpu"))
    named = {name: p for name, _, _, p in named_parameters(model)}
    optimizer = build_optimizer(named.items(), parameter_specs(model), rules(run), run.optimizer)
    take_steps(named, optimizer, range(steps))
    return named


def difference(
    run: RunConfig, optimizer: torch.optim.Optimizer, before: dict[str, Tensor], steps: int
) -> dict[str, float]:
    """Return errors of parameters whose shard differs bitwise from one process's.

    torch's fused AdamW on a CPU rounds the last elements of a tensor differently from the others,
    so its parameters may differ in the last bit.
    """
    wanted, wrong = alone(run, steps), {}
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            part, expected = local(p.detach()), like(wanted[name].detach(), p)
            if part.numel() == 0:
                continue
            error = float((part - expected).abs().max() / expected.abs().max())
            if error > (1e-7 if group["rule"] == "adamw" else 0.0):
                wrong[name] = error
            assert not torch.equal(part, before[name]), f"{name} must move"
    return wrong


@contextmanager
def begun(run: RunConfig) -> Iterator[tuple[Parallel, torch.optim.Optimizer, Mesh]]:
    """Yield this rank's part of the model and its optimizer at the start of a run."""
    with tiny.mesh(run) as mesh:
        parallel = tiny.parallel(run, mesh)
        optimizer = build_optimizer(
            parallel.named_parameters(), parallel.specs(), rules(run), run.optimizer, mesh
        )
        yield parallel, optimizer, mesh


def copies(parallel: Parallel) -> dict[str, Tensor]:
    return {name: local(p.detach()).clone() for name, p in parallel.named_parameters()}


def differences(layout: dict[str, Any], kinds: list[str]) -> dict[str, dict[str, float]]:
    found = {}
    for kind in kinds:
        run = config(layout, kind)
        with begun(run) as (parallel, optimizer, _):
            before = copies(parallel)
            take_steps(dict(parallel.named_parameters()), optimizer, range(STEPS))
            found[kind] = difference(run, optimizer, before, STEPS)
    return found


ALWAYS = ("zero0", "zero3-4", "ep2-tp2-zero1", "pp2-tp2", "replicas2-zero3")
"""Layouts that run by default; the others run in make test-all."""


@pytest.mark.parametrize(
    "name",
    [
        name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow)
        for name in LAYOUTS
        if name != "alone"
    ],
)
def test_given_gradients_give_the_same_bits_in_every_layout(run_ranks: RunRanks, name: str) -> None:
    world_size, layout = LAYOUTS[name]
    for found in run_ranks(differences, world_size, layout, list(KINDS)):
        assert found == {kind: {} for kind in KINDS}


def differences_in_batches(layout: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Newton-Schulz as on a GPU: matrices of one shape in batches of four."""
    usual = newton_schulz.usual_batch
    try:
        newton_schulz.usual_batch = lambda rows, columns, device_type: 4
        return differences(layout, ["muon", "muonh"])
    finally:
        newton_schulz.usual_batch = usual


@pytest.mark.parametrize("name", ["zero0", "zero3-4", "ep2-tp2-zero1", "pp2"])
def test_batches_of_matrices_give_the_same_bits_in_every_layout(
    run_ranks: RunRanks, name: str
) -> None:
    world_size, layout = LAYOUTS[name]
    for found in run_ranks(differences_in_batches, world_size, layout):
        assert found == {"muon": {}, "muonh": {}}


def differences_of_shards(kind: str) -> float:
    """Return the largest difference if each rank treats its shards as full matrices."""
    run = config({"zero": {"stage": 3}}, kind)
    with tiny.mesh(run) as mesh:
        parallel = tiny.parallel(run, mesh)
        sharded = dict(parallel.named_parameters())
        named = {name: nn.Parameter(local(p.detach()).clone()) for name, p in sharded.items()}
        optimizer = build_optimizer(named.items(), parallel.specs(), rules(run), run.optimizer)
        for step in range(STEPS):
            for name, p in named.items():
                whole = 0.01 * given(f"{name} {step}", sharded[name].shape)
                p.grad = like(whole, sharded[name]).clone()
            set_lr(optimizer, 1.0 - 0.1 * step)
            optimizer.step()
        wanted = alone(run)
        return max(
            float((p.detach() - like(wanted[name].detach(), sharded[name])).abs().max())
            for name, p in named.items()
        )


@pytest.mark.parametrize("kind", ["muon", "muonh", "adamh", "sgd_sai", "apollo"])
def test_the_comparison_sees_rules_applied_to_shards(run_ranks: RunRanks, kind: str) -> None:
    assert min(run_ranks(differences_of_shards, 2, kind)) > 1e-4


def save(layout: dict[str, Any], kinds: list[str], folder: Path) -> None:
    """Take some steps and save all states."""
    for kind in kinds:
        with begun(config(layout, kind)) as (parallel, optimizer, mesh):
            take_steps(dict(parallel.named_parameters()), optimizer, range(STEPS))
            write_sealed(folder / kind, state_tensors(parallel, optimizer), mesh)


def differences_after_loading(
    layout: dict[str, Any], kinds: list[str], folder: Path
) -> dict[str, dict[str, float]]:
    """Compare steps that continue from another layout's checkpoint."""
    found = {}
    for kind in kinds:
        run = config(layout, kind)
        with begun(run) as (parallel, optimizer, mesh):
            before = copies(parallel)
            init_states(optimizer)
            assert all(torch.equal(before[name], now) for name, now in copies(parallel).items())
            checkpoint.load(folder / kind, state_tensors(parallel, optimizer), mesh)
            take_steps(dict(parallel.named_parameters()), optimizer, range(STEPS, STEPS + 2))
            found[kind] = difference(run, optimizer, before, STEPS + 2)
    return found


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    thinned(
        {("ep2-tp2-zero1", "zero3-4")},
        [
            ("zero0", "ep2-tp2-zero1"),
            ("ep2-tp2-zero1", "zero3-4"),
            ("zero3-4", "pp2-tp2"),
            ("pp2-tp2", "replicas2-zero3"),
            ("ep2-zero3", "alone"),
        ],
    ),
)
def test_states_move_between_layouts_to_the_bit(
    run_ranks: RunRanks, tmp_path: Path, saved_by: str, loaded_by: str
) -> None:
    world_size, layout = LAYOUTS[saved_by]
    run_ranks(save, world_size, layout, list(KINDS), tmp_path)
    world_size, layout = LAYOUTS[loaded_by]
    for found in run_ranks(differences_after_loading, world_size, layout, list(KINDS), tmp_path):
        assert found == {kind: {} for kind in KINDS}
