"""Write token files without text, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.data.store import DTYPES, HEADER, MAGIC


def write_index(path: Path, dtype: str, lengths: NDArray[Any]) -> None:
    """Write the .idx of a store of documents with ``lengths``, one sequence per document."""
    code = next(code for code, known in DTYPES.items() if known.name == dtype)
    ends = np.cumsum(lengths, dtype=np.int64)
    pointers = (ends - lengths) * np.dtype(dtype).itemsize
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
        file.write(np.asarray(lengths, "<i4").tobytes())
        file.write(pointers.astype("<i8").tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def write_store(
    prefix: str | Path, documents: Sequence[NDArray[Any] | Sequence[int]], dtype: str = "uint16"
) -> None:
    """Write ``prefix``.bin and ``prefix``.idx with these ``documents``.

    For example, ``write_store("tiny", [[1, 2, 0], [3, 0]])`` writes two documents.
    """
    with Path(f"{prefix}.bin").open("wb") as file:
        for document in documents:
            file.write(np.asarray(document, np.dtype(dtype).newbyteorder("<")).tobytes())
    lengths = np.array([len(document) for document in documents], np.int64)
    write_index(Path(f"{prefix}.idx"), dtype, lengths)


def write_random_store(
    prefix: str | Path, num_tokens: int, vocab_size: int, mean_length: int = 512, seed: int = 0
) -> None:
    """Write documents of random tokens with geometric lengths; uint16 if the ids fit."""
    rng = np.random.default_rng(seed)
    dtype = "uint16" if vocab_size < 65536 else "int32"
    drawn = rng.geometric(1 / mean_length, 2 + 2 * num_tokens // mean_length)
    whole = drawn[: int(np.searchsorted(np.cumsum(drawn), num_tokens))]
    lengths = np.append(whole, num_tokens - int(whole.sum()))  # the last document is cut
    rng.integers(0, vocab_size, num_tokens).astype(dtype).tofile(f"{prefix}.bin")
    write_index(Path(f"{prefix}.idx"), dtype, lengths)


def write_sparse_store(prefix: str | Path, num_tokens: int, num_documents: int) -> None:
    """Write an index over a sparse .bin of zeros, which needs no disk space."""
    rng = np.random.default_rng(0)
    bounds = np.sort(rng.integers(0, num_tokens + 1, num_documents - 1))
    lengths = np.diff(np.concatenate(([0], bounds, [num_tokens])))
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(2 * num_tokens)
    write_index(Path(f"{prefix}.idx"), "uint16", lengths)
