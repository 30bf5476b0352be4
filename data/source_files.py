"""Token files of one source: encode its documents, record their sizes, report them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import get_args

from allometry.configs.errors import UserError
from allometry.data.corpus import Corpus, Document, LeftOut, OrderedMap, ReadLog
from allometry.data.encode import Encoding, Unknown, chunks, encode_chunk
from allometry.data.hints import hints
from allometry.data.manifest import SourceRecord, Split, SplitRecord
from allometry.data.progress import ProgressReport
from allometry.data.writer import TokenWriter

SPLITS: tuple[Split, ...] = get_args(Split)


def with_text(documents: Iterable[Document], log: ReadLog) -> Iterator[Document]:
    """Yield the documents that are not blank; count blank ones in ``log``."""
    for document in documents:
        if document.is_blank():
            log.left_out.add("text is blank", document.id)
        else:
            yield document


def write_splits(
    folder: Path,
    name: str,
    documents: Iterable[Document],
    encoding: Encoding,
    log: ReadLog,
    ordered_map: OrderedMap,
) -> tuple[dict[Split, SplitRecord], int]:
    """Write ``folder``/``name``.<train|validation>.{bin,idx}; a split without documents has none.

    Returns:
        the records of the splits, and the number of inexact cuts (data/pieces.py).
    """
    inexact_cuts = 0
    writers = [TokenWriter(folder, f"{name}.{split}", encoding.dtype) for split in SPLITS]
    encode = functools.partial(encode_chunk, encoding)
    for chunk in ordered_map(encode, chunks(documents)):
        for piece in chunk:
            writers[piece.held_out].add(piece.tokens, piece.text_bytes, piece.last)
            inexact_cuts += not piece.exact
            if piece.unknown is not None:
                _add_unknown(log.left_out, piece.unknown)
    records = zip(SPLITS, (writer.finish() for writer in writers), strict=True)
    return {split: record for split, record in records if record is not None}, inexact_cuts


def _add_unknown(left_out: LeftOut, unknown: Unknown) -> None:
    """Count the parts of a text without a token, with examples."""
    became = "dropped" if unknown.token is None else f"became {unknown.token}"
    reason = f"text that the tokenizer does not know, {became}"
    left_out.counts[reason] += unknown.times
    for part in unknown.parts:
        left_out.add(reason, repr(part), 0)


def source_record(
    corpus: Corpus, log: ReadLog, splits: Mapping[Split, SplitRecord], inexact_cuts: int
) -> SourceRecord:
    """Return the manifest's record of a source."""
    return SourceRecord(
        input=corpus.input,
        input_sha256=corpus.fingerprint(),
        kinds=corpus.kinds,
        skipped=dict(sorted(log.left_out.counts.items())),
        skipped_places=dict(sorted(log.left_out.places.items())),
        inexact_cuts=inexact_cuts,
        splits=dict(splits),
    )


def say_source(
    report: ProgressReport,
    name: str,
    record: SourceRecord,
    log: ReadLog,
    *,
    separator: str | None,
    holds_out: bool,
) -> None:
    """Print the contents of a source; UserError if it has no documents to train on.

    ``separator`` is None if not all documents were read. ``holds_out``: False if no document can be
    held out.
    """
    train, held_out = (record.splits.get(split) for split in SPLITS)
    documents, tokens = (held_out.documents, held_out.tokens) if held_out else (0, 0)
    left_out = str(log.left_out)
    if train is None:
        raise UserError(
            f"source {name} ({record.input}) has no documents to train on ({documents} held out; "
            f"left out: {left_out or 'nothing'}); give an input with more text or lower "
            "validation_fraction"
        )
    train_bytes, held_out_bytes = train.bytes or 0, held_out.bytes or 0 if held_out else 0
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in record.kinds.items())
    report.say(f"{name}: files read: {kinds}")
    report.say(
        f"{name}: {train.documents:,} documents, {train.tokens:,} tokens to train on "
        f"({train_bytes / train.tokens:.2f} bytes a token); {documents:,} documents, "
        f"{tokens:,} tokens held out"
    )
    if left_out:
        report.say(f"{name}: left out: {left_out}")
    for hint in hints(record.kinds, log, train_bytes + held_out_bytes, separator):
        report.say(f"{name}: {hint}")
    if held_out is None and holds_out:
        report.say(f"{name}: no document fell into the held-out split, so it has no files")
    if record.inexact_cuts:
        report.say(
            f"{name}: {record.inexact_cuts} cuts in long stretches without a boundary between "
            "tokens; a few tokens there may differ from those of the whole text"
        )
