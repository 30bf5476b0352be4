"""Examine the contents of a shard in one pass over its tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from allometry.configs.errors import UserError
from allometry.data.contents import sampled_sha256
from allometry.data.store import EmptyStoreError, TokenStore

_BLOCK_BYTES = 1 << 23


@dataclass(frozen=True)
class Examination:
    """Contents of a shard: sizes, end-of-document token counts, and identification of its .bin.

    ``inner_ends``: end-of-document tokens before the last token of a document. ``missing_ends``:
    non-empty documents with another last token. A shard without documents has no ``tokens``.
    """

    dtype: str
    documents: int
    tokens: int
    bytes: int
    largest_id: int = 0
    inner_ends: int = 0
    missing_ends: int = 0
    sha256: str = ""
    sampled_sha256: str = ""


def examine(end: int, vocab_size: int, prefix: Path) -> Examination:
    """Read the shard ``prefix``.bin and .idx once, in blocks.

    ``end``: id of the end-of-document token; ids must be below ``vocab_size``.

    Raises:
        UserError: the index or a size is wrong, or the tokenizer does not have an id.
    """
    path = Path(f"{prefix}.bin")
    try:
        store = TokenStore(prefix)
    except EmptyStoreError:
        if size := path.stat().st_size:
            raise UserError(
                f"shard {path} has {size} bytes, but its index says that it has no documents; "
                "tokenize its text again"
            ) from None
        return Examination(dtype="", documents=0, tokens=0, bytes=0)
    lasts = store.starts[1:][store.lengths > 0] - 1
    digest = hashlib.sha256()
    at = largest = ends = ended = 0
    with path.open("rb") as file:
        while data := file.read(_BLOCK_BYTES):
            digest.update(data)
            tokens = np.frombuffer(data, store.dtype)
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= vocab_size:
                raise UserError(
                    f"shard {path} holds the token id {low if low < 0 else high}, but the "
                    f"tokenizer has {vocab_size} ids; give --tokenizer the one that the shards "
                    "were made with"
                )
            largest = max(largest, high)
            ends += int(np.count_nonzero(tokens == end))
            first, stop = np.searchsorted(lasts, (at, at + len(tokens)))
            ended += int(np.count_nonzero(tokens[lasts[first:stop] - at] == end))
            at += len(tokens)
    return Examination(
        dtype=store.dtype.name,
        documents=store.num_documents,
        tokens=store.num_tokens,
        bytes=path.stat().st_size,
        largest_id=largest,
        inner_ends=ends - ended,
        missing_ends=len(lasts) - ended,
        sha256=digest.hexdigest(),
        sampled_sha256=sampled_sha256(path),
    )
