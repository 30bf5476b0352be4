"""Commands that write a report or a gallery."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from allometry.launch.command import Command, argument, option


@dataclass(frozen=True, kw_only=True)
class WriteReport(Command):
    """Write one page with the figures of runs, fits and sweeps; it needs no network."""

    runs: tuple[Path, ...] = argument(
        "run folders (folders in runs/* without a run are omitted), or a ladder's folder", ()
    )
    out: Path = option("HTML page to write", Path("report.html"), "-o")
    fits: tuple[Path, ...] = option(
        "fit to draw (file of allometry fit --out); repeat for more", (), "--fit"
    )
    trials: tuple[Path, ...] = option(
        "sweep to draw (file of allometry transfer --trials); repeat for more", (), "--transfer"
    )
    png: Path | None = option("folder for the figures as PNG, in addition")
    smoothing: float = option(
        "smoothing window of losses, as a fraction of the run so far", 0.05, "--smooth"
    )
    title: str = option("title of the page", "Allometry report")


@dataclass(frozen=True, kw_only=True)
class WriteGallery(Command):
    """Write a Markdown page and SVG pictures of the runs, sweeps and certificate in FOLDER."""

    folder: Path = argument(
        "folder with a ladder, runs, sweeps (*.jsonl of allometry transfer --trials) and "
        "certificates (*.json of allometry verify)"
    )
    out: Path = option(
        "Markdown page to write; pictures go to a folder of its name", Path("gallery.md"), "-o"
    )
