"""FP8 states are bitwise equal in layouts with equal groups, and load in all layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import tiny
from allometry.configs.run import RunConfig
from allometry.launch.studies.commands import Verify
from allometry.launch.studies.verify import verified
from allometry.models.build import parameter_specs
from allometry.optim.build import build_optimizer, init_states
from allometry.optim.fp8_states import KEYS, Fp8States, Groups
from allometry.parallel.apply import Parallel
from allometry.parallel.mesh import local
from allometry.scaling.plan import RunPlan
from allometry.studies.rehearse import rehearse
from allometry.trainer.loop import state_tensors
from allometry.trainer.state.states import load
from asked import about
from placed import LAYOUTS, MOE, like
from run_folders import events, rows
from sealed import write_sealed
from test_dist_optimizers import begun, rules, take_steps
from test_dist_runs import launch
from thinned import thinned

RunRanks = Callable[..., list[Any]]
Make = Callable[..., RunConfig]
KINDS = {
    "adamw": ("adamw", "nearest"),
    "adamw at random": ("adamw", "stochastic"),
    "muon at random": ("muon", "stochastic"),
    "muonh": ("muonh", "nearest"),
    "adamh": ("adamh", "nearest"),
}
# Column shards under tp 2 keep 128 columns, and 8 ranks shard rows of the experts' down instead.
WIDE = MOE | {
    "width": 48,
    "head_dim": 64,
    "ffn_width": 256,
    "experts": {"kind": "swiglu", "num_experts": 6, "experts_per_token": 2, "width": 256},
}
STEPS = 3


def config(layout: dict[str, Any], kind: str, model: dict[str, Any] = WIDE) -> RunConfig:
    name, rounding = KINDS[kind]
    states = {"kind": "fp8", "rounding": rounding}
    optimizer = {"kind": name, "lr": 2e-2, "states": states}
    run = tiny.config(0, "fp32").model_dump() | {"model": model, "optimizer": optimizer}
    run["batch"] = {"sequences": 24, "micro_batch_sequences": 1}
    return RunConfig.model_validate(run | {"parallel": layout})


def decoded(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return this rank's shards of all FP8 states by parameter and key, and of the parameters."""
    found = {}
    for group in optimizer.param_groups:
        fp8 = group["fp8"]
        assert isinstance(fp8, Fp8States)
        for name, p in zip(group["param_names"], group["params"], strict=True):
            found[name] = local(p.detach()).clone()
            held = optimizer.state[p]
            for key in KEYS:
                if f"{key}.q" in held:
                    assert local(held[f"{key}.q"]).dtype is torch.float8_e4m3fn
                    found[f"{name} {key}"] = fp8.read(p, held, key)
    return found


class Alone:
    """Run of one process, continued on demand when more steps are needed; ranks cache it."""

    def __init__(self, run: RunConfig) -> None:
        model = tiny.initialized(run, torch.device("cpu"))
        self.named = dict(model.named_parameters())
        specs = parameter_specs(model)
        self.optimizer = build_optimizer(self.named.items(), specs, rules(run), run.optimizer)
        self.after: dict[int, dict[str, Tensor]] = {}

    def states(self, steps: int) -> dict[str, Tensor]:
        for step in range(len(self.after), steps):
            take_steps(self.named, self.optimizer, range(step, step + 1))
            self.after[step + 1] = decoded(self.optimizer)
        return self.after[steps]


_ALONE: dict[str, Alone] = {}


def alone(run: RunConfig, steps: int) -> dict[str, Tensor]:
    """Return parameters and states after steps of one process, for any layout."""
    key = run.model.model_dump_json() + run.optimizer.model_dump_json()
    if key not in _ALONE:
        _ALONE[key] = Alone(run)
    return _ALONE[key].states(steps)


def wrong(run: RunConfig, optimizer: torch.optim.Optimizer, steps: int) -> dict[str, float]:
    """Return tensors that differ bitwise from one process's; vectors use torch's fused AdamW."""
    wanted, found = alone(run, steps), decoded(optimizer)
    parameters = {
        name: p
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }
    errors = {}
    for name, part in found.items():
        parameter = parameters[name.split(" ")[0]]
        expected = like(wanted[name], parameter)
        if part.numel() and not torch.equal(part, expected):
            error = float((part - expected).abs().max() / expected.abs().max())
            if parameter.dim() > 1 or error > 1e-7:
                errors[name] = error
    return errors


def stepped(layout: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = {}
    for kind in KINDS:
        run = config(layout, kind)
        with begun(run) as (parallel, optimizer, _):
            take_steps(dict(parallel.named_parameters()), optimizer, range(STEPS))
            found[kind] = wrong(run, optimizer, STEPS)
    return found


@pytest.mark.parametrize(
    "name",
    thinned(
        {"zero0", "tp2", "pp2"},
        [name for name in LAYOUTS if name != "alone"],
    ),
)
def test_states_and_parameters_are_one_process_s_to_the_bit(run_ranks: RunRanks, name: str) -> None:
    world_size, layout = LAYOUTS[name]
    for found in run_ranks(stepped, world_size, layout):
        assert found == {kind: {} for kind in KINDS}


def save(parallel: Parallel, optimizer: torch.optim.Optimizer, mesh: Any, path: Path) -> None:
    state = state_tensors(parallel, optimizer)
    write_sealed(path, state, mesh)


def moved(
    layout: dict[str, Any], model: dict[str, Any], source: Path | None, to: Path, steps: range
) -> list[tuple[dict[str, float], dict[str, int]]]:
    """(On each rank) resume from ``source`` for some steps, and save."""
    found = []
    for kind in KINDS:
        run, converted = config(layout, kind, model), {}
        with begun(run) as (parallel, optimizer, mesh):
            if source is not None:
                init_states(optimizer)
                names = {p: name for name, p in parallel.named_parameters()}
                state = state_tensors(parallel, optimizer)
                converted = load(source / kind, state, names, mesh).converted
            take_steps(dict(parallel.named_parameters()), optimizer, steps)
            save(parallel, optimizer, mesh, to / kind)
            found.append((wrong(run, optimizer, steps.stop), converted))
    return found


EIGHT = (8, {"zero": {"stage": 3}})


@pytest.mark.parametrize(
    "names",
    thinned(
        {"zero3-4 tp2 zero2"},
        [
            "zero3-4 tp2 zero2",
            "zero3-4 zero2 zero3-8",
            "tp2-zero3 ep2-zero3 pp2-zero1",
            "ep2-tp2-zero1 alone replicas2-zero3",
        ],
    ),
)
def test_states_move_between_layouts_without_a_new_rounding(
    run_ranks: RunRanks, tmp_path: Path, names: str
) -> None:
    source = None
    for at, name in enumerate(names.split()):
        world_size, layout = EIGHT if name == "zero3-8" else LAYOUTS[name]
        steps = range(0, 2) if at == 0 else range(at + 1, at + 2)
        asked = layout, WIDE, source, tmp_path / name, steps
        for found in run_ranks(moved, world_size, *asked, timeout_s=240.0):
            assert found == [({}, {})] * len(KINDS)
        source = tmp_path / name


def compared(layout: dict[str, Any], source: Path) -> dict[str, Any]:
    """Load a checkpoint with other groups; return errors of states and conversions."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        run = config(layout, kind, MOE)
        with begun(run) as (parallel, optimizer, mesh):
            init_states(optimizer)
            names = {p: name for name, p in parallel.named_parameters()}
            state = state_tensors(parallel, optimizer)
            converted = load(source / kind, state, names, mesh).converted
            worst, cut = 0.0, 0
            wanted, mine = alone(run, 2), decoded(optimizer)
            for p, name in names.items():
                cut += p.dim() > 1 and Groups.of(p).cuts > 1
                for key in KEYS:
                    part = mine.get(f"{name} {key}")
                    if part is not None and part.numel():
                        expected = like(wanted[f"{name} {key}"], p)
                        worst = max(worst, float((part - expected).norm() / expected.norm()))
            found[kind] = {"worst": worst, "cut": cut, "converted": converted}
    return found


def test_a_layout_that_cuts_groups_rounds_the_states_of_others_anew(
    run_ranks: RunRanks, tmp_path: Path
) -> None:
    run_ranks(moved, 1, {}, MOE, None, tmp_path / "alone", range(2))
    for found in run_ranks(compared, 2, {"tp": 2}, tmp_path / "alone"):
        for kind, seen in found.items():
            assert 0.0 < seen["worst"] < 0.04, (kind, seen)
            states = sum(seen["converted"].values())
            assert set(seen["converted"]) == {"fp8 -> fp8 of columns in 2 parts"}
            assert seen["cut"] <= states <= 2 * seen["cut"]
    run_ranks(moved, 2, {"tp": 2}, MOE, None, tmp_path / "tp2", range(2))
    (found,) = run_ranks(compared, 1, {}, tmp_path / "tp2")
    for seen in found.values():
        assert 0.0 < seen["worst"] < 0.08
        assert set(seen["converted"]) == {"fp8 of columns in 2 parts -> fp8"}


def held(run: RunConfig) -> int:
    """(On each rank) bytes of all states."""
    with begun(run) as (_, optimizer, _):
        init_states(optimizer)
        tensors = [local(t) for state in optimizer.state.values() for t in state.values()]
        return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("kind", thinned({"adamw"}, ["adamw", "muon at random"]))
def test_rehearsals_and_estimates_count_the_bytes_held(run_ranks: RunRanks, kind: str) -> None:
    world_size, layout = LAYOUTS["ep2-tp2-zero1"]
    for model in (WIDE, MOE):
        run = config(layout, kind, model)
        found = run_ranks(held, world_size, run)[0]
        (report,) = rehearse(run, world_size)
        assert report.bytes_held["optimizer states"] == found
        estimate = RunPlan.of(run, world_size).memory
        # Except for the sizes of empty or uneven shards, the estimate is that of the first rank.
        assert estimate.optimizer_states == found


def placements(layout: dict[str, Any]) -> list[str]:
    """(On each rank) states whose placement or number of rows differs from their parameter's."""
    off = []
    with begun(config(layout, "adamw")) as (parallel, optimizer, _):
        init_states(optimizer)
        for name, p in parallel.named_parameters():
            for key, state in optimizer.state[p].items():
                if key != "step" and isinstance(p, DTensor):
                    assert isinstance(state, DTensor)
                    same = state.placements == p.placements and state.device_mesh == p.device_mesh
                    if not same or local(state).shape[:-1] != local(p).shape[:-1]:
                        off.append(f"{name} {key}")
    return off


def test_states_lie_as_their_parameters(run_ranks: RunRanks) -> None:
    for name in ("tp2-zero3", "ep2-tp2-zero1"):
        world_size, layout = LAYOUTS[name]
        assert run_ranks(placements, world_size, layout) == [[]] * world_size


def compressed(tiny: Make, folder: Path, layout: dict[str, Any], *said: str) -> RunConfig:
    return tiny(
        f"parallel={json.dumps(layout)}",
        "optimizer.states.kind=fp8",
        *said,
        folder=folder,
    )


@pytest.mark.parametrize(
    "layout",
    thinned({0, 1}, [0, 1, 2]),
)
def test_two_resumes_change_no_bit_and_the_run_goes_on_elsewhere(
    tiny: Make, run_ranks: RunRanks, tmp_path: Path, layout: int
) -> None:
    parallel: dict[str, Any] = (
        {"zero": {"stage": 3, "offload": "cpu"}},
        {"tp": 2},
        {"pp": 2},
    )[layout]
    said = ("optimizer.states.rounding=stochastic", "training.total_steps=8")
    straight = compressed(tiny, tmp_path / "straight", parallel, *said)
    parts = compressed(tiny, tmp_path / "parts", parallel, *said)
    run_ranks(launch, 2, straight, 6)
    for stop in (2, 4, 6):
        run_ranks(launch, 2, parts, stop)
    wanted = [row["loss"] for row in rows(tmp_path / "straight")]
    assert [row["loss"] for row in rows(tmp_path / "parts")] == wanted
    run_ranks(launch, 2, compressed(tiny, tmp_path / "parts", {"zero": {"stage": 2}}, *said))
    assert len(rows(tmp_path / "parts")) == 8
    told = [event for event in events(tmp_path / "parts") if event["event"] == "states_converted"]
    # Only tp cuts columns of 32 and 64 in two.
    assert bool(told) == (parallel == {"tp": 2})


@pytest.mark.slow
def test_layouts_are_certified(tiny: Make, tmp_path: Path) -> None:
    """Includes columns cut by tp, where groups differ."""
    config = tiny("optimizer.states.kind=fp8")
    asked = Verify(config="", layout=("tp=2", "zero.stage=2"), out=tmp_path / "certificate.json")
    report = verified(about(config, asked))
    assert report.passed, report.text
