"""``allometry report``: what runs, fits and sweeps say, as one page and as pictures."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from allometry.configs.errors import UserError
from allometry.launch.report import (
    fits,
    isoflop,
    losses,
    page,
    stability,
    throughput,
    transfer,
)
from allometry.launch.report.figure import Section
from allometry.launch.report.inputs import Inputs, read_inputs
from allometry.launch.report.pictures import write_pictures


@dataclass(frozen=True)
class Request:
    """What the command line asks for. ``png``: folder for pictures, None: none."""

    runs: tuple[Path, ...]
    out: Path = Path("report.html")
    fits: tuple[Path, ...] = ()
    trials: tuple[Path, ...] = ()
    png: Path | None = None
    smoothing: float = 0.05
    title: str = "Allometry report"


def sections(inputs: Inputs) -> list[Section]:
    """Every section of the report, in order; those without data say why."""
    return [
        throughput.runs(inputs),
        losses.losses(inputs),
        fits.fits(inputs),
        isoflop.isoflops(inputs),
        transfer.transfer(inputs),
        losses.sources(inputs),
        losses.forecasts(inputs),
        stability.stability(inputs),
        throughput.throughput(inputs),
        throughput.events(inputs),
    ]


def run(request: Request, *, as_json: bool) -> str:
    """Write the page and the pictures; return a summary as text or JSON.

    Raises:
        UserError: an input is missing or damaged, or the output cannot be written.
    """
    if request.out.suffix not in (".html", ".htm"):
        raise UserError(f"--out={request.out}: the report is a page; name it something.html")
    _check_plotly()
    inputs = read_inputs(request.runs, request.fits, request.trials, request.smoothing)
    found = sections(inputs)
    made = (
        f"{_number(len(inputs.runs), 'run')}, {_number(len(inputs.fits), 'fit')}, "
        f"{_number(len(inputs.trials), 'sweep')}. Made on "
        f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())} by allometry "
        f"{metadata.version('allometry')}."
    )
    text = page.page(found, inputs, request.title, made)
    try:
        request.out.parent.mkdir(parents=True, exist_ok=True)
        request.out.write_text(text, encoding="utf-8")
        figures = [figure for section in found for figure in section.figures]
        pictures = write_pictures(figures, request.png) if request.png is not None else []
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be written ({error.strerror}); choose another path"
        ) from error
    return _summary(request, inputs, found, pictures, as_json=as_json)


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _check_plotly() -> None:
    try:
        metadata.version("plotly")
    except metadata.PackageNotFoundError:
        raise UserError(
            "the report needs plotly, which is not installed; pip install plotly"
        ) from None


def _summary(
    request: Request, inputs: Inputs, found: list[Section], pictures: list[Path], *, as_json: bool
) -> str:
    if as_json:
        facts = {
            "report": str(request.out),
            "bytes": request.out.stat().st_size,
            "runs": [one.name for one in inputs.runs],
            "sections": [
                {"section": s.key, "shown": s.absent is None, "absent": s.absent} for s in found
            ],
            "pictures": [str(path) for path in pictures],
            "left_out": list(inputs.notes),
        }
        return json.dumps(facts, indent=2)
    lines = [f"{s.title}: {s.absent or 'shown'}" for s in found]
    lines += inputs.notes
    lines.append(f"report: {request.out} ({request.out.stat().st_size / 1e6:.1f} MB)")
    if pictures:
        lines.append(f"pictures: {len(pictures)} in {request.png}")
    return "\n".join(lines)
