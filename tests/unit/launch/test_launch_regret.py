"""The regret in ``allometry transfer``: output and exit codes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.launch.cli import app
from allometry.launch.studies.commands import Transfer
from allometry.launch.studies.transfer import swept
from allometry.studies.sweeps.outcome import Trial
from allometry.studies.sweeps.transfer import TransferSweep
from asked import about

Make = Callable[..., RunConfig]
MUP = "parameterization={kind: mup, base_width: 16, embedding_std: 1.0}"


def basin(
    monkeypatch: pytest.MonkeyPatch, *, shift: float, depth: float, luck: float = 0.0
) -> list[Trial]:
    """Simulate the losses of all sweeps: vertices move by ``shift`` octaves per doubling, and by
    ``luck`` between seeds. Returns the list of trained trials."""
    trained: list[Trial] = []

    def loss(_: TransferSweep, trial: Trial) -> float:
        trained.append(trial)
        doublings = math.log2(trial.size / 16)
        vertex = -6.5 + (shift + luck * (trial.seed - 1)) * doublings
        floor = 2.0 - luck * 0.1 * doublings  # else the mean of such bowls would rise with width
        return floor + depth * (trial.log2_lr - vertex) ** 2

    monkeypatch.setattr(TransferSweep, "loss", loss)
    return trained


def transfer(folder: Path, *options: str) -> tuple[int, str]:
    """Return the exit code and the text of the command over widths 16 to 64."""
    done = CliRunner().invoke(
        app,
        [
            *("transfer", str(folder / "tiny.yaml"), "--sizes", "16,32,64", "--steps", "2"),
            *("--sequences", "2", "--length", "8", "--processes", "1"),
            *("--out", str(folder / "t.png"), MUP, *options),
        ],
        catch_exceptions=False,
    )
    return done.exit_code, done.output


def test_a_regret_above_its_bound_fails(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny()
    basin(monkeypatch, shift=-0.5, depth=0.2)
    code, text = transfer(tmp_path)
    assert code == 1
    assert "3 seeds" in text, "by default"
    assert "regret: loss at the rate of width 16 minus loss at the own best rate" in text
    assert re.search(r"(?m)^64 .* 0\.2000 +10\.00 \(10\.00 to 10\.00\)$", text)
    assert "FAILED: width 64: the rate of width 16 loses 10.00 % (95 % over seeds: 10" in text
    assert "NOT passed" in text
    code, text = transfer(tmp_path, "--regret-bound", "11", "--bound", "0.9", "--json")
    facts = json.loads(text)
    assert code == 1
    assert facts["failures"] == ["the best rate drifts by 1.00 octaves, more than 0.9"]
    assert facts["sizes"][2]["regret"]["percent"] == pytest.approx(10.0)
    code, text = transfer(tmp_path, "--regret-bound", "11")
    assert code == 0
    assert "passed: at most 11 % of the loss; figure" in text


def test_a_flat_basin_passes_and_seeds_that_disagree_decide_nothing(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny()
    basin(monkeypatch, shift=-0.5, depth=0.001)
    code, text = transfer(tmp_path)
    assert code == 0, text
    assert "drift 1.00 octaves" in text
    code, text = transfer(tmp_path, "--bound", "2")
    assert "passed: at most 0.5 % of the loss, at most 2 octaves; figure" in text
    basin(monkeypatch, shift=-0.1, depth=0.2, luck=0.2)
    code, text = transfer(tmp_path)
    assert code == 1
    assert "undecided: width 64: the rate of width 16 loses 0.40 % (95 % over seeds: 0.00" in text
    assert "UNDECIDED; figure" in text
    code, text = transfer(tmp_path, "--seeds", "1")
    assert code == 1
    assert "one seed does not say what is luck" in text
    assert "UNDECIDED; repeat it with --seeds 3" in text


def test_options_reach_the_sweep(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(MUP, "schedule={kind: wsd, decay_fraction: 0.5}")
    kept = tmp_path / "trials.jsonl"
    how: dict[str, Any] = {
        **{"sizes": "16,32", "steps": 4, "sequences": 2, "length": 8, "processes": 1},
        **{"trials": kept, "octaves": 3.0, "out": tmp_path / "t.png"},
    }
    trained = basin(monkeypatch, shift=0.0, depth=0.2)
    swept(about(config, Transfer(config="", schedule="run", place_first=True, **how)))
    settings = json.loads(kept.read_text().splitlines()[0])
    assert settings["schedule"]["kind"] == "wsd"
    assert settings["schedule"]["decay_fraction"] == 0.5
    by_size = [sum(trial.size == size for trial in trained) for size in (16, 32)]
    assert by_size == [13 + 2 * 3, 3 + 2 * 3], "one seed tries 13 rates at the base and 3 above it"
    for wrong, said in (
        ("cosine", "--schedule=cosine is not known; use linear or run"),
        ("run", "schedule.kind=wsd_s is that of one run"),
    ):
        other = tiny(MUP, "schedule={kind: wsd_s, decay_ends_steps: [4]}")
        with pytest.raises(UserError, match=said):
            swept(about(other, Transfer(config="", **{**how, "schedule": wrong})))


def test_a_regret_is_held_against_anothers(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes if the other regret is 16 times as large; with noisy seeds it stays undecided."""
    tiny()
    kept = str(tmp_path / "sp.jsonl")
    basin(monkeypatch, shift=-0.4, depth=0.2)
    transfer(tmp_path, "parameterization={kind: sp}", "--trials", kept)
    basin(monkeypatch, shift=-0.1, depth=0.2)
    code, text = transfer(tmp_path, "--against", kept)
    assert code == 0, text
    assert f"passed: at most 0.5 % of the loss, at most 0.2 of {kept}'s; figure" in text
    basin(monkeypatch, shift=-0.2, depth=0.2)
    code, text = transfer(tmp_path, "--against", kept, "--regret-bound", "9", "--json")
    facts = json.loads(text)
    assert code == 1
    assert facts["against"]["verdicts"] == {"32": "missed", "64": "missed"}
    assert facts["failures"][0].startswith(
        "size 32: the regret is more than 0.2 of that of sp (1.60 % of the loss, "
    )
    basin(monkeypatch, shift=-0.1, depth=0.2, luck=0.2)
    code, text = transfer(tmp_path, "--against", kept, "--regret-bound", "9")
    assert "undecided: size 64: the regret may be more than 0.2 of that of sp" in text
    with pytest.raises(UserError, match="has 0 rates of size 64 with 4 seeds"):
        transfer(tmp_path, "--against", kept, "--seeds", "4", "--sizes", "64,128")
    with pytest.raises(UserError, match=r"trials of another sweep \(steps, tokens\)"):
        transfer(tmp_path, "--against", kept, "--steps", "3")
