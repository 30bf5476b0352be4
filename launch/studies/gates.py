"""What the gates coordcheck and transfer share: sizes, processes, being stopped, figures."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from allometry.scaling.shapes import Axis, regime_unit, width_unit

GROWTH = (1, 2, 4)
INTERRUPTED = 130
"""Exit code of a command that Ctrl-C stopped, as shells have it."""


def numbers(text: str | None, flag: str) -> tuple[int, ...] | None:
    """Read ``64,128,256``; None stays None. Raises UserError for less than two numbers."""
    if text is None:
        return None
    try:
        found = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        found = ()
    if len(found) < 2 or found[0] < 1:
        raise UserError(f"{flag}={text}: give two or more different whole numbers, as 64,128,256")
    return found


def default_sizes(model: ModelConfig, axis: Axis, steps: int) -> tuple[int, ...]:
    """Sizes of a small family: the narrowest models, 4 to 16 layers, 1 to 4 times the rest."""
    match axis:
        case Axis.WIDTH:
            unit = width_unit(model)
            return tuple(unit * growth for growth in GROWTH)
        case Axis.DEPTH:
            return (4, 8, 16)
        case Axis.EXPERTS | Axis.REGIME_II | Axis.REGIME_III:
            if not isinstance(model, MoEModel):
                raise UserError("model.kind=dense has no experts to vary; choose another axis")
            unit = model.experts.num_experts if axis == Axis.EXPERTS else regime_unit(model)
            return tuple(unit * growth for growth in GROWTH)
        case Axis.HORIZON:
            return tuple(steps * growth for growth in GROWTH)


def has_depth_rule(parameterization: ParameterizationConfig) -> bool:
    """Whether something in it follows the number of layers."""
    if isinstance(parameterization, MSSP):
        return parameterization.base_layers is not None
    return isinstance(parameterization, CompleteP | MuPPlusPlus | HyperP)


def depth_words(parameterization: ParameterizationConfig, axis: Axis) -> list[str]:
    """Return a line for the verdict of a family that failed over depth and has no rule for it."""
    if axis != Axis.DEPTH or has_depth_rule(parameterization):
        return []
    return [
        f"parameterization.kind={parameterization.kind} has no rule for depth"
        + (" without base_layers" if isinstance(parameterization, MSSP) else "")
        + "; completep (with depth_alpha 0.5: Depth-muP), mupp, hyperp, and mssp with base_layers "
        "have one"
    ]


def processes_here(asked: int | None) -> int:
    """The number asked for, else one for each core that this process may use."""
    return asked or len(os.sched_getaffinity(0))


def counted(number: int, what: str) -> str:
    """Return ``1 seed`` or ``3 seeds``, of a word whose plural ends in s."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


@contextmanager
def stoppable(kept: Callable[[], str]) -> Iterator[None]:
    """While the context lasts Ctrl-C ends the command with a line that says what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"allometry: stopped; {kept()}", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve over sizes or rates; ``low`` and ``high``: over seeds, ``mark``: its best point."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    mark: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Axes of a figure; ``ticks`` of x are written as they are, else powers of two."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Line]
    ticks: Sequence[int] | None = None
    log_y: bool = False


def draw(out: Path, panels: Sequence[Panel]) -> None:
    """Write a figure of these panels side by side; x is log2."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        _panel(axis, panel)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def _panel(axis: Any, panel: Panel) -> None:
    for name, line in panel.lines.items():
        (drawn,) = axis.plot(line.x, line.y, "o-", ms=4, lw=1.4, label=name)
        if line.low is not None and line.high is not None:
            axis.fill_between(line.x, line.low, line.high, color=drawn.get_color(), alpha=0.15)
        if line.mark is not None:
            axis.plot(*line.mark, "*", ms=13, mec="black", mew=0.6, color=drawn.get_color())
    axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    axis.set_xscale("log", base=2)
    if panel.ticks is not None:
        axis.set_xticks(panel.ticks, [str(tick) for tick in panel.ticks])
        axis.set_xticks([], minor=True)
    if panel.log_y:
        axis.set_yscale("log", base=2)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
