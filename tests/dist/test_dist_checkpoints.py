"""Checkpoints load in other layouts, and on one layout a resumed run is bitwise the same run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.run import RunConfig
from run_folders import rows
from test_dist_runs import launch
from thinned import thinned

Ranks = Callable[..., list[Any]]
Make = Callable[..., RunConfig]

MOE = {
    "kind": "moe",
    "vocab_size": 64,
    "width": 32,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "first_dense_layers": 1,
    "ffn_width": 48,
    "experts": {"kind": "swiglu", "num_experts": 4, "experts_per_token": 2, "width": 24},
    "router": {"gate": "sigmoid", "balance": {"kind": "bias", "rate": 0.01}, "z_loss": 1e-3},
}
ALONE: tuple[int, dict[str, Any]] = (1, {})
DENSE_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": ALONE,
    "hdp2-zero3": (2, {"zero": {"stage": 3}}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "pp2-zbv-hdp2-zero1": (
        4,
        {"pp": 2, "pipeline": {"schedule": "zbv_zero_bubble"}, "zero": {"stage": 1}},
    ),
    "hdp2-tp2-zero2": (4, {"tp": 2, "zero": {"stage": 2}}),
}
EXPERT_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": ALONE,
    "ep2": (2, {"ep": 2}),
    "hdp4-ep2-zero3": (4, {"ep": 2, "zero": {"stage": 3}}),
    "ep2-tp2-zero1": (4, {"ep": 2, "tp": 2, "zero": {"stage": 1}}),
    "pp2-ep2": (4, {"pp": 2, "ep": 2}),
    "tp2": (2, {"tp": 2}),
    "hdp3-zero2": (3, {"hdp": 3, "zero": {"stage": 2}}),
}
# A launch would measure again; a resumed run keeps the stages of the first launch.
MEASURED = {"pp2-measured": (2, {"pp": 2, "pipeline": {"split": "measured"}})}
SAVED, MORE = 4, 3


def pairs(names: dict[str, Any], steps: tuple[int, ...]) -> list[tuple[str, str]]:
    """Return pairs of each layout with the layouts ``steps`` positions later, in a circle."""
    order = list(names)
    return [(a, order[(i + n) % len(order)]) for n in steps for i, a in enumerate(order)]


def prepared(
    tiny: Make, folder: Path, layout: dict[str, Any], model: dict[str, Any] | None
) -> RunConfig:
    changes = [f"parallel={json.dumps(layout)}", "training.total_steps=20", "model.num_layers=4"]
    if model is not None:
        changes.append(f"model={json.dumps(model)}")
    # 12 sequences: 1, 2 and 4 ranks take micro-batches of 3, and 3 ranks micro-batches of 2.
    each = 2 if layout.get("hdp") == 3 else 3
    changes += ["batch.sequences=12", f"batch.micro_batch_sequences={each}"]
    # Adam's first updates are the sign of the gradient: a large rate would amplify rounding.
    changes.append("optimizer.lr=2e-3")
    return tiny(*changes, folder=folder)


def losses(config: RunConfig) -> list[float]:
    return [row["loss"] for row in rows(Path(config.run.folder))]


class Straight:
    """Runs made once for all pairs: uninterrupted ones, and those that stop after SAVED."""

    def __init__(self) -> None:
        self.losses: dict[str, list[float]] = {}
        self.stopped: dict[tuple[str, str], Path] = {}


@pytest.fixture(scope="module")
def made() -> Straight:
    return Straight()


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    thinned(
        {
            ("dense", "alone", "hdp2-zero3"),
            ("dense", "tp2", "pp2"),
            ("dense", "pp2-zbv-hdp2-zero1", "hdp2-tp2-zero2"),
            ("moe", "alone", "ep2"),
            ("moe", "ep2-tp2-zero1", "pp2-ep2"),
            ("moe", "hdp3-zero2", "hdp4-ep2-zero3"),
            ("moe", "pp2-ep2", "alone"),
        },
        [
            *(("dense", *pair) for pair in pairs(DENSE_LAYOUTS, (1, 2))),
            *(("moe", *pair) for pair in pairs(EXPERT_LAYOUTS, (1, 3))),
        ],
    ),
)
def test_a_run_goes_on_in_another_layout(
    tiny: Make,
    run_ranks: Ranks,
    made: Straight,
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    before: str,
    after: str,
) -> None:
    layouts = DENSE_LAYOUTS if kind == "dense" else EXPERT_LAYOUTS
    model = None if kind == "dense" else MOE
    if kind not in made.losses:
        config = prepared(tiny, tmp_path_factory.mktemp("straight") / "run", {}, model)
        run_ranks(launch, 1, config, SAVED + MORE)
        made.losses[kind] = losses(config)
    if (kind, before) not in made.stopped:
        world_size, layout = layouts[before]
        folder = tmp_path_factory.mktemp("stopped") / "run"
        run_ranks(launch, world_size, prepared(tiny, folder, layout, model), SAVED)
        made.stopped[kind, before] = folder
    folder = tmp_path_factory.mktemp("moved") / "run"
    shutil.copytree(made.stopped[kind, before], folder)
    world_size, layout = layouts[after]
    config = prepared(tiny, folder, layout, model)
    run_ranks(launch, world_size, config, SAVED + MORE)
    wanted = made.losses[kind]
    assert len(wanted) == SAVED + MORE
    assert losses(config) == pytest.approx(wanted, rel=1e-5)
    assert losses(config)[SAVED:] != pytest.approx(wanted[SAVED - 1 : -1], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "name"),
    thinned(
        {("dense", "tp2"), ("dense", "pp2-measured"), ("moe", "pp2-ep2")},
        [
            ("dense", "tp2"),
            ("dense", "pp2"),
            ("dense", "pp2-measured"),
            ("dense", "pp2-zbv-hdp2-zero1"),
            ("moe", "ep2"),
            ("moe", "hdp4-ep2-zero3"),
            ("moe", "pp2-ep2"),
            ("moe", "tp2"),
        ],
    ),
)
def test_two_resumes_on_one_layout_change_no_bit(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, kind: str, name: str
) -> None:
    world_size, layout = ((DENSE_LAYOUTS | MEASURED) if kind == "dense" else EXPERT_LAYOUTS)[name]
    model = None if kind == "dense" else MOE
    straight, parts = (
        prepared(tiny, tmp_path / which, layout, model) for which in ("straight", "parts")
    )
    run_ranks(launch, world_size, straight, 7)
    for stop in (2, 5, 7):
        run_ranks(launch, world_size, parts, stop)
    assert losses(parts) == losses(straight)
    assert len(losses(parts)) == 7
