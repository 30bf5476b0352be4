"""The runs of a ladder, without training them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.errors import UserError
from allometry.configs.ladder import load_ladder
from allometry.configs.loader import dump, ladder_presets, load
from allometry.configs.run import RunConfig
from allometry.launch.studies.ladder.stages import open_ladder, save_ladder
from allometry.optim.schedule import resolve_schedule
from allometry.scaling.batch import BatchPlan
from allometry.scaling.count import (
    count_parameters,
)
from allometry.studies.ladder.plan import plan_ladder
from allometry.studies.ladder.state import as_stored
from allometry.trainer.state.unchanged import check_branch
from planned_ladders import ladder_file, per_token, planned


@pytest.fixture
def base(tiny: Callable[..., RunConfig], tmp_path: Path) -> Path:
    tiny()
    return tmp_path / "tiny.yaml"


def refused(base: Path, /, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        planned(base, **keys)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", ladder_presets())
def test_every_preset_is_planned(name: str) -> None:
    plan = plan_ladder(*load_ladder(f"preset:{name}"))
    assert plan.target is not None
    assert len({run.size for run in plan.rungs}) >= 4
    assert len({run.tokens for run in plan.rungs}) >= 3
    assert plan.target.parameters > max(run.parameters for run in plan.rungs)
    assert not plan.notes


def test_wsd_shares_one_trunk_and_counts_what_it_saves(base: Path) -> None:
    plan = planned(base)
    assert len(plan.rungs) == 12
    assert [run.name for run in plan.rungs][:3] == [
        "w16-d2048-s0",
        "w16-d5120-s0",
        "w16-d10240-s0",
    ]
    assert plan.target is not None
    assert plan.target.name == "target-w64-d20480-s0"
    assert plan.target.parent is None, "no rung is of its size"
    first, second, third = plan.rungs[:3]
    # 8, 20 and 40 steps, of which the last .3 decay.
    assert [run.steps for run in plan.rungs[:3]] == [8, 20, 40]
    assert [run.parent_step for run in plan.rungs[:3]] == [0, 6, 14]
    assert [run.parent for run in plan.rungs[:3]] == [None, first.name, second.name]
    assert first.config.checkpoint.keep_steps == (6,)
    assert third.config.checkpoint.keep_steps == (28,), "for a longer rung, some day"
    assert first.own_flops == first.flops
    assert second.own_flops == second.flops - second.flops * 6 // 20
    assert first.flops == round(8 * 8 * 32 * per_token(first.config))
    for run in plan.rungs:
        if run.parent is not None:
            parent = next(other for other in plan.rungs if other.name == run.parent)
            assert parent.config.run.seed == run.config.run.seed
            link = run.config.run.parent
            assert link is not None
            assert link.step == run.parent_step
            check_branch(parent.config, run.config, link)
            later = link.model_copy(update={"step": link.step + 1})
            with pytest.raises(UserError, match="another learning rate"):
                check_branch(parent.config, run.config, later)
    assert plan.rungs[5].config.run.seed == 1


def test_planning_loads_no_torch(base: Path) -> None:
    path = ladder_file(base)
    code = (
        "import sys\n"
        "from allometry.launch.studies.ladder.stages import open_ladder\n"
        "from allometry.launch.studies.ladder.text import planned_facts, status_text\n"
        f"print(status_text(planned_facts(open_ladder({str(path)!r}))))\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 of 13 runs done" in done.stdout
    assert "less than from scratch" in done.stdout


def test_horizons_by_parameters_and_by_compute(base: Path) -> None:
    plan = planned(
        base,
        tokens=None,
        tokens_per_parameter=[0.5, 2],
        isoflop={"flops": [1e9], "sizes": ["w32"]},
        count="total",
        seeds=[0],
    )
    names = [run.name for run in plan.rungs]
    assert sorted(names) == [
        "w16-x0.5-s0",
        "w16-x2-s0",
        "w32-c1e09-s0",
        "w32-x0.5-s0",
        "w32-x2-s0",
    ]
    for run in plan.rungs:
        total = count_parameters(run.config.model).total
        assert run.parameters == total
        step = 8 * 32
        asked = float(run.name.split("-")[1][1:])
        wanted = asked * total
        if "-c" in run.name:
            wanted = asked / per_token(run.config)
        assert wanted - 1 <= run.tokens < wanted + step, "rounded up to whole steps"


@pytest.mark.parametrize("count", ["non_embedding", "total", "with_head"])
def test_counts_are_those_of_the_convention(base: Path, count: str) -> None:
    run = planned(base, count=count).rungs[0]
    counted = count_parameters(run.config.model)
    head = 64 * 16
    expected = {
        "non_embedding": counted.non_embedding,
        "total": counted.total,
        "with_head": counted.non_embedding + head,
    }
    assert run.parameters == expected[count]


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (
            {"schedules": [{"name": "c", "schedule": {"kind": "cosine", "warmup_steps": 3}}]},
            "schedule c",
        ),
        (
            {
                "set": {
                    "optimizer": {"kind": "muonh", "lr": 0.01},
                    "parameterization": {
                        "kind": "hyperp",
                        "base_width": 32,
                        "base_layers": 2,
                        "base_head_dim": 8,
                        "base_batch_tokens": 256,
                        "base_tokens": 5120,
                    },
                }
            },
            "parameterization hyperp",
        ),
        (
            {"batch": {"kind": "power", "base_tokens": 5120, "exponent": 0.9}},
            "batch.sequences differs",
        ),
    ],
)
def test_what_cannot_share_is_trained_from_scratch_and_said(
    base: Path, keys: dict[str, Any], why: str
) -> None:
    plan = planned(base, **keys)
    assert all(run.parent is None for run in plan.rungs)
    assert all(run.config.run.parent is None for run in plan.rungs)
    assert any(why in note and "from scratch" in note for note in plan.notes), plan.notes
    assert all(run.own_flops == run.flops for run in plan.rungs)


def test_constant_runs_go_on_from_each_others_end(base: Path) -> None:
    schedules = [
        {"name": "flat", "schedule": {"kind": "constant", "warmup_steps": 3}},
        {"name": "wsd", "schedule": {"kind": "wsd", "warmup_steps": 3, "decay_fraction": 0.3}},
    ]
    plan = planned(base, schedules=schedules, seeds=[0], widths=[16])
    assert [(run.name, run.parent_step) for run in plan.rungs] == [
        ("w16-d2048-flat-s0", 0),
        ("w16-d5120-flat-s0", 8),
        ("w16-d10240-flat-s0", 20),
        ("w16-d2048-wsd-s0", 0),
        ("w16-d5120-wsd-s0", 6),
        ("w16-d10240-wsd-s0", 14),
    ]
    assert plan.target is not None
    assert plan.target.schedule == "flat"


def test_batch_by_a_law_is_a_whole_number_of_micro_batches(base: Path) -> None:
    tokens = [2048, 10240, 81920]
    plan = planned(base, batch={"kind": "law", "law": "step-law"}, seeds=[0], tokens=tokens)
    for run in plan.rungs:
        batch = run.config.batch
        wanted = 0.58 * run.config.training.total_tokens**0.571 / 32  # type: ignore[operator]
        assert batch.sequences % batch.micro_batch_sequences == 0
        assert abs(batch.sequences - wanted) <= batch.micro_batch_sequences / 2 + 1
    assert len({run.config.batch.sequences for run in plan.rungs}) == 3


def test_same_run_twice_is_left_out_and_said(base: Path) -> None:
    plan = planned(base, tokens=[2048, 2047], seeds=[0], widths=[16])
    assert [run.name for run in plan.rungs] == ["w16-d2048-s0"]
    assert plan.notes == ("w16-d2047-s0 would be w16-d2048-s0 again and is left out",)


def test_target_of_a_rungs_size_goes_on_from_it(base: Path) -> None:
    target = {"size": {"name": "same", "width": 32}, "tokens": 20480, "seed": 1}
    plan = planned(base, target=target)
    assert plan.target is not None
    assert (plan.target.parent, plan.target.parent_step) == ("w32-d10240-s1", 28)


def test_keys_of_sizes_reach_their_runs_alone(base: Path) -> None:
    sizes = [{"width": 16}, {"name": "deep", "set": {"model.num_layers": 4}}]
    plan = planned(base, widths=None, sizes=sizes, set={"optimizer.lr": 0.5}, seeds=[0])
    found = {run.size: run.config for run in plan.rungs}
    assert found["w16"].model.num_layers == 2
    assert (found["deep"].model.width, found["deep"].model.num_layers) == (32, 4)
    assert {config.optimizer.lr for config in found.values()} == {0.5}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"widhts": [3]}, "widhts is not a known key; did you mean 'widths'?"),
        ({"sizes": [{"width": 3}]}, "exactly one of widths and sizes"),
        ({"tokens": None}, "give horizons"),
        ({"tokens_per_parameter": [1]}, "not both"),
        ({"seeds": [1, 1]}, "seeds: 1 stands twice"),
        ({"widths": [16, 33]}, "run w33-d2048-s0 of the ladder: model.num_heads=4 cannot"),
        ({"set": {"optimizer.rate": 3}}, "optimizer.rate is not a known key"),
        ({"set": {"optimizer.lr": -1}}, "ladder.yaml:1: optimizer.lr=-1 is not valid"),
        ({"isoflop": {"flops": [1e9], "sizes": ["w3"]}}, "w3 is not one of w16, w32"),
        ({"target": {"size": {"width": 32}, "tokens": 5120}}, "the target is w32-d5120-s0, a rung"),
        ({"target": {"size": {"width": 32}}}, "exactly one of tokens_per_parameter and tokens"),
        ({"target": {"size": {}, "tokens": 5}}, "give the size a name"),
        ({"tokens": [256]}, "run w16-d256-s0 of the ladder: schedule: "),
        ({"batch": {"kind": "law", "law": "hyperp"}}, "batch.law=hyperp gives no batch"),
        ({"batch": {"kind": "law", "law": "x"}}, "batch.law=x is not known; use one of step-law"),
        ({"law": "chinchila"}, "no law is called 'chinchila'"),
        ({"law": "tissue"}, "law=tissue does not predict the loss of finished runs"),
        ({"law": "batch_law"}, "law=batch_law does not predict the loss of finished runs"),
        ({"fix": {"F": 0}}, "fix.F: chinchilla has no such parameter; use one of E, A, B, alpha"),
        (
            {"fix": {"alpha": 9}},
            "fix.alpha=9 is outside of what chinchilla allows; choose a value from 0",
        ),
        ({"loss": "held-out"}, "loss=held-out is no loss of a run"),
        ({"loss": "validation/x"}, "loss=validation/x: the runs have no source 'x', only "),
        ({"base": "nowhere.yaml"}, "nowhere.yaml does not exist"),
        ({"kind": "run"}, "does not describe a ladder"),
        (
            {"launch": {"kind": "local", "processes": 3}},
            "batch.sequences=8 cannot be divided by hdp=3",
        ),
        ({"launch": {"kind": "sbatch", "processes": 3, "nodes": 2}}, "nodes=2 cannot share"),
        ({"launch": {"kind": "sbatch", "options": ["gpus=1"]}}, "is no option of sbatch"),
        (
            {"schedules": [{"name": "x", "schedule": {"kind": "wsd", "decay": "fast"}}]},
            "decay='fast'",
        ),
    ],
)
def test_mistakes_are_one_sentence(base: Path, keys: dict[str, Any], said: str) -> None:
    assert said in refused(base, **keys)


def test_presets_of_the_two_kinds_are_told_apart() -> None:
    with pytest.raises(UserError, match="is not a run but a ladder"):
        load("preset:ladder_demo")
    with pytest.raises(UserError, match=r"there is no ladder 'demo'; the ladders are ladder_demo"):
        load_ladder("preset:demo")


def test_folder_alone_says_what_the_ladder_is(base: Path) -> None:
    keys = {"training.clip_grad_norm": None, "optimizer.lr": 3e-3, "data.sources.0.weight": 0.6}
    schedules = [{"name": "c", "schedule": {"kind": "cosine", "warmup_tokens": 256}}]
    plan = planned(base, set=keys, schedules=schedules, isoflop={"flops": [1e10]})
    plan.folder.mkdir()
    save_ladder(plan)
    again = open_ladder(str(plan.folder))
    assert again.runs == plan.runs
    assert again.rungs[0].config.training.clip_grad_norm is None


def test_parent_that_is_gone_is_said_and_not_waited_for(base: Path) -> None:
    plan = planned(base, seeds=[0])
    run = plan.rungs[1]
    assert as_stored(run, plan, {plan.rungs[0].name}) == (run, None)
    alone, remark = as_stored(run, plan, ())
    assert alone.config.run.parent is None
    assert alone.own_flops == run.flops > run.own_flops
    assert remark is not None
    assert "w16-d2048-s0 has not kept step 6, so it is trained from scratch" in remark


@pytest.mark.parametrize("changes", [["optimizer.lr=0.5"], ["training.total_tokens=9999"]])
def test_folder_of_another_run_is_refused(base: Path, changes: list[str]) -> None:
    plan = planned(base, seeds=[0])
    run = plan.rungs[0]
    run.folder.mkdir(parents=True)
    stored = run.folder / "config.yaml"
    stored.write_text(dump(run.config))
    assert as_stored(run, plan, ())[0] == run
    stored.write_text(dump(load(stored, changes)))
    with pytest.raises(UserError, match="the ladder now says"):
        as_stored(run, plan, ())


def test_branches_have_the_rates_of_their_own_schedule(base: Path) -> None:
    run = planned(base).rungs[1]
    plan = BatchPlan(run.config.batch, 32)
    assert resolve_schedule(run.config, plan).decay_start == 14
