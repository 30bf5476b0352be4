"""Monitors in one process: values by hand, alarms, and unchanged training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from allometry.configs.errors import UserError
from allometry.configs.execution import ParallelConfig
from allometry.configs.run import RunConfig
from allometry.parallel.mesh import Mesh, open_mesh
from allometry.trainer.record.alarms import Alarms, find
from allometry.trainer.record.monitors import Changes
from allometry.trainer.record.spectrum import TopSingularValues
from allometry.trainer.train import train
from run_folders import events, rows

Make = Callable[..., RunConfig]
CPU = torch.device("cpu")
EVERY = "record.monitors={every_steps: 1, singular_values_every_steps: 2}"
NEVER = "record.monitors={every_steps: null, singular_values_every_steps: null}"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    with open_mesh(ParallelConfig(), CPU) as opened:
        yield opened


def run(config: RunConfig, **options: Any) -> Path:
    train(config, device=CPU, callbacks=[], **options)
    return Path(config.run.folder)


@pytest.mark.parametrize(
    "extra", [[], ["model.dropout=0.2", "training.compute_dtype=bf16", "data.packing=concatenated"]]
)
def test_training_is_the_same_to_the_bit(tiny: Make, tmp_path: Path, extra: list[str]) -> None:
    extra = ["training.total_steps=7", "checkpoint.every_steps=null", *extra]
    with_all = rows(run(tiny(EVERY, *extra, folder=tmp_path / "with")))
    without = rows(run(tiny(NEVER, *extra, folder=tmp_path / "without")))
    for one, other in zip(with_all, without, strict=True):
        assert all(one[key] == other[key] for key in ("loss", "grad_norm", "lr"))
    other = run(tiny(NEVER, "run.seed=9", *extra, folder=tmp_path / "other"), stop_at_step=1)
    assert with_all[0]["loss"] != rows(other)[0]["loss"], "the comparison can fail"


def test_rows_come_when_they_are_due(tiny: Make) -> None:
    config = tiny(
        "record.monitors.every_steps=6",
        "record.monitors.singular_values_every_steps=9",
        "record.every_steps=4",
        "training.clip_grad_norm=0.4",
    )
    found = {row["step"]: row for row in rows(run(config))}
    assert sorted(found) == [4, 6, 8, 9, 12, 16, 18, 20]
    for step, row in found.items():
        assert ("monitors/attention_z/1" in row) == (step % 6 == 0)
        assert ("monitors/singular/head.weight" in row) == (step % 9 == 0)


def test_clip_rate_counts_the_steps_between_looks(tiny: Make, tmp_path: Path) -> None:
    norms = [row["grad_norm"] for row in rows(run(tiny(NEVER, folder=tmp_path / "norms")))]
    assert all(norm != 1.0 for norm in norms)
    found = rows(run(tiny("record.monitors.every_steps=5", folder=tmp_path / "rates")))
    for step in (5, 10, 15, 20):
        wanted = sum(norm > 1.0 for norm in norms[step - 5 : step]) / 5
        assert found[step - 1]["monitors/clip_rate"] == wanted


def test_a_resumed_run_shows_what_a_straight_one_does(tiny: Make, tmp_path: Path) -> None:
    every = "record.monitors={every_steps: 4, singular_values_every_steps: null}"
    straight = rows(run(tiny(every, folder=tmp_path / "straight")))
    parts = tiny(every, folder=tmp_path / "parts")
    run(parts, stop_at_step=8)
    resumed = rows(run(parts))
    for one, other in zip(straight, resumed, strict=True):
        keys = [key for key in one if key.startswith("monitors/")]
        assert [one[key] for key in keys] == [other[key] for key in keys]


def a_group(role: str, *parameters: torch.nn.Parameter, **more: Any) -> dict[str, Any]:
    return {"params": list(parameters), "role": role, "rule": "adamw", "eps": 1e-8, **more}


def test_gradients_updates_and_spheres_by_hand(mesh: Mesh) -> None:
    generator = torch.Generator().manual_seed(0)
    big, small, gain = (
        torch.nn.Parameter(torch.randn(shape, generator=generator))
        for shape in ((1030, 6), (5, 4), (9,))
    )
    experts = torch.nn.Parameter(torch.randn(3, 4, 5, generator=generator))
    optimizer = torch.optim.SGD(
        [
            a_group("hidden", big, small),
            a_group("vector", gain, eps=1e-3),
            a_group("expert_up", experts, sphere=True, rule="muonh"),
        ],
        lr=0.5,
    )
    changes = Changes(optimizer, mesh)
    for p in (big, small, gain, experts):
        p.grad = torch.randn(p.shape, generator=generator)
    before = {p: p.detach().clone() for p in (big, small, gain, experts)}
    optimizer.state[experts]["radius"] = before[experts].norm(dim=(1, 2))
    changes.remember()
    optimizer.step()
    with torch.no_grad():
        experts[1] *= 1.25 * before[experts][1].norm() / experts[1].norm()
        for other in (0, 2):
            experts[other] *= before[experts][other].norm() / experts[other].norm()
    sums, peaks = changes.measure()
    hidden = sums[1].tolist()
    both = torch.cat([big.grad.flatten(), small.grad.flatten()]).double()
    assert hidden[:3] == pytest.approx(
        [float(both.square().sum()), float(both.abs().sum()), both.numel()], rel=1e-6
    )
    kept = [before[big][::4], before[small]]  # 1030 // 256 = 4
    moved = [big.detach()[::4] - kept[0], small.detach() - kept[1]]
    wanted = [sum(float(x.double().square().sum()) for x in xs) for xs in (moved, kept)]
    assert hidden[3:] == pytest.approx([*wanted, kept[0].numel() + 20], rel=1e-6)
    assert peaks[1].tolist() == [1e-8, -1.0]
    assert peaks[3].tolist() == [1e-3, -1.0]
    assert peaks[5].tolist() == pytest.approx([-1.0, 0.25], rel=1e-5)


def test_top_singular_values(mesh: Mesh) -> None:
    generator = torch.Generator().manual_seed(1)
    flat = torch.randn(40, 24, generator=generator)
    stack = torch.randn(3, 10, 16, generator=generator)
    zeros = torch.zeros(4, 4)
    state = torch.get_rng_state()
    follow = TopSingularValues([("flat", flat), ("stack", stack), ("zeros", zeros)], mesh)
    first = follow()
    exact = {"flat": torch.linalg.svdvals(flat)[0], "stack": torch.linalg.svdvals(stack)[:, 0]}
    for name, values in exact.items():
        assert (first[name] <= values * (1 + 1e-5)).all()
        assert (first[name] >= values * 0.95).all()
    later = first
    for _ in range(60):  # the state is kept, so that it converges
        later = follow()
    for name, values in exact.items():
        assert torch.allclose(later[name], values, rtol=1e-4)
    assert later["zeros"].tolist() == [0.0]
    flat *= 3.0
    assert torch.allclose(follow()["flat"], 3.0 * exact["flat"], rtol=1e-4)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_alarming() -> None:
    calm = {
        "monitors/grad_rms/hidden": 1e-6,
        "monitors/grad_rms/output": 0.0,
        "monitors/grad_rms/router": 1e-12,  # no epsilon: its rule has no division
        "monitors/activation_max": 99.0,
        "monitors/activation_max_layer": 1,
        "monitors/attention_logit_max": 30.0,
        "monitors/attention_logit_max/0": 30.0,
        "monitors/sphere_drift/hidden": 1e-6,
    }
    eps = {"hidden": 1e-8, "output": 1e-8}
    assert find(calm, eps, mean=0.01) == {}
    wild = {
        **calm,
        "monitors/grad_rms/hidden": 9e-8,
        "monitors/activation_max": 150.0,
        "monitors/attention_logit_max": 2e4,
        "monitors/attention_logit_max/0": 7.0,
        "monitors/attention_logit_max/1": 2e4,
        "monitors/sphere_drift/hidden": 2e-3,
    }
    found = find(wild, eps, mean=0.01)
    assert found == {
        "gradient_near_eps": {"grad_rms": {"hidden": 9e-8}, "eps": {"hidden": 1e-8}},
        "massive_activation": {"value": 150.0, "layer": 1, "mean": 0.01},
        "attention_logit": {"value": 2e4, "layer": 1},
        "off_sphere": {"drift": {"hidden": 2e-3}},
    }
    assert "massive_activation" not in find(wild, eps, mean=1.0), "large, but so is the rest"


def test_an_alarm_is_raised_once_in_a_stretch() -> None:
    alarms = Alarms()
    heard = [sorted(alarms.new({key: {} for key in kinds})) for kinds in ("", "a", "ab", "b", "a")]
    assert heard == [[], ["a"], ["b"], [], ["a"]]


def test_alarms_are_events(tiny: Make) -> None:
    config = tiny(EVERY, "optimizer.eps=1e-2", "training.total_steps=6")
    told = [event for event in events(run(config)) if event["event"] == "alarm"]
    assert [(event["alarm"], event["step"]) for event in told] == [("gradient_near_eps", 1)]
    assert told[0]["eps"]["hidden"] == 1e-2
    assert 0.0 < told[0]["grad_rms"]["hidden"] < 0.1


def test_a_refined_schedule_whose_file_changed_is_refused(tiny: Make, tmp_path: Path) -> None:
    file = tmp_path / "schedule.json"

    def write(fractions: list[float]) -> None:
        file.write_text(json.dumps({"kind": "allometry.schedule", "fractions": fractions}))

    falling = [1.0 - step / 20 for step in range(20)]
    write(falling)
    config = tiny(f"schedule={{kind: refined, file: {file}}}", folder=tmp_path / "run")
    run(config, stop_at_step=8)
    write([*falling[:7], 0.1, *falling[8:]])
    with pytest.raises(UserError, match=r"schedule\.kind=refined changed"):
        run(config)
    write(falling)
    found = rows(run(config))
    assert [row["lr"] for row in found] == pytest.approx([1e-2 * value for value in falling])


def test_several_decays_resume_and_a_finished_run_goes_further(tiny: Make, tmp_path: Path) -> None:
    several = "schedule={kind: wsd_s, decay_ends_steps: [8], decay_fraction: 0.5}"
    straight = rows(run(tiny(several, folder=tmp_path / "straight")))
    parts = tiny(several, folder=tmp_path / "parts")
    run(parts, stop_at_step=6)
    run(parts, stop_at_step=8)
    resumed = rows(run(parts))
    for one, other in zip(straight, resumed, strict=True):
        assert [one[key] for key in ("loss", "lr", "s2")] == [
            other[key] for key in ("loss", "lr", "s2")
        ]
    assert straight[7]["lr"] == 0.0
    assert straight[8]["lr"] == 1e-2

    folder = tmp_path / "further"
    cosine = "{kind: cosine, warmup_steps: 2}"
    run(tiny("training.total_steps=8", f"schedule={cosine}", folder=folder))
    further = f"{{kind: continued, before: {cosine}, before_steps: 8, after: {{kind: linear}}}}"
    found = rows(run(tiny("training.total_steps=12", f"schedule={further}", folder=folder)))
    assert [round(row["lr"] / 1e-2, 6) for row in found[7:]] == [0.1, 0.75, 0.5, 0.25, 0.0]
    with pytest.raises(UserError, match="already taken"):
        run(tiny("training.total_steps=14", "schedule={kind: cosine}", folder=folder))


def test_decays_of_several_lengths_branch_off_one_stable_stretch(
    tiny: Make, tmp_path: Path
) -> None:
    """A WSD run goes back to the end of its stable part and is lengthened."""
    folder, keep = tmp_path / "branch", "checkpoint={every_steps: 1, keep_last: 99}"
    short = tiny(keep, "training.total_steps=10", folder=folder)
    run(short)  # decays from step 8 on
    longer = tiny(keep, "training.total_steps=20", "run.resume=step-7", folder=folder)
    found = rows(run(longer))
    straight = rows(run(tiny(keep, folder=tmp_path / "straight")))
    assert [row["loss"] for row in found] == [row["loss"] for row in straight]
    assert math.isclose(found[7]["lr"], 1e-2)


def test_spheres_of_a_run_hold(tiny: Make) -> None:
    config = tiny(EVERY, "optimizer={kind: muonh, lr: 0.02}", "training.total_steps=4")
    for row in rows(run(config)):
        assert 0.0 <= row["monitors/sphere_drift/hidden"] < 1e-6
        assert 0.0 <= row["monitors/sphere_drift/output"] < 1e-6
        assert row["monitors/update_ratio/hidden"] < 0.021
        assert "monitors/sphere_drift/input" not in row
