"""``allometry forecast`` on run folders whose losses follow a law."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from allometry.configs.errors import UserError
from allometry.launch.cli import app
from allometry.launch.runs.commands import Forecast
from allometry.launch.runs.forecast import forecasted
from allometry.laws.areas import areas_of
from fake_runs import fake_run

STEPS, PEAK, WARMUP, TOKENS = 400, 1e-2, 20, 8 * 32
WSD = "schedule={kind: wsd, warmup_steps: 20, decay_fraction: 0.25}"
CONSTANT = "schedule={kind: constant, warmup_steps: 20}"
COSINE = "schedule={kind: cosine, warmup_steps: 20}"


def rates(kind: str) -> np.ndarray:
    s = np.arange(1, STEPS + 1)
    x = np.clip((s - WARMUP) / (STEPS - WARMUP), 0, 1)
    lr = (
        PEAK
        * {
            "constant": np.ones(STEPS),
            "cosine": 0.1 + 0.45 * (1 + np.cos(np.pi * x)),
            "wsd": 1 - np.sqrt(np.clip((s - 300) / 100, 0, 1)),
        }[kind]
    )
    lr[:WARMUP] = PEAK * s[:WARMUP] / WARMUP
    return lr


def truth(kind: str) -> np.ndarray:
    s1, s2 = areas_of(rates(kind), WARMUP, 1 - 1 / 60)
    return 2.4 + 0.9 * s1**-0.45 - 0.25 * s2


def make(folder: Path, override: str, kind: str, *others: str, stop: int | None = None) -> Path:
    def law(_: float, D_T: np.ndarray) -> np.ndarray:
        return truth(kind)[np.rint(D_T / TOKENS).astype(int) - 1]

    settings = [f"training.total_steps={STEPS}", f"optimizer.lr={PEAK}", override, *others]
    fake_run(folder, *settings, law=law, noise=0.004, stop=stop)
    return folder


def ask(folder: Path, **options: Any) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(
        json.dumps(forecasted(Forecast(folder=folder, **options)).facts)
    )
    return facts


def test_a_run_and_what_it_would_end_at(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", WSD, "wsd", stop=350)
    facts = ask(folder)
    assert (facts["step"], facts["total_steps"]) == (350, 400)
    assert facts["low"] < truth("wsd")[-1] < facts["high"]
    assert facts["loss"] == pytest.approx(truth("wsd")[-1], rel=0.015)
    before = ask(folder, at_step=250)
    assert before["step"] == 250
    assert "gain" in before["quality"]["unmeasured"]
    assert before["high"] - before["low"] > 1.5 * (facts["high"] - facts["low"])
    level = ask(folder, level=0.5)
    assert level["high"] - level["low"] < 0.5 * (facts["high"] - facts["low"])


def test_other_runs_say_what_a_decay_gains(tmp_path: Path) -> None:
    folder = make(tmp_path / "constant", CONSTANT, "constant")
    other = make(tmp_path / "cosine", COSINE, "cosine", "run.seed=1")
    wsd = {"schedule": "wsd", "decay_fraction": 0.25}
    alone = ask(folder, **wsd)
    joint = ask(folder, others=(other,), **wsd)
    assert joint["with"] == [str(other)]
    assert joint["loss"] == pytest.approx(truth("wsd")[-1], rel=0.01)
    assert joint["high"] - joint["low"] < 0.5 * (alone["high"] - alone["low"])
    like = ask(folder, like=other, **wsd)
    assert like["prior"] == str(other)
    assert like["low"] < truth("wsd")[-1] < like["high"]
    assert like["high"] - like["low"] < alone["high"] - alone["low"]


def test_schedules_in_words_of_the_command(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", CONSTANT, "constant", stop=200)
    now = ask(folder, decay_now=True, decay_fraction=0.2)
    assert now["total_steps"] == 250
    assert now["target"] == "a decay from now on (1-sqrt, 50 steps)"
    longer = ask(folder, total_steps=800)
    assert longer["total_steps"] == 800
    assert longer["loss"] < ask(folder)["loss"]
    linear = ask(folder, schedule="wsd", decay="linear", final_fraction=0.1)
    assert linear["target"] == "wsd (decay linear, final_fraction 0.1)"
    held_out = ask(folder, loss="train/web")
    assert held_out["loss_of"] == "train/web"


def test_the_command_prints_law_fit_and_notes(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", WSD, "wsd", stop=200)
    result = CliRunner().invoke(app, ["forecast", str(folder)])
    assert result.exit_code == 0, result.output
    for part in ("step 200", "law  ", "fit  ", "decay  ", "at step 400", "note  "):
        assert part in result.output
    now, value, between = (
        line
        for line in result.output.splitlines()
        if line.startswith(("now ", "forecast ")) or "interval" in line[:30]
    )
    assert all("nats per token" in line for line in (now, value, between))
    assert "the training loss of the mixture (mean of the last" in now
    assert between.split()[:3] == ["95", "%", "interval"]
    assert "S1, S2 in learning rate x steps" in result.output
    assert ask(folder)["unit"] == "nats per token"
    assert "rests on the prior" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at_step": 25}, "a forecast needs 20"),
        ({"schedule": "triangle"}, "^--schedule=triangle is no schedule .* use constant, linear"),
        ({"schedule": "refined"}, "^--schedule=refined is no schedule"),
        ({"decay": "linear"}, "^--decay goes with --schedule=wsd; set that or remove it$"),
        ({"schedule": "wsd", "decay_fraction": 2.0}, r"^--decay-fraction=2\.0 is not valid"),
        ({"schedule": "wsd", "decay": "fast"}, "^--decay='fast' is not valid"),
        ({"schedule": "cosine", "final_fraction": -1.0}, r"^--final-fraction=-1\.0 is not"),
        (
            {"schedule": "wsd", "decay": "exponential"},
            "^--final-fraction=0 cannot be reached .* or choose --decay=1-sqrt$",
        ),
        (
            {"schedule": "wsd", "decay_fraction": 0.99},
            r"^--schedule=wsd --decay-fraction=0\.99: the decay of kind=wsd begins after step 4",
        ),
        ({"decay_now": True, "total_steps": 500}, "leave --total-steps=500 out"),
        ({"decay_now": True, "schedule": "wsd"}, "leave --schedule=wsd out"),
        ({"decay_now": True, "decay_fraction": 1.0}, "no share"),
        ({"decay_now": True, "decay": "exponential"}, "final_fraction"),
        ({"level": 1.0}, "--level=1.0"),
        ({"loss": "perplexity"}, "--loss=perplexity"),
        ({"total_steps": 10}, r"^--total-steps=10: the warm-up of 20 steps is longer than the run"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    folder = make(tmp_path / "run", CONSTANT, "constant", stop=200)
    with pytest.raises(UserError, match=message) as caught:
        ask(folder, **options)
    assert "\n" not in str(caught.value)
    assert "override" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -2.0])
def test_a_loss_that_is_no_positive_number_is_refused(tmp_path: Path, value: float) -> None:
    folder = make(tmp_path / "run", CONSTANT, "constant", stop=200)
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[99]["loss"] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"run/metrics\.jsonl, step 100: .* is .*, and laws take"):
        ask(folder)
    assert ask(folder, at_step=99)["step"] == 99


def test_runs_that_one_law_cannot_hold_for(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", CONSTANT, "constant")
    wider = make(tmp_path / "wider", COSINE, "cosine", "model.ffn_width=128")
    with pytest.raises(UserError, match="its model section"):
        ask(folder, others=(wider,))
    with pytest.raises(UserError, match="no gain"):
        ask(folder, like=folder, schedule="wsd")
    with pytest.raises(UserError, match="not a folder"):
        ask(tmp_path / "nothing")


def test_another_schedule_than_was_trained_is_found(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", CONSTANT, "constant")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("kind: constant", "kind: linear"))
    with pytest.raises(UserError, match=r"step \d+ was trained at lr"):
        ask(folder)
