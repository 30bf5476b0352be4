"""Two-step laws through the commands: best rates of sweeps, scores at predicted losses."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from allometry.laws.downstream import Chain
from allometry.laws.fit.store import load_fit
from allometry.laws.hyperparameters import fit_hyperparameter_law
from allometry.laws.observations import Observations
from allometry.laws.tables import read_table
from fake_runs import fake_run
from law_data import law_data
from shell import Shell

QUICK = ("--starts", "32", "--bootstraps", "20")
SIZES, TOKENS = (5e7, 2e8, 8e8), (4e9, 1.6e10, 6.4e10)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def best(size: float, tokens: float) -> tuple[float, float]:
    return 8.0 * size**-0.7 * tokens**0.25, 0.6 * tokens**0.57


@pytest.fixture
def sweeps(tmp_path: Path) -> Path:
    """Return nine grids of rate and batch, bowls around the law's optima; one at its edge."""
    lines = ["N,D,lr,B,loss"]
    for size in SIZES:
        for tokens in TOKENS:
            rate, batch = best(size, tokens)
            for u in np.arange(-2.0, 2.1, 0.5):
                for v in np.arange(-2.0, 2.1, 1.0):
                    at = (u + 0.2, v - 0.3)
                    if size == SIZES[2] and tokens == TOKENS[2]:
                        at = (u + 3.0, v)  # every rate is too high
                    loss = 2.5 + 0.006 * at[0] ** 2 + 0.004 * at[1] ** 2
                    lines.append(f"{size},{tokens},{rate * 2 ** at[0]},{batch * 2 ** at[1]},{loss}")
    path = tmp_path / "sweeps.csv"
    path.write_text("\n".join(lines))
    return path


def test_a_law_of_the_best_rate_is_fitted_to_sweeps(shell: Shell, sweeps: Path) -> None:
    out = sweeps.parent / "rate.json"
    asked = (sweeps, "--sweeps", *QUICK, "--hold-out", "largest")
    facts = shell.json("fit", "learning_rate_law", *asked, "--out", out)
    values = {name: one["value"] for name, one in facts["parameters"].items()}
    assert values == pytest.approx({"c": 8.0, "a": -0.7, "b": 0.25}, rel=1e-4)
    assert (facts["rows"], facts["groups"]) == (8, 8)
    assert any("--objective square hears all" in note for note in facts["notes"])
    assert facts["conventions"]["lr"].startswith("the best of each of 8 sweeps, by a parabola")
    left_out = facts["conventions"]["left out"]
    assert left_out.startswith("N=8e+08 D=6.4e+10: ")
    assert "the learning rates that were run" in left_out or "within" in left_out
    (point,) = shell.json("predict", out, "N=1e9", "D=2e10")["predictions"]
    assert point["lr"] == pytest.approx(best(1e9, 2e10)[0], rel=1e-3)
    batch = shell.json("fit", "batch_law", *asked)["parameters"]
    assert batch["b"]["value"] == pytest.approx(0.57, rel=1e-4)
    # Without the option every run is a row, and its rate is not the best.
    plain = shell.json("fit", "learning_rate_law", sweeps, *QUICK, "--hold-out", "none")
    assert plain["rows"] > 300


def test_sweeps_of_runs_are_read_from_their_folders(shell: Shell, tmp_path: Path) -> None:
    for width in (16, 32, 64):
        for steps in (40, 80):
            for octave in (-1.0, -0.5, 0.0, 0.5, 1.0):
                changes = (f"optimizer.lr={0.01 * 2**octave}", f"training.total_steps={steps}")

                def law(_: float, D_T: np.ndarray, rise: float = octave) -> np.ndarray:
                    return 2.5 + 0.01 * (rise - 0.25) ** 2 + 0.0 * D_T

                fake_run(tmp_path / f"w{width}-{steps}-{octave}", *changes, width=width, law=law)
    facts = shell.json("fit", "learning_rate_law", tmp_path, "--sweeps", *QUICK)
    assert facts["rows"] == 6
    rate = 0.01 * 2**0.25
    values = {name: one["value"] for name, one in facts["parameters"].items()}
    assert values == pytest.approx({"c": rate, "a": 0.0, "b": 0.0}, rel=1e-4, abs=1e-4)
    assert "no column 'B'" in shell.refusal("fit", "batch_law", tmp_path, "--sweeps", *QUICK)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--group", "N"), "--group does not go with --sweeps, each of which is a group"),
        (("--where", "lr > 1"), "no row is left|no cell has an optimum"),
        (("--map", "N=lr", "--map", "D=B"), "cell .*: the sweep has one learning rate"),
    ],
)
def test_what_is_no_sweep_is_one_sentence(
    shell: Shell, sweeps: Path, options: tuple[str, ...], words: str
) -> None:
    sentence = shell.refusal("fit", "learning_rate_law", sweeps, "--sweeps", *options)
    assert re.search(words, sentence), sentence


def test_step_laws_grid_through_the_command(shell: Shell) -> None:
    path = law_data("steplaw") / "dense_lr_bs_loss.csv"
    mapped = ("--map", "loss=smooth loss", "--map", "B=bs*2048")
    law = ("fit", "learning_rate_law", path, *mapped, "--sweeps", "--objective", "square")
    facts = shell.json(*law, "--bootstraps", 20, "--hold-out", "none")
    rows = read_table(
        path, ("N", "D", "lr", "B", "loss"), mapping={"loss": "smooth loss", "B": "bs*2048"}
    )
    rate = fit_hyperparameter_law(rows, samples=2).rate
    assert rate is not None
    values = {name: one["value"] for name, one in facts["parameters"].items()}
    assert values == pytest.approx(rate.values, rel=1e-5)
    assert not any("--objective square" in note for note in facts["notes"])


@pytest.fixture
def steps(shell: Shell, tmp_path: Path) -> tuple[Path, Path]:
    """Return the fits of a loss and of an error to one table."""
    rng = np.random.default_rng(0)
    lines = ["N,D,loss,error"]
    for size in (1e7, 3e7, 1e8, 3e8):
        for ratio in (5, 20, 80, 320):
            loss = 1.8 + 480 / size**0.35 + 2000 / (ratio * size) ** 0.37
            error = 0.9 - 2.0 * np.exp(-0.8 * loss) + 0.001 * rng.standard_normal()
            loss *= 1 + 0.001 * rng.standard_normal()
            lines.append(f"{size},{ratio * size},{loss},{error}")
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(lines))
    files = (tmp_path / "loss.json", tmp_path / "error.json")
    for law, file in zip(("chinchilla", "downstream_error"), files, strict=True):
        shell("fit", law, path, *QUICK, "--hold-out", "none", "--out", file)
    return files


def test_a_score_is_predicted_by_way_of_the_loss(shell: Shell, steps: tuple[Path, Path]) -> None:
    loss, error = steps
    asked = ("predict", loss, "N=1e8,1e9", "D=2e9,2e10", "--downstream", error)
    facts = shell.json(*asked)
    rows = Observations.of({"N": [1e8, 1e9], "D": [2e9, 2e10]})
    fits = load_fit(loss), load_fit(error)
    chain = Chain(fits[0].fit, fits[1].fit)
    scores = facts["downstream"]
    assert (scores["law"], scores["unit"]) == ("downstream_error", "fraction")
    assert [one["error"] for one in scores["predictions"]] == list(chain.predict(rows))
    assert fits[0].bootstrap is not None
    assert fits[1].bootstrap is not None
    low_n, high_n = chain.predict_interval(rows, fits[0].bootstrap, fits[1].bootstrap)
    assert [one["low"] for one in scores["predictions"]] == list(low_n)
    assert [one["high"] for one in scores["predictions"]] == list(high_n)
    assert any("N=1e+09 is outside of the fitted range" in text for text in facts["warnings"])
    assert not any("reads a loss described as" in text for text in facts["warnings"])
    text = shell(*asked)
    assert "loss (unit of the data)" in text
    assert re.search(r"^1e\+08 +2e\+09 +0\.\d+ +0\.\d+ to 0\.\d+$", text, re.MULTILINE)
    truth = 0.9 - 2.0 * np.exp(-0.8 * (1.8 + 480 / 1e8**0.35 + 2000 / 2e9**0.37))
    assert scores["predictions"][0]["error"] == pytest.approx(truth, rel=0.01)


def test_scores_that_cannot_be_had_are_one_sentence(shell: Shell, steps: tuple[Path, Path]) -> None:
    loss, error = steps
    at = ("N=1e8", "D=2e9")
    for arguments, words in (
        ((error, "loss=3", "--downstream", loss), "chinchilla reads N, D and .* predicts error"),
        ((loss, *at, "--downstream", loss), "chinchilla reads N, D and .* predicts loss; give"),
        ((loss, *at, "--downstream", "no.json"), "no.json: cannot read the fit"),
        ((loss, *at, "--downstream", error, "--noise"), "leave one of them out"),
        (
            ("--law", "chinchilla", "--published", "hoffmann", *at, "--downstream", error),
            "--downstream goes with a fit of the loss",
        ),
    ):
        sentence = shell.refusal("predict", *arguments)
        assert re.search(words, sentence), sentence


def test_checkpoints_are_averaged_before_a_law_of_scores(shell: Shell, tmp_path: Path) -> None:
    """The OLMo ladder's second step: five checkpoints per row, without the first tenth of a run."""
    rng = np.random.default_rng(0)
    lines = ["run,D,loss,accuracy"]
    for run, end in (("a", 2.9), ("b", 2.5)):
        for step in range(1, 41):
            loss = end + 1.5 * (step / 40) ** -0.3 - 1.5
            accuracy = 0.95 - 0.65 / (1 + np.exp(-6 * (loss - 3.0)))
            lines.append(f"{run},{step}e9,{loss},{accuracy + 0.02 * rng.standard_normal()}")
    path = tmp_path / "checkpoints.csv"
    path.write_text("\n".join(lines))
    law = ("fit", "downstream_sigmoid", path, "--group", "run", *QUICK, "--hold-out", "none")
    law = (*law, "--fix", "chance=0.3")
    noisy, smooth = shell.json(*law), shell.json(*law, "--smooth", 5)
    assert (noisy["rows"], smooth["rows"], smooth["groups"]) == (80, 64, 2)
    errors = [
        abs(0.7 * one["parameters"]["gain"]["value"] - 0.65)
        + abs(one["parameters"]["L0"]["value"] - 3.0)
        for one in (noisy, smooth)
    ]
    assert errors[1] < errors[0]
    assert errors[1] < 0.1
    few = shell.refusal(*law, "--smooth", 50)
    assert "has 36 checkpoints after the first 10%" in few
    alone = ("fit", "downstream_sigmoid", path, *QUICK, "--smooth", 5)
    assert "--smooth belongs to rows of checkpoints with --group" in shell.refusal(*alone)


def test_sweeps_have_laws_with_intervals_and_what_they_are_worth(
    shell: Shell, sweeps: Path
) -> None:
    asked = ("sweeps", sweeps, "--bootstraps", 50, "--at", "N=1e9,D=2e10")
    facts = shell.json(*asked, "--initial-loss", 2.51)
    assert len(facts["cells"]) == 8
    assert list(facts["left_out"]) == ["N=8e+08 D=6.4e+10"]
    assert facts["rate"]["values"] == pytest.approx({"c": 8.0, "a": -0.7, "b": 0.25}, rel=1e-4)
    assert facts["batch"]["values"]["b"] == pytest.approx(0.57, rel=1e-4)
    (at,) = facts["predictions"]
    assert at["lr"]["value"] == pytest.approx(best(1e9, 2e10)[0], rel=1e-3)
    assert at["B"]["low"] <= at["B"]["value"] * (1 + 1e-9)
    worth = facts["excess"]
    assert len(worth["the laws of the other sizes"]) == 9
    # In a complete sweep the best run is the nearest; Step Law describes other optima.
    own = [v for name, v in worth["the laws of the other sizes"].items() if "6.4e+10" not in name]
    assert max(own) < 1e-4 < 1e-3 < max(worth["Step Law"].values())
    # Rates from -2 to 2 octaves around: min(0.006 u^2 + its best batch, 0.01) on average.
    u = np.arange(-1.8, 2.3, 0.5)
    batch = 0.004 * min(abs(np.arange(-2.0, 2.1) - 0.3)) ** 2
    losses = np.minimum(0.006 * u**2 + batch, 0.01)
    first = facts["sensitivity"]["N=5e+07 D=4e+09"]
    assert first == pytest.approx(np.mean(losses) - losses.min(), rel=1e-6)
    text = shell(*asked)
    assert "best lr = c N^a D^b: c = 8 (" in text
    assert "sensitivity" not in text
    assert "left out: N=8e+08 D=6.4e+10: " in text
    assert "at N = 1e+09, D = 2e+10: lr = 0.00" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--at", "N=7e9"), "--at 'N=7e9' must give N and D"),
        (("--at", "N=7e9,D=-1"), "must give N and D, positive numbers"),
        (("--within", "-1"), "--within=-1 must be a positive number of percent"),
        (("--sweeps",), "--sweeps: this command reads every finished run"),
        (("--where", "N > 1e9"), "no row is left"),
    ],
)
def test_what_sweeps_cannot_do_is_one_sentence(
    shell: Shell, sweeps: Path, options: tuple[str, ...], words: str
) -> None:
    assert re.search(words, shell.refusal("sweeps", sweeps, *options))
