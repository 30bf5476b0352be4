"""The commands about laws: output, refusals and files."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from allometry.launch.cli import main
from allometry.laws.fit.store import load_fit
from fake_runs import chinchilla, fake_run
from law_data import law_data
from law_tables import MAPPED, noisy_table
from shell import Shell

QUICK = ("--starts", "48", "--bootstraps", "20")
SIZES = {16: 5200, 32: 20_640, 48: 46_320, 64: 82_240}
"""Parameters of the ladder's widths without embedding and head."""


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return four sizes, one with two seeds, and three horizons that follow
    ``chinchilla`` exactly."""
    root = tmp_path_factory.mktemp("ladder")
    for width in SIZES:
        for steps in (40, 80, 160):
            for seed in (0, 1) if width == 32 else (0,):
                changes = (f"run.seed={seed}", f"training.total_steps={steps}")
                fake_run(root / f"runs/w{width}-{steps}-{seed}", *changes, width=width)
    return root


@pytest.fixture(scope="module")
def fit_file(ladder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fit") / "fit.json"
    with pytest.raises(SystemExit):
        main(["fit", "chinchilla", str(ladder), *QUICK, "--out", str(path)])
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return noisy_table(tmp_path / "runs.csv")


def test_a_ladder_is_fitted_held_out_stored_and_predicted_from(
    shell: Shell, ladder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "fits/fit.json"
    hold = ("--hold-out", "width == 64")
    facts = shell.json("fit", "chinchilla", ladder, *QUICK, *hold, "--out", out)
    values = {name: one["value"] for name, one in facts["parameters"].items()}
    expected = {"E": 1.5 + 0.75 * 0.1 - 0.25 * 0.3, "A": 60, "B": 90, "alpha": 0.4, "beta": 0.4}
    assert values == pytest.approx(expected, rel=1e-6)
    assert (facts["rows"], facts["groups"], facts["bootstraps"]) == (15, 12, 20)
    assert facts["parameters"]["alpha"]["low"] == pytest.approx(0.4, abs=1e-6)
    assert facts["held_out"]["how"].startswith("those with width == 64")
    assert len(facts["held_out"]["measured"]) == 3
    assert facts["held_out"]["max"] < 1e-8
    assert facts["conventions"]["N"] == "parameters without embedding and head"
    stored = load_fit(out)
    assert stored.fit.values == values
    assert stored.extra["held_out"]["mean"] == facts["held_out"]["mean"]

    inside = shell.json("predict", out, "N=2e4", "D=2e4")
    law = float(chinchilla(2e4, np.array([2e4]))[0])
    (point,) = inside["predictions"]
    assert point["loss"] == pytest.approx(law, rel=1e-8)
    assert point["low"] <= point["loss"] * (1 + 1e-12)
    assert inside["warnings"] == []
    assert inside["unit"] == facts["parameters"]["E"]["unit"] == "nats per token"
    beyond = shell("predict", out, "N=2e4,1e6", "D=2e4,2e4")
    assert "N=1e+06 is outside of the fitted range" in beyond
    assert "N: parameters without embedding and head" in beyond
    assert f"{chinchilla(1e6, np.array([2e4]))[0]:.5g}" in beyond


def test_what_fit_says_in_words(shell: Shell, table: Path, tmp_path: Path) -> None:
    text = shell("fit", "chinchilla", table, *MAPPED, "--out", tmp_path / "f.json")
    assert text.startswith("chinchilla: loss = E + A/N^alpha + B/D^beta\nfitted to 15 rows of 15")
    assert "nats per token" not in text  # a table can have any unit
    assert sum(line.endswith("  unit of the data") for line in text.splitlines()) == 3  # E, A, B
    assert "loss (unit of the data)" in shell("predict", tmp_path / "f.json", "N=1e8", "D=1e9")
    assert "the sum over rows of Huber's loss (delta 0.001) of log residuals" in text
    assert re.search(r"optimum    \d+ of 4500 starts agree on it; gradient norm", text)
    assert "no parameter is at a bound" in text
    assert "over 15 rows (each of 15 groups by the fit to the others)" in text
    assert "N          size of runs.csv" in text
    assert f"written    {tmp_path / 'f.json'}" in text
    for line in text.splitlines():
        if line.startswith("alpha"):
            _, value, low, _, high, unit = line.split()
            assert float(low) < float(value) < float(high)
            assert float(low) < 0.35 < float(high)
            assert unit == "1"


def test_tables_fit_88_columns(shell: Shell, fit_file: Path) -> None:
    """With the widest numbers: intervals on both sides, exponents of two digits."""
    text = shell("optimum", fit_file, "--flops", "1.2345e21,1.2345e-3")
    rows = text.splitlines()[:4]
    assert rows[0].split()[:2] == ["FLOPs", "N"]
    assert "N in parameters, D in tokens = FLOPs / (6 N), loss in nats per token" in rows[3]
    assert max(map(len, rows)) <= 88, rows
    text = shell("predict", fit_file, "N=1.2345e10", "D=1.2345e10")
    assert max(map(len, text.splitlines()[:2])) <= 88


def test_the_optimum_of_a_fit_has_intervals_and_warnings(shell: Shell, fit_file: Path) -> None:
    facts = shell.json("optimum", fit_file, "--flops", "3e9,1e14")
    inside, beyond = facts["optima"]
    size = (0.4 * 60 / (0.4 * 90)) ** (1 / 0.8) * (3e9 / 6) ** 0.5
    assert inside["N"]["value"] == pytest.approx(size, rel=1e-5)
    assert inside["N"]["low"] <= inside["N"]["value"] * (1 + 1e-9)
    assert not inside["warnings"]
    assert any("extrapolation" in warning for warning in beyond["warnings"])
    text = shell("optimum", fit_file, "--flops", "1e10", "--flops-per-parameter-token", "7")
    assert "N: parameters without embedding and head" in text
    assert any("FLOPs for each parameter and token" in warning for warning in facts["warnings"])
    assert text.split()[:9] == ["FLOPs", "N", "95", "%", "interval", "D", "D/N", "loss", "95"]


def test_laws_are_compared_by_what_they_did_not_see(shell: Shell, table: Path) -> None:
    laws = ("--laws", "over_training,chinchilla", "--laws", "unique_data_tied", "--starts", 32)
    facts = shell.json("compare", table, *MAPPED, *laws, "--hold-out", "N > 5e8")
    by_name = {one["law"]: one for one in facts["laws"]}
    assert set(by_name) == {"chinchilla", "over_training", "unique_data_tied"}
    errors = [one["held_out"]["mean"] for one in facts["laws"]]
    assert errors == sorted(errors)
    for one in by_name.values():
        assert one["held_out"]["relative"], "one scale for all, whatever a law's residuals are"
        predicted, measured = (np.array(one["held_out"][k]) for k in ("predicted", "measured"))
        assert one["held_out"]["mean"] == pytest.approx(np.abs(predicted / measured - 1).mean())
        assert len(measured) == 3
    assert by_name["chinchilla"]["held_out"]["mean"] < 0.01
    text = shell("compare", table, *MAPPED, *laws)
    assert "each of 15 groups by the fit to the others" in text


def test_a_law_that_cannot_be_fitted_is_listed_with_its_reason(shell: Shell, table: Path) -> None:
    laws = ("--laws", "chinchilla,unique_data_tied", "--where", "size < 5e7", "--starts", 32)
    compared = shell.json("compare", table, *MAPPED, *laws)["laws"]
    assert [one["law"] for one in compared] == ["unique_data_tied", "chinchilla"]
    assert compared[0]["problem"] is None
    assert "cannot identify" in compared[1]["problem"], "two sizes do not tell E, A and alpha"
    text = shell("compare", table, *MAPPED, *laws)
    assert "chinchilla: the 6 observations cannot identify" in text
    few = ("--where", "size < 2e7")
    assert "rows that differ in N, D" in shell.refusal("compare", table, *MAPPED, *laws, *few)


def test_what_data_cannot_identify_is_named(shell: Shell, tmp_path: Path) -> None:
    lines = ["N,D,loss", *(f"1e8,{d},{1.8 + 2000 / d**0.37}" for d in np.geomspace(1e9, 1e11, 12))]
    path = tmp_path / "one_size.csv"
    path.write_text("\n".join(lines))
    sentence = shell.refusal("fit", "chinchilla", path, "--starts", 32, "--out", tmp_path / "f")
    assert "cannot identify" in sentence
    assert "A" in sentence
    assert "alpha" in sentence
    assert not (tmp_path / "f").exists()
    fixed = ("--fix", "A=0.0001", "--fix", "alpha=0.3")
    facts = shell.json("fit", "chinchilla", path, *QUICK, *fixed, "--hold-out", "none")
    assert facts["parameters"]["beta"]["value"] == pytest.approx(0.37, rel=1e-3)
    assert facts["parameters"]["A"] | {"unit": ""} == {
        "value": 1e-4, "low": 1e-4, "high": 1e-4, "unit": "", "fixed": True,
    }  # fmt: skip


def test_curves_of_runs_and_tables_are_fitted(shell: Shell, tmp_path: Path) -> None:
    def law(N: float, D_T: np.ndarray) -> np.ndarray:
        return 2.0 + 3.0 / np.sqrt(D_T)  # S1 at a constant rate

    constant = "schedule={kind: constant, warmup_steps: 0}"
    for seed in (0, 1):
        changes = (constant, f"run.seed={seed}", "training.total_steps=200")
        fake_run(tmp_path / f"runs/s{seed}", *changes, law=law, noise=1e-3)
    fix = ("--fix", "C=0", "--fix", "memory=1000", "--starts", 16)
    facts = shell.json("fit", "tissue", tmp_path / "runs", *fix, "--bins", 50, "--bootstraps", 10)
    assert (facts["rows"], facts["groups"]) == (100, 2)
    assert facts["parameters"]["L0"]["value"] == pytest.approx(2.0, rel=5e-3)
    assert "intervals rest on 2 groups and are rough; add runs" in facts["notes"]
    alone = shell("fit", "tissue", tmp_path / "runs/s0", *fix)
    assert "no intervals: all rows belong to one group" in alone
    assert "no held-out error: all rows belong to one group" in alone
    rows = [f"{s},0.001,{2 + 3 / np.sqrt(s)}" for s in range(1, 60)]
    (tmp_path / "c.csv").write_text("\n".join(["step,lr,loss", *rows]))
    facts = shell.json("fit", "tissue", tmp_path / "c.csv", *fix, "--where", "step > 5")
    assert facts["rows"] == 54
    assert facts["parameters"]["alpha"]["value"] == pytest.approx(0.5, rel=1e-4)


def test_steps_on_the_way_are_rows_where_they_are_asked_for(shell: Shell, ladder: Path) -> None:
    asked = ("--curves", "--bins", 10, "--starts", 64, "--bootstraps", 10)
    facts = shell.json("fit", "chinchilla", ladder, *asked)
    assert (facts["rows"], facts["groups"]) == (150, 15)
    assert facts["parameters"]["alpha"]["value"] == pytest.approx(0.4, abs=0.01)
    steps = ("--map", "S_min=step", "--hold-out", "S_min > 100")
    facts = shell.json("fit", "kaplan_trajectory", ladder, *asked, *steps)
    assert facts["rows"] == 150
    assert facts["held_out"]["mean"] < 0.05
    sentence = shell.refusal("fit", "chinchilla", ladder, "--curves", "--last", 0.5)
    assert "rows of finished runs" in sentence


def test_groups_are_left_out_by_name(shell: Shell, ladder: Path) -> None:
    by_run = ("--group-by", "run", "--drop", "w64-40-0", "--drop", "w64-80-0")
    facts = shell.json("fit", "chinchilla", ladder, *QUICK, *by_run, "--hold-out", "largest")
    assert (facts["rows"], facts["groups"]) == (13, 13)
    assert facts["held_out"]["how"] == "N = 82240, the largest, by the fit to the others"
    assert facts["held_out"]["groups"] == ["w64-160-0"]
    by_size = ("--group-by", "model", "--count", "total")
    facts = shell.json("fit", "chinchilla", ladder, *QUICK, *by_size, "--hold-out", "largest:D")
    assert facts["groups"] == 4
    assert len(facts["held_out"]["groups"]) == 5


def curve_fit(shell: Shell, ladder: Path) -> Path:
    """Return a fit of a law of curves, made once."""
    path = ladder / "curve.json"
    if not path.exists():
        run = ladder / "runs/w16-40-0"
        shell("fit", "tissue", run, "--starts", 8, "--fix", "memory=60", "--out", path)
    return path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["fit", "chinchila", "LADDER"],
            "no law is called 'chinchila'; did you mean 'chinchilla' ",
        ),
        (["fit", "chinchilla", "TABLE", "--count", "total"], "--count belongs to run folders"),
        (["fit", "chinchilla", "LADDER", "--bins", "9"], "--bins belongs to laws of curves"),
        (["fit", "tissue", "LADDER", "--last", "0.2"], "--last belongs to rows of finished runs"),
        (["fit", "tissue", "LADDER", "--warmup", "2"], "--warmup belongs to tables of curves"),
        (["fit", "chinchilla", "LADDER", "TABLE"], "give run folders or tables, not both"),
        (
            ["fit", "chinchilla", "LADDER", "--count", "all"],
            "--count=all is not known; use non_emb",
        ),
        (["fit", "chinchilla", "LADDER", "--group-by", "x"], "--group-by=x is not known; use cell"),
        (["fit", "chinchilla", "LADDER", "--unfinished", "x"], "use refuse, skip"),
        (
            ["fit", "chinchilla", "LADDER", "--group", "seed", "--group-by", "run"],
            "give one of them",
        ),
        (["fit", "chinchilla", "LADDER", "--map", "N"], "--map 'N' is not NAME=VALUE"),
        (["fit", "chinchilla", "LADDER", "--map", "N=D", "--map", "N=D"], "gives N twice"),
        (["fit", "chinchilla", "LADDER", "--map", "N=depth"], "is called 'depth'"),
        (["fit", "chinchilla", "LADDER", "--drop", "x"], "'x' is no group of the rows; the groups"),
        (["fit", "chinchilla", "LADDER", "--fix", "q=1"], "chinchilla has no such parameter; it"),
        (["fit", "chinchilla", "LADDER", "--fix", "E=x"], "--fix E=x is no number"),
        (["fit", "chinchilla", "LADDER", "--fix", "alpha=9"], "alpha=9 is outside of .* 0 to 4;"),
        (["fit", "chinchilla", "TABLE", "TABLE", *MAPPED], "the same table is given twice"),
        (["fit", "chinchilla", "TABLE", *MAPPED[:4], "--map", "loss=nll-9"], "line 2: loss is -"),
        (["fit", "chinchilla", ""], "a source is an empty text"),
        (["fit", "chinchilla", "LADDER", "--objective", "l1"], "use huber or square"),
        (["fit", "chinchilla", "LADDER", "--delta", "0"], "delta=0.0 must be a positive number"),
        (["fit", "chinchilla", "LADDER", "--hold-out", "x"], "--hold-out=x is not known; use"),
        (["fit", "chinchilla", "LADDER", "--hold-out", "x > 1"], "is called 'x'"),
        (["fit", "chinchilla", "LADDER", "--hold-out", "largest:x"], "no column 'x'"),
        (["fit", "chinchilla", "LADDER", "--bootstraps", "1"], "1 bootstrap samples say nothing"),
        (["fit", "downstream_error", "LADDER"], "no column 'error'.*--map error=COLUMN"),
        (["compare", "LADDER", "--laws", "chinchilla"], "needs two laws"),
        (["compare", "LADDER", "--laws", "chinchilla,chinchilla"], "gives chinchilla twice"),
        (["compare", "LADDER", "--laws", "chinchilla,tissue"], "law of whole curves"),
        (["compare", "LADDER", "--laws", "chinchilla,downstream_error"], "different things"),
        (
            ["compare", "LADDER", "--laws", "chinchilla,over_training", "--hold-out", "none"],
            "compared by what is held out",
        ),
        (["predict", "FIT", "N=1"], "chinchilla needs D=VALUE .training tokens"),
        (["predict", "FIT", "N=1", "D=1", "x=1"], "has no input 'x'; it reads N, D"),
        (["predict", "FIT", "N=1", "D=x"], "D=x is no number"),
        (["predict", "FIT", "N=1,2", "D=1,2,3"], "give one value or as many"),
        (["predict", "FIT", "N=0", "D=1"], "N=0 is no value that .* give a positive number$"),
        (["predict", "FIT", "N=1", "D=2,-3"], "D=-3 is no value that chinchilla can read; give a"),
        (["predict", "FIT", "N=1", "N=2"], "N is given twice"),
        (["predict", "FIT", "FIT"], "neither NAME=VALUE nor the first file"),
        (["predict", "FIT", "N=1", "D=1", "--law", "chinchilla"], "leave --law and --published"),
        (["predict", "N=1", "D=1"], "no law is given"),
        (["predict", "nowhere.json", "N=1"], "nowhere.json: cannot read the fit"),
        (["predict", "--law", "chinchilla", "N=1", "D=1"], "needs --published NAME, one of hoff"),
        (
            ["predict", "--law", "chinchilla", "--published", "me", "N=1", "D=1"],
            "no coefficients of 'me'; use one of hoffmann, .*besiroglu",
        ),
        (["predict", "--law", "tissue", "--published", "x", "step=1"], "has no published|curves"),
        (
            ["predict", "CURVE", "step=1"],
            "law of whole curves, .*; use allometry forecast RUN",
        ),
        (["predict", "CURVE", "S1=1"], "tissue is a law of whole curves,.*allometry forecast RUN"),
        (["optimum", "CURVE", "--flops", "1e10"], "tissue|curves"),
        (
            ["optimum", "--law", "batch_law", "--published", "step_law", "--flops", "1e10"],
            "batch_law predicts B, and FLOPs are spent for the least loss; give a law",
        ),
        (
            ["predict", "--law", "chinchilla", "--published", "hoffmann", "N=1", "D=1", "--noise"],
            "--noise widens an interval",
        ),
        (["predict", "FIT", "N=1", "D=1", "--level", "95"], "--level=95 is no probability"),
        (["fit", "chinchilla", "TABLE", *MAPPED, "--hold-out", "set == 'c'"], "holds for none of"),
        (["fit", "chinchilla", "TABLE", *MAPPED, "--hold-out", "sets == 'b'"], "--hold-out .sets"),
        (["optimum", "FIT", "--flops", "1e10,x"], "--flops=x is no number"),
        (["optimum", "FIT", "--flops", "-1"], "must be a positive number"),
        (["optimum", "FIT", "--flops", "1e10", "--with", "x"], "--with 'x' is not NAME=VALUE"),
        (["optimum", "FIT", "--flops", "1e10", "--with", "N=3"], "no input besides N, D"),
        (["optimum", "FIT", "--flops", "1e10", "--with", "x=3"], "--with x: chinchilla has no"),
        (["laws", "x"], "no law is called 'x'; use one of .*chinchilla"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    shell: Shell, ladder: Path, table: Path, fit_file: Path, arguments: list[str], words: str
) -> None:
    paths = {"LADDER": ladder, "TABLE": table, "FIT": fit_file}
    if "CURVE" in arguments:
        paths["CURVE"] = curve_fit(shell, ladder)
    sentence = shell.refusal(*(paths.get(one, one) for one in arguments))
    assert re.search(words, sentence), sentence


def test_the_points_behind_chinchilla_through_the_command(shell: Shell) -> None:
    path = law_data("chinchilla_epoch") / "svg_extracted_data.csv"
    rows = ("--where", "loss < 3.44", "--map", "N=Model Size")
    tokens = ("--map", "D=`Training FLOP`/(6*N)")
    facts = shell.json("fit", "chinchilla", path, *rows, *tokens, "--bootstraps", 100)
    assert facts["objective"] <= 0.0010184
    alpha = facts["parameters"]["alpha"]
    assert alpha["value"] == pytest.approx(0.347, abs=0.002)
    assert alpha["low"] < 0.3478 < alpha["high"]
    assert facts["rows"] == 240
    assert facts["certificate"]["agreeing"] > 1000
    assert facts["held_out"]["mean"] < 0.006
