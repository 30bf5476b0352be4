"""Ladder folder without training: runs of several sizes, a fit, a prediction."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from allometry.laws.fit.bootstrap import bootstrap
from allometry.laws.fit.engine import FitOptions, fit
from allometry.laws.fit.store import save_fit
from allometry.laws.ladder import Prediction, save_prediction
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named
from fake_runs import chinchilla, fake_run


def add_columns(folder: Path, columns: Mapping[str, Any]) -> None:
    """Add keys to every row of a run: a number, or a function of the step (None: no key)."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        for key, value in columns.items():
            found = value(row["step"]) if callable(value) else value
            if found is not None:
                row[key] = found
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def add_event(folder: Path, event: Mapping[str, Any]) -> None:
    """Append one event to events.jsonl."""
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps(dict(event)) + "\n")


def watched_run(folder: Path, *overrides: str, **options: Any) -> Path:
    """Write a run with all contents of a report: speeds, monitors, an alarm, a forecast."""
    fake_run(folder, *overrides, **options)
    columns: dict[str, Any] = {
        "grad_norm": lambda step: 1.0 / step,
        "tokens_per_s": 1000.0,
        "mfu": 0.25,
        "peak_bytes": 2**30,
        "forecast/loss": lambda step: 3.0 if step > 10 else None,
        "forecast/low": lambda step: 2.9 if step > 10 else None,
        "forecast/high": lambda step: 3.2 if step > 10 else None,
    }
    for layer in range(2):
        key = f"monitors/attention_logit_max/{layer}"
        columns[key] = lambda step, layer=layer: step + layer if step % 10 == 0 else None
    add_columns(folder, columns)
    alarm = {"event": "alarm", "alarm": "attention_logit", "step": 20, "value": 2e4, "time": 1.0e9}
    add_event(folder, alarm)
    record = json.loads((folder / "run.json").read_text())
    layout = {"world_size": 2, "hdp": 2, "tp": 1, "pp": 1, "ep": 1, "zero_stage": 1}
    record |= {
        "versions": {"allometry": "0.1.0", "torch": "2.13.0"},
        "commit": "0123456789ab",
        "layout": layout,
        "launches": [{"first_step": 1, "layout": layout}, {"first_step": 21, "layout": layout}],
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def small_fit(noise: float = 0.01) -> Observations:
    """Return observations of Chinchilla's form with noise."""
    draw = np.random.default_rng(0)
    rows = [(n, d) for n in (1e6, 3e6, 1e7, 3e7) for d in (1e8, 3e8, 1e9)]
    size, tokens = np.array(rows).T
    loss = 1.7 + 400.0 / size**0.34 + 410.0 / tokens**0.28
    loss *= np.exp(noise * draw.standard_normal(len(rows)))
    return Observations.of(
        {"N": size, "D": tokens, "loss": loss}, [f"N={n:.0e} D={d:.0e}" for n, d in rows]
    )


def write_fit(path: Path, observations: Observations, samples: int = 20) -> None:
    """Fit Chinchilla's law from a few starts and write the file, with a
    bootstrap if samples > 0."""
    found = fit(form_named("chinchilla"), observations, FitOptions(starts=16))
    save_fit(path, found, bootstrap(found, samples) if samples else None)


def fake_ladder(folder: Path, measured: float | None = 3.05) -> Path:
    """Write four sizes x two horizons, some with equal FLOPs, and the ladder's
    files next to them."""
    for width in (16, 32, 64):
        for steps in (40, 80):
            watched_run(
                folder / "runs" / f"w{width}-s{steps}", f"training.total_steps={steps}", width=width
            )
    write_fit(folder / "fit.json", small_fit())
    prediction = Prediction(
        law="chinchilla",
        target={"run": "w128", "N": 1e8, "D": 2e9},
        predicted=3.0,
        low=2.9,
        high=3.1,
        level=0.95,
        rungs=6,
        loss="",
        time=1.0e9,
        target_state="planned",
        target_step=0,
        warnings=("N=1e8 is outside of the fitted range",),
        measured=measured,
    )
    save_prediction(folder / "prediction.json", prediction)
    return folder


__all__ = [
    "add_columns",
    "add_event",
    "chinchilla",
    "fake_ladder",
    "small_fit",
    "watched_run",
    "write_fit",
]
