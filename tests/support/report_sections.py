"""Sections of the report for folders and files, without rendering a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from allometry.launch.figures.figure import Panel
from allometry.launch.report.inputs import Inputs, read_inputs
from allometry.launch.report.section import Section


def inputs(*runs: Path, fit: Path | None = None, sweeps: tuple[Path, ...] = ()) -> Inputs:
    """Read all inputs, smoothed over 5 %."""
    return read_inputs(runs, () if fit is None else (fit,), sweeps, 0.05)


def panels(section: Section) -> dict[str, Panel]:
    """Return a section's panels by title."""
    return {panel.title: panel for figure in section.figures for panel in figure.panels}


def trial_file(path: Path, rows: list[tuple[int, float, int, float | None]]) -> Path:
    """Write a file of trials: size, log2 of the rate, seed, loss."""
    lines: list[dict[str, Any]] = [{"axis": "width"}]
    lines += [{"size": s, "log2_lr": r, "seed": k, "loss": v} for s, r, k, v in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
