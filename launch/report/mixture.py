"""Tokens that runs read from each source, and their forgetting of replayed sources."""

from __future__ import annotations

import numpy as np

from allometry.configs.format import human
from allometry.launch.figures.figure import Column, Figure, Panel, Series, known, thin
from allometry.launch.report.inputs import Inputs, Shown
from allometry.launch.report.losses import NO_RUNS
from allometry.launch.report.section import Section, Table
from allometry.laws.frontier import repeated

HEAD = (
    "run",
    "source",
    "kind",
    "tokens",
    "share",
    "unique tokens",
    "epochs",
    "average worth",
    "next worth",
)
KIND_HEAD = ("run", "kind", "tokens", "share")
DOTS = 200


def ledger(inputs: Inputs) -> Section:
    """Return the tokens that each run read from each source, up to its last row."""
    title = "What was read of each source"
    rows = [(one.number, row) for one in inputs.runs for row in _ledger_rows(one)]
    if not rows:
        return Section("ledger", title, absent="no run has a ledger" if inputs.runs else NO_RUNS)
    text = (
        "Unique tokens were read for the first time, and epochs count how often a source has been "
        "read, by the run and, with data.continue_sources, by those that it goes on after. "
        "Within an epoch no sample is read twice. What the average and the next token of so many "
        "epochs are worth, a new one being 1, is by arXiv 2305.16264."
    )
    table = Table(HEAD, tuple(row for _, row in rows), run_s=tuple(number for number, _ in rows))
    sums = [(one.number, row) for one in inputs.runs for row in _kind_rows(one)]
    by_kind = Table(KIND_HEAD, tuple(row for _, row in sums), run_s=tuple(n for n, _ in sums))
    return Section("ledger", title, text, tables=(table, by_kind) if sums else (table,))


def _kind(one: Shown, name: str) -> str:
    """Return the kind of a source, and its origin."""
    source = (one.run.record.get("data", {}).get("sources") or {}).get(name) or {}
    kind, parent = source.get("kind", "natural"), source.get("parent")
    return str(kind) if parent is None else f"{kind} from {parent}"


def _kind_rows(one: Shown) -> list[tuple[str, ...]]:
    """Return the tokens of each kind, for runs with synthetic text."""
    found = {
        key.partition("/")[2]: float(column[-1])
        for key, column in one.metrics.items()
        if key.startswith("kind_tokens/")
    }
    total = sum(found.values())
    return [(one.name, kind, human(count), f"{count / total:.1%}") for kind, count in found.items()]


def _ledger_rows(one: Shown) -> list[tuple[str, ...]]:
    def last(column: str) -> float:
        return float(one.metrics[column][-1])

    names = [key.partition("/")[2] for key in one.metrics if key.startswith("epochs/")]
    return [
        (
            one.name,
            name,
            _kind(one, name),
            human(last(f"tokens/{name}")),
            f"{last(f'tokens/{name}') / last('tokens'):.1%}",
            human(last(f"unique_tokens/{name}")),
            f"{last(f'epochs/{name}'):.3g}",
            *(f"{worth:.3f}" for worth in _worth(last(f"epochs/{name}"))),
        )
        for name in names
    ]


def _worth(epochs: float) -> tuple[float, float]:
    """Return the average value of a token over ``epochs`` epochs, and of the next token."""
    if not epochs > 0.0:
        return 1.0, 1.0
    one = repeated(epochs, 1.0)
    return one.worth / epochs, one.last


def forgetting(inputs: Inputs) -> Section:
    """Return the held-out loss of replayed sources relative to the start, a panel each."""
    title = "Forgetting"
    runs = [(one, name) for one in inputs.runs for name in _forgotten(one)]
    if not runs:
        why = "no run replays a source that has held-out tokens (data.replay)"
        return Section("forgetting", title, absent=why if inputs.runs else NO_RUNS)
    panels = tuple(
        Panel(
            f"{name}, replayed",
            "training tokens of the mixture",
            "held-out loss less that before the first step (nats per token)",
            tuple(s for one, source in runs if source == name for s in _curve(one, name)),
        )
        for name in dict.fromkeys(name for _, name in runs)
    )
    text = (
        "How far the held-out loss of each replayed source is from what it was before the run's "
        "first step with data.replay: above 0 the run has forgotten some of it. The losses "
        "themselves, those of new sources too, are in the figures of each source."
    )
    return Section("forgetting", title, text, (Figure("forgetting", panels),))


def _forgotten(one: Shown) -> list[str]:
    prefix = "forgetting/"
    return [key.removeprefix(prefix) for key in one.metrics if key.startswith(prefix)]


def _curve(one: Shown, name: str) -> list[Series]:
    """Return the curve with its start, where the difference is 0."""
    x, y = known(one.metrics["tokens"], one.metrics[f"forgetting/{name}"])
    starts = [e for e in one.run.events if e.get("event") == "held_out_before"]
    first = [_tokens_at(one, int(e["step"])) for e in starts if name in e.get("losses", {})][:1]
    x, y = np.concatenate([first, x]), np.concatenate([np.zeros(len(first)), y])
    order = np.argsort(x, kind="stable")
    return one.curve(*thin(x[order], y[order], most=DOTS), "tokens")  # type: ignore[call-arg]


def _tokens_at(one: Shown, step: int) -> float:
    """Return the tokens of the run's first ``step`` steps, from the last row up to this step."""
    rows: Column = one.metrics["tokens"][one.metrics["step"] <= step]
    return float(rows[-1]) if len(rows) else 0.0
