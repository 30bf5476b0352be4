"""The loads used by the balance loss: choice, record and resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allometry.configs.run import RunConfig
from allometry.scaling.loads import BalanceLoads
from allometry.trainer.balance import load_correlation
from allometry.trainer.train import train
from run_folders import rows

Make = Callable[..., RunConfig]
EXPERTS = (
    "model.kind=moe",
    "model.ffn_width=null",
    "model.experts={kind: swiglu, num_experts: 4, experts_per_token: 2, width: 16}",
    "model.router.balance={kind: auxiliary, coefficient: 0.1}",
)
DOCUMENTS = ("data.kind=documents", "data.max_document_tokens=64", "batch.micro_batch_sequences=1")
RAMP = "batch.ramp={start_sequences: 8, increment_sequences: 8, over_tokens: 1e5}"


@pytest.mark.parametrize(
    ("settings", "loads", "reason"),
    [
        ((), "this_batch", "auto: a step has 8 sequences, fewer than 64"),
        (("batch.sequences=64",), "step_before", "auto: a step has 64 sequences, 64 or more"),
        (("batch.sequences=64", RAMP), "this_batch", "auto: a step has 8 sequences"),
        (("batch.sequences=64", *DOCUMENTS), "this_batch", "auto: whole documents"),
        (("model.router.balance.loads=step_before",), "step_before", "as model.router.balance"),
        (("model.router.balance={kind: bias}",), None, None),
    ],
)
def test_the_safe_loads_are_chosen_and_said(
    tiny: Make, settings: tuple[str, ...], loads: str | None, reason: str | None
) -> None:
    chosen = BalanceLoads.of(tiny(*EXPERTS, *settings))
    assert (chosen and chosen.loads) == loads
    assert reason is None or chosen.reason.startswith(reason)


def test_a_run_records_its_loads_and_resumes_to_the_bit(tiny: Make, tmp_path: Path) -> None:
    straight = tiny(*EXPERTS, folder=tmp_path / "straight")
    parts = tiny(*EXPERTS, folder=tmp_path / "parts")
    before = tiny(*EXPERTS, "model.router.balance.loads=step_before", folder=tmp_path / "before")
    for config, stops in ((straight, [None]), (parts, [7, None]), (before, [None])):
        for stop in stops:
            train(config, callbacks=[], stop_at_step=stop)
    facts = json.loads((tmp_path / "straight/run.json").read_text())
    assert facts["plan"]["balance_loads"]["loads"] == "this_batch"
    recorded = {}
    for name in ("straight", "parts", "before"):
        kept = ("step", "loss", "grad_norm", "router/max_vio", "router/load_correlation")
        recorded[name] = [[row.get(key) for key in kept] for row in rows(tmp_path / name)]
    assert recorded["parts"] == recorded["straight"]
    assert recorded["before"][5] != recorded["straight"][5], "another gradient"
    first, *others = rows(tmp_path / "straight")
    assert "router/load_correlation" not in first, "no step was before it"
    for row in others:
        by_layer = [row[f"router/{layer}/load_correlation"] for layer in range(2)]
        assert row["router/load_correlation"] == pytest.approx(sum(by_layer) / 2)
        assert all(-1.0 <= value <= 1.0 for value in by_layer)


def test_correlation_of_loads() -> None:
    load = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert load_correlation(2.0 * load, 7.0 * load) == pytest.approx(1.0)
    assert load_correlation(load, load.flip(0)) == pytest.approx(-1.0)
    assert load_correlation(torch.full((3,), 1 / 3), load[:3]) is None


def test_loads_of_this_batch_even_out_where_topics_take_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the other topic's loads, the loss pushes tokens in the wrong direction."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[3] / "benchmarks"))
    study = __import__("balance_loads")
    draw = study.alternating()
    before, correlation = study.simulate("step_before", draw, steps=150)
    this, _ = study.simulate("this_batch", draw, steps=150)
    assert correlation < 0.2, "which the record shows"
    assert this < 0.6 * before
