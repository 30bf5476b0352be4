"""Benchmark score at a predicted loss: ``allometry predict --downstream``."""

# n: rows

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.launch.laws.text import doubts
from allometry.laws.downstream import Chain
from allometry.laws.fit.store import StoredFit, load_fit
from allometry.laws.observations import Observations

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """Score of each row, [n], with its interval if both fits have bootstrap samples."""

    law: str
    origin: str
    name: str
    unit: str
    value_n: Array
    interval_n: tuple[Array, Array] | None
    warnings: list[str]

    def point(self, row: int) -> dict[str, float | None]:
        """Return a row for JSON."""
        low, high = None, None
        if self.interval_n is not None:
            low, high = (float(end_n[row]) for end_n in self.interval_n)
        return {self.name: float(self.value_n[row]), "low": low, "high": high}

    def describe(self) -> dict[str, Any]:
        """Return everything except the warnings, for JSON."""
        points = [self.point(row) for row in range(len(self.value_n))]
        return {"law": self.law, "from": self.origin, "unit": self.unit, "predictions": points}


def scores_at(
    loss: StoredFit, loss_file: Path, file: Path, observations: Observations, level: float
) -> Scores:
    """Return the scores that the fit in ``file`` predicts at the losses predicted by another fit.

    Raises UserError: the fit in ``file`` reads other inputs than the loss.
    """
    score = load_fit(file)
    form, target = score.fit.form, loss.fit.form.target
    reads = [variable.name for variable in form.inputs]
    if reads != [target.name]:
        raise UserError(
            f"--downstream {file}: {form.name} reads {', '.join(reads)} and {loss_file} predicts "
            f"{target.name}; give a fit that reads that alone, as of downstream_error"
        )
    chain = Chain(loss.fit, score.fit)
    interval_n = None
    warnings = [*_of_other_losses(loss, score, file), *chain.warnings_for(observations)]
    warnings += doubts(score.fit)
    if score.fit.unidentified:
        score = StoredFit(score.fit, None, score.extra)
    if loss.bootstrap is None or score.bootstrap is None:
        which = loss_file if loss.bootstrap is None else file
        warnings.append(f"no interval of {form.target.name}: {which} has none")
    else:
        interval_n = chain.predict_interval(observations, loss.bootstrap, score.bootstrap, level)
    return Scores(
        form.name,
        str(file),
        form.target.name,
        score.fit.unit(form.target.unit),
        chain.predict(observations),
        interval_n,
        warnings,
    )


def _of_other_losses(loss: StoredFit, score: StoredFit, file: Path) -> list[str]:
    """Return a warning if the losses of the two fits have different descriptions."""
    name = loss.fit.form.target.name
    predicted, read = (one.fit.observations.conventions.get(name) for one in (loss, score))
    if predicted == read:
        return []
    return [
        f"{file} reads a loss described as {read!r}, and the one predicted is {predicted!r}: see "
        "that they are of the same tokens and unit"
    ]
