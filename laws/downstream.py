"""Benchmark scores from compute in two steps: a law of the loss, then a law of the score."""

# n rows, B bootstrap samples

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.laws.fit.bootstrap import Bootstrap
from allometry.laws.fit.engine import Fit
from allometry.laws.observations import Observations

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Chain:
    """A fit of the loss and a fit of a score (an error, an accuracy) as a function of the loss.

    The score's only input is the loss predicted by the first fit, so rows need only the inputs of
    the first fit. The error of the loss is multiplied by the slope of the score: near the foot of a
    steep curve an error of 1 % in the loss is an error of many percent in the score.
    """

    loss: Fit
    score: Fit

    def __post_init__(self) -> None:
        assert len(self.score.form.inputs) == 1, "the second step reads the loss alone"

    def predict(self, observations: Observations) -> Array:
        """Return the score [n] of these rows."""
        return self.score.predict(self._with_loss(self.loss.predict(observations)))

    def warnings_for(self, observations: Observations) -> list[str]:
        """Return the warnings of both fits about rows outside of their fitted ranges."""
        second = self._with_loss(self.loss.predict(observations))
        return [*self.loss.warnings_for(observations), *self.score.warnings_for(second)]

    def predict_interval(
        self, observations: Observations, loss: Bootstrap, score: Bootstrap, level: float = 0.95
    ) -> tuple[Array, Array]:
        """Return the interval [n], [n] of the score by the uncertainty of both fits.

        Percentiles; samples of the two bootstraps are paired in order, as for independent fits.
        Outside of the data of either fit, the interval is widened in quadrature by the effect of
        the forms' own errors (``Bootstrap.form_width``) on the score.
        """
        losses_Bn = loss.predictions(observations)
        form, scores_Bn = self.score.form, []
        for losses_n, values_P in zip(losses_Bn, score.values_BP, strict=False):
            values = dict(zip(score.names, values_P, strict=True))
            scores_Bn.append(form.predict(values, form.prepare(self._with_loss(losses_n))))
        ends_2n = np.quantile(scores_Bn, [(1.0 - level) / 2.0, (1.0 + level) / 2.0], axis=0)
        center_n, losses_n = self.predict(observations), self.loss.predict(observations)
        width_n = score.form_width(self._with_loss(losses_n), level)
        if form.residual == "log":
            width_n = width_n * np.abs(center_n)
        off_n, log = loss.form_width(observations, level), self.loss.form.residual == "log"
        for sign in (-1.0, 1.0):
            moved_n = losses_n * np.exp(sign * off_n) if log else losses_n + sign * off_n
            change_n = np.abs(self.score.predict(self._with_loss(moved_n)) - center_n)
            width_n = np.hypot(width_n, change_n / np.sqrt(2.0))
        below_n, above_n = (
            np.maximum(center_n - ends_2n[0], 0),
            np.maximum(ends_2n[1] - center_n, 0),
        )
        wide_2n = center_n + np.array([-np.hypot(below_n, width_n), np.hypot(above_n, width_n)])
        low_n, high_n = form.target.clip(np.where(width_n > 0.0, wide_2n, ends_2n))
        return low_n, high_n

    def _with_loss(self, losses_n: Array) -> Observations:
        return Observations.of({self.score.form.inputs[0].name: losses_n})


def smooth_checkpoints(
    observations: Observations,
    columns: Sequence[str] = ("loss", "accuracy"),
    *,
    order: str = "D",
    window: int = 5,
    skip: float = 0.1,
) -> Observations:
    """Return checkpoints of runs with averaged noise, for the second step of a chain.

    In each group, by ``order``: the checkpoints in the first ``skip`` of the run (as a share of the
    group's largest ``order``) are dropped, then ``columns`` are means of each ``window`` successive
    rows; other columns are those of the window's last row, as in the OLMo ladder (arXiv
    2412.04403). Raises UserError: ``skip`` or ``window`` are invalid, or a run has fewer than
    ``window`` checkpoints.
    """
    if window < 1 or not 0.0 <= skip < 1.0:
        raise UserError(f"window={window}, skip={skip}: use window >= 1 and 0 <= skip < 1")
    at_n = observations[order]
    groups_n = np.array(observations.groups)
    rows: list[int] = []
    means: dict[str, list[float]] = {name: [] for name in columns}
    for group in dict.fromkeys(observations.groups):
        member_i = np.flatnonzero(groups_n == group)
        member_i = member_i[np.argsort(at_n[member_i], kind="stable")]
        kept_i = member_i[at_n[member_i] > skip * at_n[member_i[-1]]]
        if len(kept_i) < window:
            raise UserError(
                f"run {group} has {len(kept_i)} checkpoints after the first {skip:.0%} and the "
                f"mean takes {window}; evaluate more checkpoints or lower window"
            )
        rows += [int(row) for row in kept_i[window - 1 :]]
        for name in columns:
            windows = np.lib.stride_tricks.sliding_window_view(observations[name][kept_i], window)
            means[name] += windows.mean(axis=1).tolist()
    smoothed = {name: observations[name][rows] for name in observations.columns}
    smoothed.update({name: np.array(values) for name, values in means.items()})
    groups = tuple(observations.groups[row] for row in rows)
    return replace(observations, columns=smoothed, groups=groups)
