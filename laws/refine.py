"""Learning-rate schedule from the gradient norms of a run (arXiv 2310.07831)."""

# T steps

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allometry.configs.errors import UserError
from allometry.laws.collect import not_finished
from allometry.laws.runs import Run, read_run

POWERS = {"sgd": 2, "adam": 1}
"""Power of the gradient norm by which a step of each kind is divided."""

SMOOTHING = 0.1
"""Width of the median filter as a share of the run."""


def refine(norms_T: ArrayLike, power: int, smoothing: float = SMOOTHING) -> NDArray[np.float64]:
    """Return the schedule [T] for these gradient norms, with a largest value of 1.

    w_t = G_t^−power of the norms after a median filter (2·⌊smoothing·T/2⌋ + 1 wide, reflected at
    the ends); the rate of step t is w_t · Σ_{p>t} w_p. Constant norms give a linear decay to 0 at
    the last step, norms that rise towards the end give an earlier decay. ``power`` is 2 for SGD
    (2-norms) and 1 for Adam (1-norms).
    """
    from scipy.ndimage import median_filter  # import takes half a second

    norms = np.asarray(norms_T, dtype=np.float64)
    assert norms.ndim == 1, norms.shape
    assert len(norms) > 1, "a schedule needs two steps at least"
    assert np.isfinite(norms).all(), "norms must be finite"
    assert (norms > 0.0).all(), "norms must be positive"
    width = 2 * int(smoothing * len(norms) / 2) + 1
    smooth = median_filter(norms, size=width, mode="reflect")
    weights = (smooth / smooth.min()) ** -float(power)
    later = weights[::-1].cumsum()[::-1] - weights
    later[-1] = 0.0
    rates = weights * later
    return np.asarray(rates / rates.max(), dtype=np.float64)


def gradient_norms(run: Run, kind: Literal["sgd", "adam"]) -> tuple[NDArray[np.float64], str]:
    """Return the norm of each step of a run, and the name of its column.

    Adam: the 1-norms of the monitors (``monitors/grad_l1``, after clipping) if at least ten steps
    have one, else the 2-norms (``grad_norm``), as for SGD. Steps that were not recorded are
    interpolated linearly. Raises UserError: fewer than ten steps are recorded, or a norm is zero or
    not finite.
    """
    key = "grad_norm"
    if kind == "adam":
        seen = run.metrics.get("monitors/grad_l1", np.empty(0))
        key = "monitors/grad_l1" if np.isfinite(seen).sum() >= 10 else key
    steps, values = run.metrics["step"], run.metrics[key]
    there = ~np.isnan(values)
    steps, values = steps[there], values[there]
    if len(values) < 10:
        raise UserError(
            f"{run.folder} has {len(values)} recorded steps with {key}, too few to refine a "
            "schedule; give a run of ten or more (record.every_steps)"
        )
    if not (np.isfinite(values).all() and (values > 0.0).all()):
        raise UserError(
            f"{run.folder} has a {key} that is zero or not finite, which says nothing of a "
            "schedule; give a run that trained to its end"
        )
    return np.interp(np.arange(1, int(run.metrics["step"][-1]) + 1), steps, values), key


def refined_schedule(
    folder: str | Path, kind: Literal["sgd", "adam"] = "adam", smoothing: float = SMOOTHING
) -> dict[str, Any]:
    """Return the content of the file of ``schedule: {kind: refined, file: ...}`` for a run.

    Raises UserError: see ``gradient_norms`` and ``read_run``; the run is not finished; or
    ``smoothing`` is not a share.
    """
    if not 0.0 <= smoothing <= 1.0:
        raise UserError(f"--smoothing={smoothing} is not a share of the run; use 0 to 1, e.g. 0.1")
    run = read_run(folder)
    problem = not_finished(run)
    if problem is not None:
        raise UserError(
            f"{folder} {problem}, and a schedule that decays to 0 there would be that of a shorter "
            "run; let it finish"
        )
    norms, key = gradient_norms(run, kind)
    return {
        "kind": "allometry.schedule",
        "version": 1,
        "from": {
            "run": str(folder),
            "norm": key,
            "power": POWERS[kind],
            "smoothing": smoothing,
            "steps": len(norms),
        },
        "fractions": refine(norms, POWERS[kind], smoothing).tolist(),
    }


def write_schedule(content: dict[str, Any], file: str | Path) -> None:
    """Write a schedule as JSON, creating its folder.

    Raises UserError: the file cannot be written.
    """
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(json.dumps(content) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out={file} cannot be written: {error.strerror}") from None
