"""Law of a ladder's rungs, and the prediction of its target before training."""

# N parameters, D tokens of a run

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from allometry.configs import json_file
from allometry.configs.errors import UserError
from allometry.laws.collect import CountName, from_runs
from allometry.laws.fit.bootstrap import Bootstrap, bootstrap
from allometry.laws.fit.engine import Fit, FitOptions, fit, require_identified
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named

LEVEL = 0.95
"""Probability of a prediction's interval."""
TargetState = Literal["planned", "partial", "done"]


@dataclass(frozen=True)
class Prediction:
    """Loss of a target as predicted from the rungs, and as measured.

    ``low``, ``high``: the ``level`` interval of one run's loss, from the law's parameters, by
    bootstrap over cells, its form, by folds, and the scatter of runs around it; None if the rungs
    do not identify the law. ``time``: creation time in seconds since 1970; ``target_state`` and
    ``target_step``: state of the target at this time: a prediction made after the run had ended has
    ``done``. ``target``: the run's name, N, D and other columns. ``fix``, ``bootstraps``, ``runs``:
    options of the fit, and names of the fitted runs; None in older files without these fields.
    """

    law: str
    target: dict[str, Any]
    predicted: float
    low: float | None
    high: float | None
    level: float
    rungs: int
    loss: str
    time: float
    target_state: TargetState
    target_step: int
    warnings: tuple[str, ...]
    measured: float | None = None
    fix: dict[str, float] | None = None
    bootstraps: int | None = None
    runs: tuple[str, ...] | None = None

    @property
    def error(self) -> float | None:
        """Predicted over measured, minus 1."""
        return None if self.measured is None else self.predicted / self.measured - 1.0

    @property
    def covered(self) -> bool | None:
        """True if the interval contains the measured loss; None if unknown."""
        if self.measured is None or self.low is None or self.high is None:
            return None
        return self.low <= self.measured <= self.high

    def describe(self) -> dict[str, Any]:
        """Return the prediction as JSON."""
        return {**asdict(self), "error": self.error, "covered": self.covered}


def fit_rungs(
    folders: Sequence[Path],
    law: str,
    *,
    count: CountName,
    loss: str,
    bootstraps: int,
    fixed: Mapping[str, float] | None = None,
) -> tuple[Fit, Bootstrap]:
    """Return the law of finished runs and its bootstrap over cells (equal runs but for seeds).

    Raises UserError: the law does not exist, runs are not finished or not comparable, or there are
    fewer runs than parameters. For example,
    ``fit_rungs(folders, "chinchilla", count="non_embedding", loss="train", bootstraps=200)``.
    """
    form = form_named(law)
    observations = from_runs(folders, count=count, loss=loss)
    fitted = fit(form, observations, FitOptions(fixed=dict(fixed or {})))
    return fitted, bootstrap(fitted, bootstraps)


def unidentified(fitted: Fit) -> str | None:
    """Return a sentence with the parameters that the rungs do not identify, or None.

    A prediction near the rungs can be good although a parameter, often E, is not identified. There
    is no interval if other values predict the rungs equally well, or if the rungs hardly identify a
    parameter and too few rungs can be held out to measure the error of the law's form.
    """
    try:
        require_identified(fitted, "fix: {{{name}: 0}} in the ladder")
    except UserError as error:
        return str(error)
    return None


def predict_target(
    fitted: Fit,
    resampled: Bootstrap,
    target: Mapping[str, Any],
    *,
    state: TargetState,
    step: int,
    runs: Sequence[str] = (),
) -> Prediction:
    """Return the prediction of a run; ``target``: its name and the values of the law's inputs.

    ``runs``: names of the fitted rungs. Raises UserError: the law reads inputs that are unknown
    before the run.
    """
    columns = {
        key: [float(value)]
        for key, value in target.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    wanted = Observations.of(columns, [str(target["run"])])
    predicted = float(fitted.predict(wanted)[0])
    open_ones = unidentified(fitted)
    warnings = [*fitted.warnings_for(wanted), *([open_ones] if open_ones else [])]
    low, high = None, None
    if not fitted.unidentified and (open_ones is None or resampled.form_error is not None):
        ends = resampled.predict_interval(wanted, LEVEL, noise=True)
        low, high = (float(end[0]) for end in ends)
    else:
        warnings.append("no interval is given, as the rungs do not identify the law")
    return Prediction(
        law=fitted.form.name,
        target=dict(target),
        predicted=predicted,
        low=low,
        high=high,
        level=LEVEL,
        rungs=len(fitted.observations),
        loss=fitted.observations.conventions.get("loss", ""),
        time=round(time.time(), 3),
        target_state=state,
        target_step=step,
        warnings=tuple(warnings),
        fix=dict(fitted.options.fixed),
        bootstraps=len(resampled) + resampled.failed,
        runs=tuple(runs),
    )


def measure_target(
    prediction: Prediction, rungs: Sequence[Path], target: Path, *, count: CountName, loss: str
) -> Prediction:
    """Return the prediction with the loss of the target's finished run, comparable with the rungs.

    Raises UserError: the run is not finished, or its loss differs in kind from the rungs'.
    """
    together = from_runs([*rungs, target], count=count, loss=loss)
    return replace(prediction, measured=float(together["loss"][-1]))


def save_prediction(path: Path, prediction: Prediction) -> None:
    """Write a prediction as JSON, atomically."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(prediction.describe(), indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def load_prediction(path: Path) -> Prediction | None:
    """Return the prediction of ``save_prediction``; None without a file.

    Raises UserError: not valid.
    """
    if not path.is_file():
        return None
    try:
        data = json_file.read_object(path)
        fields = {key: data[key] for key in Prediction.__dataclass_fields__ if key in data}
        lists = {
            key: tuple(fields[key]) for key in ("warnings", "runs") if fields.get(key) is not None
        }
        prediction = Prediction(**{**fields, "warnings": (), **lists})
        ends = (prediction.low, prediction.high)
        numbers = [prediction.predicted, *(() if ends == (None, None) else ends)]
        if not all(map(math.isfinite, numbers)):
            raise ValueError("its numbers are not finite")
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(
            f"{path} is not a prediction ({type(error).__name__}: {error}); restore it or remove it"
        ) from None
    return prediction
