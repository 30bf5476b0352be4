"""Functions shared by coordcheck and transfer: families of sizes, processes, Ctrl-C, curves."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from allometry.configs.errors import UserError
from allometry.configs.model import (
    MSSP,
    CompleteP,
    HyperP,
    ModelConfig,
    MoEModel,
    MuPPlusPlus,
    ParameterizationConfig,
)
from allometry.launch.figures.figure import Column, Series, star
from allometry.scaling.shapes import Axis, regime_unit, width_and_depth_unit, width_unit

GROWTH = (1, 2, 4)
INTERRUPTED = 130
"""Exit code of a command stopped by Ctrl-C, as in shells."""


def numbers(text: str | None, flag: str) -> tuple[int, ...] | None:
    """Parse ``64,128,256``; None stays None. Raises UserError: fewer than two numbers.

    For example, ``numbers("64,128", "--widths")`` returns ``(64, 128)``.
    """
    if text is None:
        return None
    try:
        sizes = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        sizes = ()
    if len(sizes) < 2 or sizes[0] < 1:
        raise UserError(f"{flag}={text}: give two or more different whole numbers, as 64,128,256")
    return sizes


def default_sizes(
    model: ModelConfig, axis: Axis, steps: int, sequences: int = 1
) -> tuple[int, ...]:
    """Return sizes of a small family: narrow models, 4 to 16 layers, or 1 to 4 times a unit."""
    match axis:
        case Axis.WIDTH:
            unit = width_unit(model)
        case Axis.WIDTH_AND_DEPTH:
            unit = width_and_depth_unit(model)
        case Axis.DEPTH:
            return (4, 8, 16)
        case Axis.EXPERTS | Axis.REGIME_II | Axis.REGIME_III:
            if not isinstance(model, MoEModel):
                raise UserError("model.kind=dense has no experts to vary; choose another axis")
            unit = model.experts.num_experts if axis == Axis.EXPERTS else regime_unit(model)
        case Axis.HORIZON:
            unit = steps
        case Axis.BATCH:
            unit = sequences
    return tuple(unit * growth for growth in GROWTH)


def has_depth_rule(parameterization: ParameterizationConfig) -> bool:
    """Return True if the parameterization depends on the number of layers."""
    if isinstance(parameterization, MSSP):
        return parameterization.base_layers is not None
    return isinstance(parameterization, CompleteP | MuPPlusPlus | HyperP)


def depth_words(parameterization: ParameterizationConfig, axis: Axis) -> list[str]:
    """Return a line for a failure over depth of a parameterization without a depth rule."""
    if axis != Axis.DEPTH or has_depth_rule(parameterization):
        return []
    return [
        f"parameterization.kind={parameterization.kind} has no rule for depth"
        + (" without base_layers" if isinstance(parameterization, MSSP) else "")
        + "; completep (with depth_alpha 0.5: Depth-muP), mupp, hyperp, and mssp with base_layers "
        "have one"
    ]


def processes_here(asked: int | None) -> int:
    """Return the requested number, or one process for each core available to this process."""
    return asked or len(os.sched_getaffinity(0))


@contextmanager
def stoppable(kept: Callable[[], str]) -> Iterator[None]:
    """Return a context in which Ctrl-C ends the command with a line about the kept results."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"allometry: stopped; {kept()}", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None


def curve(
    name: str,
    colour: str,
    x_n: Sequence[float],
    y_Rn: Sequence[Sequence[float]] | Column,
    best: tuple[float, float] | None = None,
) -> list[Series]:
    """Return the mean of y over R seeds as a curve, with its range and the ``best`` point."""
    x, ys = np.array(x_n, np.float64), np.array(y_Rn, np.float64)
    mean, low, high = ys.mean(axis=0), ys.min(axis=0), ys.max(axis=0)
    series = [Series(name, x, mean, "joined", colour)]
    if len(ys) > 1:
        series.append(Series(name, x, mean, "band", colour, low=low, high=high, named=False))
    if best is not None:
        series.append(star(name, *best, colour, named=False))
    return series
