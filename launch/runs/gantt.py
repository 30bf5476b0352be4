"""``allometry plot RUN --hdp [STEP]``: which rank ran which documents, and when, in one step."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from allometry.configs.errors import UserError
from allometry.launch.runs.plot import check_format
from allometry.laws.runs import read_lines
from allometry.parallel.hdp.orders import Orders, schedule_orders
from allometry.parallel.hdp.plan import Plan
from allometry.parallel.hdp.replay import Replay, Span, replay
from allometry.trainer.record.plans import plan_of

_DUMMY_SHARE = 0.003
"""Of the picture's width: a micro-batch that counts nothing takes no time, and is drawn as this."""
_MOST_NAMED = 32
_MOST_IN_LEGEND = 8


@dataclass(frozen=True)
class Picture:
    """What was drawn. ``balance``: the makespan over the mean of the ranks' busy seconds."""

    figure: str
    step: int
    mode: str
    ranks: int
    waves: int
    dummies: int
    balance: float
    makespan_s: float


def draw_plan(folder: Path, step: int | None, out: Path, *, as_json: bool) -> str:
    """Write the picture of a step's schedule (None: the last recorded) and return what it shows.

    It is drawn from the run's plans.jsonl alone: seconds are those that were planned with.
    Raises UserError for a folder without plans, or a step without one.
    """
    check_format(out)
    record = _record(folder, step)
    plan, pp = plan_of(record), int(record["pp"])
    played = replay(plan, _orders(record) if pp > 1 else None)
    picture = Picture(
        figure=str(out),
        step=record["step"],
        mode=plan.mode,
        ranks=plan.ranks,
        waves=max(map(len, plan.orders)),
        dummies=sum(order.count(None) for order in plan.orders),
        balance=played.balance,
        makespan_s=played.makespan,
    )
    text = (
        f"step {picture.step}, {picture.mode}: {picture.ranks} hdp rank{'s' * (plan.ranks > 1)}"
        + (f" x {pp} pipeline ranks ({record['schedule']})" if pp > 1 else "")
        + f", {picture.waves} waves, balance {picture.balance:.3f}"
        + (f", {picture.dummies} dummies" if picture.dummies else "")
    )
    _figure(played, plan, text, out)
    if as_json:
        return json.dumps(asdict(picture), indent=2)
    return f"{text}, {picture.makespan_s:.4g} s as planned\nschedule: {out}"


def run_and_step(arguments: Sequence[Path]) -> tuple[Path, int | None]:
    """RUN [STEP] as they stand on the command line; raises UserError for anything else."""
    folder, *rest = arguments
    if not rest:
        return folder, None
    if len(rest) > 1 or not str(rest[0]).isdecimal():
        raise UserError(
            f"--hdp draws one step of one run, not {' '.join(map(str, arguments))!r}; write "
            "allometry plot RUN --hdp STEP, with STEP a whole number or left out"
        )
    return folder, int(str(rest[0]))


def _record(folder: Path, step: int | None) -> dict[str, Any]:
    """The row of plans.jsonl that is asked for."""
    path = folder / "plans.jsonl"
    rows = {row["step"]: row for row in read_lines(path)}
    if not rows:
        raise UserError(
            f"{path} holds no plan; only runs with data.kind: documents plan their steps, from the "
            "first recorded one on"
        )
    if step is None:
        return rows[max(rows)]
    if step not in rows:
        nearest = min(rows, key=lambda known: (abs(known - step), known))
        raise UserError(
            f"{path} has no plan of step {step}, only of {len(rows)} steps from {min(rows)} to "
            f"{max(rows)}; the nearest is {nearest}"
        )
    return rows[step]


def _orders(record: Mapping[str, Any]) -> Callable[[int], Orders]:
    """What a pipeline's ranks do in turn, for a number of micro-batches."""
    pp = int(record["pp"])
    return lambda count: schedule_orders(record["schedule"], pp, record["stages"] // pp, count)


def _figure(played: Replay, plan: Plan, title: str, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lanes = [lane for pipeline in played.spans for lane in pipeline]
    pp, width = len(lanes) // plan.ranks, played.makespan or 1.0
    figure, panel = plt.subplots(
        figsize=(12, min(14.0, 1.8 + 0.3 * len(lanes))), layout="constrained"
    )
    draw_boxes(panel, lanes, plan, width)
    draw_links(panel, lanes)
    panel.set_xlim(0, width)
    panel.set_ylim(len(lanes) - 0.4, -0.6)
    panel.set_xlabel("seconds, as planned (pale: forward; a line joins a ring)")
    if len(lanes) <= _MOST_NAMED:
        names = [str(r) if pp == 1 else f"{r // pp}, {r % pp}" for r in range(len(lanes))]
        panel.set_yticks(range(len(lanes)), names, fontsize=8)
    panel.set_ylabel("hdp rank" if pp == 1 else "hdp rank, pipeline rank")
    panel.set_title(title, fontsize=10, loc="left")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def draw_boxes(panel: Any, lanes: Sequence[Sequence[Span]], plan: Plan, width: float) -> None:
    """A rectangle for each box, its colour by the ranks that share it, paler in the forward."""
    from matplotlib import colormaps
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch

    degrees = sorted({len(unit.ring) for unit in plan.units})
    shades = colormaps["viridis"]
    colour: dict[int | None, Any] = {
        degree: shades(0.12 + 0.8 * place / max(1, len(degrees) - 1))
        for place, degree in enumerate(degrees)
    }
    colour[None] = "0.6"
    half = 0.4 if len(lanes) <= _MOST_NAMED else 0.5
    groups = defaultdict(list)
    for row, span in _rows(lanes):
        degree = None if span.unit is None else len(plan.units[span.unit].ring)
        end = max(span.end, span.start + _DUMMY_SHARE * width) if degree is None else span.end
        low, high = row - half, row + half
        corners = [(span.start, low), (end, low), (end, high), (span.start, high)]
        groups[degree, span.action.kind == "F"].append(corners)
    for (degree, forward), corners in groups.items():
        alpha = 0.55 if forward else 0.95
        panel.add_collection(
            PolyCollection(
                corners, facecolors=colour[degree], alpha=alpha, edgecolors="white", linewidths=0.3
            )
        )
    stride = -(-len(degrees) // _MOST_IN_LEGEND)
    named = sorted({*degrees[::stride], *degrees[-1:]})
    handles = [Patch(color=colour[d], label=f"{d} rank{'s' if d > 1 else ''}") for d in named]
    if (None, True) in groups:
        handles.append(Patch(color=colour[None], label="counts nothing"))
    panel.figure.legend(
        handles=handles, fontsize=8, ncols=len(handles), loc="outside upper right", frameon=False
    )


def draw_links(panel: Any, lanes: Sequence[Sequence[Span]]) -> None:
    """A line through a forward that the members of a ring run together, a dot on each of them."""
    from matplotlib.collections import LineCollection

    rings = defaultdict(list)
    for row, span in _rows(lanes):
        if span.unit is not None and span.action.kind == "F":
            # Inside the box, where rings that begin at one moment have lines apart.
            at = span.start + (0.1 + 0.1 * (span.unit % 8)) * (span.end - span.start)
            rings[span.unit, span.action.stage, at].append(row)
    met = {key: rows for key, rows in rings.items() if len(rows) > 1}
    few = len(lanes) <= _MOST_NAMED
    lines = [[(at, min(rows)), (at, max(rows))] for (*_, at), rows in met.items()]
    panel.add_collection(LineCollection(lines, colors="black", linewidths=0.8 if few else 0.4))
    dots = [(at, row) for (*_, at), rows in met.items() for row in rows]
    if dots:
        panel.plot(*zip(*dots, strict=True), "k.", ms=4 if few else 2)


def _rows(lanes: Sequence[Sequence[Span]]) -> Iterator[tuple[int, Span]]:
    return ((row, span) for row, lane in enumerate(lanes) for span in lane)
