"""Plan of a preparation in tasks: the files of each task, and the records that tasks leave."""

from __future__ import annotations

import os
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from allometry.configs import json_file
from allometry.configs.base import Section
from allometry.configs.errors import UserError
from allometry.data.corpora import FileCorpus
from allometry.data.corpus import OnBadLine
from allometry.data.manifest import Split, SplitRecord, TokenizerRecord
from allometry.data.prepare import TASKS

Read = TypeVar("Read", bound=Section)


class SourcePlan(Section):
    """Source of a plan, as recorded later in the manifest; ``skipped``: entries not read."""

    input: str
    input_sha256: str
    kinds: dict[str, int]
    skipped: dict[str, int]
    skipped_places: dict[str, list[str]]


class Plan(Section):
    """All settings of the tasks.

    ``identity`` are the settings that determine the files, as in the manifest. ``drops``: the
    stages that drop documents, "deduplicate" and "decontaminate".
    """

    kind: Literal["allometry.tasks"] = "allometry.tasks"
    version: Literal[1] = 1
    identity: dict[str, Any]
    tasks: int
    sources: dict[str, SourcePlan]
    tokenizer: TokenizerRecord
    dtype: Literal["uint16", "int32"]
    validation_below: int
    text_key: str
    split_key: str | None
    separator: str | None
    on_bad_line: OnBadLine
    max_bad_lines: int
    drops: tuple[str, ...] = ()


class PlannedFile(Section):
    """Input file: kind and compression as in ``kinds.SourceFile``; ``state``: size and mtime."""

    path: str
    kind: str
    compression: str
    state: str


class Part(Section):
    """Files of one task by source, in the order of the source."""

    files: dict[str, tuple[PlannedFile, ...]]


class SourceTask(Section):
    """Result of one task for one source: counts as in ``ReadLog``, and its shards."""

    skipped: dict[str, int]
    skipped_places: dict[str, list[str]]
    marks: dict[str, int]
    separators: int
    bad_lines: int
    inexact_cuts: int
    splits: dict[Split, SplitRecord] = Field(default_factory=dict)


class TaskRecord(Section):
    """Result of a finished task."""

    sources: dict[str, SourceTask]


@dataclass(frozen=True)
class Folder:
    """Paths of a preparation in tasks with output folder ``out``.

    ``out``/.tasks has the plan, the parts, the records of finished tasks, and datatrove's logs;
    shards are written to their final place, ``out``/<source>.<split>.shards/<task>.bin.
    """

    out: Path

    @property
    def work(self) -> Path:
        """Folder of the unfinished preparation."""
        return self.out / TASKS

    @property
    def plan(self) -> Path:
        """File of the plan, written last of what the tasks need."""
        return self.work / "plan.json"

    @property
    def logs(self) -> Path:
        """Folder of datatrove's logs, kept after the end."""
        return self.work / "log"

    def part(self, task: int) -> Path:
        """Return the file with the input of a task."""
        return self.work / f"parts/{task:05d}.json"

    def record(self, task: int) -> Path:
        """Return the file that marks a task as finished."""
        return self.work / f"records/{task:05d}.json"

    def failure(self, task: int) -> Path:
        """Return the file with the reason why a task could not finish."""
        return self.work / f"failures/{task:05d}.txt"

    def shard(self, stem: str, task: int) -> Path:
        """Return the path, without ending, of the shard that a task writes of a split."""
        return self.out / f"{stem}.shards" / f"{task:05d}"


def divide(sizes: Sequence[int], tasks: int) -> list[range]:
    """Divide files into ``tasks`` ranges of about equal size in bytes, each with at least one file.

    The ranges are contiguous, so the documents of the tasks, concatenated, are in the order of the
    files. For example, ``divide([5, 1, 1, 1], 2)`` is ``[range(0, 1), range(1, 4)]``.
    """
    assert 1 <= tasks <= len(sizes)
    middles = [end - size / 2 for end, size in zip(accumulate(sizes), sizes, strict=True)]
    total, bounds = sum(sizes), [0]
    for task in range(1, tasks):
        at = bisect_right(middles, total * task / tasks)
        bounds.append(max(bounds[-1] + 1, min(at, len(sizes) - (tasks - task))))
    return [range(*pair) for pair in zip(bounds, [*bounds[1:], len(sizes)], strict=True)]


def parts_of(corpora: dict[str, FileCorpus], tasks: int) -> list[Part]:
    """Return the input of each task; UserError if a file cannot be read now."""
    found = [(name, file) for name, corpus in corpora.items() for file in corpus.sources]
    states = [state_of(file.path) for _, file in found]
    sizes = [int(state.partition(":")[0]) for state in states]
    parts = []
    for numbers in divide(sizes, tasks):
        files: dict[str, list[PlannedFile]] = {}
        for number in numbers:
            name, (path, kind, compression) = found[number]
            planned = PlannedFile(
                path=str(path), kind=kind, compression=compression, state=states[number]
            )
            files.setdefault(name, []).append(planned)
        parts.append(Part(files={name: tuple(some) for name, some in files.items()}))
    return parts


def state_of(path: str | Path) -> str:
    """Return size and modification time of an input file; UserError if it is missing."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(
            f"input file {path} was there and cannot be read now ({error.strerror}); run again "
            "when nothing else changes the input"
        ) from None
    return f"{status.st_size}:{status.st_mtime_ns}"


def write(path: Path, values: Section) -> None:
    """Write a file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(values.model_dump_json(indent=1) + "\n")
    os.replace(file.name, path)


def read(path: Path, kind: type[Read]) -> Read:
    """Read a file of ``write``; UserError if it is missing or damaged."""
    try:
        return kind.model_validate(json_file.read_object(path))
    except (ValidationError, ValueError, OSError) as error:
        raise UserError(
            f"{path} of a preparation in tasks cannot be read ({str(error).splitlines()[0]}); "
            f"remove the folder {TASKS} and start again"
        ) from None
