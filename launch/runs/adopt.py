"""Implementation of ``allometry adopt`` on the command line: shards become one source."""

from __future__ import annotations

from allometry.data.adopt import AdoptRequest, adopt
from allometry.launch.command import Report
from allometry.launch.runs.commands import Adopt
from allometry.launch.runs.prepare import manifest_report


def adopted(asked: Adopt) -> Report:
    """Adopt the shards; the facts of the report are the manifest."""
    request = AdoptRequest(
        shards=asked.shards,
        out=str(asked.out),
        tokenizer=str(asked.tokenizer),
        validation=asked.validation,
        end_of_document=asked.end_of_document,
        allow_inner_ends=asked.allow_inner_ends,
        allow_missing_ends=asked.allow_missing_ends,
        processes=asked.processes,
    )
    return manifest_report(adopt(request, quiet=asked.json), asked.out)
