"""What the gates coordcheck and transfer share: sizes, processes, being stopped, figures."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from allometry.configs.errors import UserError
from allometry.configs.model import ModelConfig, MoEModel
from allometry.scaling.shapes import Axis, width_unit

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
    """Sizes of a small family: the narrowest widths, 4 to 16 layers, 1 to 4 times the rest."""
    match axis:
        case Axis.WIDTH:
            unit = width_unit(model)
            return tuple(unit * growth for growth in GROWTH)
        case Axis.DEPTH:
            return (4, 8, 16)
        case Axis.EXPERTS | Axis.REGIME_II | Axis.REGIME_III:
            if not isinstance(model, MoEModel):
                raise UserError("model.kind=dense has no experts to vary; choose another axis")
            return tuple(model.experts.num_experts * growth for growth in GROWTH)
        case Axis.HORIZON:
            return tuple(steps * growth for growth in GROWTH)


def processes_here(asked: int | None) -> int:
    """The number asked for, else one for each core that this process may use."""
    return asked or len(os.sched_getaffinity(0))


@contextmanager
def stoppable(kept: Callable[[], str]) -> Iterator[None]:
    """While the context lasts Ctrl-C ends the command with a line that says what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"allometry: stopped; {kept()}", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None


def curves(
    out: Path,
    panels: Sequence[tuple[str, str, dict[str, tuple[Sequence[float], Sequence[float]]]]],
    y_label: str,
    *,
    log_y: bool,
) -> None:
    """Write a figure with a panel for each (title, x label, {name: (x, y)}); x is log2."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False, layout="constrained"
    )
    for axis, (title, x_label, lines) in zip(axes[0], panels, strict=True):
        _panel(axis, lines)
        axis.set_title(title)
        axis.set_xlabel(x_label)
        axis.set_xscale("log", base=2)
        if log_y:
            axis.set_yscale("log", base=2)
        axis.set_ylabel(y_label)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def _panel(axis: Any, lines: dict[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    for name, (x, y) in lines.items():
        axis.plot(x, y, "o-", ms=4, lw=1.4, label=name)
