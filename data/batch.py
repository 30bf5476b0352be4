"""Batches of a step: sequences of tokens, their targets, and document boundaries."""

# B sequences, L tokens in a sequence, T = B * L, C documents in the batch

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

IGNORE = -100
"""Target outside the loss: the next token belongs to another document, or is repeated."""


@dataclass(frozen=True)
class PackedDocuments:
    """Documents as runs of the flattened T tokens of a batch; each sequence begins a new run.

    ``cu_lengths`` (int32, C + 1) is 0, the running sum of the lengths, T, as in variable-length
    attention kernels. ``max_length`` is the longest run. ``positions_BL`` (int64) counts the tokens
    of each run from 0.
    """

    cu_lengths: NDArray[np.int32]
    max_length: int
    positions_BL: NDArray[np.int64]

    @classmethod
    def of_lengths(cls, lengths: NDArray[np.int64], shape: tuple[int, int]) -> Self:
        """Return documents of these ``lengths`` (positive, sum B * L, not across a sequence's end).

        For example, ``of_lengths(np.array([3, 1, 4]), (2, 4))`` has ``cu_lengths`` [0, 3, 4, 8].
        """
        total = shape[0] * shape[1]
        assert total < 2**31, "a batch has fewer than 2**31 tokens"
        cu_lengths = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=cu_lengths[1:])
        assert cu_lengths[-1] == total
        positions = np.arange(total) - np.repeat(cu_lengths[:-1], lengths)
        return cls(cu_lengths.astype(np.int32), int(lengths.max()), positions.reshape(shape))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens in each document, in order (C)."""
        return np.diff(self.cu_lengths).astype(np.int64)


@dataclass(frozen=True)
class Batch:
    """B sequences of L tokens.

    ``tokens_BL`` and ``targets_BL`` (int64): a target is the next token, or ``IGNORE``.
    ``source_B`` (int64): index of each sequence's source in the configuration. ``documents`` is
    None if sequences are plain token streams with attention across documents.
    """

    tokens_BL: NDArray[np.int64]
    targets_BL: NDArray[np.int64]
    source_B: NDArray[np.int64]
    documents: PackedDocuments | None

    @property
    def num_sequences(self) -> int:
        """Number of sequences, B."""
        return int(self.tokens_BL.shape[0])

    @property
    def num_tokens(self) -> int:
        """T = B * L, including tokens whose target is ``IGNORE``."""
        return int(self.tokens_BL.size)

    @property
    def num_targets(self) -> int:
        """Number of targets in the loss."""
        return int(np.count_nonzero(self.targets_BL != IGNORE))

    def rows(self, start: int, stop: int) -> Batch:
        """Return sequences ``start`` to ``stop`` (exclusive) as a batch."""
        assert 0 <= start < stop <= self.num_sequences
        documents = None
        if self.documents is not None:
            length = self.tokens_BL.shape[1]
            bounds = (start * length, stop * length)
            first, last = np.searchsorted(self.documents.cu_lengths, bounds)
            lengths = self.documents.lengths[first:last]
            documents = PackedDocuments.of_lengths(lengths, (stop - start, length))
        part = slice(start, stop)
        return Batch(self.tokens_BL[part], self.targets_BL[part], self.source_B[part], documents)

    @classmethod
    def concatenate(cls, batches: Sequence[Batch]) -> Self:
        """Return one batch of all sequences; the batches must have the same L and packing."""
        assert batches, "nothing to concatenate"
        tokens_BL = np.concatenate([batch.tokens_BL for batch in batches])
        packed = [batch.documents for batch in batches if batch.documents is not None]
        assert len(packed) in (0, len(batches)), "batches differ in packing"
        documents = None
        if packed:
            lengths = np.concatenate([part.lengths for part in packed])
            documents = PackedDocuments.of_lengths(lengths, tokens_BL.shape)
        targets_BL = np.concatenate([batch.targets_BL for batch in batches])
        source_B = np.concatenate([batch.source_B for batch in batches])
        return cls(tokens_BL, targets_BL, source_B, documents)
