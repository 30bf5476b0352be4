from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.areas import areas_of
from allometry.laws.collect import from_runs
from allometry.laws.curves import curves_from_runs, curves_from_tables
from allometry.laws.observations import LearningRates
from allometry.laws.runs import Run
from fake_runs import chinchilla, fake_run


@pytest.mark.parametrize("every", [1, 4])
def test_curves_have_the_rates_of_every_step(tmp_path: Path, every: int) -> None:
    fake_run(tmp_path / "cosine")
    schedule = "schedule={kind: wsd, warmup_steps: 4, decay_fraction: 0.5, decay: linear}"
    fake_run(tmp_path / "wsd", f"record.every_steps={every}", schedule)
    found = curves_from_runs([tmp_path], bins=None)
    assert set(found.groups) == {"cosine", "wsd"}
    curve = found.curves["wsd"]
    rates = np.concatenate([np.arange(1, 5) / 4, np.ones(16), 1 - np.arange(1, 21) / 20]) * 1e-2
    np.testing.assert_allclose(curve.rates, rates, rtol=1e-12, atol=1e-17)
    assert curve.warmup_steps == 4
    part = found.take([group == "wsd" for group in found.groups])
    np.testing.assert_array_equal(part["step"], np.arange(5 if every == 1 else 8, 41, every))
    s1, s2 = areas_of(rates, 4)
    steps = part["step"].astype(int) - 1
    np.testing.assert_allclose(part["S1"], s1[steps], rtol=1e-12)
    np.testing.assert_allclose(part["S2"], s2[steps], rtol=1e-12)
    np.testing.assert_allclose(part["loss"], chinchilla(part["N"][0], part["D"]), rtol=1e-12)


def test_steps_of_a_trunk_count_once(tmp_path: Path) -> None:
    fake_run(tmp_path / "a-trunk")
    for name, step in (("b", 20), ("c", 30)):
        parent = f"run.parent={{folder: {tmp_path / 'a-trunk'}, step: {step}}}"
        fake_run(tmp_path / name, parent)
    found = curves_from_runs([tmp_path], bins=None)
    steps = {g: found["step"][np.array(found.groups) == g] for g in ("a-trunk", "b", "c")}
    assert [(s[0], s[-1]) for s in steps.values()] == [(5, 40), (21, 40), (31, 40)]
    assert found.conventions["left out"] == "rows of another run: b to step 20, c to step 30"
    found = curves_from_runs([tmp_path / "b", tmp_path / "c"], bins=None)
    steps = {g: found["step"][np.array(found.groups) == g] for g in ("b", "c")}
    assert [(s[0], s[-1]) for s in steps.values()] == [(5, 40), (21, 40)]
    moved = tmp_path.rename(tmp_path.parent / "moved")
    found = curves_from_runs([moved / "b", moved / "a-trunk"], bins=None)
    assert found.conventions["left out"] == "rows of another run: b to step 20"


def test_noisy_losses_are_averaged_in_stretches(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", noise=0.01)
    rows = curves_from_runs([tmp_path], bins=None)
    means = curves_from_runs([tmp_path], bins=6)
    np.testing.assert_array_equal(means["step"], [8, 14, 20, 26, 32, 38])
    np.testing.assert_allclose(means["loss"], rows["loss"].reshape(6, 6).mean(axis=1))
    held_out = curves_from_runs([tmp_path], loss="validation", bins=1)
    np.testing.assert_array_equal(held_out["step"], [20, 40])


def change(folder: Path, step: int, key: str, value: float | None) -> None:
    """Replace a value in the row of a step."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[step - 1][key] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("value", "said"),
    [(float("nan"), "nan"), (None, "nan"), (float("inf"), "inf"), (0.0, "0"), (-1.5, "-1.5")],
)
def test_a_loss_that_is_no_positive_number_is_refused(
    tmp_path: Path, value: float | None, said: str
) -> None:
    for name in ("a", "b"):
        fake_run(tmp_path / name)
    change(tmp_path / "b", 2, "loss", value)  # in the warm-up, which laws ignore
    assert curves_from_runs([tmp_path], bins=6).groups.count("b") == 6
    change(tmp_path / "b", 10, "loss", value)
    sentence = rf"b/metrics\.jsonl, step 10: the training loss of the mixture is {said}, and .*mend"
    with pytest.raises(UserError, match=sentence):
        curves_from_runs([tmp_path], bins=6)
    assert len(from_runs([tmp_path])) == 2  # the final held-out loss is unchanged
    change(tmp_path / "b", 40, "loss", value)
    with pytest.raises(UserError, match=f"step 40: the training loss of the mixture is {said}"):
        from_runs([tmp_path], loss="train")


def test_a_held_out_loss_that_is_no_positive_number_is_refused(tmp_path: Path) -> None:
    fake_run(tmp_path / "a")
    change(tmp_path / "a", 20, "validation/web", float("inf"))
    with pytest.raises(UserError, match="step 20: the held-out loss of web is inf"):
        curves_from_runs([tmp_path], loss="validation/web")
    change(tmp_path / "a", 40, "validation/web", -40.0)
    with pytest.raises(UserError, match=r"step 40: the held-out loss of the mixture is -\d"):
        from_runs([tmp_path], loss="validation")


def test_rates_that_were_hardly_recorded_are_refused(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", "record.every_steps=16", "evaluation.every_steps=null")
    with pytest.raises(UserError, match=r"do not tell those between.*record\.every_steps: 1"):
        curves_from_runs([tmp_path / "a"])

    def planned(run: Run) -> LearningRates:
        return LearningRates(rates, 4)

    fake_run(tmp_path / "b")
    rates = curves_from_runs([tmp_path / "b"]).curves["b"].rates
    exact = curves_from_runs([tmp_path / "a"], bins=None, planned=planned)
    np.testing.assert_array_equal(exact.curves["a"].rates, rates)
    np.testing.assert_array_equal(exact["step"], [16, 32, 40])
    rates = rates * 1.01  # not as recorded: falls back to straight lines, which do not fit
    with pytest.raises(UserError, match="do not tell those between"):
        curves_from_runs([tmp_path / "a"], planned=planned)


def test_a_curve_within_its_warmup_is_refused(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", stop=3)
    with pytest.raises(
        UserError, match="no recorded train loss of its own after its warm-up of 4 steps"
    ):
        curves_from_runs([tmp_path / "a"])
    with pytest.raises(UserError, match=r"--bins=0"):
        curves_from_runs([tmp_path / "a"], bins=0)


def test_curves_from_tables_fill_in_rates(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("step,lr,nll\n10,0.5,4\n20,0.5,3\n24,0.1,2\n")
    (tmp_path / "b.csv").write_text("step,lr,nll\n2,0.5,3\n1,1,4\n")
    found = curves_from_tables([tmp_path / "a.csv", tmp_path / "b.csv"], mapping={"loss": "nll"})
    assert found.groups == ("a.csv", "a.csv", "b.csv", "b.csv")
    np.testing.assert_array_equal(found["step"], [20, 24, 1, 2])
    np.testing.assert_array_equal(found["loss"], [3, 2, 4, 3])
    a, b = found.curves["a.csv"], found.curves["b.csv"]
    assert (a.warmup_steps, b.warmup_steps) == (10, 0)
    np.testing.assert_allclose(a.rates[[0, 9, 19, 20, 23]], [0.05, 0.5, 0.5, 0.4, 0.1])
    np.testing.assert_array_equal(b.rates, [1.0, 0.5])
    early = curves_from_tables([tmp_path / "a.csv"], mapping={"loss": "nll"}, warmup_steps=5)
    np.testing.assert_allclose(early.curves["a.csv"].rates[[0, 4, 9]], [0.1, 0.5, 0.5])
    assert len(early) == 3


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("1,1,1\n1,1,1\n", "two rows of step 1"),
        ("0,1,1\n1,1,1\n", "no whole number from 1"),
        ("1.5,1,1\n", "no whole number from 1"),
        ("1,-1,1\n2,1,1\n", "negative lr"),
        ("9,1,1\n", "no row after the warm-up of 9 steps"),
    ],
)
def test_tables_that_are_no_curves_are_refused(tmp_path: Path, rows: str, words: str) -> None:
    (tmp_path / "a.csv").write_text(f"step,lr,loss\n{rows}")
    with pytest.raises(UserError, match=words):
        curves_from_tables([tmp_path / "a.csv"])
    with pytest.raises(UserError, match="given twice"):
        curves_from_tables([tmp_path / "a.csv"] * 2)


def test_rows_of_a_table_are_chosen_and_still_say_their_rates(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rates = (1e-3, 1e-3, 8e-4, 6e-4, 4e-4)
    losses = ("4", "3.5", "nan", "3.2", "3.1")
    rows = [
        f"{step},{rate},{loss}"
        for step, (rate, loss) in enumerate(zip(rates, losses, strict=True), 1)
    ]
    path.write_text("\n".join(["step,lr,loss", *rows]))
    with pytest.raises(UserError, match=r"line 4, column 'loss'.*--where '`loss` > 0' does"):
        curves_from_tables([path])
    found = curves_from_tables([path], where=["`loss` > 0"])
    assert found["step"].tolist() == [1, 2, 4, 5]
    assert found.curves["a.csv"].rates.tolist() == pytest.approx(rates)


def test_one_curve_in_two_files_is_refused(tmp_path: Path) -> None:
    text = "step,lr,loss\n1,1e-3,4\n2,1e-3,3.5\n3,1e-3,3.4\n"
    (tmp_path / "a.csv").write_text(text)
    (tmp_path / "b.tsv").write_text(text.replace(",", "\t"))
    files = [tmp_path / "a.csv", tmp_path / "b.tsv"]
    with pytest.raises(UserError, match=r"a\.csv and b\.tsv hold the same curve"):
        curves_from_tables(files)
    files[1].write_text(text.replace("3.4", "3.3").replace(",", "\t"))
    assert len(curves_from_tables(files)) == 6
