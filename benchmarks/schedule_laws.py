"""Select the method of fitting a schedule law by cross-validation on the fitted curves alone.

    python benchmarks/schedule_laws.py DATA [--out FILE]

DATA: the folder of published curves (arXiv 2503.12811: csv_25, csv_100, csv_400). Three curves are
fitted and six predicted. A candidate is a law, a fixed or free gamma, a weighting of the rows, and
the share of steps dropped from the start of each curve. Its score is the mean relative error on
each of the three curves, predicted by the fit to the other two; the six curves do not enter the
score. Means of two laws' predictions are candidates too. After the scores, the script prints all
candidates' errors on the six curves, and the errors of fits to the six and to all nine curves.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from contenders.machine import facts
from numpy.typing import NDArray

from allometry.laws.fit.engine import predict
from allometry.laws.fit.problem import Problem
from allometry.laws.fit.solver import Loss, minimize
from allometry.laws.fit.starts import project, starts_of
from allometry.laws.forms.base import Form
from allometry.laws.forms.multi_power import MultiPower, MultiPowerWithWarmup
from allometry.laws.forms.tissue import Tissue
from allometry.laws.observations import LearningRates, Observations

Array = NDArray[np.float64]
SIZES = (25, 100, 400)
WARMUP, PEAK, STARTS = 2160, 3e-4, 8
FITTED = ("constant_24000", "cosine_24000", "wsdcon_9")
OTHERS = (
    "constant_72000",
    "cosine_72000",
    "wsd_20000_24000",
    "wsdcon_18",
    "wsdcon_3",
    "wsdld_20000_24000",
)
GOALS = (1.2e-3, 1.5e-3, 1.8e-3)


@dataclass(frozen=True)
class Candidate:
    """Method of fitting. ``weight``: ``row`` (equal weight per row) or ``curve`` (per curve)."""

    form: Form
    gamma: float | None
    weight: str
    dropped: float

    @property
    def name(self) -> str:
        fixed = "" if self.gamma is None else f", gamma {self.gamma:g}"
        return f"{self.form.name}{fixed}, by {self.weight}, without {self.dropped:.0%}"


def rates(name: str) -> LearningRates:
    kind, *numbers = name.split("_")
    first, last = int(numbers[0]), int(numbers[-1])
    steps = np.arange(1, (16_000 if kind == "wsdcon" else last) + 1)
    x = np.clip((steps - first) / max(last - first, 1), 0.0, 1.0)
    found = PEAK * np.asarray(
        {
            "constant": lambda: np.ones(last),
            "cosine": lambda: 0.55 + 0.45 * np.cos(np.pi * (steps - WARMUP) / (last - WARMUP)),
            "wsd": lambda: 0.1**x,
            "wsdld": lambda: 1 - 0.9 * x,
            "wsdcon": lambda: np.where(steps < 8000, 1.0, first * 1e-5 / PEAK),
        }[kind]()
    )
    found[:WARMUP] = PEAK * np.arange(1, WARMUP + 1) / WARMUP
    return LearningRates(found, WARMUP)


class Curves:
    """Curves of one model size."""

    def __init__(self, folder: Path) -> None:
        self.by_name = {name: self._read(folder, name) for name in (*FITTED, *OTHERS)}

    def _read(self, folder: Path, name: str) -> Observations:
        table = np.loadtxt(folder / f"{name}.csv", delimiter=",", skiprows=1)
        columns = {"step": table[:, 0], "loss": table[:, 2]}
        return Observations(columns, (name,) * len(table), {name: rates(name)})

    def together(self, names: tuple[str, ...], dropped: float = 0.0) -> Observations:
        parts = [self.by_name[name] for name in names]
        parts = [part.take(part["step"] > dropped * part["step"].max()) for part in parts]
        return Observations(
            {key: np.concatenate([part[key] for part in parts]) for key in ("step", "loss")},
            tuple(group for part in parts for group in part.groups),
            {name: self.by_name[name].curves[name] for name in names},
        )


def weights_of(rows: Observations, kind: str) -> Array:
    """Return weights [n] with mean 1."""
    found, groups = np.ones(len(rows)), np.array(rows.groups)
    for name in set(rows.groups):
        its = groups == name
        found[its] = 1.0 if kind == "row" else 1.0 / its.sum()
    return found / found.mean()


def fit(candidate: Candidate, curves: Curves, names: tuple[str, ...]) -> dict[str, float]:
    """Return the optimum of the Huber loss (0.001, of logs) from uninformed starts."""
    rows = curves.together(names, candidate.dropped)
    fixed = {} if candidate.gamma is None else {"gamma": candidate.gamma}
    problem = Problem(candidate.form, rows, fixed)
    starts = project(problem, starts_of(problem, STARTS, 0))
    weights = np.tile(weights_of(rows, candidate.weight), (len(starts), 1))
    solved = minimize(problem, starts, Loss(1e-3), weights, max_iterations=1000)
    best = problem.values_array(solved.x_SP[np.argmin(solved.objective_S)][None])[0]
    found = {p.name: float(v) for p, v in zip(problem.free, best, strict=True)}
    return {**found, **fixed}


Errors = dict[tuple[int, str], Array]


def residuals(candidate: Candidate, values: dict[str, float], rows: Observations) -> Array:
    return np.asarray(predict(candidate.form, values, rows) / rows["loss"] - 1.0)


def errors_of(candidate: Candidate, curves: dict[int, Curves]) -> tuple[Errors, Errors]:
    """Return relative errors on each fitted curve by the fit to the other two, and on the six."""
    left_out, others = {}, {}
    for size, its in curves.items():
        for held in FITTED:
            values = fit(candidate, its, tuple(name for name in FITTED if name != held))
            left_out[size, held] = residuals(candidate, values, its.by_name[held])
        values = fit(candidate, its, FITTED)
        for name in OTHERS:
            others[size, name] = residuals(candidate, values, its.by_name[name])
    return left_out, others


def mean_errors(errors: Errors) -> list[float]:
    """Return the mean over curves of the mean absolute error, for each size."""
    return [
        float(np.mean([np.abs(e).mean() for (which, _), e in errors.items() if which == size]))
        for size in SIZES
    ]


def line(name: str, left_out: Errors, others: Errors) -> dict[str, object]:
    return {
        "name": name,
        "score": float(np.mean(mean_errors(left_out))),
        "left_out": mean_errors(left_out),
        "others": mean_errors(others),
    }


def candidates() -> list[Candidate]:
    ways = list(itertools.product(("row", "curve"), (0.0, 0.15)))
    powers = itertools.product((None, 0.75, 1.0), ways)
    return [
        *(Candidate(MultiPower(), gamma, *way) for gamma, way in powers),
        *(Candidate(MultiPowerWithWarmup(), None, *way) for way in ways),
        *(Candidate(Tissue(), None, *way) for way in ways),
    ]


def best_possible(curves: dict[int, Curves], names: tuple[str, ...]) -> dict[str, list[float]]:
    """Return errors on the six curves of laws that were fitted to them as well."""
    found = {}
    for form in (MultiPower(), Tissue()):
        way, errors = Candidate(form, None, "curve", 0.0), {}
        for size, its in curves.items():
            values = fit(way, its, names)
            for name in OTHERS:
                errors[size, name] = residuals(way, values, its.by_name[name])
        found[form.name] = mean_errors(errors)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    curves = {size: Curves(arguments.data / f"csv_{size}") for size in SIZES}
    found = {way: errors_of(way, curves) for way in candidates()}
    lines = [line(way.name, *both) for way, both in found.items()]
    for way, (left_out, others) in found.items():
        if not isinstance(way.form, MultiPower):
            continue
        tissue = next(
            both
            for other, both in found.items()
            if isinstance(other.form, Tissue)
            and (other.weight, other.dropped) == (way.weight, way.dropped)
        )
        means = [
            {key: (mine[key] + its[key]) / 2 for key in mine}
            for mine, its in ((left_out, tissue[0]), (others, tissue[1]))
        ]
        lines.append(line(f"mean of tissue and {way.name}", *means))
    lines.sort(key=lambda each: each["score"])  # type: ignore[arg-type,return-value]
    for each in lines:
        print(
            f"{each['score']:.3%} | "
            + " ".join(f"{e:.3%}" for e in each["others"])  # type: ignore[attr-defined]
            + f"  {each['name']}"
        )
    floors = {
        "fitted to the six": best_possible(curves, OTHERS),
        "fitted to all nine": best_possible(curves, (*FITTED, *OTHERS)),
    }
    print(json.dumps(floors, indent=1))
    met = [e["name"] for e in lines if np.all(np.array(e["others"]) <= GOALS)]
    print(f"{len(lines)} candidates; goals {GOALS} met by: {met or 'none'}")
    if arguments.out:
        content = {**facts(), "goals": GOALS, "candidates": lines, "floors": floors}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
