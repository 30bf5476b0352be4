"""A run that rejects one rank's bad batch equals bitwise a run configured to skip that step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.run import RunConfig
from checkpoint_bits import bits
from faulty_steps import launch_with_faults
from run_folders import events, rows
from test_dist_checkpoints import MOE
from thinned import thinned

Ranks = Callable[..., list[Any]]
Make = Callable[..., RunConfig]

LAYOUTS: dict[str, dict[str, Any]] = {
    "hdp2": {},
    "hdp2-zero1": {"zero": {"stage": 1}},
    "hdp2-zero3": {"zero": {"stage": 3}},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "ep2": {"ep": 2},
}
OPTIMIZERS = {"adamw": {"kind": "adamw", "lr": 2e-3}, "muonh": {"kind": "muonh", "lr": 1e-3}}
NAN, SPIKE, LAST = 3, 11, 13
POLICY = "training.bad_steps={window_steps: 8, most_in_row: 1, most_in_window: 2}"


def described(tiny: Make, folder: Path, layout: str, optimizer: str, *more: str) -> RunConfig:
    changes = [
        f"parallel={json.dumps(LAYOUTS[layout])}",
        f"optimizer={json.dumps(OPTIMIZERS[optimizer])}",
        f"training.total_steps={LAST}",
        "batch.micro_batch_sequences=1",
    ]
    changes += [f"model={json.dumps(MOE)}"] if layout == "ep2" else []
    return tiny(*changes, *more, folder=folder)


@pytest.mark.parametrize(
    ("layout", "optimizer"),
    thinned(
        {("hdp2-zero3", "muonh"), ("ep2", "adamw")},
        list(LAYOUTS),
        list(OPTIMIZERS),
    ),
)
def test_a_bad_batch_leaves_no_trace(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, layout: str, optimizer: str
) -> None:
    # A pipeline compares the factors of its losses; infinite factors give NaN gradients.
    faults = {NAN: math.inf if layout == "pp2" else math.nan, SPIKE: 1e4}
    told = f"training.skip_steps=[{NAN}, {SPIKE}]"
    control = described(tiny, tmp_path / "told", layout, optimizer, POLICY, told)
    run_ranks(launch_with_faults, 2, control, faults)
    bad = described(tiny, tmp_path / "bad", layout, optimizer, POLICY)
    for stop in (NAN + 1, SPIKE, None):  # two resumes, one directly after a skipped step
        run_ranks(launch_with_faults, 2, bad, faults, stop)
    wanted, found = bits(control, LAST), bits(bad, LAST)
    assert wanted.keys() == found.keys()
    assert not [name for name, tensor in wanted.items() if not tensor.equal(found[name])]
    keys = ("step", "loss", "grad_norm", "lr", "s1", "s2", "tokens", "skipped")
    rows_of = [
        [[row.get(key) for key in keys] for row in rows(Path(config.run.folder))]
        for config in (control, bad)
    ]
    assert rows_of[0] == rows_of[1]
    assert len(rows_of[0]) == LAST
    reasons = [
        (event["step"], event["reason"])
        for event in events(tmp_path / "bad")
        if event["event"] == "bad_step"
    ]
    assert reasons == [(NAN, "not_finite"), (SPIKE, "spike")]
    facts = [
        json.loads((tmp_path / name / f"checkpoints/step-{LAST}/trainer.json").read_text())
        for name in ("told", "bad")
    ]
    assert facts[0]["accepted"] == facts[1]["accepted"]
