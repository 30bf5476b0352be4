"""The study of transfer: its rows run, its plan adds up, and it resumes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from allometry.scaling.count import count_parameters, flops_per_token
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.shapes import Axis, resize
from allometry.studies.sweeps.outcome import Trial
from allometry.studies.sweeps.transfer import TransferSweep

ROOT = Path(__file__).resolve().parents[2]
POOL = np.random.default_rng(0).integers(0, 512, (400, 33))


@pytest.fixture(autouse=True)
def folder_of_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the import path of that folder's scripts."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def module(name: str) -> ModuleType:
    return __import__(name, fromlist=["x"])


def families() -> Any:
    return module("contenders.study_families")


class MadeText:
    """Random tokens instead of the corpora."""

    tokens = POOL.size

    def pools(self, entry: Any) -> tuple[Any, Any]:
        longest = max(entry.sizes) if entry.axis == Axis.HORIZON else entry.steps
        assert longest * entry.cut.sequences <= len(POOL) - 8
        return POOL[8:], POOL[:8]


def test_every_row_of_the_study_exists_at_every_size() -> None:
    study, plan = families(), module("contenders.study_plan")
    for cut in study.CUTS.values():
        rows = study.entries(cut)
        names = [row.name for row in rows]
        assert len(set(names)) == len(names) == len({row.slug for row in rows})
        assert {row.part for row in rows} == set(study.PARTS)
        for row in rows:
            if cut.only is None and row.compared is not None:
                assert names.index(row.compared) < names.index(row.name), "it is run before"
            base = row.steps * cut.sequences * cut.length
            for size in row.sizes:
                run = plan.shape(row, size)
                tokens = run.steps * run.sequences * cut.length
                assert tokens == base * (size // row.sizes[0] if row.axis == Axis.HORIZON else 1)
                model = resize(row.model, row.axis, size)
                made = module("contenders.families").optimizer(row.kind, 1.0)
                Parameterization(row.config, model, made)
            if cut.name == "real":
                assert base >= 20 * count_parameters(row.model).active
                assert max(row.sizes) // min(row.sizes) in (8, 16, 64)
    assert {row.name for row in study.entries(study.SMALL)} == set(study.SMALL.only)
    assert [row.part for row in study.entries(study.REAL, ["depth"])] == ["depth"] * 6


@pytest.mark.parametrize(
    ("part", "axis", "size"),
    [
        ("depth", Axis.DEPTH, 2),
        ("horizon", Axis.HORIZON, 8),
        ("batch", Axis.BATCH, 8),
        ("experts", Axis.EXPERTS, 4),
    ],
)
def test_rules_that_share_a_row_are_the_same_runs(part: str, axis: Axis, size: int) -> None:
    study = families()
    cut = replace(study.SMALL, only=None, most_steps=8)
    row = next(row for row in study.entries(cut, [part]) if row.who.startswith("sp"))
    other = next(row for row in study.entries(cut, [part]) if row.who == "mupp")
    rules = {who: config for who, config, _ in study.rules(cut, row.model)}

    def loss(config: Any) -> float:
        sweep = module("contenders.study").sweep_of(replace(row, config=config), MadeText())
        assert sweep.axis == axis
        return sweep.loss(Trial(size, -6.0, 0))

    alike = row.who.split(", ")
    assert len(alike) == (2 if part == "depth" else 3)
    assert len({loss(rules[who]) for who in alike}) == 1
    assert loss(other.config) != loss(row.config)


def test_the_plan_adds_up(tmp_path: Path) -> None:
    study, plan = families(), module("contenders.study_plan")
    rows = study.entries(study.SMALL, ["width", "batch"])
    made = plan.jobs(rows, tmp_path / "seconds.json")
    assert [(job.entry.name, job.size) for job in made] == [
        *(("width: sp", 16), ("width: sp", 32), ("width: mup", 16), ("width: mup", 32)),
        *(("batch: mupp", 4), ("batch: mupp", 8)),
    ]
    seconds = json.loads((tmp_path / "seconds.json").read_text())
    assert len(seconds) == 3, "a shape is timed once: two widths, and a batch twice as large"
    job = replace(made[1], seconds_a_step=9.0)
    model = resize(rows[0].model, Axis.WIDTH, 32)
    assert job.runs == 5 + 4 * 2
    assert job.tokens == 16 * 4 * 32
    assert job.flops == flops_per_token(model, 32).total * job.tokens
    assert job.hours == pytest.approx(16 * 9.0 / 3600)
    kept, left_out = plan.within([made[0], job], 0.01)
    assert (kept, left_out) == ([made[0]], [job])
    said = "\n".join(plan.lines(kept, left_out, 2))
    assert "left out: width: sp at 32: 0.04 hours a run" in said
    assert plan.sizes_of(made)["width: sp"] == (16, 32)
    slow = replace(made[0], seconds_a_step=1e6)
    assert plan.within([slow], 0.01) == ([slow], []), "a base is never left out"


def test_a_study_that_was_killed_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transfer = module("transfer")
    trained: list[Trial] = []
    most = 20

    def loss(_: TransferSweep, trial: Trial) -> float:
        if len(trained) == most:
            raise KeyboardInterrupt
        trained.append(trial)
        return 2.0 + 0.1 * (trial.log2_lr + 6.1 + 0.5 * math.log2(trial.size)) ** 2

    monkeypatch.setattr(TransferSweep, "loss", loss)
    monkeypatch.setattr(transfer.Text, "prepared", lambda *_: MadeText())
    monkeypatch.setattr(module("contenders.study_plan"), "_seconds", lambda *_: 0.5)
    out = tmp_path / "r.json"
    asked = [
        *("--size", "small", "--only", "width"),
        *("--work", str(tmp_path / "work"), "--json", str(out)),
    ]
    transfer.main([*asked, "--dry-run"])
    assert trained == []
    assert not out.exists()
    with pytest.raises(KeyboardInterrupt):
        transfer.main(asked)
    most = -1
    transfer.main(asked)
    assert len({(n, t) for n, t in enumerate(trained)}) == len(trained)
    result = json.loads(out.read_text())
    assert sum(len(row["losses"]) for row in result["rows"]) <= len(trained)
    sp, mup = result["rows"]
    assert (sp["name"], mup["name"]) == ("width: sp", "width: mup")
    assert mup["compared"] == sp["name"]
    assert sp["by_size"]["32"]["nats"] == pytest.approx(0.1 * 0.25)
    assert sp["gate"] == "missed"
    assert mup["by_size"]["32"]["fifth"] == "missed", "the same loss is not a fifth of it"
    assert sp["by_size"]["32"]["fifth"] is None
    first = len(trained)
    transfer.main(asked)
    assert len(trained) == first, "nothing is trained twice"
    assert "1.25 (1.25 to 1.25)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--dry-run",), "--dry-run is of --size real or small"),
        (("--size", "real", "--quick"), "--quick is of --size bytes"),
        (("--size", "real", "--only", "rates"), "--only rates is no part of --size real: width"),
        (("--size", "small", "--device", "cuda"), "add --engine stacked"),
    ],
)
def test_what_a_size_does_not_have_is_said(
    given: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        module("transfer").main([*given])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_the_gate_is_of_eight_times_and_a_fifth(tmp_path: Path) -> None:
    study = module("contenders.study")
    regret = module("allometry.laws.regret").Regret
    low = regret(-6.0, 2.0, 2.0, 0.0, 0.0, (0.0, 0.0), (0.0, 0.1))
    high = replace(low, percent_interval=(0.6, 0.9))
    unsure = replace(low, percent_interval=(0.1, 0.9))
    assert study.gate({16: low, 64: low, 128: high}, 8) == "met", "16 x is reported alone"
    assert study.gate({16: low, 64: high}, 8) == "missed"
    assert study.gate({16: unsure, 64: high}, 8) == "missed"
    assert study.gate({16: unsure, 64: low}, 8) == "undecided"
