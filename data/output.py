"""Folder of token files with its tokenizer; files are published once all are complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from allometry.configs.errors import UserError
from allometry.data.builtin import python_version
from allometry.data.manifest import MANIFEST, Manifest, TokenizerRecord
from allometry.data.special_tokens import (
    find_end_of_document,
    load_tokenizer,
    vocabulary_bound,
)
from allometry.data.tokenizer import (
    BESIDE,
    TOKENIZER,
    fingerprint,
    read_tokenizer_json,
    tokenizer_file,
)


def copy_tokenizer(given: str, folder: Path) -> None:
    """Copy a tokenizer.json, and adjacent files about special tokens, into ``folder``."""
    shutil.copyfile(tokenizer_file(given), folder / TOKENIZER)
    for beside in map(tokenizer_file(given).with_name, BESIDE):
        if beside.is_file():
            shutil.copyfile(beside, folder / beside.name)


def tokenizer_record(
    folder: Path, given: str | None, end_of_document: str | None
) -> TokenizerRecord:
    """Return the record of the tokenizer in ``folder``, a copy of ``given`` if not None."""
    path = folder / TOKENIZER
    tokenizer = load_tokenizer(str(path))
    end, number = find_end_of_document(given or str(path), tokenizer, end_of_document)
    return TokenizerRecord(
        file=TOKENIZER,
        sha256=fingerprint(read_tokenizer_json(path)),
        vocab_size=vocabulary_bound(tokenizer),
        end_of_document=end,
        end_of_document_id=number,
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of ``folder``."""
    text = manifest.model_dump_json(indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def publish(partial: Path, out: Path, names: Iterable[str]) -> None:
    """Move files from ``partial`` to ``out``, the manifest last."""
    for name in sorted(names, key=lambda name: name == MANIFEST):
        os.replace(partial / name, out / name)


def refuse_to_overwrite(out: Path, names: Iterable[str]) -> None:
    """Raise UserError if ``out`` contains a tokenizer, a manifest or a file of ``names``."""
    for name in (TOKENIZER, *BESIDE, MANIFEST, *names):
        if (out / name).exists():
            raise UserError(
                f"folder {out} holds {name}, but no manifest.json that tells how it was made; "
                "choose another output folder"
            )


def versions(further: Iterable[str] = ()) -> dict[str, str]:
    """Return the versions of Python, of the packages that create token files, and ``further``."""
    found = {"python": python_version()}
    for package in ("allometry", "tokenizers", "numpy", "megatron-core", *further):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that was not installed
            found[package] = "not installed"
    return found
