"""Columns of metrics.jsonl: declared once, documented from the declaration, and complete."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from allometry.configs.checks import CardsConfig
from allometry.configs.run import RunConfig
from allometry.trainer.record.callbacks import Callback, Reporter
from allometry.trainer.record.cards import CardRows, Reading
from allometry.trainer.record.columns import COLUMNS, conventions, table
from allometry.trainer.record.writer import Row
from allometry.trainer.train import train
from allometry.trainer.watch.stragglers import RankTimes, Slowest, Stragglers
from allometry.trainer.watch.watchdog import Steps
from run_folders import rows, undeclared

Make = Callable[..., RunConfig]
DOCS = Path(__file__).parents[3] / "docs"
MONITORS = "record.monitors={every_steps: 2, singular_values_every_steps: 2}"
NEVER = "record.monitors={every_steps: null, singular_values_every_steps: null}"
MOE = {
    "kind": "moe",
    "vocab_size": 64,
    "width": 32,
    "num_layers": 2,
    "num_heads": 4,
    "experts": {"kind": "swiglu", "num_experts": 4, "experts_per_token": 2, "width": 16},
    "router": {
        "gate": "softmax",
        "z_loss": 1e-3,
        "balance": {"kind": "auxiliary", "coefficient": 0.01},
    },
}
RUNS: dict[str, tuple[str, ...]] = {
    "dense": ("training.total_steps=2", "data.replay={ratio: 0.5, sources: [down]}"),
    "ahead": ("training.total_steps=2", "model.multi_token={depth: 1}"),
    "stages": (
        "training.total_steps=null",
        "stages=[{name: one, steps: 2}, {name: two, steps: 2}]",
    ),
    "forecast": (
        *("training.total_steps=30", "training.skip_steps=[12]"),
        "record.forecast.every_steps=30",
    ),
    "spheres": ("training.total_steps=2", "optimizer={kind: muonh, lr: 0.02, states: {kind: fp8}}"),
    "experts": ("training.total_steps=2", f"model={json.dumps(MOE)}"),
    "fp8": (
        "training.total_steps=2",
        f"model={json.dumps(MOE)}",
        "precision={saved_activations: fp8, linears: fp8_rowwise}",
    ),
    "offload": (
        "training.total_steps=2",
        "training.activation_offload=1.0",
        "model.num_layers=3",
    ),
    "documents": (
        "training.total_steps=2",
        "data.kind=documents",
        "data.max_document_tokens=32",
        "batch.micro_batch_sequences=1",
    ),
}


def keys_of(config: RunConfig, callbacks: list[Callback] | None = None) -> set[str]:
    """Return all keys written by a run."""
    train(config, device=torch.device("cpu"), callbacks=callbacks or [])
    lines = (Path(config.run.folder) / "metrics.jsonl").read_text().splitlines()
    return {key for line in lines for key in json.loads(line)}


def of_ranks() -> Row:
    """Return the additions to rows if several ranks are compared."""
    found = Stragglers(20, slowest=Slowest(1, 25.0, certain=True))
    step = SimpleNamespace(seconds=1.0, recorded=True)
    return RankTimes(found, Steps(), Reporter(None, [])).additions(step)  # type: ignore[arg-type]


def of_cards() -> Row:
    """Return the additions to rows if ranks have GPUs."""
    reading = Reading(60, 1980, 650.0, 0, 0, ())
    card = SimpleNamespace(read=lambda: reading)
    mesh: Any = SimpleNamespace(gather_objects=lambda one: [one], is_main=True, rank=0)
    rows = CardRows(CardsConfig(every_steps=1), lambda: (card, None), mesh, Reporter(None, []))  # type: ignore[arg-type]
    rows.after_step(1)
    return rows.additions(SimpleNamespace(step=1))  # type: ignore[arg-type]


def test_what_runs_write_is_declared_and_what_is_declared_is_written(
    tiny: Make, tmp_path: Path
) -> None:
    written: set[str] = set()
    for name, settings in RUNS.items():
        common = ("schedule.warmup_steps=1", NEVER if name == "forecast" else MONITORS, *settings)
        sources = ("data.sources.1.validation=null", "data.sources.1.kind=generated")
        common += sources if name == "experts" else ()
        written |= keys_of(tiny(*common, folder=tmp_path / name))
    written |= {*of_ranks(), *of_cards()}
    assert undeclared(written) == []
    never = [c.name for c in COLUMNS if not any(c.names(key) for key in written)]
    assert never == []


def test_a_row_with_an_undeclared_column_fails(tiny: Make) -> None:
    class Adds(Callback):
        def additions(self, finished: Any) -> dict[str, float]:
            return {"loss/up/more": 1.0}

    config = tiny("training.total_steps=1", "schedule.warmup_steps=0")
    assert undeclared(keys_of(config, [Adds()])) == ["loss/up/more"]
    with pytest.raises(AssertionError, match="loss/up/more"):
        rows(Path(config.run.folder))


@pytest.mark.parametrize(
    "key", ["losses", "router/x/entropy", "router/1/entropy/2", "monitors", ""]
)
def test_keys_that_are_no_column(key: str) -> None:
    assert undeclared([key]) == [key]


def test_names_are_declared_once() -> None:
    names = [column.name for column in COLUMNS]
    assert len(set(names)) == len(names)
    assert conventions()["time_s"].endswith("[s]")
    assert list(conventions()) == names


@pytest.mark.parametrize(
    ("document", "made"),
    [
        (
            "file_formats.md",
            lambda: table([c for c in COLUMNS if not c.name.startswith("monitors/")]),
        ),
        (
            "monitors.md",
            lambda: table([c for c in COLUMNS if c.name.startswith("monitors/")], "monitors/"),
        ),
    ],
)
def test_the_documents_have_these_columns(
    document: str, made: Callable[[], str], pytestconfig: pytest.Config
) -> None:
    """`pytest tests/unit/trainer/test_trainer_columns.py --update-golden` updates the documents."""
    path = DOCS / document
    text = path.read_text(encoding="utf-8")
    begin, end = "<!-- columns: made from trainer/record/columns.py -->\n\n", "\n<!-- end -->\n"
    pattern = re.compile(re.escape(begin) + "(.*?)" + re.escape(end), re.DOTALL)
    if pytestconfig.getoption("--update-golden"):
        text = pattern.sub(lambda _: begin + made() + end, text)
        path.write_text(text, encoding="utf-8")
    assert pattern.findall(text) == [made()]
