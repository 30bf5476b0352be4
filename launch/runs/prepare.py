"""Token files from text: ``allometry prepare``."""

from __future__ import annotations

from pathlib import Path
from typing import cast, get_args

from allometry.configs.errors import UserError
from allometry.data.corpus import OnBadLine
from allometry.data.manifest import MANIFEST, Manifest
from allometry.data.prepare import PrepareRequest, prepare
from allometry.data.tasks.executors import Engine, Kind
from allometry.data.tasks.run import Submitted, prepare_in_tasks
from allometry.launch.command import Report
from allometry.launch.runs.commands import Prepare
from allometry.launch.text import table


def prepared(asked: Prepare) -> Report:
    """Prepare token files; the facts are the manifest."""
    request = PrepareRequest(
        inputs=asked.inputs,
        out=str(asked.out),
        tokenizer=str(asked.tokenizer) if asked.tokenizer else None,
        vocab_size=asked.vocab_size,
        end_of_document=asked.end_of_document,
        validation_fraction=asked.validation_fraction,
        text_key=asked.text_key,
        max_documents=asked.max_documents,
        processes=asked.processes,
        separator=asked.separator,
        on_bad_line=cast(OnBadLine, asked.on_bad_line),
        max_bad_lines=asked.max_bad_lines,
        split_key=asked.split_key,
    )
    engine = _engine(asked)
    if engine is None:
        return manifest_report(prepare(request, quiet=asked.json), asked.out)
    made = prepare_in_tasks(request, engine, quiet=asked.json)
    if not isinstance(made, Submitted):
        return manifest_report(made, asked.out)
    return Report(
        {"jobs": made.jobs, "tasks": made.tasks, "out": str(asked.out)},
        f"submitted {made.tasks:,} tasks as Slurm jobs {', '.join(made.jobs)}; the last job writes "
        f"{asked.out / MANIFEST}; if a job fails, repeat this command",
    )


_KIND = "datatrove:"


def _engine(asked: Prepare) -> Engine | None:
    """Return the engine of the tasks; None for processes of this machine."""
    if asked.engine is None:
        for key in ("tasks", "workers", "sbatch", "deduplicate", "decontaminate"):
            if value := getattr(asked, key):
                raise UserError(
                    f"--{key} ({value}) is for preparation in tasks; add --engine datatrove:local"
                )
        return None
    kind = asked.engine.removeprefix(_KIND)
    if not asked.engine.startswith(_KIND) or kind not in get_args(Kind):
        raise UserError(
            f"engine={asked.engine} must be one of "
            + ", ".join(f"{_KIND}{kind}" for kind in get_args(Kind))
        )
    return Engine(
        kind=cast(Kind, kind),
        tasks=asked.tasks,
        workers=asked.workers,
        sbatch=asked.sbatch,
        deduplicate=asked.deduplicate,
        decontaminate=asked.decontaminate,
    )


def manifest_report(manifest: Manifest, out: Path) -> Report:
    """Return the content of a folder of token files, as a table."""
    rows = [["source", "split", "documents", "tokens"]]
    rows += [
        [name, split, f"{record.documents:,}", f"{record.tokens:,}"]
        for name, source in manifest.sources.items()
        for split, record in source.splits.items()
    ]
    shown = table(rows, right=(2, 3), least=(20, 12, 12, 16), gap="")
    left_out = [
        [name, reason, f"{count:,}", ", ".join(source.skipped_places.get(reason, ()))]
        for name, source in manifest.sources.items()
        for reason, count in source.skipped.items()
    ]
    if left_out:
        header = ["source", "left out", "count", "the first of them"]
        shown += "\n" + table([header, *left_out], right=(2,), least=(20,))
    made = manifest.tokenizer
    vocabulary = (
        f"vocabulary {made.vocab_size:,}, documents end with {made.end_of_document} "
        f"({made.end_of_document_id}), token files in {out}"
    )
    return Report(manifest.model_dump(mode="json"), f"{shown}\n{vocabulary}")
