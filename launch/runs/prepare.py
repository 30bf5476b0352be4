"""Token files from text: ``allometry prepare``."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from allometry.data.corpus import OnBadLine
from allometry.data.manifest import Manifest
from allometry.data.prepare import PrepareRequest, prepare
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
    return manifest_report(prepare(request, quiet=asked.json), asked.out)


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
