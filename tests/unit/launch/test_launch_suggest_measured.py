"""``allometry suggest`` reports measurements of a rate's transfer, and missing ones."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from allometry.configs.loader import load
from allometry.configs.model import DenseModel, ParameterizationConfig
from allometry.configs.optimization import AdamW, MuonH
from allometry.configs.run import RunConfig
from allometry.launch.studies.commands import Suggest
from allometry.launch.studies.suggest import suggested
from allometry.laws import transfers
from allometry.laws.transfers import measured
from allometry.scaling.shapes import Axis
from asked import about

ROOT = Path(__file__).resolve().parents[3]
Make = Callable[..., RunConfig]
MODEL = DenseModel(vocab_size=128, width=64, num_layers=2, num_heads=4, ffn_width=128)


def rules(kind: str, **values: Any) -> ParameterizationConfig:
    parsed: ParameterizationConfig = TypeAdapter(ParameterizationConfig).validate_python(
        {"kind": kind, "embedding_std": 1.0, **values}
    )
    return parsed


def test_the_table_is_what_the_records_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    maker = __import__("transfer_table")
    written = json.loads(transfers.FILE.read_text())
    records = [ROOT / record for record in dict.fromkeys(e["record"] for e in written["entries"])]
    again = json.loads(json.dumps(maker.table(records)))
    assert again == written
    mup = next(e for e in written["entries"] if e["name"] == "mup" and e["axis"] == "width")
    result = json.loads(records[0].read_text())
    (row,) = [row for row in result["rates"] if row["name"] == "mup"]
    assert mup["drift_octaves"] == pytest.approx(row["drift_octaves"], abs=1e-3)


def test_a_measurement_is_of_the_same_rules_only() -> None:
    found = measured(MODEL, rules("mup", base_width=32), AdamW(lr=1.0))
    assert found[Axis.WIDTH].base == 32
    assert found[Axis.WIDTH].reach == 8.0
    assert Axis.BATCH not in found
    spheres = {"base_width": 32, "base_layers": 2, "output_multiplier": "1/m"}
    plain, spectral = (
        measured(MODEL, rules("hyperp", **spheres), MuonH(lr=1.0, step_norm=norm))[Axis.WIDTH]
        for norm in ("frobenius", "spectral")
    )
    assert plain.percent > spectral.percent
    assert spectral.verdict == "met"
    assert measured(MODEL, rules("hyperp", **spheres), AdamW(lr=1.0)) == {}
    published = measured(MODEL, rules("hyperp", **spheres | {"head_std": 0.03}), MuonH(lr=1.0))
    assert published == {}
    half = measured(MODEL, rules("completep", base_width=32, base_layers=2), AdamW(lr=1.0))
    other = rules("completep", base_width=32, base_layers=2, depth_alpha=0.5)
    assert half[Axis.DEPTH].percent > measured(MODEL, other, AdamW(lr=1.0))[Axis.DEPTH].percent
    assert Axis.WIDTH not in half


def test_what_is_infinite_or_unknown_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def regret(percent: float | None, diverged: bool, verdict: str) -> dict[str, Any]:
        ends = [percent, percent]
        return {"percent": percent, "interval": ends, "diverged": diverged, "verdict": verdict}

    entry = next(e for e in transfers.entries() if e["name"] == "mup" and e["axis"] == "width")
    by_size = {"64": regret(0.1, False, "met"), "128": regret(None, True, "missed")}
    monkeypatch.setattr(transfers, "entries", lambda: (entry, {**entry, "regrets": by_size}))
    found = measured(MODEL, rules("mup", base_width=32), AdamW(lr=1.0))[Axis.WIDTH]
    assert (found.worst, found.percent, found.verdict) == (128, math.inf, "missed")
    by_size = {"64": regret(None, False, "undecided"), "128": regret(0.1, False, "met")}
    monkeypatch.setattr(transfers, "entries", lambda: ({**entry, "regrets": by_size},))
    found = measured(MODEL, rules("mup", base_width=32), AdamW(lr=1.0))[Axis.WIDTH]
    assert (found.worst, found.percent, found.verdict) == (128, 0.1, "undecided")


def test_suggest_says_range_regret_and_what_is_not_measured(tiny: Make) -> None:
    wide = tiny("parameterization={kind: mup, base_width: 16}", "model.width=256")
    report = suggested(about(wide, Suggest(config="")))
    text, facts = report.text, json.loads(json.dumps(report.facts))["measured"]
    assert re.search(r"(?m)^width +32 to 256 \(8 x\) +16 x, beyond +0.12 ", text)
    assert "0.12 (0.00 to 0.63) at 256" in text
    assert facts["width"]["verdict"] == "undecided"
    assert facts["width"]["beyond"] is True
    assert facts["batch"] is None
    assert re.search(r"(?m)^batch +nothing +- ", text)
    assert "weight decay, betas, epsilon, warm-up, clipping): nothing measured" in text
    whole = " ".join(text.split())
    assert "other than here: parameterization.embedding_std=1.0" in whole
    assert max(map(len, text.splitlines())) <= 100
    moe = suggested(Suggest(config="preset:moe_demo")).text
    assert "measured transfer (mup with adamw, mixtures): nothing" in moe
    assert load("preset:moe_demo").parameterization.kind == "mup"
