"""Token files in Megatron's .bin/.idx format, read through memory maps.

docs/file_formats.md documents the format. Reading needs only numpy: megatron-core takes seconds to
import and is not installed on every training machine.
"""

from __future__ import annotations

import copy
import hashlib
import struct
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import RankError, UserError
from allometry.data.manifest import manifest_of
from allometry.data.shards import ENDING, TokenLine, read_shards, shard_files, shards_path

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, dtype code, number of sequences, number of document indices."""

DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in enumerate(
        ("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"), start=1
    )
}

_SCAN_TOKENS = 1 << 25
_SAMPLE_BLOCKS = 512
_BLOCK_TOKENS = 1 << 16


class EmptyStoreError(UserError):
    """Token files without documents or without tokens."""


class TokenStore:
    """Documents of ``prefix``.bin and ``prefix``.idx, or of ``prefix``.shards.json and .idx.

    Documents are defined by the document indices, for any number of sequences per document. The
    constructor reads the index and checks it against the size of the .bin file; tokens are read on
    request. For example, ``TokenStore("tokens/web.train").read(0)`` returns the tokens of the first
    document.

    Raises:
        UserError: files are missing, damaged, of another format, or empty.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.vocab_size: int | None = None
        """Exclusive bound of the token ids that ``read`` accepts; None: no check."""
        self.prefix = str(prefix)
        if self.prefix.endswith((".bin", ".idx")):
            raise UserError(
                f"token files are named without their ending: write {self.prefix[:-4]} instead of "
                f"{self.prefix}"
            )
        self._idx = Path(self.prefix + ".idx")
        listed = shards_path(self.prefix)
        self._bin = listed if listed.is_file() else Path(self.prefix + ".bin")
        for path in (self._bin, self._idx):
            if not path.is_file():
                raise UserError(
                    f"token file {path} does not exist; give the path without .bin/.idx of files "
                    "made by `allometry prepare` or Megatron"
                )
        self.dtype, starts = self._read_index()
        self.starts: NDArray[np.int64] = starts
        """Start of each document in the concatenated documents, and the end (documents + 1)."""
        self._offsets: NDArray[np.int64] = starts[:-1]
        """Start of each document in the concatenated .bin files, in tokens."""
        self._tokens = self._open_tokens(int(starts[-1]))

    def _read_index(self) -> tuple[np.dtype[Any], NDArray[np.int64]]:
        """Return token type and document starts, checked against the .bin file."""
        size = self._idx.stat().st_size
        with self._idx.open("rb") as file:
            header = file.read(HEADER.size)
        if not header.startswith(MAGIC):
            raise self._damaged("does not begin with MMIDIDX: it is not a Megatron index")
        if len(header) < HEADER.size:
            raise self._damaged("ends within its header")
        _, version, code, num_sequences, num_indices = HEADER.unpack(header)
        if version != 1:
            raise self._damaged(f"has version {version}, but only 1 is known")
        if code not in DTYPES or DTYPES[code].kind == "f":
            raise self._damaged(f"has dtype code {code}, which is no integer type")
        if size < HEADER.size + 12 * num_sequences + 8 * num_indices:
            raise self._damaged(f"is cut short ({num_sequences} sequences in {size} bytes)")
        if num_sequences == 0 or num_indices < 2:
            raise self._empty()
        index = np.memmap(self._idx, np.uint8, mode="r").data

        def section(dtype: str, count: int, offset: int) -> NDArray[Any]:
            return np.frombuffer(index, dtype, count, HEADER.size + offset)

        lengths = section("<i4", num_sequences, 0)
        pointers = section("<i8", num_sequences, 4 * num_sequences)
        indices = section("<i8", num_indices, 12 * num_sequences)
        dtype = DTYPES[code]
        ends = np.cumsum(lengths, dtype=np.int64)
        if lengths.min() < 0 or np.any(pointers != (ends - lengths) * dtype.itemsize):
            raise self._damaged("has sequences that do not follow each other")
        if indices[0] != 0 or indices[-1] != len(lengths) or np.any(np.diff(indices) < 0):
            raise self._damaged("has document indices that do not cover its sequences")
        num_tokens = int(ends[-1])
        if num_tokens == 0:
            raise self._empty()
        return dtype, np.concatenate(([0], ends))[indices]

    def _open_tokens(self, num_tokens: int) -> TokenLine:
        """Open the token files and check their sizes against the index."""
        if self._bin.name.endswith(ENDING):
            listed = read_shards(self._bin)
            counts = [shard.tokens for shard in listed.shards]
            files = shard_files(self._bin, listed)
            num_bytes = sum(shard.file.bytes for shard in listed.shards)
        else:
            counts, files, num_bytes = [num_tokens], [self._bin], self._bin.stat().st_size
        expected = num_tokens * self.dtype.itemsize
        if num_bytes != expected or sum(counts) != num_tokens:
            raise UserError(
                f"token file {self._bin} has {num_bytes} bytes, but its index {self._idx} says "
                f"{expected}: it was cut short or belongs to another index; prepare or copy both "
                "files again"
            )
        return TokenLine(files, counts, self.dtype)

    def _damaged(self, how: str) -> UserError:
        return UserError(f"token index {self._idx} {how}; prepare or copy both files again")

    def _empty(self) -> UserError:
        return EmptyStoreError(
            f"token file {self._bin} holds no documents or no tokens; prepare it from a corpus "
            "that is not empty, or take this source out of the configuration"
        )

    @property
    def num_documents(self) -> int:
        """Number of documents, empty ones included."""
        return len(self.starts) - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all documents."""
        return int(self.starts[-1])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens in each document (int64, num_documents)."""
        return np.diff(self.starts)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (16 digits) of all document lengths and of tokens at the ends of two documents.

        The first and last 4096 tokens of the first and the last document are read: enough to detect
        another preparation, and fast for terabytes. A store from ``only`` has the fingerprint of
        the full store.
        """
        digest = hashlib.sha256(np.ascontiguousarray(self.lengths).tobytes())
        for document in (0, self.num_documents - 1):
            length = int(self.lengths[document])
            for start in (0, max(0, length - 4096)):
                tokens = self.read(document, start, min(length, start + 4096))
                digest.update(np.asarray(tokens, np.int64).tobytes())
        return digest.hexdigest()[:16]

    def only(self, documents: NDArray[np.int64]) -> TokenStore:
        """Return a store of these documents alone, renumbered in this order, over the same files.

        For example, ``store.only(np.array([4, 2]))`` has two documents. Tokens are not copied.
        """
        assert self.fingerprint  # cached before the copy: it is of the full store
        made = copy.copy(self)
        made.__dict__.pop("lengths")
        made.starts = np.concatenate(([0], np.cumsum(self.lengths[documents])))
        made._offsets = self._offsets[documents]
        return made

    def read(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return tokens ``start`` to ``stop`` (exclusive) of a document as a view of the file.

        Raises RankError for an id that is not below ``vocab_size``.
        """
        begin = int(self._offsets[document])
        length = int(self.starts[document + 1] - self.starts[document])
        stop = length if stop is None else stop
        assert 0 <= start <= stop <= length
        return self._checked(self._tokens.read(begin + start, begin + stop))

    def read_into(
        self,
        documents: NDArray[np.int64],
        offsets: NDArray[np.int64],
        lengths: NDArray[np.int64],
        out: NDArray[np.int64],
    ) -> None:
        """Fill ``out`` with ``lengths`` tokens from ``offsets`` of each of ``documents``.

        Raises RankError as ``read`` does.
        """
        files, begins = self._tokens.find(self._offsets[documents] + offsets)
        at, tokens = 0, {file: self._tokens.tokens(file) for file in set(files.tolist())}
        runs = zip(files.tolist(), begins.tolist(), lengths.tolist(), strict=True)
        for file, begin, length in runs:
            out[at : at + length] = tokens[file][begin : begin + length]
            at += length
        assert at == len(out)
        self._checked(out)

    def _checked(self, tokens: NDArray[Any]) -> NDArray[Any]:
        """Return ``tokens`` after one check for ids that are too large or negative."""
        if self.vocab_size is not None and len(tokens):
            unsigned = tokens.view(f"<u{tokens.itemsize}")
            if int(unsigned.max()) >= self.vocab_size:
                wrong = int(tokens[unsigned >= self.vocab_size][0])
                raise RankError(
                    f"token file {self._bin} holds the token id {wrong}, but model.vocab_size="
                    f"{self.vocab_size} has no row for it: copy or prepare the data again, or set "
                    "model.vocab_size above all ids"
                )
        return tokens

    @property
    def vocab_bound(self) -> int:
        """Number above all token ids: the least number of rows of the embedding.

        ``vocab_bound_origin`` is the origin of the bound. Of a large store without a manifest, only
        a sample is read, so the bound may be too low.
        """
        return self._vocab_bound[0]

    @property
    def vocab_bound_origin(self) -> Literal["manifest", "scan", "sample"]:
        """Origin of ``vocab_bound``: the manifest's vocabulary, all tokens, or a sample."""
        return self._vocab_bound[1]

    @cached_property
    def _vocab_bound(self) -> tuple[int, Literal["manifest", "scan", "sample"]]:
        recorded = manifest_of(self.prefix)
        if recorded is not None:
            return recorded[0].tokenizer.vocab_size, "manifest"
        tokens = self._tokens
        blocks = -(-len(tokens) // _BLOCK_TOKENS)
        sampled = len(tokens) > _SCAN_TOKENS
        chosen = np.linspace(0, blocks - 1, _SAMPLE_BLOCKS if sampled else blocks).astype(np.int64)
        largest, smallest = 0, 0
        for block in chosen.tolist():
            start = block * _BLOCK_TOKENS
            part = tokens.read(start, min(start + _BLOCK_TOKENS, len(tokens)))
            largest, smallest = max(largest, int(part.max())), min(smallest, int(part.min()))
        if smallest < 0:
            raise UserError(
                f"token file {self._bin} holds the negative token id {smallest}; prepare it again"
            )
        return largest + 1, "sample" if sampled else "scan"
