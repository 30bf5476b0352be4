"""Check token files against their manifest, on a sample of each file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from allometry.configs.errors import UserError
from allometry.data.manifest import MANIFEST, FileRecord, manifest_of
from allometry.data.shards import read_shards, shards_path
from allometry.data.store import TokenStore

SAMPLES = 16
SAMPLE_BYTES = 1 << 16
WHOLE_BYTES = 1 << 24
"""Maximum size at which files of manifests without ``sampled_sha256`` are read completely."""
SHARDS = 16
"""Number of sampled shards of a store, evenly spaced."""


def sampled_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's size and of ``SAMPLES`` evenly spaced blocks.

    The first and the last block of the file are included.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    last = max(0, size - SAMPLE_BYTES)
    with path.open("rb") as file:
        for start in sorted({last * index // (SAMPLES - 1) for index in range(SAMPLES)}):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def check_contents(stores: Iterable[TokenStore]) -> None:
    """Raise UserError if sampled contents of token files differ from their manifests.

    Reads at most one MiB of a file (16 MiB if its manifest has no ``sampled_sha256``), and at most
    ``SHARDS`` files of an adopted store. Files without a manifest of this package are not compared.
    """
    for store in stores:
        folder = Path(store.prefix).parent
        recorded = manifest_of(store.prefix)  # compares file sizes
        for name, record in () if recorded is None else recorded[1].files.items():
            _check(folder / name, record, folder / MANIFEST)
        shards = shards_path(store.prefix)
        if shards.is_file():
            listed = read_shards(shards).shards
            chosen = np.linspace(0, len(listed) - 1, min(SHARDS, len(listed))).astype(int)
            for shard in (listed[index] for index in chosen.tolist()):
                _check(folder / shard.path, shard.file, shards)


def _check(path: Path, record: FileRecord, where: Path) -> None:
    if _differs(path, record):
        raise UserError(
            f"token file {path} does not hold what {where} recorded; copy it again, or prepare the "
            "data again into another folder"
        )


def _differs(path: Path, record: FileRecord) -> bool:
    if record.sampled_sha256 is not None:
        return sampled_sha256(path) != record.sampled_sha256
    if record.bytes > WHOLE_BYTES:
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() != record.sha256
