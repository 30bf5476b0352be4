"""Write token files with megatron-core's builder."""

from __future__ import annotations

import hashlib
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.data.contents import sampled_sha256
from allometry.data.manifest import FileRecord, SplitRecord

LONGEST_SEQUENCE = 2**31 - 1


@lru_cache(maxsize=1)
def load_megatron() -> Any:
    """Import megatron-core's indexed_dataset, which takes seconds and warns about GPUs."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.datasets import indexed_dataset
    except ImportError as error:
        raise UserError(
            f"preparing token files needs megatron-core, which cannot be imported ({error}); "
            "install it with `pip install megatron-core==0.16.1`, or copy token files that were "
            "prepared elsewhere"
        ) from error
    return indexed_dataset


class TokenWriter:
    """Writer of ``folder``/``stem``.bin and .idx, with one sequence per document.

    A document of more than 2**31 - 1 tokens, the limit of a sequence in the index, has several
    sequences. For example: ``writer.add(tokens, text_bytes, last=True)`` for each document, then
    ``writer.finish()``.
    """

    def __init__(self, folder: Path, stem: str, dtype: str) -> None:
        self._bin = folder / f"{stem}.bin"
        self._idx = folder / f"{stem}.idx"
        self._builder = load_megatron().IndexedDatasetBuilder(str(self._bin), np.dtype(dtype).type)
        self.documents = self.tokens = self.text_bytes = self._largest_id = 0
        self._begun = 0

    def add(self, tokens: NDArray[Any], text_bytes: int, last: bool) -> None:
        """Append tokens to the current document, and end it if they are its ``last``."""
        self.tokens += len(tokens)
        self.text_bytes += text_bytes
        self._largest_id = max(self._largest_id, int(tokens.max(initial=0)))
        self._begun += len(tokens)
        if not last:
            self._builder.data_file.write(tokens.tobytes())
            return
        full, rest = divmod(self._begun, LONGEST_SEQUENCE)
        self._builder.add_document(tokens, [LONGEST_SEQUENCE] * full + [rest] * (rest > 0))
        self.documents += 1
        self._begun = 0

    def finish(self) -> SplitRecord | None:
        """Close the files and return their record; without documents, delete them (None)."""
        self._builder.finalize(str(self._idx))
        if self.documents == 0:
            self._bin.unlink()
            self._idx.unlink()
            return None
        return SplitRecord(
            documents=self.documents,
            tokens=self.tokens,
            bytes=self.text_bytes,
            largest_id=self._largest_id,
            files={path.name: file_record(path) for path in (self._bin, self._idx)},
        )


def file_record(path: Path) -> FileRecord:
    """Return the size and SHA-256 of a file, and the SHA-256 of a sample."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(bytes=path.stat().st_size, sha256=digest, sampled_sha256=sampled_sha256(path))
