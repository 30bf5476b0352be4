"""Runs with updates one step late: losses, saves, resumes, branches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.data.batch import IGNORE
from allometry.data.stream import Stream, open_stream
from allometry.models.build import build_model
from allometry.models.init import initialize
from allometry.optim.schedule import resolve_schedule
from allometry.scaling.batch import BatchPlan
from allometry.scaling.layout import Layout
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.plan import RunPlan
from allometry.trainer.feed import DeviceBatch
from allometry.trainer.state.changed import UPDATE
from allometry.trainer.train import train
from checkpoint_bits import bits
from run_folders import events, rows

Make = Callable[..., RunConfig]
EXACT = "parallel.zero.optimizer_states={}"


def delayed(**states: Any) -> str:
    told = {"update": "delayed", "bucket_mib": 0.05} | states
    return f"parallel.zero.optimizer_states={json.dumps(told)}"


def launch(run: RunConfig, stop_at_step: int | None = None) -> None:
    train(run, device=torch.device("cpu"), callbacks=[], stop_at_step=stop_at_step)


def losses(run: RunConfig) -> list[float]:
    return [row["loss"] for row in rows(Path(run.run.folder))]


def a_plain_loop(config: RunConfig, steps: int, *, late: bool) -> list[float]:
    """Return the losses of the same run in fp64: torch's AdamW on a copy that is used one step
    later."""
    rules, plan = Parameterization.of_run(config), BatchPlan(config.batch, 32)
    model = build_model(config.model, rules, "fp64").double()
    initialize(model, rules, config.run.seed)
    now = list(model.parameters())
    ahead = [parameter.detach().clone() for parameter in now]
    optimizer = torch.optim.AdamW(
        [
            {"params": [each], "weight_decay": config.optimizer.weight_decay * (each.dim() > 1)}
            for each in ahead
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True,
    )
    schedule, stream = resolve_schedule(config, plan), open_stream(config.data, config.run.seed)
    assert isinstance(stream, Stream)
    found = []
    for step in range(1, steps + 1):
        position = plan.sequences_before(step)
        read = stream.batch(position, plan.sequences(step))
        batch = DeviceBatch.of(read, torch.device("cpu"), position)
        losses = model(batch.tokens_BL, batch.targets_BL, batch.documents)
        loss = losses.total / (batch.targets_BL != IGNORE).sum()
        gradients = torch.autograd.grad(loss, now)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        if late:
            _show(ahead, now)
        for each, gradient in zip(ahead, gradients, strict=True):
            each.grad = gradient * min(1.0, 1.0 / (float(norm) + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * schedule.fraction(step)
        optimizer.step()
        if not late:
            _show(ahead, now)
        found.append(float(loss.detach()))
    return found


@torch.no_grad()
def _show(ahead: list[Tensor], now: list[torch.nn.Parameter]) -> None:
    for parameter, values in zip(now, ahead, strict=True):
        parameter.copy_(values)


@pytest.mark.parametrize("late", [True, False])
def test_a_run_is_a_plain_loop_that_holds_each_update_back_for_a_step(
    tiny: Make, tmp_path: Path, late: bool
) -> None:
    run = tiny(delayed() if late else EXACT, "training.compute_dtype=fp64", folder=tmp_path / "run")
    launch(run)
    wanted = a_plain_loop(run, 20, late=late)
    assert losses(run) == pytest.approx(wanted, rel=0, abs=1e-5)  # parameters are fp32
    other = a_plain_loop(run, 20, late=not late)
    assert max(abs(a - b) for a, b in zip(losses(run), other, strict=True)) > 1e-2


@pytest.mark.parametrize("place", ["cpu", "nvme"])
def test_neither_a_save_nor_a_resume_changes_a_bit(tiny: Make, tmp_path: Path, place: str) -> None:
    states = {"nvme": str(tmp_path / "swap"), "cpu": 0.3} if place == "nvme" else {}
    straight = tiny(delayed(), "checkpoint.every_steps=null", folder=tmp_path / "straight")
    launch(straight)
    saving = tiny(delayed(**states), "checkpoint.every_steps=1", folder=tmp_path / "saving")
    for stop in (1, 2, 9, None):
        launch(saving, stop)
    assert losses(saving) == losses(straight)
    one, other = bits(straight, 20), bits(saving, 20)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    late = [name for name in one if name.endswith(".late")]
    assert len(late) == len([name for name in one if name.startswith("model.")])
    (said, *_) = (e for e in events(tmp_path / "saving") if e["event"] == "optimizer_states")
    assert said["update"] == "delayed"
    assert said["device_bytes"] == 0
    assert (said["nvme_bytes"] > 0) == (place == "nvme")


def test_only_a_branch_may_begin_or_cease_to_be_late(tiny: Make, tmp_path: Path) -> None:
    trunks = {
        name: tiny(how, folder=tmp_path / name) for name, how in (("e", EXACT), ("d", delayed()))
    }
    for run in trunks.values():
        launch(run, 10)
    for name, how in (("e", delayed()), ("d", EXACT), ("d", "parallel.zero.stage=0")):
        with pytest.raises(UserError, match=r"optimizer_states.update='(delayed|exact)' differs"):
            launch(tiny(how, folder=tmp_path / name))
    for name, how in (("e", delayed()), ("d", EXACT)):
        whence = f"run.parent={{folder: {tmp_path / name}, step: 10, changes: [{UPDATE}]}}"
        branch = tiny(how, whence, folder=tmp_path / f"from-{name}")
        launch(branch)
        assert len(losses(branch)) == 20
    # With all updates of its parent applied.
    begun = bits(trunks["e"], 10)
    whence = f"run.parent={{folder: {tmp_path / 'e'}, step: 10, changes: [{UPDATE}]}}"
    launch(tiny(delayed(), whence, "checkpoint.every_steps=1", folder=tmp_path / "again"), 11)
    after = bits(tiny(folder=tmp_path / "again"), 11)
    late = after["optimizer.blocks.1.ffn.down.weight.late"]
    assert torch.equal(late, begun["model.blocks.1.ffn.down.weight"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("optimizer.kind=muon",), "optimizer.kind=muon: muon wants whole matrices"),
        (("optimizer={kind: adamw, lr: 0.01, states: {kind: fp8}}",), "states.kind=fp8"),
        (("kernels.adamw=apex",), "kernels.adamw=apex"),
        (("parallel.zero.engine=deepspeed", "parallel.zero.stage=3"), "update=delayed .*exact"),
    ],
)
def test_what_cannot_come_late_is_refused(tiny: Make, more: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=rf"optimizer_states.update=delayed.*{said}|{said}"):
        Layout.of(tiny(delayed(), *more), 1)


@pytest.mark.parametrize(
    "states", [{"device": 0.5}, {"master_weights": True}, {"gradients": True}, {"update": "later"}]
)
def test_keys_that_contradict_it_are_refused(tiny: Make, states: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"optimizer_states.*{next(iter(states))}"):
        tiny(delayed(**states), "training.compute_dtype=bf16", "parallel.zero.stage=1")


def test_the_estimate_has_no_states_on_the_device(tiny: Make) -> None:
    plans = [RunPlan.of(tiny(how), 1).memory for how in (delayed(), "parallel.zero.stage=0")]
    assert plans[0].optimizer_states == 0 < plans[1].optimizer_states
    assert plans[0].parameters == plans[1].parameters
