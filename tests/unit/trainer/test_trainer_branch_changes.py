"""Branches that differ from their parent in declared keys: applied, recorded, or refused."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from allometry.configs.errors import ConfigError, UserError
from allometry.configs.run import RunConfig
from allometry.optim.schedule import resolve_schedule, schedules_of
from allometry.scaling.batch import BatchPlan
from allometry.scaling.plan import RunPlan
from allometry.trainer.record.rates import planned_rates, with_history
from allometry.trainer.state.unchanged import check_branch
from allometry.trainer.train import train
from run_folders import events, rows

Make = Callable[..., RunConfig]
STABLE = "schedule={kind: constant, warmup_steps: 3}"
STEP = 8


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(config: RunConfig, **options: Any) -> Path:
    train(config, device=torch.device("cpu"), callbacks=[], **options)
    return Path(config.run.folder)


@pytest.fixture
def trunk(tiny: Make, tmp_path: Path) -> Path:
    config = tiny(STABLE, f"checkpoint.keep_steps=[{STEP}]", folder=tmp_path / "trunk")
    return run(config, stop_at_step=STEP)


def parent(folder: Path, *changes: str, step: int = STEP) -> str:
    return f"run.parent={{folder: {folder}, step: {step}, changes: [{', '.join(changes)}]}}"


def told(folder: Path) -> dict[str, tuple[Any, Any]]:
    said = [event for event in events(folder) if event["event"] == "config_changed"]
    return {event["key"]: (event["before"], event["after"]) for event in said}


def rate(folder: Path, step: int = STEP + 1) -> float:
    (found,) = [row["lr"] for row in rows(folder) if row["step"] == step]
    return float(found)


KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "constant"},
    {"kind": "constant", "warmup_steps": 4},
    {"kind": "constant", "warmup_tokens": 768},
    {"kind": "linear"},
    {"kind": "linear", "warmup_steps": 2},
    {"kind": "cosine", "warmup_steps": 3},
    {"kind": "wsd", "warmup_steps": 2, "decay_fraction": 0.5},
    {"kind": "wsd_s", "decay_ends_steps": [4, 7], "decay_fraction": 0.2},
    {"kind": "wsd_s", "decay_ends_tokens": [1024], "rewarmup_steps": 2},
    {"kind": "refined", "file": "FILE"},
    {
        "kind": "continued",
        "before": {"kind": "linear"},
        "before_steps": 5,
        "after": {"kind": "wsd"},
    },
)


@pytest.mark.parametrize("section", KINDS, ids=lambda section: section["kind"])
def test_a_named_schedule_counts_from_the_branch_under_every_kind(
    tiny: Make, tmp_path: Path, section: dict[str, Any]
) -> None:
    """Each rate equals that of a run of the remaining steps that starts at the branch."""
    file = tmp_path / "refined.json"
    fractions = list(np.linspace(1.0, 0.2, 12))
    file.write_text(json.dumps({"kind": "allometry.schedule", "fractions": fractions}))
    text = json.dumps(section).replace("FILE", str(file))
    trunk, more = tiny(STABLE), ("optimizer.lr=3e-3", f"schedule={text}")
    link = parent(tmp_path / "run", "schedule", "optimizer.lr")
    branch, fresh = tiny(link, *more), tiny(*more, "training.total_steps=12")
    assert branch.run.parent is not None
    check_branch(trunk, branch, branch.run.parent)
    plan = BatchPlan(branch.batch, branch.data.sequence_length)
    here, alone = resolve_schedule(branch, plan), resolve_schedule(fresh, plan)
    assert (here.first_step, here.total_steps) == (STEP + 1, 20)
    for step in range(1, 13):
        assert here.fraction(STEP + step) == alone.fraction(step)
    assert RunPlan.of(branch, 1).warmup_steps == STEP + RunPlan.of(fresh, 1).warmup_steps
    assert here.ends == tuple(STEP + end for end in alone.ends)


def test_tokens_of_a_warm_up_are_counted_from_the_branch_in_a_growing_batch(tiny: Make) -> None:
    ramp = "batch.ramp={start_sequences: 2, increment_sequences: 2, over_tokens: 1024}"
    plan = BatchPlan(tiny(ramp).batch, 32)
    for step in (0, 3, 5, 40):
        after = plan.rest(step)
        assert [after.sequences(s) for s in (1, 5, 50)] == [
            plan.sequences(step + s) for s in (1, 5, 50)
        ]
        assert after.tokens_after(7) == plan.tokens_after(step + 7) - plan.tokens_after(step)
        assert after.steps_for_tokens(1000) == next(
            s for s in range(1, 100) if after.tokens_after(s) >= 1000
        )


def test_another_rate_and_schedule_are_obeyed_and_resumed_twice(
    tiny: Make, trunk: Path, tmp_path: Path
) -> None:
    """Killed and resumed twice, without its trunk, it equals an uninterrupted run."""
    changed = (
        "optimizer.lr=3e-3",
        "schedule={kind: cosine, warmup_steps: 2}",
        "data.sources.1.weight=0.9",
        parent(trunk, "optimizer.lr", "schedule", "data"),
        "training.total_steps=16",
    )
    straight = run(tiny(*changed, folder=tmp_path / "straight"))
    config = tiny(*changed, folder=tmp_path / "branch")
    shutil.copytree(trunk, tmp_path / "kept")
    run(config, stop_at_step=10)
    shutil.rmtree(trunk)
    run(config, stop_at_step=13)
    branch = run(config)
    keys = ("step", "loss", "lr", "s1", "s2", "tokens/up", "tokens/down", "grad_norm")
    found, wanted = ([[row[key] for key in keys] for row in rows(f)] for f in (branch, straight))
    assert found == wanted
    assert rate(branch) == 3e-3 / 2
    assert rate(branch, STEP) == 1e-2
    assert told(branch) == {
        "data.sources.down.weight": (0.3, 0.9),
        "optimizer.lr": (0.01, 0.003),
        "schedule.final_fraction": (None, 0.1),
        "schedule.kind": ("constant", "cosine"),
        "schedule.warmup_steps": (3, 2),
        "training.total_steps": (20, 16),
    }
    kinds = [event["event"] for event in events(branch)]
    assert kinds[0] == "branched"
    assert kinds.count("mixture_changed") == 1
    # A branch of the branch continues its schedule, or has its own.
    (tmp_path / "kept").rename(trunk)
    # A branch killed between its config and its record still records its changes.
    killed = tmp_path / "killed"
    run(tiny(*changed, "checkpoint.keep_last=9", folder=killed), stop_at_step=9)
    for name in ("run.json", "events.jsonl", "latest"):
        (killed / name).unlink()
    shutil.rmtree(killed / "checkpoints/step-9")
    run(tiny(*changed, "checkpoint.keep_last=9", folder=killed), stop_at_step=10)
    assert told(killed) == told(branch)
    assert next(event["event"] for event in events(killed)) == "branched"
    keep = ("checkpoint.keep_steps=[12]",)
    holder = run(tiny(*changed, *keep, folder=tmp_path / "holder"), stop_at_step=12)
    own = [one for one in changed if not one.startswith("run.parent")]
    with pytest.raises(UserError, match=r"go on with its schedule by run\.parent\.schedule_from=8"):
        run(tiny(*own, parent(holder, step=12), folder=tmp_path / "twig"))
    link = f"run.parent={{folder: {holder}, step: 12, schedule_from: 8}}"
    twig = run(tiny(*own, link, folder=tmp_path / "twig"))
    assert [[row[key] for key in keys] for row in rows(twig)] == wanted
    again = run(tiny(*own, parent(holder, "schedule", step=12), folder=tmp_path / "again"))
    assert rate(again, 13) == 3e-3 / 2


def test_another_rate_alone_keeps_the_schedule(tiny: Make, trunk: Path, tmp_path: Path) -> None:
    more = ("optimizer.lr=2e-3", "optimizer.weight_decay=0.0", "training.clip_grad_norm=0.5")
    names = ("optimizer", "training.clip_grad_norm")
    branch = run(tiny(parent(trunk, *names), *more, folder=tmp_path / "branch"), stop_at_step=15)
    assert rate(branch) == 2e-3, "WSD, which is stable there"
    assert set(told(branch)) == {
        "optimizer.lr",
        "optimizer.weight_decay",
        "training.clip_grad_norm",
        *(f"schedule.{key}" for key in ("decay", "decay_fraction", "final_fraction", "kind")),
    }
    # S1 continues from the trunk's.
    found = rows(branch)
    assert found[8]["s1"] == pytest.approx(found[7]["s1"] + 2e-3, rel=1e-12)
    config = tiny(parent(trunk, *names), *more, folder=branch)
    recorded = np.arange(1, 16), np.array([row["lr"] for row in found])
    rates = with_history(planned_rates(config), config.run.branched_at, *recorded)
    assert list(rates.rates[:8]) == [row["lr"] for row in found[:8]], "as they were recorded"
    assert list(rates.rates[8:15]) == [row["lr"] for row in found[8:]]


def test_a_refined_schedule_of_a_branch_is_known_again(
    tiny: Make, trunk: Path, tmp_path: Path
) -> None:
    file = tmp_path / "refined.json"
    file.write_text(json.dumps({"kind": "allometry.schedule", "fractions": [1.0, 0.5, 0.2]}))
    config = tiny(
        f"schedule={{kind: refined, file: {file}}}",
        parent(trunk, "schedule"),
        folder=tmp_path / "branch",
    )
    run(config, stop_at_step=11)
    run(config, stop_at_step=13)
    file.write_text(json.dumps({"kind": "allometry.schedule", "fractions": [0.9, 0.5, 0.2]}))
    with pytest.raises(UserError, match=r"file of schedule\.kind=refined changed"):
        run(config)
    file.write_text(json.dumps({"kind": "allometry.schedule", "fractions": [1.0, 0.5, 0.2]}))
    assert rate(run(config)) == 1e-2


def test_an_edited_resume_says_what_changed(tiny: Make, tmp_path: Path) -> None:
    run(tiny(STABLE), stop_at_step=5)
    edited = tiny(STABLE, "data.sources.0.max_epochs=9", "training.total_steps=12")
    folder = run(edited, stop_at_step=7)
    assert told(folder) == {
        "data.sources.up.max_epochs": (None, 9.0),
        "training.total_steps": (20, 12),
    }
    run(edited)
    assert len(told(folder)) == 2
    assert len([e for e in events(folder) if e["event"] == "config_changed"]) == 2


REFUSED: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (
        (),
        ("optimizer.lr=0.5",),
        r"does not name it; add optimizer\.lr to run\.parent\.changes",
    ),
    ((), ("data.sources.1.weight=0.9",), "add data to run.parent.changes"),
    ((), ("data.replay={ratio: 0.5, sources: [down]}",), "add data to run.parent.changes"),
    ((), ("training.clip_grad_norm=null",), r"add training\.clip_grad_norm to"),
    ((), ("optimizer.states={kind: fp8}",), r"add optimizer\.states to"),
    (("optimizer.lr",), ("optimizer.beta2=0.9",), r"add optimizer\.beta2 to"),
    (
        ("data",),
        ("data.sequence_length=16",),
        r"cannot change where a run goes on; .*initial=\{",
    ),
    (("model",), ("model.width=48",), r"model\.width=48 differs from 32 .* cannot change"),
    (("optimizer",), ("optimizer={kind: muon, lr: 1e-2}",), r"optimizer\.kind='muon' differs"),
    (("data",), ("run.seed=4",), r"run\.seed=4 .*keep: \[weights, optimizer\]\}"),
    (("schedule",), ("batch.sequences=16",), r"batch\.sequences=16 .*\[weights, optimizer, data\]"),
    ((), ("parameterization={kind: mup, base_width: 16}",), r"parameterization\.kind='mup' diff"),
    (("optimizer.lrr",), (), r"changes: 'optimizer\.lrr' is no key of this run"),
    (("optimizer.kind",), (), r"changes: 'optimizer\.kind' cannot change where a run goes on"),
    (("run",), (), r"changes: 'run'"),
    (("batch",), ("batch.sequences=16",), r"batch\.sequences=16 .* cannot change"),
    (("schedule.kind",), (), "is a part of the schedule"),
    (("schedule",), ("training.total_steps=8",), "so that none is left"),
    (("schedule",), ("schedule.warmup_steps=13",), "a warm-up of 13 steps is longer than the run"),
)


@pytest.mark.parametrize(("names", "changes", "sentence"), REFUSED)
def test_what_is_not_named_or_cannot_be(
    tiny: Make, tmp_path: Path, names: tuple[str, ...], changes: tuple[str, ...], sentence: str
) -> None:
    trunk = tiny(STABLE, folder=tmp_path / "trunk")

    def checked() -> None:
        branch = tiny(STABLE, parent(tmp_path / "trunk", *names), *changes)
        assert branch.run.parent is not None
        check_branch(trunk, branch, branch.run.parent)
        resolve_schedule(branch, BatchPlan(branch.batch, branch.data.sequence_length))

    with pytest.raises(UserError, match=sentence) as refused:
        checked()
    assert "\n" not in str(refused.value)


def test_links_that_contradict_themselves(tiny: Make) -> None:
    for more, said in (
        ("changes: [data, data]", "changes names 'data' twice"),
        ("changes: [schedule], schedule_from: 3", "counts from step=8; leave one of them out"),
        ("schedule_from: 9", "schedule_from=9 is past step=8"),
        ("changes: data", r"run\.parent\.changes"),
        ("changes: ['']", r"run\.parent\.changes"),
    ):
        with pytest.raises(ConfigError, match=said):
            tiny(f"run.parent={{folder: a, step: 8, {more}}}")


def test_a_schedule_that_begins_after_the_end(tiny: Make) -> None:
    config = tiny(
        "run.parent={folder: a, step: 20, changes: [schedule]}", "training.total_steps=20"
    )
    with pytest.raises(UserError, match="so that none is left"):
        schedules_of(config)
