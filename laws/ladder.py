"""What a ladder says: the law of its rungs, and its target predicted before it is trained."""

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
"""Of a prediction's interval."""
TargetState = Literal["planned", "partial", "done"]


@dataclass(frozen=True)
class Prediction:
    """A target's loss as the rungs foretell it, and as it was measured.

    ``low``, ``high``: the ``level`` interval of one run's loss: of the law's parameters, by
    bootstrap over cells, of its form, by folds, and of the scatter of runs around it; None where
    the rungs do not identify the law. ``time``: when it was made, seconds
    since 1970; ``target_state`` and ``target_step``: how far the target was then: a prediction that
    was made of a run that had ended says ``done``. ``target``: the run's name, N, D and more.
    ``fix``, ``bootstraps``, ``runs``: how the law was fitted, and to the runs of which names; None
    in a file of a time when that was not kept.
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
        """Predicted over measured, less 1."""
        return None if self.measured is None else self.predicted / self.measured - 1.0

    @property
    def covered(self) -> bool | None:
        """Whether the interval holds what was measured."""
        if self.measured is None or self.low is None or self.high is None:
            return None
        return self.low <= self.measured <= self.high

    def describe(self) -> dict[str, Any]:
        """JSON."""
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
    """Return the law of these finished runs and its bootstrap over cells (runs alike but in seed).

    Raises UserError if the law is not known, runs have not finished or cannot be compared, or there
    are fewer of them than the law has parameters.
    """
    form = form_named(law)
    observations = from_runs(folders, count=count, loss=loss)
    fitted = fit(form, observations, FitOptions(fixed=dict(fixed or {})))
    return fitted, bootstrap(fitted, bootstraps)


def unidentified(fitted: Fit) -> str | None:
    """Say which parameters the rungs leave open, if any.

    A prediction near the rungs can be good although a parameter, often E, is not. There is no
    interval where other values predict the rungs the same, or where the rungs hardly tell a
    parameter and too few can be held out to say how far off the law is beyond the others.
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
    """Return the prediction of a run of which ``target`` gives what the law reads, and its name.

    ``runs``: names of the rungs that the law was fitted to. Raises UserError if the law reads what
    is not known before a run.
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

    Raises UserError if it has not finished, or its loss is another than that of the rungs.
    """
    together = from_runs([*rungs, target], count=count, loss=loss)
    return replace(prediction, measured=float(together["loss"][-1]))


def save_prediction(path: Path, prediction: Prediction) -> None:
    """Write a prediction as JSON, at once under its name."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(prediction.describe(), indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def load_prediction(path: Path) -> Prediction | None:
    """Return the prediction of ``save_prediction``; None without a file, UserError for another."""
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
