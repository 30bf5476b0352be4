"""Write a report of runs, fits and sweeps as one page and as pictures: ``allometry report``."""

from __future__ import annotations

import time
from importlib import metadata
from pathlib import Path

from allometry.configs.errors import UserError
from allometry.launch.command import Report
from allometry.launch.figures.drawing import draw
from allometry.launch.report import (
    fits,
    isoflop,
    losses,
    mixture,
    page,
    scores,
    selection,
    stability,
    throughput,
    transfer,
)
from allometry.launch.report.commands import WriteReport
from allometry.launch.report.inputs import Inputs, read_inputs
from allometry.launch.report.section import Section
from allometry.launch.text import counted


def sections(inputs: Inputs) -> list[Section]:
    """Return all sections of the report, in order; a section without data has a reason."""
    makers = (
        throughput.runs,
        losses.losses,
        fits.fits,
        isoflop.isoflops,
        transfer.transfer,
        losses.sources,
        mixture.forgetting,
        mixture.ledger,
        selection.selection,
        scores.scores,
        losses.forecasts,
        stability.stability,
        throughput.throughput,
        throughput.events,
    )
    return [make(inputs).without_blanks() for make in makers]


def written(asked: WriteReport) -> Report:
    """Write the page and the pictures.

    Raises UserError: an input is missing or damaged, or the output cannot be written.
    """
    if asked.out.suffix not in (".html", ".htm"):
        raise UserError(f"--out={asked.out}: the report is a page; name it something.html")
    try:
        metadata.version("plotly")
    except metadata.PackageNotFoundError:
        raise UserError(
            "the report needs plotly, which is not installed; pip install plotly"
        ) from None
    inputs = read_inputs(asked.runs, asked.fits, asked.trials, asked.smoothing)
    shown = sections(inputs)
    made = (
        f"{counted(len(inputs.runs), 'run')}, {counted(len(inputs.fits), 'fit')}, "
        f"{counted(len(inputs.trials), 'sweep')}. Made on "
        f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())} by allometry "
        f"{metadata.version('allometry')}."
    )
    pictures: list[Path] = []
    try:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(page.page(shown, inputs, asked.title, made), encoding="utf-8")
        if asked.png is not None:
            for figure in (figure for section in shown for figure in section.figures):
                pictures.append(asked.png / f"{figure.key}.png")
                draw(figure, pictures[-1])
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be written ({error.strerror}); choose another path"
        ) from error
    size = asked.out.stat().st_size
    facts = {
        "report": str(asked.out),
        "bytes": size,
        "runs": [one.name for one in inputs.runs],
        "sections": [
            {"section": s.key, "shown": s.absent is None, "absent": s.absent} for s in shown
        ],
        "pictures": [str(path) for path in pictures],
        "left_out": list(inputs.notes),
    }
    lines = [f"{section.title}: {section.absent or 'shown'}" for section in shown]
    lines += [*inputs.notes, f"report: {asked.out} ({size / 1e6:.1f} MB)"]
    lines += [f"pictures: {len(pictures)} in {asked.png}"] if pictures else []
    return Report(facts, "\n".join(lines))
