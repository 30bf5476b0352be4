"""Last step of a preparation in tasks: one store of the shards of all tasks."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from allometry.configs.errors import UserError
from allometry.data.corpus import LeftOut, ReadLog
from allometry.data.joined import write_joined_index
from allometry.data.lock import locked
from allometry.data.manifest import (
    FileRecord,
    Manifest,
    SourceRecord,
    Split,
    SplitRecord,
    read_manifest,
)
from allometry.data.output import copy_tokenizer, publish, versions, write_manifest
from allometry.data.prepare import TASKS
from allometry.data.progress import ProgressReport
from allometry.data.shards import Shard, ShardList, shards_path
from allometry.data.source_files import SPLITS, say_source
from allometry.data.tasks.plan import Folder, Plan, SourcePlan, SourceTask, TaskRecord, read
from allometry.data.writer import file_record

_PACKAGES = "datatrove", "spacy"


class Finish:
    """Step of a pipeline with one task: finish the preparation in ``out``."""

    def __init__(self, out: str) -> None:
        self.out = out

    def __repr__(self) -> str:
        return "allometry: one store of all shards"

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        """See the module."""
        folder = Folder(Path(self.out))
        with ProgressReport() as report, locked(folder.out):
            if read_manifest(folder.out) is None:
                finish(folder, report)


def finish(folder: Folder, report: ProgressReport) -> Manifest:
    """Write the index, the list of shards and the manifest of a preparation with finished tasks.

    Indices are concatenated; the .bin files stay in place. The manifest is published last; until
    then, an interrupted ``finish`` can be repeated.

    Raises:
        UserError: a task has not finished, or a source has no documents to train on.
    """
    plan = read(folder.plan, Plan)
    missing = missing_tasks(folder, plan)
    if missing:
        raise UserError(
            f"{len(missing):,} of {plan.tasks:,} tasks in {folder.work} have not finished, first "
            f"task {missing[0]}; repeat the command of the preparation"
        )
    records = [read(folder.record(task), TaskRecord) for task in range(plan.tasks)]
    partial = folder.work / "publish"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    copy_tokenizer(str(folder.work), partial)
    sources = {
        name: _source(folder, name, plan, source, records, partial, report)
        for name, source in plan.sources.items()
    }
    manifest = Manifest(
        dtype=plan.dtype,
        tokenizer=plan.tokenizer,
        sources=sources,
        request={**plan.identity, "tasks": plan.tasks},
        versions=versions(_PACKAGES if plan.drops else _PACKAGES[:1]),
    )
    write_manifest(partial, manifest)
    publish(partial, folder.out, [path.name for path in partial.iterdir()])
    clean(folder, sources)
    return manifest


def missing_tasks(folder: Folder, plan: Plan) -> list[int]:
    """Return the tasks without a record."""
    return [task for task in range(plan.tasks) if not folder.record(task).is_file()]


def clean(folder: Folder, sources: Iterable[str]) -> None:
    """Remove the files of a finished preparation that are no longer needed, except the logs."""
    for name in sources:
        for split in SPLITS:
            for path in folder.shard(f"{name}.{split}", 0).parent.glob("*.idx"):
                path.unlink()
    for path in folder.work.iterdir() if folder.work.is_dir() else ():
        if path.is_dir() and path != folder.logs:
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def _source(
    folder: Folder,
    name: str,
    plan: Plan,
    source: SourcePlan,
    records: list[TaskRecord],
    partial: Path,
    report: ProgressReport,
) -> SourceRecord:
    """Join the results of all tasks for one source."""
    results = {task: one.sources[name] for task, one in enumerate(records) if name in one.sources}
    log = _joined_log(plan, source, results.values())
    if plan.on_bad_line == "skip" and log.bad_lines > plan.max_bad_lines:
        raise UserError(
            f"source {name} ({source.input}) has {log.bad_lines} bad lines, more than "
            f"{plan.max_bad_lines} ({log.left_out}); mend the input, or remove {folder.work} and "
            "raise --max-bad-lines"
        )
    splits: dict[Split, SplitRecord] = {}
    for split in SPLITS:
        shards = {task: one.splits[split] for task, one in results.items() if split in one.splits}
        if shards:
            splits[split] = _split(folder, f"{name}.{split}", plan.dtype, shards, partial)
    record = SourceRecord(
        input=source.input,
        input_sha256=source.input_sha256,
        kinds=source.kinds,
        skipped=dict(sorted(log.left_out.counts.items())),
        skipped_places=dict(sorted(log.left_out.places.items())),
        inexact_cuts=sum(one.inexact_cuts for one in results.values()),
        splits=splits,
    )
    say_source(
        *(report, name, record, log),
        separator=plan.separator,
        holds_out=bool(plan.validation_below),
    )
    return record


def _joined_log(plan: Plan, source: SourcePlan, results: Iterable[SourceTask]) -> ReadLog:
    """Return the counts of all tasks, as if one process had read the source."""
    log = ReadLog(lambda num_bytes: None, plan.on_bad_line, plan.max_bad_lines)
    log.left_out.update(_left_out(source))
    for one in results:
        log.left_out.update(_left_out(one))
        log.marks.update(one.marks)
        log.separators += one.separators
        log.bad_lines += one.bad_lines
    return log


def _left_out(counts: SourcePlan | SourceTask) -> LeftOut:
    left_out = LeftOut()
    left_out.counts = Counter(counts.skipped)
    left_out.places = dict(counts.skipped_places)
    return left_out


def _split(
    folder: Folder, stem: str, dtype: str, shards: dict[int, SplitRecord], partial: Path
) -> SplitRecord:
    """Write the index and the list of the shards of a split, in the order of the tasks."""
    places = {task: folder.shard(stem, task) for task in shards}
    index = partial / f"{stem}.idx"
    write_joined_index(index, [Path(f"{place}.idx") for place in places.values()])
    listed = ShardList(
        dtype=dtype,
        shards=tuple(
            Shard(
                path=f"{places[task].relative_to(folder.out)}.bin",
                documents=one.documents,
                tokens=one.tokens,
                file=_bin(places[task], stem, one),
            )
            for task, one in shards.items()
        ),
    )
    path = shards_path(partial / stem)
    path.write_text(listed.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return SplitRecord(
        documents=sum(one.documents for one in shards.values()),
        tokens=sum(one.tokens for one in shards.values()),
        bytes=sum(one.bytes or 0 for one in shards.values()),
        largest_id=max(one.largest_id for one in shards.values()),
        files={file.name: file_record(file) for file in (index, path)},
    )


def _bin(place: Path, stem: str, record: SplitRecord) -> FileRecord:
    """Return the record of a shard's .bin; UserError if the file is missing or cut short."""
    file = record.files[f"{stem}.bin"]
    path = Path(f"{place}.bin")
    size = path.stat().st_size if path.is_file() else None
    if size != file.bytes:
        raise UserError(
            f"shard {path} {'is missing' if size is None else f'has {size} bytes'}, but its task "
            f"wrote {file.bytes} bytes; remove {path.parents[1] / TASKS} and start again"
        )
    return file
