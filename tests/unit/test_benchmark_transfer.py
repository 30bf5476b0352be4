"""Benchmarks of parameterizations: their runs exist, and their sums are right."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from allometry.laws.optimum import Sweep, exponent
from allometry.scaling.shapes import Axis
from allometry.studies.sweeps.outcome import Trial
from allometry.studies.sweeps.transfer import TransferSweep

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def folder_of_benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set the import path of that folder's scripts, on one thread."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def module(name: str) -> ModuleType:
    return __import__(name, fromlist=["x"])


def parts() -> dict[str, Any]:
    found: dict[str, Any] = module("contenders.variants").PARTS
    return found


def test_everything_that_a_part_asks_for_can_be_run() -> None:
    sweeps = module("contenders.sweeps")
    assert set(parts()) | {"coordinates"} == set(module("contenders.variants").SEEDS)
    for variants in parts().values():
        assert len({variant.slug for variant in variants}) == len(variants), "one file each"
        for variant in variants:
            sweeps._sweep(variant, 80).check(variant.sizes, (0,))
    assert [max(v.sizes) // min(v.sizes) for v in parts()["depth"]] == [4] * 4
    assert [max(v.sizes) // min(v.sizes) for v in parts()["horizon"]] == [8] * 2
    assert parts()["experts"][0].sizes[0] == 1
    assert parts()["experts"][0].sizes[-1] == 32


def test_trials_of_earlier_runs_stay_valid() -> None:
    """Names and settings of the part ``rates``, which runs for half an hour, are fixed."""
    sweeps = module("contenders.sweeps")
    slugs = [variant.slug for variant in parts()["rates"]]
    assert slugs[4:6] == ["hyperp--base-head", "hyperp--base-head--logits---m"]
    settings = sweeps._sweep(parts()["rates"][1], 80).settings()
    assert settings["parameterization"]["base_width"] == 32
    assert (settings["steps"], settings["sequences"], settings["axis"]) == (80, 8, "width")
    assert settings["clip"] == 1.0
    assert settings["model"]["ffn_width"] == 128


def tiny(variant: Any, **changes: Any) -> Any:
    model = module("contenders.families").model(16, 2)
    return replace(variant, **{"model": model, **changes})


@pytest.mark.parametrize("part", ["depth", "horizon"])
def test_a_reading_is_what_training_under_the_other_rule_gives(part: str) -> None:
    """A factor on every rate only shifts rates, so HyperP's rules of depth and tokens need no
    separate training runs."""
    sweeps = module("contenders.sweeps")
    variant = parts()[part][0]
    (reading,) = variant.readings
    first, size = (2, 8) if part == "depth" else (4, 16)
    here = sweeps._sweep(tiny(variant), 4)
    there = {"base_layers": size} if part == "depth" else {"data_exponent": 0.32}
    if part == "horizon":
        there["base_tokens"] = first * 8 * 64
    other = sweeps._sweep(tiny(variant, config=variant.config.model_copy(update=there)), 4)
    shifted = sweeps.under(reading, {s: Sweep((-4.0,), np.array([[1.0]])) for s in (first, size)})
    assert shifted[first].log2_lrs == (-4.0,)
    (rate,) = shifted[size].log2_lrs
    assert abs(rate + 4.0) > 0.6
    loss = here.loss(Trial(size, -4.0, 0))
    assert other.loss(Trial(size, rate, 0)) == pytest.approx(loss, abs=1e-4)
    assert abs(other.loss(Trial(size, -4.0, 0)) - loss) > 0.01, "without the shift it is another"


def test_a_variant_is_kept_and_its_rows_say_what_was_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeps = module("contenders.sweeps")
    families = module("contenders.families")
    best = {2: -4.0, 4: -4.1, 8: -4.2}

    def bowl(_self: TransferSweep, trial: Trial) -> float:
        return 2.0 + (trial.log2_lr - best[trial.size] - 0.01 * trial.seed) ** 2

    monkeypatch.setattr(TransferSweep, "loss", bowl)
    given = Namespace(quick=False, work=tmp_path, processes=1, seeds_of={"depth": 2})
    rows = sweeps.run_variant("depth", parts()["depth"][0], given)
    with_rule, without = rows
    assert with_rule["drift_octaves"] == pytest.approx(0.2)
    assert with_rule["met"]
    assert without["exponent"] == pytest.approx(-0.6)
    assert without["met"]
    assert without["expected_inside"] is False
    assert len(with_rule["losses"]) == 3 * 6 * 2
    out = capsys.readouterr().out
    assert "0.20 (0.20 to 0.20), ≤ 0.5: met" in out
    assert "-0.60 (-0.60 to -0.60), -0.5: OUTSIDE" in out
    assert json.loads(json.dumps(rows)) == rows

    def never(_self: TransferSweep, trial: Trial) -> float:
        raise AssertionError(trial)

    monkeypatch.setattr(TransferSweep, "loss", never)
    assert sweeps.run_variant("depth", parts()["depth"][0], given) == rows
    strict = families.Asked(most=0.1)
    assert not sweeps._row("x", strict, {2: sweep(-4.0), 8: sweep(-4.2)})["met"]
    assert not sweeps._row("x", families.Asked(), {2: sweep(-4.0), 8: sweep(-9.0)})["met"]


def sweep(vertex: float) -> Sweep:
    rates = (-5.0, -4.5, -4.0, -3.5)
    return Sweep(rates, np.array([[2.0 + (rate - vertex) ** 2] for rate in rates]))


def test_the_whole_script_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transfer = module("transfer")
    kept = tiny(parts()["horizon"][0], log2_lrs=(-4.0, -2.0, 0.0))
    monkeypatch.setitem(transfer.PARTS, "horizon", (kept,))
    asked = ["--quick", "--only", "horizon", "--processes", "1", "--work", str(tmp_path / "work")]
    transfer.main([*asked, "--json", str(tmp_path / "a.json")])
    transfer.main([*asked, "--json", str(tmp_path / "b.json")])
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert one["horizon"] == two["horizon"]
    assert set(one) & {"rates", "coordinates"} == set()
    measured = {o["size"]: o["log2_lr"] for o in one["horizon"][0]["optima"]}
    assert set(measured) == {10, 20}
    assert all(math.isfinite(loss) for *_, loss in one["horizon"][0]["losses"])


def test_spans_follow_rate_and_decay_of_hidden_matrices() -> None:
    decay = module("weight_decay")
    settings = decay.Settings(lr=2.0**-4, weight_decay=4.0, spans=2)
    steps = {}
    for rule in decay.RULES:
        found = decay.singular_values(settings, decay.Trial(rule, 128, 0))
        steps[rule] = (found["span"], found["steps"])
        assert len(found["looks"]) <= 2 * decay.LOOKS
        assert min(found["looks"][-1].values()) > 0.0
    # 1/(2^-4 x 4) = 4 steps at the base, x 2 where eta falls alone, x 1 where lambda rises alike.
    assert steps == {"coupled": (8, 16), "mup": (4, 8), "sqrt": (6, 12)}


def test_slopes_and_steadiness_of_singular_values() -> None:
    decay = module("weight_decay")

    def found(level: float, before: float = 1.0) -> dict[str, Any]:
        name = "blocks.0.attention.wq.weight"
        looks = [{name: level * before}] * decay.LOOKS + [{name: level}] * decay.LOOKS
        return {"steps": 16, "loss": 2.0, "looks": looks}

    def known(power: float, before: float = 1.0) -> dict[Any, Any]:
        return {
            decay.trial_of("sqrt", width, seed): found((width / 64) ** power, before)
            for width in (64, 128, 256)
            for seed in (0, 1)
        }

    row = decay.row_of("sqrt", (64, 128, 256), 2, known(0.1))
    assert row["slope"] == pytest.approx(0.1)
    assert row["slope_interval_95"] == pytest.approx([0.1, 0.1])
    assert row["slopes_by_matrix"] == {"attention.wq": pytest.approx(0.1)}
    assert row["met"]
    assert row["steady"]
    assert not decay.row_of("sqrt", (64, 128, 256), 2, known(0.2))["met"]
    moving = decay.row_of("sqrt", (64, 128, 256), 2, known(0.0, before=1.1))
    assert not moving["steady"]
    assert "NOT STEADY" in decay.line(moving)
    assert decay.trial_of("mup", 64, 0) == decay.trial_of("sqrt", 64, 0), "one base for all"


def test_the_share_of_monitors() -> None:
    monitors = module("monitors")
    load = module("allometry.configs.loader").load
    steps = range(1, 21)
    times = {
        "step": dict.fromkeys(steps, 1.0),
        "before": {s: 0.25 * (s % 2 == 0) for s in steps},
        "after": {s: 0.25 * (s % 2 == 0) + 3.0 * (s % 4 == 0) for s in steps},
        "row": {s: 0.5 * (s % 2 == 0) for s in steps},
        "singular": {s: 3.0 for s in steps if s % 4 == 0},
    }
    found = monitors.summary(times, load("preset:demo"))
    assert (found["look_s"], found["singular_s"]) == (1.0, 3.0)
    assert found["share"] == pytest.approx(1.0 / 100 + 3.0 / 1000)
    assert not found["met"]
    assert "NOT MET" in monitors.text(found)
    assert found["batch_tokens"] == 16 * 256


def test_a_timed_method_is_put_back() -> None:
    monitors = module("monitors")

    class Owner:
        def work(self, step: int) -> int:
            if step < 0:
                raise ValueError(step)
            return step + 1

    plain, seconds = Owner.work, {}
    with monitors.timed(Owner, "work", seconds, lambda args: args[1]):
        assert Owner().work(3) == 4
        assert Owner.work is not plain
        with pytest.raises(ValueError, match="-1"):
            Owner().work(-1)
    assert Owner.work is plain
    assert list(seconds) == [3]


@pytest.mark.slow
def test_what_monitors_cost_is_measured_in_a_run(tmp_path: Path) -> None:
    monitors = module("monitors")
    monitors.main(["--quick", "--threads", "1", "--json", str(tmp_path / "m.json")])
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["steps"] == 8
    assert set(found["seconds"]["singular"]) == {"4", "8", "12", "16"}
    assert 0.0 < found["share"] < 1.0


def test_the_exponent_of_a_reading_is_shifted_by_its_power() -> None:
    sweeps, families = module("contenders.sweeps"), module("contenders.families")
    plain = {40: sweep(-4.0), 80: sweep(-4.2), 160: sweep(-4.4)}
    shifted = sweeps.under(families.Reading("x", 0.32), plain)
    assert exponent(plain) == pytest.approx(-0.2)
    assert exponent(shifted) == pytest.approx(0.12)
    assert Axis.REGIME_II in {variant.axis for variant in parts()["experts"]}
