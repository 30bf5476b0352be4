"""Schedule of one step, by rank and document: ``allometry plot RUN --hdp [STEP]``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from allometry.configs.errors import UserError
from allometry.launch.command import Report
from allometry.launch.figures.drawing import check_format, draw
from allometry.launch.figures.schedule import recorded_schedule


def draw_plan(folder: Path, step: int | None, out: Path) -> Report:
    """Draw the schedule of a step (None: the last recorded step) and return a summary.

    The figure is drawn from the run's plans.jsonl only: times are the planned seconds. Raises
    UserError: a folder without plans, or a step without a plan. For example,
    ``draw_plan(Path("runs/a"), 100, Path("plan.png"))``.
    """
    check_format(out)
    figure, facts = recorded_schedule(folder, step)
    draw(figure, out)
    text, seconds = figure.panels[0].title, facts["makespan_s"]
    return Report(
        {"figure": str(out), **facts}, f"{text}, {seconds:.4g} s as planned\nschedule: {out}"
    )


def run_and_step(arguments: Sequence[Path]) -> tuple[Path, int | None]:
    """Return the run folder and the step of RUN [STEP]. Raises UserError: any other arguments.

    For example, ``run_and_step([Path("runs/a"), Path("100")])`` returns ``(Path("runs/a"), 100)``.
    """
    folder, *rest = arguments
    if not rest:
        return folder, None
    if len(rest) > 1 or not str(rest[0]).isdecimal():
        raise UserError(
            f"--hdp draws one step of one run, not {' '.join(map(str, arguments))!r}; write "
            "allometry plot RUN --hdp STEP, with STEP a whole number or left out"
        )
    return folder, int(str(rest[0]))
