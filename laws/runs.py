"""Reader of run folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import ConfigError, UserError
from allometry.configs.json_file import parse_object, read_object
from allometry.configs.renamed import parse


@dataclass(frozen=True)
class Run:
    """Record of one run.

    ``config``: its resolved configuration as plain data. ``record``: run.json (versions, counts,
    layout; empty if the run died before writing it). ``metrics``: a float64 column for each key of
    metrics.jsonl, one entry for each recorded step in order, NaN if a row lacks the key.
    ``events``: the rows of events.jsonl.
    """

    folder: Path
    config: dict[str, Any]
    record: dict[str, Any]
    metrics: dict[str, NDArray[np.float64]]
    events: list[dict[str, Any]]

    @property
    def sources(self) -> list[str]:
        """Names of the data sources with a training loss, in the order of metrics.jsonl."""
        return [key.removeprefix("loss/") for key in self.metrics if key.startswith("loss/")]


def read_run(folder: str | Path) -> Run:
    """Read a run's folder, also while the run is writing to it.

    An incomplete last line (the run was killed, or is writing) is left out. After a resume from an
    earlier step, rows that were written again replace the first ones. Raises UserError: the folder
    is missing, is not a run's, has no row yet, or is damaged. For example,
    ``read_run("runs/a").metrics["loss"]``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder of a run (run.folder)")
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder} holds no config.yaml, so it is no run's folder; give the run.folder of a "
            "run that has started"
        )
    rows = _resumed(read_lines(folder / "metrics.jsonl"), folder / "metrics.jsonl")
    if not rows:
        raise UserError(
            f"{folder}/metrics.jsonl holds no rows yet; wait for the run's first step or give "
            "another folder"
        )
    return Run(
        folder=folder,
        config=_read_yaml(folder / "config.yaml"),
        record=_read_record(folder / "run.json"),
        metrics=_columns(rows, folder / "metrics.jsonl"),
        events=read_lines(folder / "events.jsonl"),
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file ([] if missing), without an incomplete last row."""
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(parse_object(line))
        except ValueError as error:
            if number == len(lines):
                break  # no newline after it: the line was being written
            raise UserError(
                f"{path}, line {number}, is not JSON ({error}); remove that line"
            ) from error
    return rows


def _resumed(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Drop the rows of steps that the run repeated after a resume."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        if not isinstance(row.get("step"), int):
            raise UserError(f"{path} has a row without a whole number 'step'; remove that row")
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return kept


def _columns(rows: list[dict[str, Any]], path: Path) -> dict[str, NDArray[np.float64]]:
    columns: dict[str, NDArray[np.float64]] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(key) for row in rows]
        try:
            columns[key] = np.array([np.nan if v is None else float(v) for v in values])
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{path} has a value of {key!r} that is not a number ({error}); remove that row"
            ) from error
    return columns


def _read_record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = read_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON ({error}); restore it or remove it") from error
    for key in ("plan", "data"):
        if not isinstance(value.get(key, {}), dict):
            raise UserError(f"{path}: {key} is not a JSON object; restore the file or remove it")
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        return parse(path, recorded=True).data
    except ConfigError as error:
        raise UserError(f"{error}; restore it") from None
