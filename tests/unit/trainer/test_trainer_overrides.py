"""Runs with frozen parameters and multiplied rates: bits, resumes, overrides
edited during a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.configs.lineage import Parent
from allometry.configs.run import RunConfig
from allometry.interop.huggingface.weights import CheckpointWeights
from allometry.scaling.update_rules import OPTIMIZER_KINDS
from allometry.trainer.state.unchanged import changed_overrides, check_branch
from allometry.trainer.train import train
from run_folders import events, rows
from thinned import thinned

Make = Callable[..., RunConfig]
Entries = Sequence[dict[str, Any]]
CPU = torch.device("cpu")
KINDS: dict[str, list[str]] = {
    "adamw": ["optimizer.lr=0.01"],
    "lion": ["optimizer.lr=0.003"],
    "muon": ["optimizer.lr=0.01"],
    "muonh": ["optimizer.lr=0.03", "optimizer.adamw_lr=0.01"],
    "adamh": ["optimizer.lr=0.03", "optimizer.adamw_lr=0.01"],
    "sgd_sai": ["optimizer.lr=0.03"],
    "apollo": ["optimizer.lr=0.01", "optimizer.refresh_steps=4"],
    "apollo_mini": ["optimizer.lr=0.01", "optimizer.refresh_steps=4"],
}
SHORT = ("training.total_steps=8", "checkpoint.every_steps=2", "checkpoint.keep_last=9")
FROZEN: Entries = (
    {"freeze": True},
    {"layers": 1, "freeze": False},
    {"names": "*.1.attention.wk.weight", "freeze": True},
)
"""All except layer 1, and one matrix of its combined product."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def said(entries: Entries) -> str:
    return f"optimizer.overrides={json.dumps(list(entries))}"


def run(config: RunConfig, **options: Any) -> Path:
    train(config, device=CPU, callbacks=[], **options)
    return Path(config.run.folder)


def tensors(folder: Path, step: int, what: str = "model.") -> dict[str, Tensor]:
    stored = CheckpointWeights(folder / "checkpoints" / f"step-{step}", what)
    return {name: stored.read(name) for name in stored.shapes}


def is_frozen(name: str) -> bool:
    return not name.startswith("blocks.1.") or name == "blocks.1.attention.wk.weight"


def same_rows(one: Path, other: Path) -> None:
    for a, b in zip(rows(one), rows(other), strict=True):
        for key in ("loss", "grad_norm", "lr"):
            assert a[key] == b[key], (key, a["step"])


def test_every_kind_is_run() -> None:
    assert set(KINDS) == set(OPTIMIZER_KINDS)


@pytest.mark.parametrize("kind", thinned({"adamw", "muonh"}, list(KINDS)))
def test_frozen_bits_never_change_and_two_resumes_are_exact(
    tiny: Make, tmp_path: Path, kind: str
) -> None:
    asked = [f"optimizer.kind={kind}", *KINDS[kind], *SHORT, said(FROZEN)]
    straight = run(tiny(*asked, folder=tmp_path / "straight"))
    parts = tiny(*asked, folder=tmp_path / "parts")
    run(parts, stop_at_step=3)
    run(parts, stop_at_step=5)
    same_rows(straight, run(parts))
    first, last = tensors(straight, 2), tensors(straight, 8)
    assert {n for n in last if torch.equal(first[n], last[n])} == {n for n in last if is_frozen(n)}
    for name, tensor in tensors(tmp_path / "parts", 8).items():
        assert torch.equal(tensor, last[name]), name
    states = tensors(straight, 8, "optimizer.")
    assert {n.rsplit(".weight.", 1)[0] for n in states} == {
        n.removesuffix(".weight") for n in last if not is_frozen(n)
    }


@pytest.mark.parametrize("kind", thinned({"adamw", "muonh"}, list(KINDS)))
def test_a_multiplier_of_all_is_another_rate(tiny: Make, tmp_path: Path, kind: str) -> None:
    asked = [f"optimizer.kind={kind}", *SHORT]
    settings = dict(one.split("=") for one in KINDS[kind])
    rates = {key: float(value) for key, value in settings.items() if key.endswith("lr")}
    others = [f"{k}={v}" for k, v in settings.items() if k not in rates]
    multiplied = [f"{key}={value}" for key, value in rates.items()]
    halved = [f"{key}={value / 2}" for key, value in rates.items()]
    one = run(
        tiny(*asked, *others, *multiplied, said([{"lr_multiplier": 0.5}]), folder=tmp_path / "one")
    )
    other = run(tiny(*asked, *others, *halved, folder=tmp_path / "other"))
    for a, b in zip(rows(one), rows(other), strict=True):
        assert (a["loss"], a["grad_norm"], a["lr"]) == (b["loss"], b["grad_norm"], 2 * b["lr"])


LIFE: dict[str, list[str]] = {
    "adamw": [],
    "adamw, states in fp8": ["optimizer.states.kind=fp8"],
    "muonh": ["optimizer.kind=muonh", "optimizer.lr=0.03", "optimizer.adamw_lr=0.01"],
    "apollo": ["optimizer.kind=apollo", "optimizer.refresh_steps=2"],
    "a tier": ["parallel.zero.optimizer_states={device: 0.0}"],
}


@pytest.mark.parametrize("kind", thinned({next(iter(LIFE))}, list(LIFE)))
def test_overrides_edited_in_mid_run(tiny: Make, tmp_path: Path, kind: str) -> None:
    """Trained, frozen, trained again: dropped states restart at zero with their own step count."""
    asked = [*LIFE[kind], *SHORT]
    folder = tmp_path / "run"
    run(tiny(*asked, folder=folder), stop_at_step=2)
    run(tiny(*asked, said(FROZEN), folder=folder), stop_at_step=4)
    before = tensors(folder, 4)
    states = tensors(folder, 4, "optimizer.")
    assert {n for n in before if torch.equal(before[n], tensors(folder, 2)[n])} == {
        n for n in before if is_frozen(n)
    }
    assert not [n for n in states if is_frozen(n.rsplit(".weight.", 1)[0] + ".weight")]
    run(tiny(*asked, folder=folder))
    told = [event for event in events(folder) if event["event"] == "overrides_changed"]
    count = sum(map(is_frozen, before))
    wanted = [(2, count, 0), (4, 0, count)]
    assert [(e["step"], e["frozen"], e["trained"]) for e in told] == wanted
    states = tensors(folder, 8, "optimizer.")
    steps = {n.rsplit(".step", 1)[0]: float(x) for n, x in states.items() if n.endswith(".step")}
    assert steps
    for name, taken in steps.items():
        assert taken == (4.0 if is_frozen(name) else 8.0), name
    for name, radius in states.items():
        if name.endswith(".radius") and is_frozen(name.removesuffix(".radius")):
            norm = before[name.removesuffix(".radius")].double().norm()
            assert float(radius) == pytest.approx(float(norm), rel=1e-6), "of the values it has now"


@pytest.mark.parametrize(
    "asked",
    [
        ["training.compute_dtype=bf16", "precision.saved_activations=fp8"],
        ["training.compute_dtype=bf16", "precision.linears=fp8_tensorwise"],
        ["training.compute_dtype=bf16", "training.activation_checkpointing=selective"],
        ["training.activation_offload=1.0", "model.num_layers=4"],
        ["parallel.zero.optimizer_states={device: 0.0}"],
        ["record.monitors={every_steps: 2, singular_values_every_steps: 4}"],
    ],
)
def test_frozen_with_other_techniques(tiny: Make, tmp_path: Path, asked: list[str]) -> None:
    folder = run(tiny(*asked, *SHORT, said(FROZEN), folder=tmp_path / "run"))
    first, last = tensors(folder, 2), tensors(folder, 8)
    assert {n for n in last if torch.equal(first[n], last[n])} == {n for n in last if is_frozen(n)}
    found = rows(folder)
    assert found[-1]["loss"] < found[0]["loss"]
    seen = {key for row in found for key in row if key.startswith("monitors/grad_rms/")}
    if "record" in asked[0]:
        assert seen == {"monitors/grad_rms/hidden", "monitors/grad_rms/vector"}


MOE = (
    "model.kind=moe",
    "model.first_dense_layers=0",
    "model.ffn_width=null",
    "model.experts={kind: swiglu, num_experts: 4, experts_per_token: 2, width: 16}",
    "model.router={gate: sigmoid, balance: {kind: bias, rate: 0.01}}",
)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
@pytest.mark.parametrize("names", [["*.experts.gate", "*.wo.*"], ["*.experts.*", "*router*"]])
def test_frozen_experts_in_bf16(
    tiny: Make, tmp_path: Path, names: list[str], checkpointing: str
) -> None:
    how = ("training.compute_dtype=bf16", f"training.activation_checkpointing={checkpointing}")
    asked = said([{"names": names, "freeze": True}])
    folder = run(tiny(*MOE, *how, *SHORT, asked, folder=tmp_path / "run"))
    first, last = tensors(folder, 2), tensors(folder, 8)
    frozen = {n for n in last if any(fnmatchcase(n, name) for name in names)}
    trained = {n for n in last if not n.endswith((".load", ".bias"))} - frozen
    assert not [n for n in trained if torch.equal(first[n], last[n])]
    assert {n for n in last if torch.equal(first[n], last[n])} >= {
        n for n in frozen if not n.endswith(".load")
    }


def test_a_frozen_router_keeps_its_bias(tiny: Make, tmp_path: Path) -> None:
    entry = {"roles": "router", "layers": 0, "freeze": True}
    folder = run(tiny(*MOE, *SHORT, said([entry]), folder=tmp_path / "run"))
    last = tensors(folder, 8)
    assert not last["blocks.0.ffn.router.bias"].any()
    assert last["blocks.1.ffn.router.bias"].any()
    assert torch.equal(
        last["blocks.0.ffn.router.weight"], tensors(folder, 2)["blocks.0.ffn.router.weight"]
    )


def test_changes_are_counted(tiny: Make) -> None:
    plain, frozen = tiny(), tiny(said(FROZEN))
    multiplied = tiny(said([{"layers": 0, "lr_multiplier": 0.5}]))
    assert changed_overrides(plain, plain, 5) == changed_overrides(frozen, frozen, 5) == {}
    assert changed_overrides(plain, multiplied, 5) == {"frozen": 0, "trained": 0, "multiplied": 11}
    counted = changed_overrides(plain, frozen, 5)
    assert counted == {"frozen": 15, "trained": 0, "multiplied": 0}


def test_a_branch_names_the_overrides_in_which_it_differs(tiny: Make) -> None:
    with pytest.raises(UserError, match=r"optimizer\.overrides\.0\.freeze=True differs"):
        check_branch(tiny(), tiny(said(FROZEN)), Parent(folder="trunk", step=5))
    named = Parent(folder="trunk", step=5, changes=("optimizer.overrides",))
    check_branch(tiny(), tiny(said(FROZEN)), named)
