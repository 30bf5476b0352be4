"""Manifest that ``prepare`` and ``adopt`` write next to token files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from allometry.configs import json_file
from allometry.configs.base import Section
from allometry.configs.errors import UserError

MANIFEST = "manifest.json"

Split = Literal["train", "validation"]


class FileRecord(Section):
    """One file, as written; older records have no ``sampled_sha256`` (``contents.py``)."""

    bytes: int
    sha256: str
    sampled_sha256: str | None = None


class SplitRecord(Section):
    """One split of a source.

    ``bytes``: UTF-8 bytes of text without end-of-document tokens; None if only tokens were read.
    """

    documents: int
    tokens: int
    bytes: int | None
    largest_id: int
    files: dict[str, FileRecord]


class SourceRecord(Section):
    """Record of one source: its input, skipped documents and splits.

    ``kinds`` is the number of files read by kind, ``skipped`` the number of skipped documents by
    reason; ``skipped_places`` are the first few places of each reason. ``inexact_cuts`` is the
    number of places in long documents where tokens may differ from the tokens of the complete text
    (data/pieces.py).
    """

    input: str
    input_sha256: str
    kinds: dict[str, int] = Field(default_factory=dict)
    skipped: dict[str, int]
    skipped_places: dict[str, list[str]] = Field(default_factory=dict)
    inexact_cuts: int = 0
    splits: dict[Split, SplitRecord]


class TokenizerRecord(Section):
    """The tokenizer; ``sha256`` of its canonical JSON, ``vocab_size``: its largest id + 1."""

    file: str
    sha256: str
    vocab_size: int
    end_of_document: str
    end_of_document_id: int


class Manifest(Section):
    """Contents of a folder of token files, and their preparation."""

    kind: Literal["allometry.tokens"] = "allometry.tokens"
    version: Literal[1] = 1
    dtype: Literal["uint8", "int8", "int16", "int32", "int64", "uint16"]
    tokenizer: TokenizerRecord
    sources: dict[str, SourceRecord]
    request: dict[str, Any]
    versions: dict[str, str]

    def split(self, stem: str) -> SplitRecord | None:
        """Return the split with files ``stem``.bin and .idx, None if it is not recorded."""
        splits = (split for source in self.sources.values() for split in source.splits.values())
        return next((split for split in splits if f"{stem}.idx" in split.files), None)


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest in ``folder``; None without a manifest.

    A manifest.json of another program counts as none. Raises UserError for a damaged manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        values = json_file.read(path)
        if not isinstance(values, dict) or values.get("kind") != "allometry.tokens":
            return None
        return Manifest.model_validate(values)
    except (ValidationError, ValueError, OSError) as error:
        raise UserError(
            f"manifest {path} is damaged ({str(error).splitlines()[0]}); prepare the data again "
            "into another folder"
        ) from error


def manifest_of(prefix: str) -> tuple[Manifest, SplitRecord] | None:
    """Return the manifest next to ``prefix``.bin/.idx and the split's record in it.

    Returns None if no manifest contains the files. For example, ``manifest_of("tokens/web.train")``
    reads tokens/manifest.json.

    Raises:
        UserError: a file is missing or has another size than recorded.
    """
    path = Path(prefix)
    manifest = read_manifest(path.parent)
    split = manifest.split(path.name) if manifest is not None else None
    if manifest is None or split is None:
        return None
    for name, record in split.files.items():
        file = path.parent / name
        size = file.stat().st_size if file.is_file() else None
        if size != record.bytes:
            problem = "is missing" if size is None else f"has {size} bytes"
            raise UserError(
                f"token file {file} {problem}, but {path.parent / MANIFEST} recorded "
                f"{record.bytes} bytes; prepare the data again into another folder"
            )
    return manifest, split
