"""Comparison of a store written in tasks with the store of one process."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from allometry.data.manifest import SourceRecord, read_manifest

needs_datatrove = pytest.mark.skipif(
    importlib.util.find_spec("datatrove") is None,
    reason="datatrove is not installed: pip install 'allometry[prepare]'",
)


def token_bytes(folder: Path, stem: str) -> bytes:
    """Return the tokens of a split, of one .bin or of all shards in their order."""
    alone = folder / f"{stem}.bin"
    if alone.is_file():
        return alone.read_bytes()
    listed = json.loads((folder / f"{stem}.shards.json").read_text())["shards"]
    assert [shard["path"] for shard in listed] == sorted(shard["path"] for shard in listed)
    return b"".join((folder / shard["path"]).read_bytes() for shard in listed)


def without_files(record: SourceRecord) -> dict[str, Any]:
    values = record.model_dump()
    for split in values["splits"].values():
        del split["files"]
    return values


def differences(ours: Path, theirs: Path) -> list[str]:
    """Return what differs between two stores: bytes of tokens and indices, tokenizer, manifest."""
    mine, other = read_manifest(ours), read_manifest(theirs)
    assert mine is not None
    assert other is not None
    found = []
    for name, source in other.sources.items():
        if without_files(mine.sources[name]) != without_files(source):
            found.append(f"record of {name}")
        for split in source.splits:
            stem = f"{name}.{split}"
            if token_bytes(ours, stem) != token_bytes(theirs, stem):
                found.append(f"tokens of {stem}")
            if (ours / f"{stem}.idx").read_bytes() != (theirs / f"{stem}.idx").read_bytes():
                found.append(f"index of {stem}")
    if (ours / "tokenizer.json").read_bytes() != (theirs / "tokenizer.json").read_bytes():
        found.append("tokenizer")
    if {k: v for k, v in mine.request.items() if k != "tasks"} != other.request:
        found.append("request")
    return found
