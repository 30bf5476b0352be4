"""``allometry prepare``: convert documents to token files."""

from __future__ import annotations

import math
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from allometry.configs.errors import UserError
from allometry.data.corpora import named_input, open_corpus
from allometry.data.corpus import (
    Corpus,
    Document,
    OnBadLine,
    ReadLog,
    held_out_below,
    is_held_out,
)
from allometry.data.encode import (
    Encoding,
    TextSample,
    Workers,
    train_tokenizer,
)
from allometry.data.hints import unused
from allometry.data.lock import locked
from allometry.data.manifest import (
    MANIFEST,
    Manifest,
    SourceRecord,
    TokenizerRecord,
    manifest_of,
    read_manifest,
)
from allometry.data.output import (
    copy_tokenizer,
    publish,
    refuse_to_overwrite,
    tokenizer_record,
    versions,
    write_manifest,
)
from allometry.data.progress import ProgressReport
from allometry.data.source_files import (
    SPLITS,
    say_source,
    source_record,
    with_text,
    write_splits,
)
from allometry.data.special_tokens import END_OF_DOCUMENT, find_end_of_document, load_tokenizer
from allometry.data.tokenizer import TOKENIZER, fingerprint, read_tokenizer_json, recorded_as
from allometry.data.writer import load_megatron

DEFAULT_VOCAB_SIZE = 8192
_PARTIAL = ".partial"
TASKS = ".tasks"
"""Folder of an unfinished preparation in tasks (data/tasks/)."""
_DECIDING = "text_key", "split_key", "max_documents", "max_bytes", "separator", "on_bad_line"
_WITHOUT: dict[str, Any] = {"deduplicate": None, "decontaminate": None}
"""Settings of a preparation in tasks that change the documents."""
_SAMPLE_CHARACTERS = 4 << 20
_SAMPLED_FROM = 16  # limit of the characters read, in multiples of the sample


@dataclass(frozen=True)
class PrepareRequest:
    """Request of ``prepare``.

    ``inputs`` are ``name=input`` or ``input``: files, folders, patterns, builtin:python-code,
    builtin:python-prose. ``tokenizer`` is the path of a tokenizer.json; None trains a tokenizer
    with ``vocab_size`` ids (default 8192). ``validation_fraction`` is the fraction of held-out
    documents. ``max_documents`` and ``max_bytes`` (of UTF-8 text) limit each source. ``processes``
    None uses all cores; the files do not depend on the number. ``separator`` separates the
    documents of a text file. ``on_bad_line``: missing or damaged text stops the preparation
    ("stop"), or is left out and counted ("skip"), up to ``max_bad_lines`` per source.
    ``split_key``: the field whose hash decides whether a document is held out, instead of the hash
    of the document's text, such as the text or the id of the document's parent.
    """

    inputs: tuple[str, ...]
    out: str
    tokenizer: str | None = None
    vocab_size: int | None = None
    validation_fraction: float = 0.05
    text_key: str = "text"
    end_of_document: str | None = None
    max_documents: int | None = None
    max_bytes: int | None = None
    processes: int | None = None
    separator: str | None = None
    on_bad_line: OnBadLine = "stop"
    max_bad_lines: int = 1000
    split_key: str | None = None

    def __post_init__(self) -> None:
        if not self.inputs:
            raise UserError("inputs is empty; name at least one, such as builtin:python-code")
        if not (math.isfinite(self.validation_fraction) and 0 <= self.validation_fraction < 1):
            raise UserError(
                f"validation_fraction={self.validation_fraction} must be at least 0 and below 1"
            )
        for key in ("vocab_size", "max_documents", "max_bytes", "processes"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{key}={value} must be at least 1")
        if self.separator == "":
            raise UserError("separator is empty; give the text that stands between documents")
        if self.on_bad_line not in get_args(OnBadLine):
            raise UserError(f"on_bad_line={self.on_bad_line} must be stop or skip")
        if self.max_bad_lines < 0:
            raise UserError(f"max_bad_lines={self.max_bad_lines} must be at least 0")
        if self.tokenizer is None and self.end_of_document not in (None, END_OF_DOCUMENT):
            raise UserError(
                f"end_of_document={self.end_of_document} is a token of no tokenizer that is given; "
                f"leave it out (one that is trained has {END_OF_DOCUMENT}) or give --tokenizer"
            )
        if self.tokenizer is not None and self.vocab_size is not None:
            raise UserError(
                f"vocab_size={self.vocab_size} is for a tokenizer that is trained, but "
                f"tokenizer={self.tokenizer} is given; give one of them"
            )


def prepare(request: PrepareRequest, quiet: bool = False) -> Manifest:
    """Write ``out``/<source>.<train|validation>.{bin,idx}, tokenizer.json and manifest.json.

    All files are written to ``out``/.partial and renamed once they are complete, the manifest last.
    A repeated request finds its files and returns their manifest. Progress is printed to standard
    error unless ``quiet``. For example,
    ``prepare(PrepareRequest(("builtin:python-code",), "tokens"))``.

    Raises:
        UserError: inputs cannot be read or have no text, or ``out`` has files of another request.
    """
    corpora = open_inputs(request)
    out = Path(request.out)
    with ProgressReport(quiet=quiet) as report, locked(out):
        return _prepare_locked(request, corpora, out, report)


def _prepare_locked(
    request: PrepareRequest, corpora: dict[str, Corpus], out: Path, report: ProgressReport
) -> Manifest:
    identity = identity_of(request, corpora)
    manifest = already_prepared(out, identity, corpora)
    if manifest is not None:
        report.say(f"{out} is already prepared from the same inputs; nothing to do")
        return manifest
    if (out / TASKS).exists():
        raise UserError(
            f"folder {out} holds an unfinished preparation in tasks; repeat its command, with its "
            f"--engine, to finish it, or remove {out / TASKS}"
        )
    partial = out / _PARTIAL
    interrupted = (partial / MANIFEST).is_file()
    if partial.exists():
        report.say(f"removing what an interrupted preparation left in {partial}")
        shutil.rmtree(partial)
    if not interrupted:
        refuse_to_overwrite(out, token_files(corpora))
    partial.mkdir()
    try:
        processes = request.processes or len(os.sched_getaffinity(0))
        if processes > 1:  # the import takes seconds, while the processes can work
            threading.Thread(target=load_megatron, daemon=True).start()
        with Workers(processes) as workers:
            manifest = Preparation(request, partial, workers, report).run(corpora, identity)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    publish(partial, out, [path.name for path in partial.iterdir()])
    partial.rmdir()
    return manifest


def token_files(sources: Iterable[str]) -> list[str]:
    """Return the names that token files of ``sources`` can have, in one file or in shards."""
    endings = ".bin", ".idx", ".shards.json", ".shards"
    return [f"{name}.{split}{end}" for name in sources for split in SPLITS for end in endings]


class Preparation:
    """One run of ``prepare`` into an empty folder."""

    def __init__(
        self, request: PrepareRequest, folder: Path, workers: Workers, report: ProgressReport
    ) -> None:
        self.request = request
        self.folder = folder
        self.workers = workers
        self.report = report
        self.validation_below = held_out_below(request.validation_fraction)

    def run(self, corpora: dict[str, Corpus], identity: dict[str, Any]) -> Manifest:
        """Write all files to the folder."""
        for hint in unused(corpora.values(), self.request.text_key, self.request.separator):
            self.report.say(hint)
        tokenizer = self.tokenizer(corpora)
        encoding = self.encoding(tokenizer)
        manifest = Manifest(
            dtype=encoding.dtype,
            tokenizer=tokenizer,
            sources={name: self._source(name, corpora[name], encoding) for name in corpora},
            request=identity,
            versions=versions(),
        )
        write_manifest(self.folder, manifest)
        return manifest

    def encoding(self, tokenizer: TokenizerRecord) -> Encoding:
        """Return the settings of the encoding with the tokenizer in the folder."""
        dtype: Literal["uint16", "int32"] = "uint16" if tokenizer.vocab_size < 65536 else "int32"
        path, end = str(self.folder / TOKENIZER), tokenizer.end_of_document_id
        return Encoding(path, tokenizer.sha256, end, dtype, self.validation_below)

    def _log(self) -> ReadLog:
        return ReadLog(self.report.advance, self.request.on_bad_line, self.request.max_bad_lines)

    def _documents(self, corpus: Corpus, log: ReadLog) -> Iterator[Document]:
        """Yield the corpus without blank documents, up to the request's limits."""
        texts = with_text(corpus.documents(log, self.workers.map), log)
        left = self.request.max_bytes
        for document in islice(texts, self.request.max_documents):
            if left is not None:
                left -= document.num_bytes()
                if left < 0:
                    return
            yield document

    def tokenizer(self, corpora: dict[str, Corpus]) -> TokenizerRecord:
        """Write a tokenizer.json to the folder: the given one, or one trained on a sample."""
        given = self.request.tokenizer
        if given is not None:
            copy_tokenizer(given, self.folder)
        else:
            texts = [text for name in corpora for text in self._sample(name, corpora[name])]
            vocab_size = self.request.vocab_size or DEFAULT_VOCAB_SIZE
            train_tokenizer(texts, vocab_size).save(str(self.folder / TOKENIZER))
        return tokenizer_record(self.folder, given, self.request.end_of_document)

    def _sample(self, name: str, corpus: Corpus) -> list[str]:
        """Sample a source's training documents for the tokenizer; sources have equal budgets."""
        sample = TextSample(_SAMPLE_CHARACTERS)
        self.report.begin(f"sampling {name} for the tokenizer", corpus.total_bytes)
        for document in self._documents(corpus, self._log()):
            if not is_held_out(document.group, self.validation_below):
                sample.offer(document)
            if sample.offered >= _SAMPLED_FROM * sample.budget:
                break
        return sample.texts()

    def _source(self, name: str, corpus: Corpus, encoding: Encoding) -> SourceRecord:
        log = self._log()
        log.left_out.update(corpus.left_out)
        self.report.begin(f"encoding {name}", corpus.total_bytes)
        documents = self._documents(corpus, log)
        written = write_splits(self.folder, name, documents, encoding, log, self.workers.map)
        record = source_record(corpus, log, *written)
        limited = (self.request.max_documents, self.request.max_bytes) != (None, None)
        say_source(
            *(self.report, name, record, log),
            separator=None if limited else self.request.separator,
            holds_out=bool(self.validation_below),
        )
        return record


def open_inputs(request: PrepareRequest) -> dict[str, Corpus]:
    """Return the sources of a request; UserError if one cannot be opened."""
    corpora: dict[str, Corpus] = {}
    for value in request.inputs:
        name, source = named_input(value)
        if name in corpora:
            raise UserError(
                f"two inputs give the source {name!r} (the second is {value}); name one of them "
                "with name=input"
            )
        corpora[name] = open_corpus(source, request.text_key, request.separator, request.split_key)
    return corpora


def identity_of(request: PrepareRequest, corpora: dict[str, Corpus]) -> dict[str, Any]:
    """Return the settings that determine the files of a request, without the inputs (JSON)."""
    if request.tokenizer is None:
        tokenizer: dict[str, Any] = {"trained_vocab_size": request.vocab_size or DEFAULT_VOCAB_SIZE}
        end = END_OF_DOCUMENT
    else:
        tokenizer = {"sha256": recorded_as(request.tokenizer, Path(request.out))}
        end, _ = find_end_of_document(
            request.tokenizer, load_tokenizer(request.tokenizer), request.end_of_document
        )
    inputs = {name: corpus.input for name, corpus in corpora.items()}
    values = {key: getattr(request, key) for key in ("validation_fraction", *_DECIDING)}
    values |= _WITHOUT
    return {"inputs": inputs, "tokenizer": tokenizer, "end_of_document": end, **values}


def already_prepared(
    out: Path, identity: dict[str, Any], corpora: dict[str, Corpus]
) -> Manifest | None:
    """Return the manifest of ``out`` if it matches the request; None if ``out`` has none.

    Raises UserError if the manifest is of another request, or the inputs have changed.
    """
    manifest = read_manifest(out)
    if manifest is None:
        return None
    advice = "choose another output folder or remove this one"
    recorded = {"split_key": None, **_WITHOUT, **manifest.request}
    recorded["end_of_document"] = manifest.tokenizer.end_of_document
    for key, value in identity.items():
        before = recorded.get(key, value)  # older manifests have fewer keys
        nothing_was_bad = key == "on_bad_line" and before == "stop"
        if before != value and not nothing_was_bad:
            raise UserError(f"folder {out} was prepared with {key}={before}, not {value}; {advice}")
    for name, corpus in corpora.items():
        source = manifest.sources[name]
        if source.input_sha256 != corpus.fingerprint():
            raise UserError(
                f"input {corpus.input} has changed since folder {out} was prepared from it; "
                f"{advice}"
            )
        for split in source.splits:
            manifest_of(str(out / f"{name}.{split}"))
    if fingerprint(read_tokenizer_json(out / TOKENIZER)) != manifest.tokenizer.sha256:
        raise UserError(f"{out / TOKENIZER} is not the one that {out / MANIFEST} names; {advice}")
    return manifest
