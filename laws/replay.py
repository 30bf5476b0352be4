"""Runs of continual pretraining by the share of the new domain, for the D-CPT and CMR laws."""

# n: rows

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from allometry.configs.errors import UserError
from allometry.laws.cells import by_cell
from allometry.laws.collect import CountName, Unfinished, count_of, finished_runs
from allometry.laws.comparable import check_comparable
from allometry.laws.losses import LossChoice
from allometry.laws.observations import Column, Observations
from allometry.laws.runs import Run
from allometry.laws.tables import read_table

COLUMNS = ("N", "D", "r", "domain", "general")
SKIPPED = 0.1
"""Share of a run's tokens before the first row, where losses are affected by the warm-up."""
STEADY = 1.05
"""Ratio of learning rates below which the rate is constant."""


@dataclass(frozen=True)
class ReplayRows:
    """Held-out losses of runs that continue one model per size with new and old data.

    ``rows``: ``N``, ``D`` (tokens of the continual pretraining), ``r`` (the new sources' share of
    D), ``domain`` and ``general`` (held-out losses of the new and of the old sources), ``start``
    (the initial general loss). Rows of one N and r are one group. ``ends``: the last row of each
    run with each source's share ``r/NAME`` and loss ``loss/NAME``; None for a table. ``unique``:
    tokens of each source. ``new`` and ``old``: weights of their sources in the two losses.
    """

    rows: Observations
    ends: Observations | None = None
    new: Mapping[str, float] = field(default_factory=dict)
    old: Mapping[str, float] = field(default_factory=dict)
    unique: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def sizes(self) -> list[float]:
        """Numbers of parameters N of the models, in increasing order."""
        return [float(size) for size in np.unique(self.rows["N"])]

    @property
    def sources(self) -> list[str]:
        """Sources that at least one run reads."""
        if self.ends is None:
            return []
        return [name for name in (*self.new, *self.old) if self.ends[f"r/{name}"].any()]

    def start_at(self, size: float, alpha: float) -> float:
        """Return the general loss before the training of a model of this size.

        For a size without runs: by ``e + a / N^alpha`` through the other sizes, with the ``alpha``
        of the general loss's law.
        """
        sizes = self.sizes
        means = [float(self.rows["start"][self.rows["N"] == one].mean()) for one in sizes]
        if size in sizes:
            return means[sizes.index(size)]
        if len(sizes) == 1:
            return means[0]
        slope, level = np.polyfit(np.power(sizes, -alpha), means, 1)
        return float(level + slope * size**-alpha)


def replay_table(
    paths: Sequence[str | Path],
    *,
    mapping: Mapping[str, str] | None = None,
    where: Sequence[str] = (),
    start: float | None = None,
) -> ReplayRows:
    """Return the rows of tables: N, D, r, domain, general, and start unless given.

    Raises UserError: as ``read_table``, or an r is not a share.
    """
    names = [*COLUMNS, *(["start"] if start is None else [])]
    positive = [name for name in names if name != "r"]
    rows = read_table(paths, names, mapping=mapping, where=where, positive=positive)
    bad_n = ~((rows["r"] >= 0.0) & (rows["r"] <= 1.0))
    if bad_n.any():
        row = int(np.argmax(bad_n))
        raise UserError(
            f"{rows.place(row)}: r={rows['r'][row]:g} is no share; r is the new domain's, 0 to 1 "
            "(--map 'r=1-replay', or r=percent/100)"
        )
    columns = {name: rows[name] for name in names}
    columns |= {} if start is None else {"start": np.full(len(rows), start)}
    return ReplayRows(by_cell(Observations(columns, rows.groups, conventions={}), ["N", "r"]))


def replay_runs(
    folders: Sequence[str | Path],
    *,
    domain: Sequence[str] = (),
    count: CountName = "non_embedding",
    skip: float = SKIPPED,
    ends: bool = False,
    start: float | None = None,
    unfinished: Unfinished = "refuse",
) -> ReplayRows:
    """Return the rows of run folders: each held-out loss after ``skip`` of a run's tokens.

    ``domain``: the new sources; by default all sources that ``data.replay`` does not list.
    ``ends``: True for each run's last row only. ``start``: the initial general loss, if runs did
    not measure it. Runs from which other given runs branch are left out. Raises UserError: no run
    is left, runs disagree in their new sources, a ratio changes within a run, or losses are missing
    or not comparable.
    """
    if not 0.0 <= skip < 1.0:
        raise UserError(f"--skip={skip:g} is no share of a run; use at least 0 and less than 1")
    runs, skipped = finished_runs(folders, unfinished)
    notes = [f"not finished, left out: {', '.join(skipped)}"] if skipped else []
    trunks = [run for run in runs if any(_branches_from(other, run) for other in runs)]
    if trunks:
        names = ", ".join(str(run.folder) for run in trunks)
        notes.append(f"left out, as others branch from there: {names}")
    runs = [run for run in runs if run not in trunks]
    new, old = _kinds(runs, domain)
    for name in (*new, *old):
        check_comparable(runs, LossChoice("validation", name, 0.1))
    if not ends and any(_rate_moves(run, skip) for run in runs):
        notes.append(
            "rows are held-out losses along runs whose rate moves, and a loss before the decay "
            "lies above that of a run that ends there; give runs of a constant rate, or of several "
            "lengths with --ends"
        )
    parts = [_rows_of(run, count, new, old, skip, start) for run in runs]
    if ends:
        parts = [{name: column[-1:] for name, column in part.items()} for part in parts]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    groups = [str(run.folder) for run, part in zip(runs, parts, strict=True) for _ in part["N"]]
    rows = by_cell(Observations(columns, tuple(groups)), ["N", "r"])
    at_end = {name: [float(part[name][-1]) for part in parts] for name in columns}
    for name in (*new, *old):
        at_end[f"r/{name}"] = [declared_shares(run.config["data"])[name] for run in runs]
        at_end[f"loss/{name}"] = [float(_held_out(run, name)[-1]) for run in runs]
    stores = [run.record["data"]["sources"] for run in runs]
    unique = {
        name: max(float(one[name]["train"]["tokens"]) for one in stores) for name in (*new, *old)
    }
    return ReplayRows(rows, Observations.of(at_end), new, old, unique, tuple(notes))


def declared_shares(data: Mapping[str, Any]) -> dict[str, float]:
    """Return each source's share by a run's ``data`` section, with its first ratio of replay."""
    weights = {source["name"]: float(source["weight"]) for source in data["sources"]}
    replay = data.get("replay")
    if replay is None:
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}
    shares = dict.fromkeys(weights, 0.0)
    for kind, part in ((True, float(replay["ratio"])), (False, 1.0 - float(replay["ratio"]))):
        of_kind = {n: w for n, w in weights.items() if (n in replay["sources"]) == kind}
        total = sum(of_kind.values())
        shares |= {n: part * w / total if total else 0.0 for n, w in of_kind.items()}
    return shares


def _branches_from(run: Run, trunk: Run) -> bool:
    parent = run.record.get("parent")
    if run is trunk or not isinstance(parent, dict) or not parent.get("folder"):
        return False
    named = Path(parent["folder"])
    beside = run.folder.resolve().parent / named.name
    return trunk.folder.resolve() in (named.resolve(), beside)


def _fork(run: Run) -> int:
    """Return the step after which the continual pretraining starts."""
    parent = run.record.get("parent")
    return int(parent["step"]) if isinstance(parent, dict) else 0


def _kinds(runs: Sequence[Run], domain: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the weights of the new and of the old sources in the two losses, each summing to 1."""
    if not runs:
        raise UserError("every run given is one that others branch from; give its branches too")
    replayed = [(run.config["data"].get("replay") or {}).get("sources") for run in runs]
    said = [set(names) for names in replayed if names]
    if not domain and (not said or any(names != said[0] for names in said)):
        raise UserError(
            "the runs do not agree on which sources are old (data.replay.sources: "
            f"{'; '.join(sorted({', '.join(sorted(one)) for one in said})) or 'none'}); name the "
            "new ones with --domain"
        )
    names = [source["name"] for source in runs[0].config["data"]["sources"]]
    for run in runs:
        others = [source["name"] for source in run.config["data"]["sources"]]
        if set(others) != set(names):
            raise UserError(
                f"{runs[0].folder} has the sources {', '.join(names)} and {run.folder} "
                f"{', '.join(others)}; give runs of the same sources (weight 0 reads none of one)"
            )
    unknown = [name for name in domain if name not in names]
    if unknown:
        raise UserError(f"--domain {unknown[0]} is no source of the runs ({', '.join(names)})")
    new = [n for n in names if (n in domain if domain else n not in said[0])]
    kinds = []
    for kind, sources in (("new", new), ("old", [n for n in names if n not in new])):
        weights = [_weights(run, sources) for run in runs]
        if not sources or not weights[0]:
            raise UserError(
                f"the runs have no {kind} source; D-CPT takes runs that go on with new data and "
                "old (data.replay), the old with held-out tokens also where its ratio is 0"
            )
        alike = all(one == weights[0] for one in weights)
        kept = weights[0] if alike else dict.fromkeys(sources, 1.0)
        kinds.append({name: weight / sum(kept.values()) for name, weight in kept.items()})
    return kinds[0], kinds[1]


def _weights(run: Run, names: Sequence[str]) -> dict[str, float]:
    """Return the weights of sources of one kind; equal if all are 0, as with a replay of 0."""
    given = {one["name"]: float(one["weight"]) for one in run.config["data"]["sources"]}
    kept = {name: given[name] for name in names if given[name]}
    return kept or dict.fromkeys(names, 1.0)


def _rate_moves(run: Run, skip: float) -> bool:
    steps, rates = run.metrics["step"], run.metrics["lr"]
    fork = _fork(run)
    used = rates[steps >= fork + max(skip, SKIPPED) * (steps[-1] - fork)]
    return bool(used.max() > STEADY * used.min())


def _held_out(run: Run, name: str) -> Column:
    values = run.metrics.get(f"validation/{name}")
    if values is None or not np.isfinite(values[-1]):
        raise UserError(
            f"{run.folder} has no held-out loss of {name} at its last step; give the source "
            "'validation' tokens and train again, or leave the run out"
        )
    return values


def _rows_of(
    run: Run,
    count: CountName,
    new: Mapping[str, float],
    old: Mapping[str, float],
    skip: float,
    start: float | None,
) -> dict[str, Column]:
    """Return the columns of one run."""
    fork, data = _fork(run), run.config["data"]
    moved = [e for e in run.events if e.get("event") == "mixture_changed"]
    if (data.get("replay") or {}).get("changes") or any(e.get("step", 0) > fork + 1 for e in moved):
        raise UserError(
            f"{run.folder} changes its mixture on the way, and the laws are of one ratio a run; "
            "leave it out"
        )
    steps, tokens = run.metrics["step"], run.metrics["tokens"]
    before = steps <= fork
    if fork and not before.any():
        raise UserError(
            f"{run.folder}/metrics.jsonl has no row of the {fork} steps that it took over from "
            f"{run.record['parent']['folder']}; restore the file or leave the run out"
        )
    own = tokens - (tokens[before][-1] if before.any() else 0.0)
    losses = {
        kind: np.sum([weight * _held_out(run, n) for n, weight in of.items()], axis=0)
        for kind, of in (("domain", new), ("general", old))
    }
    kept = (steps > fork) & (own >= skip * own[-1])
    kept &= np.isfinite(losses["domain"]) & np.isfinite(losses["general"])
    size, share = float(count_of(run, count)), sum(declared_shares(data)[name] for name in new)
    at = start if start is not None else _before(run, fork, old)
    full = np.full(int(kept.sum()), 1.0)
    rows = {"N": size * full, "D": own[kept], "r": round(share, 9) * full}
    return rows | {name: one[kept] for name, one in losses.items()} | {"start": at * full}


def _before(run: Run, fork: int, old: Mapping[str, float]) -> float:
    """Return the general loss before the first step of the continual pretraining."""
    for event in reversed(run.events):
        losses = event.get("losses", {})
        at_fork = event.get("event") == "held_out_before" and event.get("step") == fork
        if at_fork and all(name in losses for name in old):
            return float(sum(weight * losses[name] for name, weight in old.items()))
    there = run.metrics["step"] == fork
    parts = [weight * run.metrics[f"validation/{name}"][there] for name, weight in old.items()]
    total = np.sum(parts, axis=0)
    if not total.size or not np.isfinite(total[0]):
        raise UserError(
            f"{run.folder} did not measure the loss of {', '.join(old)} before its first step, as "
            "runs with data.replay do; give it with --start"
        )
    return float(total[0])
