"""Command that writes a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from allometry.launch.command import Command, argument, option


@dataclass(frozen=True, kw_only=True)
class WriteReport(Command):
    """Write one page with the figures of runs, fits and sweeps; it needs no network."""

    runs: tuple[Path, ...] = argument(
        "run folders (of runs/*, what is no run is left out), or a ladder's folder", ()
    )
    out: Path = option("page to write", Path("report.html"), "-o")
    fits: tuple[Path, ...] = option("a fit to draw (allometry fit --out)", (), "--fit")
    trials: tuple[Path, ...] = option(
        "a sweep to draw (allometry transfer --trials)", (), "--transfer"
    )
    png: Path | None = option("folder for the same figures as PNG")
    smoothing: float = option(
        "smoothed losses: means over this share of the run so far", 0.05, "--smooth"
    )
    title: str = option("title of the page", "Allometry report")
