"""Runs of the deepspeed engine on ranks equal FSDP2's, and checkpoints move in both directions."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.run import RunConfig
from checkpoint_bits import bits
from deepspeed_cases import STEADY, assert_close, losses, needs_deepspeed, needs_nvme
from run_folders import events, rows
from test_dist_document_runs import DOCUMENTS, capacity
from test_dist_runs import launch
from thinned import thinned

Ranks = Callable[..., list[Any]]
Make = Callable[..., RunConfig]

MUP = 'parameterization={"kind": "mup", "base_width": 16}'
MIXTURE = {
    "kind": "moe",
    "vocab_size": 64,
    "width": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "experts": {"kind": "swiglu", "num_experts": 4, "experts_per_token": 2, "width": 16},
    # Large enough to show a gradient that does not scale with the loss.
    "router": {
        "gate": "softmax",
        "balance": {"kind": "auxiliary", "coefficient": 0.5},
        "z_loss": 0.01,
    },
}
LARGE = ("model.width=256", "model.ffn_width=1024", "training.total_steps=8", "optimizer.lr=1e-3")
"""Matrices of which each rank stores a MiB."""


def engine(stage: int, offload: str = "none", **more: Any) -> str:
    zero = {"engine": "deepspeed", "stage": stage, "offload": offload, **more}
    return f"parallel.zero={json.dumps(zero)}"


def assert_same_parameters(one: RunConfig, other: RunConfig, step: int = 20) -> None:
    ours, theirs = bits(one, step), bits(other, step)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.startswith("model."):
            assert (ours[name] - theirs[name]).abs().max() <= 1e-6, name


@needs_deepspeed
@pytest.mark.parametrize(
    ("ranks", "stage", "offload"),
    thinned({(2, 3, "cpu")}, [1, 2], [1, 2, 3], ["none", "cpu"]),
)
def test_losses_and_parameters_are_those_of_fsdp2(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, ranks: int, stage: int, offload: str
) -> None:
    other = tiny(*STEADY, MUP, f"parallel.zero.stage={stage}", folder=tmp_path / "fsdp2")
    run_ranks(launch, ranks, other)
    ours = tiny(*STEADY, MUP, engine(stage, offload), folder=tmp_path / "deepspeed")
    run_ranks(launch, ranks, ours)
    assert_close(ours, other)
    assert_same_parameters(ours, other)
    norms = [[row["grad_norm"] for row in rows(Path(run.run.folder))] for run in (ours, other)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    last = [rows(Path(run.run.folder))[-1] for run in (ours, other)]
    assert last[0]["validation/up"] == pytest.approx(last[1]["validation/up"], abs=1e-6)
    facts = json.loads((tmp_path / "deepspeed" / "run.json").read_text())
    assert facts["layout"]["zero_engine"] == "deepspeed"
    assert facts["versions"]["deepspeed"] == "0.19.8"


@needs_deepspeed
def test_a_run_goes_from_engine_to_engine_on_other_numbers_of_ranks(
    tiny: Make, run_ranks: Ranks, tmp_path: Path
) -> None:
    straight = tiny(*STEADY, "parallel.zero.stage=1", folder=tmp_path / "straight")
    run_ranks(launch, 2, straight)
    moving = tmp_path / "moving"
    for ranks, zero, stop in (
        (2, "parallel.zero.stage=2", 4),
        (2, engine(3), 7),
        (1, engine(1, "cpu"), 10),
        (2, engine(2), 13),
        (2, "parallel.zero.stage=3", None),
    ):
        run_ranks(launch, ranks, tiny(*STEADY, zero, folder=moving), stop)
    assert_close(tiny(folder=moving), straight)
    assert_same_parameters(tiny(folder=moving), straight)


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "what"),
    thinned({(3, "mixture")}, [1, 2, 3], ["documents", "mixture"]),
)
def test_uneven_micro_batches_and_gradients_of_routers(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, stage: int, what: str
) -> None:
    more = {
        # At stage 1 ranks have different numbers of micro-batches, with rings between some ranks.
        "documents": (*DOCUMENTS, capacity(40)),
        "mixture": (f"model={json.dumps(MIXTURE)}",),
    }[what]
    other = tiny(*STEADY, *more, f"parallel.zero.stage={stage}", folder=tmp_path / "fsdp2")
    run_ranks(launch, 2, other)
    ours = tiny(*STEADY, *more, engine(stage), folder=tmp_path / "deepspeed")
    run_ranks(launch, 2, ours, 9)
    run_ranks(launch, 2, ours)
    assert_close(ours, other)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    "setting",
    [
        "model.tied_embeddings=true",
        "model.dropout=0.1",
        "training.activation_checkpointing=full",
        "training.activation_checkpointing=selective",
    ],
)
def test_other_parts_of_a_run(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, stage: int, setting: str
) -> None:
    other = tiny(*STEADY, setting, f"parallel.zero.stage={stage}", folder=tmp_path / "fsdp2")
    run_ranks(launch, 2, other)
    ours = tiny(*STEADY, setting, engine(stage), folder=tmp_path / "deepspeed")
    run_ranks(launch, 2, ours)
    assert_close(ours, other)


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "precision"),
    thinned(
        {(3, "fp8_rowwise")},
        [1, 2, 3],
        ["fp8_tensorwise", "fp8_rowwise", "fp8_blockwise", "saved"],
    ),
)
def test_products_in_fp8_are_those_of_fsdp2(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, stage: int, precision: str
) -> None:
    """The first step agrees to its last bits; later a last bit may change how a
    number is rounded."""
    linears = "fp8_rowwise" if precision == "saved" else precision
    how = f"precision.linears={linears}", f"parallel.zero.stage={stage}"
    if precision == "saved":
        how = (*how, "precision.saved_activations=fp8")
    other = tiny(*STEADY, *how, folder=tmp_path / "fsdp2")
    run_ranks(launch, 2, other)
    ours = tiny(*STEADY, *how, "parallel.zero.engine=deepspeed", folder=tmp_path / "deepspeed")
    run_ranks(launch, 2, ours)
    here, there = (rows(Path(run.run.folder)) for run in (ours, other))
    for key in ("loss", "grad_norm"):
        assert here[0][key] == pytest.approx(there[0][key], rel=1e-6)
    assert here[1]["loss"] == pytest.approx(there[1]["loss"], abs=5e-4)
    assert losses(ours) == pytest.approx(losses(other), abs=0.05)
    plain = tiny(*STEADY, f"parallel.zero.stage={stage}", folder=tmp_path / "plain")
    run_ranks(launch, 2, plain, 1)
    assert abs(losses(plain)[0] - here[0]["loss"]) > 1e-4


PIPELINED = {
    "zero_optimization": {"offload_optimizer": {"pipeline_read": True, "pipeline_write": True}}
}


@needs_nvme
@pytest.mark.parametrize(
    ("ranks", "what"), thinned({(2, "parameters")}, [1, 2], ["states", "parameters", "pipelined"])
)
def test_on_nvme_a_run_is_the_same_and_resumes(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, ranks: int, what: str
) -> None:
    swap = tmp_path / "swap"
    more: dict[str, Any] = {"optimizer_states": {"nvme": str(swap), "bucket_mib": 4}}
    if what == "pipelined":
        more["deepspeed_extra"] = PIPELINED
    ours_zero = engine(3, "nvme" if what == "parameters" else "none", **more)
    other = tiny(*STEADY, *LARGE, "parallel.zero.stage=3", folder=tmp_path / "fsdp2")
    run_ranks(launch, ranks, other)
    ours = tiny(*STEADY, *LARGE, ours_zero, folder=tmp_path / "deepspeed")
    run_ranks(launch, ranks, ours, 3)
    assert not list(swap.iterdir())  # the run removes its files
    run_ranks(launch, ranks, ours, 6)
    run_ranks(launch, ranks, ours)
    assert_close(ours, other, steps=8)
    assert_same_parameters(ours, other, step=8)
    (held,) = [
        event for event in events(tmp_path / "deepspeed") if event["event"] == "optimizer_states"
    ][-1:]
    assert held["nvme_bytes"] > 1 << 20


PLACES: dict[str, Callable[[str], str]] = {
    "fsdp2": lambda swap: "parallel.zero.stage=2",
    "fsdp2 cpu": lambda swap: "parallel.zero={stage: 3, optimizer_states: {bucket_mib: 4}}",
    "fsdp2 nvme": lambda swap: (
        f"parallel.zero={{stage: 1, optimizer_states: {{nvme: {swap}, bucket_mib: 4}}}}"
    ),
    "deepspeed": lambda swap: engine(2),
    "deepspeed cpu": lambda swap: engine(3, "cpu"),
    "deepspeed nvme": lambda swap: engine(3, optimizer_states={"nvme": swap, "bucket_mib": 4}),
    "deepspeed nvme parameters": lambda swap: engine(
        3, "nvme", optimizer_states={"nvme": swap, "bucket_mib": 4}
    ),
}


def every_way() -> list[str]:
    """Return an order with every transition between places, without FSDP2 to FSDP2."""
    names, order = list(PLACES), []
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            if "deepspeed" in other:
                order += [one, other]
        order.append(one)
    return order


@needs_nvme
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_goes_from_every_place_to_every_other(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, ranks: int
) -> None:
    order, swap = every_way(), str(tmp_path / "swap")
    ways = set(itertools.pairwise(order))
    missing = {(a, b) for a in PLACES for b in PLACES if a != b and "deepspeed" in a + b} - ways
    assert not missing
    steps = (*STEADY, *LARGE, f"training.total_steps={len(order)}")
    straight = tiny(*steps, "parallel.zero.stage=2", folder=tmp_path / "straight")
    run_ranks(launch, ranks, straight)
    for step, name in enumerate(order, 1):
        run_ranks(launch, ranks, tiny(*steps, PLACES[name](swap), folder=tmp_path / "moving"), step)
    moving = tiny(folder=tmp_path / "moving")
    assert_close(moving, straight, steps=len(order))
    assert_same_parameters(moving, straight, step=len(order))
