"""Input of a report: runs, ladders, fits, sweeps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from allometry.configs.errors import UserError
from allometry.launch.figures.branches import branched, taken_over, trunks_first
from allometry.launch.figures.figure import Column, Series, colours
from allometry.launch.text import names_of
from allometry.laws.fit.store import StoredFit, load_fit
from allometry.laws.ladder import Prediction, load_prediction
from allometry.laws.runs import Run, read_run
from allometry.laws.trials import TrialFile, read_trials

SECTIONS = ("run", "model", "data", "optimizer", "schedule")
COLUMNS = ("step", "tokens", "flops", "loss")
"""Columns of every run."""
LAUNCHED = ("started", "resumed", "branched")
"""Events that start a launch."""


@dataclass(frozen=True)
class Shown:
    """A run of the report: ``number`` in the list, displayed ``name``, ``colour``."""

    number: int
    name: str
    colour: str
    run: Run

    def curve(self, x: Column, y: Column, along: str, **more: Any) -> list[Series]:
        """Return a curve over the metric ``along``, dotted up to the run's branch point."""
        return branched(self.series(x, y, **more), taken_over(self.run, along))

    def series(self, x: Column, y: Column, name: str = "", **more: Any) -> Series:
        """Return a curve of this run, in its colour, shown and hidden with the run."""
        return Series(name or self.name, x, y, colour=self.colour, run=self.number, **more)

    @property
    def metrics(self) -> dict[str, Column]:
        """Columns of the run's metrics.jsonl."""
        return self.run.metrics

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """Numbers of parameters in run.json; empty if missing."""
        counts = self.run.record.get("plan", {}).get("parameters", {})
        return counts if isinstance(counts, dict) else {}

    @cached_property
    def shares(self) -> dict[str, float]:
        """Share of each source in the first mixture, from weights if run.json has no shares."""
        recorded = self.run.record.get("data", {}).get("sources") or {}
        if recorded and all("share" in source for source in recorded.values()):
            return {name: float(source["share"]) for name, source in recorded.items()}
        rows = self.run.config.get("data", {}).get("sources") or []
        weights = {str(row["name"]): float(row.get("weight", 1.0)) for row in rows}
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items()}

    @cached_property
    def validation(self) -> tuple[Column, Column]:
        """Tokens and held-out loss of the mixture, weighted by source shares; may be empty."""
        names = [n for n, w in self.shares.items() if w and f"validation/{n}" in self.metrics]
        if not names:
            return np.empty(0), np.empty(0)
        weights = np.array([self.shares[name] for name in names])
        losses = np.stack([self.metrics[f"validation/{name}"] for name in names])
        mean = (weights[:, None] * losses).sum(axis=0) / weights.sum()
        rows = np.isfinite(mean)
        return self.metrics["tokens"][rows], mean[rows]

    @cached_property
    def train_loss(self) -> float:
        """Mean training loss over the last tenth of the recorded steps, without skipped steps."""
        loss = self.metrics["loss"]
        loss = loss[self.metrics.get("skipped", np.zeros(len(loss))) != 1.0]
        return float(loss[-max(1, len(loss) // 10) :].mean())  # not finite if a loss was not finite

    @cached_property
    def final_loss(self) -> tuple[float, str]:
        """Final loss and its kind: held out if recorded at the last step, else training."""
        tokens, losses = self.validation
        if len(tokens) and tokens[-1] == self.metrics["tokens"][-1]:
            return float(losses[-1]), "held out"
        return self.train_loss, "train"

    @cached_property
    def state(self) -> str:
        """State of the run: the end of its last launch in the events, and the step.

        A launch that ended at a step whose checkpoint could not be written is ``not saved``.
        """
        step, end = int(self.metrics["step"][-1]), ""
        for event in self.run.events:
            kind = event.get("event")
            if kind in LAUNCHED:
                end = ""
            elif kind == "finished":
                end = "finished"
            elif kind in ("stopped", "not_finite"):
                end = f"{str(kind).replace('_', ' ')} at step {step}"
            elif kind == "checkpoint_failed" and event.get("step", 0) >= step:
                end = f"not saved at step {step}"
        return end or f"running or cut off, step {step}"


@dataclass(frozen=True)
class Inputs:
    """Complete input of a report, read from files.

    ``predictions``: with the folders of their ladders. ``notes``: paths left out, with reasons.
    """

    runs: tuple[Shown, ...]
    fits: tuple[tuple[Path, StoredFit], ...]
    trials: tuple[TrialFile, ...]
    predictions: tuple[tuple[Path, Prediction], ...]
    notes: tuple[str, ...]
    smoothing: float = 0.05


def read_inputs(
    folders: Sequence[Path], fits: Sequence[Path], trials: Sequence[Path], smoothing: float
) -> Inputs:
    """Read run folders, ladders, folders of runs, fits and files of trials.

    Of several paths, such as ``runs/*``, paths that are not a run or have no row are left out with
    a note. Raises UserError: no path is given, a path is given twice, missing or damaged, or no
    path of several is a run. For example, ``read_inputs([Path("runs/a")], [], [], 0.05)``.
    """
    if not (folders or fits or trials):
        raise UserError("nothing to report on; name run folders, --fit FILE or --transfer FILE")
    if not 0.0 < smoothing <= 0.5:
        raise UserError(f"--smooth={smoothing:g} must be a share of a run, above 0 and up to 0.5")
    for paths in (folders, fits, trials):
        resolved = [path.resolve() for path in paths]
        for path, place in zip(paths, resolved, strict=True):
            if resolved.count(place) > 1:
                raise UserError(f"{path} is given twice; give it once")
    by_place: dict[Path, Path] = {}
    notes: list[str] = []
    fit_files = list(fits)
    predictions = []
    for folder in folders:
        runs_at = _place_of_runs(folder)
        if runs_at is None:
            problem = _no_run(folder) if len(folders) > 1 and folder.exists() else None
            if problem is None:
                by_place.setdefault(folder.resolve(), folder)
            else:
                notes.append(f"{folder} is left out: {problem}.")
            continue
        inside, left_out = _runs_of(runs_at)
        by_place |= {run.resolve(): run for run in inside if run.resolve() not in by_place}
        notes += left_out
        if (folder / "fit.json").is_file():
            fit_files.append(folder / "fit.json")
        prediction = load_prediction(folder / "prediction.json")
        if prediction is not None:
            predictions.append((folder, prediction))
    if notes and not (by_place or fit_files or trials):
        raise UserError(f"none of the {len(folders)} that are named is a run; {notes[0]}")
    for path in fit_files:
        if not path.is_file():
            raise UserError(f"--fit={path} is no file; write one with allometry fit LAW ... --out")
    return Inputs(
        runs=_shown([_read(folder) for folder in by_place.values()]),
        fits=tuple((path, load_fit(path)) for path in dict.fromkeys(fit_files)),
        trials=tuple(read_trials(path) for path in dict.fromkeys(trials)),
        predictions=tuple(predictions),
        notes=tuple(notes),
        smoothing=smoothing,
    )


def _place_of_runs(folder: Path) -> Path | None:
    """Return the folder of the runs of a ladder or of a folder of runs; None for any other path."""
    if (folder / "config.yaml").is_file() or not folder.is_dir():
        return None
    if (folder / "runs").is_dir():
        return folder / "runs"
    return folder if any(folder.glob("*/config.yaml")) else None


def _runs_of(place: Path) -> tuple[list[Path], list[str]]:
    """Return the run folders with a row in ``place``, and a sentence for each other folder."""
    started: list[Path] = []
    left_out: list[str] = []

    def by_number(folder: Path) -> list[tuple[int, str]]:  # w64 before w128
        parts = re.findall(r"[0-9]+|[^0-9]+", folder.name)
        return [(int(part), "") if part[0] in "0123456789" else (-1, part) for part in parts]

    for folder in sorted(filter(Path.is_dir, place.iterdir()), key=by_number):
        problem = _no_run(folder)
        if problem is None:
            started.append(folder)
        else:
            left_out.append(f"{folder} is left out: {problem}.")
    if not started and not left_out:
        raise UserError(f"{place} holds no run; run the ladder first (allometry ladder run)")
    return started, left_out


def _no_run(folder: Path) -> str | None:
    """Return the reason for leaving out a path; None for a run with a row."""
    if not (folder / "config.yaml").is_file():
        return "it is no run's folder, or has not begun"
    return None if _has_row(folder / "metrics.jsonl") else "it has no row yet"


def _has_row(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.readline().endswith(b"\n")


def _read(folder: Path) -> Run:
    run = read_run(folder)
    for name in SECTIONS:
        if not isinstance(run.config.get(name), dict):
            raise UserError(
                f"{folder}/config.yaml has no section {name!r}; restore what the run wrote"
            )
    for name in COLUMNS:
        if name not in run.metrics:
            raise UserError(
                f"{folder}/metrics.jsonl has no {name!r} in any row; give the folder of a run "
                "that trained"
            )
    return run


def _shown(runs: Sequence[Run]) -> tuple[Shown, ...]:
    """Return the runs with their names and colours, trunks before their branches.

    Names are folder names, or full paths if two folder names are equal.
    """
    runs = [runs[place] for place in trunks_first(runs)]
    names = names_of([run.folder for run in runs])
    shown = [Shown(i, name, "", run) for i, (name, run) in enumerate(zip(names, runs, strict=True))]
    shades = colours([float(one.parameters.get("total", 0)) for one in shown])
    return tuple(replace(one, colour=shade) for one, shade in zip(shown, shades, strict=True))
