"""Runs of every optimizer resume bitwise in their layout, and continue in another layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import tiny as tiny_model
from allometry.configs.run import RunConfig
from allometry.optim.build import init_states
from allometry.parallel.mesh import local
from allometry.scaling.plan import RunPlan
from allometry.studies.rehearse import rehearse
from allometry.trainer.assemble import make_model, make_optimizer
from test_dist_checkpoints import DENSE_LAYOUTS, EXPERT_LAYOUTS, MOE, losses, prepared
from test_dist_runs import launch
from thinned import thinned

Ranks = Callable[..., list[Any]]
Make = Callable[..., RunConfig]

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "muonh": {"lr": 1e-3},
    "sgd_sai": {"lr": 1e-4},
    "apollo": {"lr": 2e-3, "refresh_steps": 3},
}


def run_of(
    tiny: Make, folder: Path, kind: str, layout: dict[str, Any], model: dict[str, Any] | None
) -> RunConfig:
    def make(*changes: str, folder: Path) -> RunConfig:
        kept = [change for change in changes if not change.startswith("optimizer.")]
        optimizer = {"kind": kind, **OPTIMIZERS[kind]}
        return tiny(*kept, f"optimizer={json.dumps(optimizer)}", folder=folder)

    return prepared(make, folder, layout, model)


@pytest.mark.parametrize(
    ("kind", "name"),
    thinned(
        {("muonh", "pp2"), ("apollo", "ep2")},
        [
            ("muonh", "pp2"),
            ("muonh", "hdp4-ep2-zero3"),
            ("apollo", "ep2"),
            ("sgd_sai", "hdp2-zero3"),
        ],
    ),
)
def test_two_resumes_on_one_layout_change_no_bit(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, kind: str, name: str
) -> None:
    dense = name in DENSE_LAYOUTS
    world_size, layout = (DENSE_LAYOUTS if dense else EXPERT_LAYOUTS)[name]
    straight, parts = (
        run_of(tiny, tmp_path / which, kind, layout, None if dense else MOE)
        for which in ("straight", "parts")
    )
    run_ranks(launch, world_size, straight, 6)
    for stop in (2, 4, 6):
        run_ranks(launch, world_size, parts, stop)
    assert losses(parts) == losses(straight)
    assert len(losses(parts)) == 6
    assert len(set(losses(parts))) == 6


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        # With experts, routing that rounding flips would show at once: MuonH's updates are
        # orthogonal in bf16, whose last bits are noise in directions without a gradient.
        ("muonh", ("hdp2-tp2-zero2", "alone", "pp2-zbv-hdp2-zero1", "hdp2-zero3")),
        ("apollo", ("ep2-tp2-zero1", "alone", "hdp4-ep2-zero3", "pp2-ep2")),
    ],
)
def test_a_run_goes_on_in_other_layouts(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, kind: str, layouts: tuple[str, ...]
) -> None:
    known, model = (DENSE_LAYOUTS, None) if kind == "muonh" else (EXPERT_LAYOUTS, MOE)
    straight = run_of(tiny, tmp_path / "straight", kind, {}, model)
    run_ranks(launch, 1, straight, 7)
    for stop, name in zip((2, 3, 5, 7), layouts, strict=True):
        world_size, layout = known[name]
        moving = run_of(tiny, tmp_path / "moving", kind, layout, model)
        run_ranks(launch, world_size, moving, stop)
    wanted, found = losses(straight), losses(run_of(tiny, tmp_path / "moving", kind, {}, model))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert found[1:] != pytest.approx(wanted[:-1], rel=1e-5), "the comparison can fail"


def states_held(config: RunConfig) -> int:
    """(On each rank) bytes of the optimizer's states."""
    plan = RunPlan.of(config, dist.get_world_size())
    with tiny_model.mesh(config) as mesh:
        optimizer = make_optimizer(config, plan, make_model(config, plan, mesh), mesh)
        init_states(optimizer)
        held = [local(t) for state in optimizer.state.values() for t in state.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


@pytest.mark.parametrize(
    ("kind", "name"), [("muonh", "hdp4-ep2-zero3"), ("apollo", "ep2-tp2-zero1")]
)
def test_rehearsals_count_states_and_what_is_exchanged(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, kind: str, name: str
) -> None:
    world_size, layout = EXPERT_LAYOUTS[name]
    config = run_of(tiny, tmp_path, kind, layout, MOE)
    (report,) = rehearse(config, world_size)
    assert report.bytes_held["optimizer states"] == run_ranks(states_held, world_size, config)[0]
    sent = [c for c, _ in report.collectives if c.kind == "all-to-all" and c.ranks == world_size]
    assert len(sent) >= 1, "matrices travel to their owners and back"
