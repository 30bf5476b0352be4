"""Steps of a datatrove pipeline: read the documents of a task, write its shards.

datatrove calls a step as ``step(data, rank, world_size)``, where rank is the task, and pipes the
returned iterable to the next step. Any of its filters can stand between the two steps. An executor
is pickled for its tasks, so the steps store paths alone; ``Shards`` and ``Dropped`` share the state
of their ``Documents``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from allometry.configs.errors import UserError
from allometry.data.corpora import FileCorpus, record_keys
from allometry.data.corpus import Document, LeftOut, ReadLog
from allometry.data.encode import Encoding
from allometry.data.kinds import SourceFile
from allometry.data.manifest import Split, SplitRecord
from allometry.data.source_files import with_text, write_splits
from allometry.data.tasks.plan import Folder, Part, Plan, SourceTask, TaskRecord, read, state_of
from allometry.data.tasks.plan import write as write_json
from allometry.data.tokenizer import TOKENIZER


class Piped:
    """Document of a source, with the attributes that datatrove's filters use.

    The text of a large file is not in memory as one string unless a filter reads ``text``.
    """

    def __init__(self, source: str, document: Document) -> None:
        self.source = source
        self.document = document
        self.media: list[Any] = []
        self.metadata: dict[str, Any] = {}

    @property
    def id(self) -> str:
        """Name of the document."""
        return self.document.id

    @property
    def text(self) -> str:
        """The complete text."""
        return self.document.text


class Documents:
    """First step: yield the documents of a task's part, in order, without blank ones."""

    def __init__(self, out: str) -> None:
        self.out = out
        self.logs: dict[str, ReadLog] = {}
        """Counts of the current task, by source."""

    def __repr__(self) -> str:
        return "allometry: documents of a task"

    def __call__(self, data: Any, rank: int, world_size: int) -> Iterator[Piped]:
        """See the module."""
        folder = Folder(Path(self.out))
        with failures(folder, rank):
            plan, part = read(folder.plan, Plan), read(folder.part(rank), Part)
            self.logs = {
                name: ReadLog(_unreported, plan.on_bad_line, plan.max_bad_lines)
                for name in part.files
            }
            keys = record_keys(plan.text_key, plan.split_key)
            for name, files in part.files.items():
                for file in files:
                    if state_of(file.path) != file.state:
                        raise UserError(
                            f"input file {file.path} has changed since the preparation began; "
                            f"remove {folder.work} and start again"
                        )
                sources = [SourceFile(Path(one.path), one.kind, one.compression) for one in files]
                corpus = FileCorpus(name, sources, LeftOut(), keys, plan.separator)
                log = self.logs[name]
                for document in with_text(corpus.documents(log, map), log):
                    yield Piped(name, document)


class Shards:
    """Last step: write ``out``/<source>.<split>.shards/<task>.{bin,idx}, then the task's record.

    The files are written to a folder of this attempt and moved when they are complete, so that an
    attempt that was cut off, or two at once, do no harm. A task with a record is not repeated.
    """

    def __init__(self, out: str, documents: Documents) -> None:
        self.out = out
        self.documents = documents

    def __repr__(self) -> str:
        return "allometry: shards of a task"

    def __call__(self, data: Iterable[Piped], rank: int, world_size: int) -> None:
        """See the module."""
        folder = Folder(Path(self.out))
        if folder.record(rank).is_file():
            return
        with failures(folder, rank):
            plan = read(folder.plan, Plan)
            encoding = Encoding(
                str(folder.work / TOKENIZER),
                plan.tokenizer.sha256,
                plan.tokenizer.end_of_document_id,
                plan.dtype,
                plan.validation_below,
            )
            attempts = folder.work / "attempts"
            attempts.mkdir(exist_ok=True)
            attempt = Path(tempfile.mkdtemp(prefix=f"{rank:05d}-", dir=attempts))
            written: dict[str, tuple[dict[Split, SplitRecord], int]] = {}
            for name, group in groupby(data, key=lambda one: one.source):
                texts, log = (one.document for one in group), self.documents.logs[name]
                written[name] = write_splits(attempt, name, texts, encoding, log, map)
            sources = {
                name: _result(log, *written.get(name, ({}, 0)))
                for name, log in self.documents.logs.items()
            }
            _publish(folder, rank, attempt, sources)
            write_json(folder.record(rank), TaskRecord(sources=sources))
            shutil.rmtree(attempt)
            folder.failure(rank).unlink(missing_ok=True)


class Dropped:
    """Exclusion writer of a datatrove filter: count the dropped documents of each source."""

    def __init__(self, reason: str, documents: Documents) -> None:
        self.reason = reason
        self.documents = documents

    def __enter__(self) -> Dropped:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def write(self, document: Piped, rank: int) -> None:
        """Count a document that the filter drops."""
        self.documents.logs[document.source].left_out.add(self.reason, document.id)


@contextmanager
def failures(folder: Folder, task: int) -> Iterator[None]:
    """Store the reason of a UserError, as not every executor passes it on."""
    try:
        yield
    except UserError as error:
        path = folder.failure(task)
        path.parent.mkdir(exist_ok=True)
        path.write_text(str(error), encoding="utf-8")
        raise


def _unreported(num_bytes: int) -> None:
    """Ignore the progress of a task."""


def _result(log: ReadLog, splits: dict[Split, SplitRecord], inexact_cuts: int) -> SourceTask:
    return SourceTask(
        skipped=dict(log.left_out.counts),
        skipped_places=log.left_out.places,
        marks=dict(log.marks),
        separators=log.separators,
        bad_lines=log.bad_lines,
        inexact_cuts=inexact_cuts,
        splits=splits,
    )


def _publish(folder: Folder, task: int, attempt: Path, sources: dict[str, SourceTask]) -> None:
    """Move the shards of an attempt to their places."""
    for name, source in sources.items():
        for split in source.splits:
            stem = f"{name}.{split}"
            to = folder.shard(stem, task)
            to.parent.mkdir(parents=True, exist_ok=True)
            for ending in (".bin", ".idx"):
                os.replace(attempt / f"{stem}{ending}", f"{to}{ending}")
