from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.refine import refine, refined_schedule, write_schedule
from allometry.laws.sensitivity import learning_rate_sensitivity
from allometry.optim.schedule import read_refined


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("steps", [2, 7, 500])
def test_constant_norms_give_a_straight_line(steps: int, power: int) -> None:
    wanted = np.arange(steps - 1, -1, -1) / (steps - 1)
    assert refine(np.full(steps, 0.37), power) == pytest.approx(wanted, abs=1e-12)


def test_refinement_by_hand() -> None:
    # w = 1, 1/2, 1/4, 1/4; without a filter.
    found = refine([1.0, 2.0, 4.0, 4.0], 1, smoothing=0.0)
    assert found == pytest.approx([1.0, 0.25, 0.0625, 0.0], abs=1e-15)


def test_norms_that_rise_at_the_end_anneal_earlier_and_warm_up_where_they_begin_large() -> None:
    flat = np.ones(400)
    rising = np.append(np.ones(300), np.linspace(1.0, 5.0, 100))
    line, found = refine(flat, 1), refine(rising, 1)
    assert (found[310:399] < line[310:399]).all()
    assert (np.diff(found[290:]) < 0.0).all()
    early = refine(np.append(np.linspace(4.0, 1.0, 60), np.ones(340)), 1)
    assert early.argmax() > 30
    assert early[0] < 0.5


def test_single_peaks_are_filtered_out() -> None:
    norms = np.ones(200)
    norms[77] = 50.0
    assert refine(norms, 2) == pytest.approx(refine(np.ones(200), 2), abs=1e-12)
    assert refine(norms, 2, smoothing=0.0)[77] < 0.01


def run_folder(
    folder: Path, rows: list[dict[str, float]], lr: float = 1e-3, ended: str = "finished"
) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(f"optimizer: {{lr: {lr}}}\n")
    (folder / "run.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    event = {"event": ended, "step": rows[-1]["step"]}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    return folder


def test_from_a_run_to_a_file_that_a_run_reads(tmp_path: Path) -> None:
    rows = [{"step": s, "grad_norm": 2.0, "monitors/grad_l1": 1.0 + s} for s in range(2, 41, 2)]
    folder = run_folder(tmp_path / "run", rows)
    content = refined_schedule(folder, "adam")
    assert content["from"]["norm"] == "monitors/grad_l1"
    write_schedule(content, tmp_path / "schedule.json")
    fractions = read_refined(tmp_path / "schedule.json")
    assert len(fractions) == 40
    assert max(fractions) == 1.0
    norms = np.interp(np.arange(1, 41), np.arange(2, 41, 2), 1.0 + np.arange(2, 41, 2))
    assert fractions == pytest.approx(refine(norms, 1))
    from allometry.launch.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["refine", str(folder), "--out", str(tmp_path / "new/folder/again.json")])
    assert ended.value.code in (0, None)
    assert read_refined(tmp_path / "new/folder/again.json") == fractions
    with pytest.raises(UserError, match=r"schedule\.json/x\.json cannot be written: "):
        write_schedule(content, tmp_path / "schedule.json/x.json")
    by_sgd = refined_schedule(folder, "sgd")
    assert (by_sgd["from"]["norm"], by_sgd["from"]["power"]) == ("grad_norm", 2)
    assert by_sgd["fractions"] == pytest.approx(np.arange(39, -1, -1) / 39)


def test_runs_that_say_nothing(tmp_path: Path) -> None:
    few = run_folder(tmp_path / "few", [{"step": s, "grad_norm": 1.0} for s in range(1, 6)])
    with pytest.raises(UserError, match="5 recorded steps with grad_norm, too few"):
        refined_schedule(few)
    zero = run_folder(tmp_path / "zero", [{"step": s, "grad_norm": 0.0} for s in range(1, 16)])
    with pytest.raises(UserError, match="zero or not finite"):
        refined_schedule(zero)
    with pytest.raises(UserError, match="smoothing"):
        refined_schedule(few, smoothing=2.0)


@pytest.mark.parametrize(
    ("ended", "said"),
    [("stopped", "is at step 40 of"), ("not_finite", "ended at step 40 as its loss was not")],
)
def test_run_that_has_not_finished_is_refused(tmp_path: Path, ended: str, said: str) -> None:
    rows = [{"step": s, "grad_norm": 2.0} for s in range(1, 41)]
    assert refined_schedule(run_folder(tmp_path / "whole", rows))["from"]["steps"] == 40
    with pytest.raises(UserError, match=f"part {said}"):
        refined_schedule(run_folder(tmp_path / "part", rows, ended=ended))


def test_sensitivity_by_hand() -> None:
    losses = {3e-4: 4.5, 1e-2: 4.0, 3e-1: 9.0}
    assert learning_rate_sensitivity(losses, 7.0) == pytest.approx(7 / 6, abs=1e-6)
    diverged = losses | {3e-1: float("nan")}
    assert learning_rate_sensitivity(diverged, 7.0) == pytest.approx(7 / 6, abs=1e-6)
    assert learning_rate_sensitivity(losses, 7.0, (1e-3, 1.0)) == pytest.approx(1.5)
    assert learning_rate_sensitivity({1.0: 8.0, 2.0: 9.0}, 7.0) == 0.0
