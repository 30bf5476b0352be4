"""Optimizer states in host memory and in files: bitwise as in memory, and resumable."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from allometry.configs.run import RunConfig
from checkpoint_bits import bits
from run_folders import events, rows
from test_dist_runs import launch
from thinned import thinned

Ranks = Callable[..., list[Any]]
Make = Callable[..., RunConfig]

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "alone-zero3": (1, {"zero": {"stage": 3}}),
    "hdp2-zero1": (2, {"zero": {"stage": 1}}),
    "hdp2-zero3-cpu": (2, {"zero": {"stage": 3, "offload": "cpu"}}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "hdp2-tp2-zero2": (4, {"tp": 2, "zero": {"stage": 2}}),
    "pp2-hdp2-zero1": (4, {"pp": 2, "zero": {"stage": 1}}),
    "tp2-zero2": (2, {"tp": 2, "zero": {"stage": 2}}),
    "pp2-zero1": (2, {"pp": 2, "zero": {"stage": 1}}),
}
TIERS: dict[str, dict[str, Any] | None] = {
    "memory": None,
    "cpu": {},
    "nvme": {"nvme": "SWAP"},
    "half": {"device": 0.5},
    "all": {"device": 0.3, "cpu": 0.4, "nvme": "SWAP"},
    "cpu-masters": {"master_weights": True},
    "nvme-masters": {"nvme": "SWAP", "master_weights": True},
    "all-masters": {"device": 0.3, "cpu": 0.4, "nvme": "SWAP", "master_weights": True},
    "nvme-gradients": {"nvme": "SWAP", "master_weights": True, "gradients": True},
    "half-gradients": {"device": 0.5, "gradients": True},
}
OPTIMIZERS = {
    "adamw": {"kind": "adamw", "lr": 1e-2},
    "muonh": {"kind": "muonh", "lr": 1e-2, "weight_decay": 0.0},
    "apollo": {"kind": "apollo", "lr": 1e-2},
}
RANDOM = {"kind": "fp8", "rounding": "stochastic"}
IN_FP8 = {
    "adamw in fp8": OPTIMIZERS["adamw"] | {"states": {"kind": "fp8"}},
    "adamw in fp8 at random": OPTIMIZERS["adamw"] | {"states": RANDOM},
    "muonh in fp8": OPTIMIZERS["muonh"] | {"states": {"kind": "fp8"}},
    "muon in fp8 at random": {"kind": "muon", "lr": 1e-2, "states": RANDOM},
}
HALF = "training.compute_dtype=bf16"
"""Lets masters be offloaded."""


def prepared(
    tiny: Make, folder: Path, layout: str, tier: str, optimizer: str = "adamw", *more: str
) -> RunConfig:
    parallel = json.loads(json.dumps(LAYOUTS[layout][1]))
    states = TIERS[tier]
    if states is not None:
        # A rank's states take half a MiB to two: several buckets per rule.
        states = (
            states
            | {"bucket_mib": 0.1}
            | ({"nvme": str(folder.parent / "swap")} if "nvme" in states else {})
        )
        parallel.setdefault("zero", {})["optimizer_states"] = states
    return tiny(
        f"parallel={json.dumps(parallel)}",
        f"optimizer={json.dumps((OPTIMIZERS | IN_FP8)[optimizer])}",
        *("model.width=64", "model.ffn_width=160", "model.num_layers=4"),
        *more,
        folder=folder,
    )


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing
    assert any(name.startswith("optimizer.") for name in one)


@pytest.fixture(scope="module")
def in_memory() -> dict[tuple[str, str], dict[str, Tensor]]:
    """Return a cache of the final tensors of runs without tiers."""
    return {}


@pytest.mark.parametrize(
    ("layout", "tier", "optimizer"),
    thinned(
        {
            ("alone", "nvme", "muonh"),
            ("hdp2-zero1", "all", "adamw"),
        },
        [
            (layout, tier, optimizer)
            for layout in LAYOUTS
            for tier in ("cpu", "nvme", "half", "all")
            for optimizer in OPTIMIZERS
            if layout != "hdp2-zero3-cpu" or tier == "nvme"
        ],
    ),
)
def test_every_tier_gives_the_bits_of_memory(
    tiny: Make,
    run_ranks: Ranks,
    tmp_path: Path,
    in_memory: dict[tuple[str, str], dict[str, Tensor]],
    layout: str,
    tier: str,
    optimizer: str,
) -> None:
    world_size = LAYOUTS[layout][0]
    if (layout, optimizer) not in in_memory:
        config = prepared(tiny, tmp_path / "memory", layout, "memory", optimizer)
        run_ranks(launch, world_size, config)
        in_memory[layout, optimizer] = bits(config, 20)
    config = prepared(tiny, tmp_path / "tiers", layout, tier, optimizer)
    run_ranks(launch, world_size, config)
    assert_same_bits(bits(config, 20), in_memory[layout, optimizer])
    swap = tmp_path / "swap"
    if swap.exists():
        assert not os.listdir(swap)
        assert swap.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("layout", "tier", "optimizer"),
    thinned(
        {("hdp2-zero1", "nvme", "adamw in fp8")},
        [
            ("alone", "all", "adamw in fp8 at random"),
            ("alone", "nvme", "muon in fp8 at random"),
            ("hdp2-zero1", "nvme", "adamw in fp8"),
            ("hdp2-zero1", "all", "muonh in fp8"),
            ("hdp2-zero3-cpu", "nvme", "adamw in fp8 at random"),
            ("tp2", "cpu", "adamw in fp8"),
            ("pp2", "all", "muon in fp8 at random"),
        ],
    ),
)
def test_states_in_fp8_have_the_bits_of_memory_too(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, layout: str, tier: str, optimizer: str
) -> None:
    memory = prepared(tiny, tmp_path / "memory", layout, "memory", optimizer)
    away = prepared(tiny, tmp_path / "tiers", layout, tier, optimizer)
    for config in (memory, away):
        run_ranks(launch, LAYOUTS[layout][0], config)
    wanted = bits(memory, 20)
    assert_same_bits(bits(away, 20), wanted)
    codes = [tensor for name, tensor in wanted.items() if name.endswith(".q")]
    assert codes
    assert all(tensor.dtype is torch.float8_e4m3fn for tensor in codes)
    (said,) = (one for one in events(tmp_path / "tiers") if one["event"] == "optimizer_states")
    travels = said["cpu_bytes"] + said["nvme_bytes"]
    assert travels > 0.3 * sum(tensor.nbytes for tensor in codes) / LAYOUTS[layout][0]


def test_states_in_fp8_resume_from_place_to_place(
    tiny: Make, run_ranks: Ranks, tmp_path: Path
) -> None:
    optimizer, ranks = "adamw in fp8 at random", 2
    straight = prepared(tiny, tmp_path / "straight", "hdp2-zero1", "memory", optimizer)
    run_ranks(launch, ranks, straight)
    path = ["memory", "nvme", "all", "memory"]
    for stop, tier in enumerate(path, start=1):
        config = prepared(tiny, tmp_path / "moving", "hdp2-zero1", tier, optimizer)
        run_ranks(launch, ranks, config, 5 * stop if stop < len(path) else None)
    assert_same_bits(bits(config, 20), bits(straight, 20))
    told = [one["event"] for one in events(tmp_path / "moving")]
    assert "states_converted" not in told


@pytest.mark.parametrize("to", thinned({"fp8"}, ["fp8", "other groups", "fp32"]))
def test_states_are_converted_in_tiers_as_in_memory(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, to: str
) -> None:
    """Branch to FP8 and to fp32, and to a layout that cuts columns within groups."""
    layout, before, after = {
        "fp8": ("alone", "adamw", "adamw in fp8 at random"),
        "other groups": ("tp2", "adamw in fp8", "adamw in fp8"),
        "fp32": ("alone", "adamw in fp8", "adamw"),
    }[to]
    parent = prepared(tiny, tmp_path / "parent", "alone", "nvme", before)
    run_ranks(launch, 1, parent, 10)
    link = f"folder: {parent.run.folder}, step: 10, changes: [optimizer.states]"
    said = f"run.parent={{{link}}}"
    found = []
    for tier in ("memory", "all"):
        config = prepared(tiny, tmp_path / tier, layout, tier, after, said)
        run_ranks(launch, LAYOUTS[layout][0], config)
        found.append((bits(config, 20), [row["loss"] for row in rows(tmp_path / tier)]))
        (told,) = (one for one in events(tmp_path / tier) if one["event"] == "states_converted")
        assert told["states"] > 10
    assert_same_bits(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]


@pytest.mark.parametrize(
    ("layout", "tier", "optimizer"),
    thinned(
        {
            ("pp2-zero1", "nvme-gradients", "adamw"),
        },
        [
            (layout, tier, optimizer)
            for layout in LAYOUTS
            if LAYOUTS[layout][1].get("zero")
            for tier in (
                *("cpu-masters", "nvme-masters", "all-masters"),
                *("nvme-gradients", "half-gradients"),
            )
            for optimizer in OPTIMIZERS
            if layout != "hdp2-zero3-cpu" or tier == "nvme-masters"
        ],
    ),
)
def test_masters_elsewhere_give_the_bits_of_memory(
    tiny: Make,
    run_ranks: Ranks,
    tmp_path: Path,
    in_memory: dict[tuple[str, str], dict[str, Tensor]],
    layout: str,
    tier: str,
    optimizer: str,
) -> None:
    world_size, key = LAYOUTS[layout][0], (f"{layout}-bf16", optimizer)
    monitors = "record.monitors.every_steps=5"
    if key not in in_memory:
        config = prepared(tiny, tmp_path / "memory", layout, "memory", optimizer, HALF, monitors)
        run_ranks(launch, world_size, config)
        in_memory[key] = bits(config, 20)
    config = prepared(tiny, tmp_path / "tiers", layout, tier, optimizer, HALF, monitors)
    run_ranks(launch, world_size, config, 7)
    run_ranks(launch, world_size, config)
    assert_same_bits(bits(config, 20), in_memory[key])
    if (tmp_path / "memory").exists():
        wanted, got = (rows(tmp_path / name) for name in ("memory", "tiers"))
        seen = [key for key in wanted[4] if key.startswith("monitors/")] + ["grad_norm"]
        assert any("param_rms" in key for key in seen)
        assert any("grad_rms" in key for key in seen)
        assert [[row[key] for key in seen] for row in got[4::5]] == [
            [row[key] for key in seen] for row in wanted[4::5]
        ]
    said = next(one for one in events(tmp_path / "tiers") if one["event"] == "optimizer_states")
    assert (said["parameters_bytes"] > 0) == (tier != "half-gradients")


MOE = (
    "model={kind: moe, vocab_size: 64, width: 64, num_layers: 3, num_heads: 4, num_kv_heads: 2, "
    "first_dense_layers: 1, ffn_width: 160, "
    "experts: {kind: swiglu, num_experts: 4, experts_per_token: 2, width: 48}}"
)
ALL_AWAY: dict[str, Any] = {"master_weights": True, "gradients": True, "bucket_mib": 0.1}


@pytest.mark.parametrize(
    ("ranks", "parallel", "more"),
    [
        (2, {"ep": 2, "zero": {"stage": 2}}, (MOE, "optimizer.states={kind: fp8}")),
        pytest.param(2, {"zero": {"stage": 3}}, (MOE,), marks=pytest.mark.slow),
        pytest.param(4, {"zero": {"stage": 2, "replicas": 2}}, (), marks=pytest.mark.slow),
        pytest.param(2, {"pp": 2, "zero": {"stage": 2}}, ("tied",), marks=pytest.mark.slow),
    ],
    ids=["experts-fp8", "experts", "replicas", "tied-pp2"],
)
def test_all_away_in_other_layouts(
    tiny: Make,
    run_ranks: Ranks,
    tmp_path: Path,
    ranks: int,
    parallel: dict[str, Any],
    more: tuple[str, ...],
) -> None:
    found = []
    model = ("model.width=64", "model.ffn_width=160") if MOE not in more else ()
    more = tuple("model.tied_embeddings=true" if each == "tied" else each for each in more)
    for states in (None, ALL_AWAY | {"nvme": str(tmp_path / "swap")}):
        zero = {"zero": parallel["zero"] | {"optimizer_states": states}}
        folder = tmp_path / ("away" if states else "memory")
        config = tiny(f"parallel={json.dumps(parallel | zero)}", HALF, *model, *more, folder=folder)
        run_ranks(launch, ranks, config)
        found.append(bits(config, 20))
    assert_same_bits(*found)
    said = next(one for one in events(tmp_path / "away") if one["event"] == "optimizer_states")
    assert said["parameters_bytes"] > 0


EACH_ONCE = ["memory", "cpu", "nvme", "all", "half", "memory", "nvme"]
STATES_PATH = ["memory", "cpu", "nvme", "memory", "nvme", "cpu", "memory", "all", "half", "nvme"]
STATES_PATH += ["all", "cpu", "all"]
MASTERS_PATH = ["memory", "nvme-gradients", "memory", "cpu-masters", "nvme-masters", "nvme"]
MASTERS_PATH += ["all-masters", "half-gradients", "nvme-gradients", "nvme-gradients"]


@pytest.mark.parametrize(
    ("path", "more"),
    [
        (EACH_ONCE, ()),
        pytest.param(STATES_PATH, (), marks=pytest.mark.slow),
        pytest.param(MASTERS_PATH, (HALF,), marks=pytest.mark.slow),
    ],
    ids=["each", "states", "masters"],
)
def test_a_run_resumes_from_every_tier_to_every_tier(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, path: list[str], more: tuple[str, ...]
) -> None:
    straight = prepared(tiny, tmp_path / "straight", "hdp2-zero1", "memory", "adamw", *more)
    run_ranks(launch, 2, straight)
    wanted = bits(straight, 20)
    moving = tmp_path / "moving"
    for stop, tier in enumerate(path, start=1):
        config = prepared(tiny, moving, "hdp2-zero1", tier, "adamw", *more)
        run_ranks(launch, 2, config, stop if stop < len(path) else None)
    assert_same_bits(bits(config, 20), wanted)
    assert [row["loss"] for row in rows(moving)] == [
        row["loss"] for row in rows(tmp_path / "straight")
    ]


def test_a_checkpoint_of_files_loads_in_another_layout(
    tiny: Make, run_ranks: Ranks, tmp_path: Path
) -> None:
    first = prepared(tiny, tmp_path / "first", "alone", "nvme")
    run_ranks(launch, 1, first, 5)
    shutil.copytree(tmp_path / "first", tmp_path / "other")
    memory = prepared(tiny, tmp_path / "first", "hdp2-zero1", "memory")
    files = prepared(tiny, tmp_path / "other", "hdp2-zero1", "nvme")
    for config in (memory, files):
        run_ranks(launch, 2, config)
    assert_same_bits(bits(files, 20), bits(memory, 20))


LATE: dict[str, Any] = {"update": "delayed", "bucket_mib": 0.1}


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, {"zero": {"stage": 3}}),
        pytest.param(2, {"zero": {"stage": 1}}, marks=pytest.mark.slow),
        pytest.param(2, {"zero": {"stage": 3, "offload": "cpu"}}, marks=pytest.mark.slow),
        pytest.param(2, {"tp": 2, "zero": {"stage": 2}}, marks=pytest.mark.slow),
        pytest.param(4, {"pp": 2, "zero": {"stage": 1}}, marks=pytest.mark.slow),
        pytest.param(4, {"zero": {"stage": 2, "replicas": 2}}, marks=pytest.mark.slow),
    ],
    ids=["zero3", "zero1", "zero3-cpu", "tp2-zero2", "pp2-hdp2", "replicas"],
)
def test_late_updates_are_those_of_one_process_and_resume_on_it(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, ranks: int, parallel: dict[str, Any]
) -> None:
    """From ranks with states in a file to one process with states on the host, and back."""

    def prepared(folder: Path, how: dict[str, Any], **states: Any) -> RunConfig:
        zero = {"zero": how.get("zero", {}) | {"optimizer_states": LATE | states}}
        sizes = ("model.width=64", "model.ffn_width=160", "optimizer.eps=1e-4")
        return tiny(f"parallel={json.dumps(how | zero)}", *sizes, folder=folder)

    one = prepared(tmp_path / "one", {})
    run_ranks(launch, 1, one)
    swap = str(tmp_path / "swap")
    for name, path in (("there", [(ranks, 20)]), ("moving", [(ranks, 6), (1, 11), (ranks, 20)])):
        for size, stop in path:
            how = prepared(tmp_path / name, parallel, nvme=swap)
            run_ranks(launch, size, how if size > 1 else prepared(tmp_path / name, {}), stop)
        found = [row["loss"] for row in rows(tmp_path / name)]
        assert found == pytest.approx([row["loss"] for row in rows(tmp_path / "one")], abs=1e-5)
    there, wanted = bits(tiny(folder=tmp_path / "there"), 20), bits(one, 20)
    assert there.keys() == wanted.keys()
    for name, tensor in there.items():
        assert (tensor - wanted[name]).abs().max() < 1e-5, name
