"""``allometry prepare --engine``: token files written by many tasks, on one machine or many."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allometry.configs.errors import UserError
from allometry.data.corpora import FileCorpus, open_corpus
from allometry.data.corpus import Corpus, held_out_below
from allometry.data.encode import Workers
from allometry.data.hints import unused
from allometry.data.lock import locked
from allometry.data.manifest import Manifest
from allometry.data.output import refuse_to_overwrite
from allometry.data.prepare import (
    Preparation,
    PrepareRequest,
    already_prepared,
    identity_of,
    open_inputs,
    token_files,
)
from allometry.data.progress import ProgressReport
from allometry.data.store import TokenStore
from allometry.data.tasks import drops
from allometry.data.tasks.executors import (
    Engine,
    check_installed,
    failure,
    run_here,
    submit,
    unfinished_jobs,
)
from allometry.data.tasks.finish import Finish, clean, finish, missing_tasks
from allometry.data.tasks.plan import Folder, Plan, SourcePlan, parts_of, read, write
from allometry.data.tasks.steps import Documents, Shards

_MOST_TASKS = 1000


@dataclass(frozen=True)
class Submitted:
    """Jobs that Slurm has; the store is complete when the last one has finished."""

    jobs: tuple[str, ...]
    tasks: int


def prepare_in_tasks(
    request: PrepareRequest, engine: Engine, quiet: bool = False
) -> Manifest | Submitted:
    """Write the files of ``prepare`` in tasks, with the tokens of a split in one shard per task.

    A task is a contiguous range of the input files, so that the documents of all tasks, in order,
    are those of ``prepare`` in order: the index, and the .bin files one after another, have the
    same bytes. An interrupted request goes on when it is repeated, and a finished one returns its
    manifest. On Slurm, the tasks are submitted, and the last job writes the manifest.

    Raises:
        UserError: as ``prepare``; a task could not finish; a package or program is missing; the
            request cannot be divided into tasks.
    """
    _check(request)
    check_installed(engine)
    corpora = open_inputs(request)
    folder = Folder(Path(request.out))
    with ProgressReport(quiet=quiet) as report, locked(folder.out):
        return _InTasks(request, engine, folder, report).run(corpora)


def _check(request: PrepareRequest) -> None:
    """Raise UserError for settings that apply to one process."""
    for key in ("max_documents", "max_bytes"):
        value = getattr(request, key)
        if value is not None:
            raise UserError(
                f"{key}={value} counts the documents of a source in order, which tasks cannot; "
                "leave out --engine"
            )
    if request.processes is not None:
        raise UserError(
            f"processes={request.processes} is for preparation without --engine; give --workers"
        )


class _InTasks:
    """One run of ``prepare_in_tasks``."""

    def __init__(
        self, request: PrepareRequest, engine: Engine, folder: Folder, report: ProgressReport
    ) -> None:
        self.request, self.engine, self.folder, self.report = request, engine, folder, report

    def run(self, corpora: dict[str, Corpus]) -> Manifest | Submitted:
        identity = {**identity_of(self.request, corpora), **self._drops()}
        manifest = already_prepared(self.folder.out, identity, corpora)
        if manifest is not None:
            for name, source in manifest.sources.items():
                for split in source.splits:
                    TokenStore(self.folder.out / f"{name}.{split}")
            clean(self.folder, manifest.sources)
            self.report.say(
                f"{self.folder.out} is already prepared from the same inputs; nothing to do"
            )
            return manifest
        plan = self._plan(corpora, identity)
        missing = missing_tasks(self.folder, plan)
        stages = self._stages(plan)
        if self.engine.kind == "slurm" and missing:
            return self._submitted(plan, missing, stages)
        if missing:
            self.report.say(
                f"{len(missing):,} of {plan.tasks:,} tasks to do; logs in {self.folder.logs}"
            )
            run_here(self.engine, self.folder, stages)
        return finish(self.folder, self.report)

    def _submitted(self, plan: Plan, missing: list[int], stages: list[drops.Stage]) -> Submitted:
        jobs = unfinished_jobs(self.folder)
        if jobs:
            raise UserError(
                f"folder {self.folder.out} is being prepared by the Slurm jobs {', '.join(jobs)} "
                f"({plan.tasks - len(missing):,} of {plan.tasks:,} tasks are finished); wait for "
                "them, or cancel them and repeat the command"
            )
        if reason := failure(self.folder, missing):
            self.report.say(f"the last attempt ended: {reason}")
        last = ("finish", [Finish(str(self.folder.out.absolute()))], 1)
        return Submitted(tuple(submit(self.engine, self.folder, [*stages, last])), plan.tasks)

    def _drops(self) -> dict[str, Any]:
        """Return the part of the identity that the one-process preparation does not have."""
        minhash = {"words": drops.WORDS, "bands": drops.BUCKETS, "hashes": drops.HASHES}
        benchmarks = {
            value: open_corpus(value, self.request.text_key).fingerprint()
            for value in self.engine.decontaminate
        }
        words = {"words": drops.BENCHMARK_WORDS, "files": benchmarks}
        return {
            drops.DEDUPLICATE: minhash if self.engine.deduplicate else None,
            drops.DECONTAMINATE: words if benchmarks else None,
        }

    def _stages(self, plan: Plan) -> list[drops.Stage]:
        folder = Folder(self.folder.out.absolute())
        documents = Documents(str(folder.out))
        between = drops.filters(folder, plan.drops, documents)
        shards = Shards(str(folder.out), documents)
        before = drops.minhash_stages(folder, plan.tasks) if drops.DEDUPLICATE in plan.drops else []
        return [*before, ("shards", [documents, *between, shards], plan.tasks)]

    def _plan(self, corpora: dict[str, Corpus], identity: dict[str, Any]) -> Plan:
        """Return the plan of the interrupted preparation in the folder, or write a new one."""
        fingerprints = {name: corpus.fingerprint() for name, corpus in corpora.items()}
        if not self.folder.plan.is_file():
            shutil.rmtree(self.folder.work, ignore_errors=True)
            refuse_to_overwrite(self.folder.out, token_files(corpora))
            return self._new_plan(corpora, identity, fingerprints)
        plan = read(self.folder.plan, Plan)
        advice = f"repeat its command, or remove {self.folder.out} and start again"
        for key, value in {**identity, "tasks": self.engine.tasks or plan.tasks}.items():
            before = plan.tasks if key == "tasks" else plan.identity.get(key)
            if before != value:
                raise UserError(
                    f"folder {self.folder.out} holds an unfinished preparation with "
                    f"{key}={before}, not {value}; {advice}"
                )
        for name, source in plan.sources.items():
            if source.input_sha256 != fingerprints[name]:
                raise UserError(
                    f"input {source.input} has changed since the preparation in {self.folder.out} "
                    f"began; {advice}"
                )
        return plan

    def _new_plan(
        self, corpora: dict[str, Corpus], identity: dict[str, Any], fingerprints: dict[str, str]
    ) -> Plan:
        files, request = _files(corpora), self.request
        count = sum(len(corpus.sources) for corpus in files.values())
        tasks = self.engine.tasks or min(count, _MOST_TASKS)
        if tasks > count:
            raise UserError(
                f"tasks={tasks} is more than the {count} input files, and a file is read by one "
                f"task; split the files, or set tasks to {count} or less"
            )
        for hint in unused(corpora.values(), request.text_key, request.separator):
            self.report.say(hint)
        self.folder.work.mkdir(parents=True)
        with Workers(1) as workers:
            preparation = Preparation(request, self.folder.work, workers, self.report)
            tokenizer = preparation.tokenizer(corpora)
            encoding = preparation.encoding(tokenizer)
        for task, part in enumerate(parts_of(files, tasks)):
            write(self.folder.part(task), part)
        if self.engine.decontaminate:
            inputs = self.engine.decontaminate
            self.report.say(drops.write_benchmarks(self.folder, inputs, request.text_key))
        plan = Plan(
            identity=identity,
            tasks=tasks,
            sources={
                name: SourcePlan(
                    input=corpus.input,
                    input_sha256=fingerprints[name],
                    kinds=corpus.kinds,
                    skipped=dict(corpus.left_out.counts),
                    skipped_places=corpus.left_out.places,
                )
                for name, corpus in corpora.items()
            },
            tokenizer=tokenizer,
            dtype=encoding.dtype,
            validation_below=held_out_below(request.validation_fraction),
            text_key=request.text_key,
            split_key=request.split_key,
            separator=request.separator,
            on_bad_line=request.on_bad_line,
            max_bad_lines=request.max_bad_lines,
            drops=tuple(key for key in (drops.DEDUPLICATE, drops.DECONTAMINATE) if identity[key]),
        )
        write(self.folder.plan, plan)
        return plan


def _files(corpora: dict[str, Corpus]) -> dict[str, FileCorpus]:
    """Return the corpora; UserError unless all consist of files that tasks can share."""
    found = {}
    for name, corpus in corpora.items():
        if not isinstance(corpus, FileCorpus):
            raise UserError(
                f"input {corpus.input} is one piece that tasks cannot share; prepare it without "
                "--engine"
            )
        found[name] = corpus
    return found
