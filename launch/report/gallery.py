"""Write the gallery, a Markdown page with SVG pictures: ``allometry gallery``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from allometry.configs.errors import UserError
from allometry.launch.command import Report
from allometry.launch.figures.picture import write_picture
from allometry.launch.report import fits, isoflop, transfer
from allometry.launch.report.commands import WriteGallery
from allometry.launch.report.gallery_parts import (
    certificates,
    curves,
    documents,
    experts,
    is_certificate,
)
from allometry.launch.report.inputs import Inputs, read_inputs
from allometry.launch.report.section import Section, Table
from allometry.launch.text import counted
from allometry.laws.runs import Run, read_run
from allometry.laws.trials import TrialFile

HEADER = """\
# Gallery

Figures of trained runs, which are small enough for minutes on two CPU cores; their losses say
nothing about large models. `make gallery` trains the runs with `examples/gallery/runs.sh` and
writes this page and its pictures with `allometry gallery gallery --out docs/gallery.md`.
"""
SMOOTHING = 0.05


@dataclass(frozen=True)
class Found:
    """Content of the folder, by type."""

    ladders: tuple[Path, ...]
    runs: tuple[Path, ...]
    trials: tuple[Path, ...]
    certificates: tuple[Path, ...]

    @staticmethod
    def in_folder(folder: Path) -> Found:
        """Return the ladders, runs, sweeps and certificates directly in ``folder``.

        Raises UserError: the folder is missing or has none of them.
        """
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; make gallery creates one with its runs")
        inside = sorted(folder.iterdir())
        found = Found(
            tuple(path for path in inside if (path / "runs").is_dir()),
            tuple(path for path in inside if (path / "config.yaml").is_file()),
            tuple(path for path in inside if path.suffix == ".jsonl"),
            tuple(path for path in inside if path.suffix == ".json" and is_certificate(path)),
        )
        if not any((found.ladders, found.runs, found.trials, found.certificates)):
            raise UserError(
                f"{folder} has no ladder, run, sweep (.jsonl) or certificate (.json); make gallery "
                "creates one with all of them"
            )
        return found


def written(asked: WriteGallery) -> Report:
    """Write the page and its pictures.

    Raises UserError: an input is missing or damaged, or the output cannot be written.
    """
    if asked.out.suffix != ".md":
        raise UserError(f"--out={asked.out}: the gallery is a page; name it something.md")
    found = Found.in_folder(asked.folder)
    pictures = asked.out.with_suffix("")
    parts = [HEADER]
    shown = list(sections(found))
    try:
        for section, made_by in shown:
            parts += _markdown(section, made_by, pictures)
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text("\n".join(parts), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be written ({error.strerror}); choose another path"
        ) from error
    number = sum(len(section.figures) for section, _ in shown)
    facts = {
        "page": str(asked.out),
        "pictures": number,
        "sections": [{"section": s.key, "absent": s.absent} for s, _ in shown],
    }
    lines = [f"{section.title}: {section.absent or 'shown'}" for section, _ in shown]
    lines.append(f"gallery: {asked.out}, {counted(number, 'picture')} in {pictures}")
    return Report(facts, "\n".join(lines))


def sections(found: Found) -> Iterator[tuple[Section, str]]:
    """Yield the sections with the provenance of each."""
    inputs = Inputs((), (), (), (), (), SMOOTHING)
    if found.ladders or found.trials:
        inputs = read_inputs(found.ladders, (), found.trials, SMOOTHING)
    of_ladders = made_by([one.run for one in inputs.runs])
    for section in (curves(inputs), _law(inputs), isoflop.isoflops(replace(inputs, fits=()))):
        yield section.without_blanks(), of_ladders
    yield transfer.transfer(inputs).without_blanks(), _trained_by(inputs.trials)
    for file, make in (("plans.jsonl", documents), ("expert_load.jsonl", experts)):
        folders = [path for path in found.runs if (path / file).is_file()]
        yield make(folders), made_by([read_run(path) for path in folders])
    yield certificates(found.certificates), ""


def _trained_by(trials: Sequence[TrialFile]) -> str:
    """Return one sentence about sweeps: the number of runs and of seeds of each file."""
    said = []
    for file in trials:
        seeds = [len(by_seed) for rates in file.losses.values() for by_seed in rates.values()]
        said.append(f"{file.path.name} {counted(sum(seeds), 'run')} (seeds per rate: {max(seeds)})")
    return f"Trained: {', '.join(said)}." if said else ""


def _law(inputs: Inputs) -> Section:
    """Return the fitted laws: of each, the law over an input and the predictions only."""
    section = fits.fits(inputs)
    figures = tuple(replace(one, panels=one.panels[:2]) for one in section.figures)
    return Section(
        section.key,
        section.title,
        section.text,
        figures,
        section.tables[-1:],
        absent=section.absent,
    )


def made_by(runs: Sequence[Run]) -> str:
    """Return one sentence about the runs: number, tokens, FLOPs, commit, versions, hardware."""
    if not runs:
        return ""
    tokens, flops = (
        max(float(run.metrics[key][-1]) for run in runs) for key in ("tokens", "flops")
    )
    said = f"Trained: {counted(len(runs), 'run')}, up to {tokens:,.0f} tokens and {flops:.2e} FLOPs"
    record = runs[-1].record
    facts = {
        "commit": record.get("commit"),
        "torch": record.get("versions", {}).get("torch"),
        "on": _device(record.get("hardware", {})),
    }
    more = [f"{name} {value}" for name, value in facts.items() if value]
    return f"{', '.join([said, *more])}."


def _device(hardware: dict[str, Any]) -> str:
    return str(hardware.get("device") or hardware.get("name") or "")


def _markdown(section: Section, made_by: str, pictures: Path) -> Iterator[str]:
    """Yield the lines of a section, and write its pictures."""
    yield f"## {section.title}\n"
    if section.absent:
        yield f"Not shown: {section.absent}.\n"
        return
    yield f"{section.text}\n"
    for figure in section.figures:
        if figure.text:
            yield f"{figure.text}\n"
        title = f"{section.title}: {', '.join(panel.title for panel in figure.panels)}"
        write_picture(figure, title, pictures / f"{figure.key}.svg")
        yield f"![{_plain(title)}]({pictures.name}/{figure.key}.svg)\n"
    for note in section.notes:
        yield f"{note}\n"
    for table in section.tables:
        yield from _table(table)
    if made_by:
        yield f"*{made_by}*\n"


def _table(table: Table) -> Iterator[str]:
    if table.caption:
        yield f"{table.caption}\n"
    rows = [table.head, ("---",) * len(table.head), *table.rows]
    yield "\n".join("| " + " | ".join(map(_plain, row)) + " |" for row in rows) + "\n"


def _plain(text: str) -> str:
    """Return text without the characters that Markdown would interpret."""
    return "".join(f"\\{c}" if c in "|[]*_" else c for c in text)
