"""The tokens of a run as a pure function of (seed, sample position)."""

# B sequences, L tokens in a sequence, S sources

from __future__ import annotations

import hashlib
import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.configs.data import DataConfig
from allometry.configs.errors import UserError
from allometry.data.batch import IGNORE, Batch, PackedDocuments
from allometry.data.manifest import manifest_of
from allometry.data.mixture import Mixture
from allometry.data.order import DocumentOrder
from allometry.data.store import TokenStore
from allometry.data.tokenizer import check_tokenizer

_log = logging.getLogger(__name__)


class Stream:
    """Training and held-out sequences of a data configuration.

    A sample is a window [w L, w L + L] of its source's endless line of tokens (see
    ``DocumentOrder``): L inputs and, one further, L targets, so that each token is a target once
    an epoch; the windows of an epoch are shuffled. ``Mixture`` says which source's sample stands at
    a position. Nothing depends on what was asked before, on the number of ranks or on how positions
    are grouped into batches.

    Raises UserError for token files that cannot be used or were made with different tokenizers.
    """

    def __init__(self, data: DataConfig, seed: int) -> None:
        self.sequence_length = data.sequence_length
        self.per_document = data.packing == "per_document"
        self.seed = seed
        self.sources = tuple(source.name for source in data.sources)
        self.mixture = Mixture([source.weight for source in data.sources])
        self._train = [
            DocumentOrder(self._open(source.train), source.name, seed) for source in data.sources
        ]
        self._validation = {
            source.name: DocumentOrder(self._open(source.validation), source.name, None)
            for source in data.sources
            if source.validation is not None
        }
        check_tokenizer(data.tokenizer, [store.prefix for store in self.stores])

    def _open(self, prefix: str) -> TokenStore:
        store = TokenStore(prefix)
        longest = int(store.lengths.max()) if self.per_document else store.num_tokens
        if longest < 2:
            raise UserError(
                f"token files {prefix} have no document of two tokens, so there is nothing to "
                "predict; prepare them from longer documents"
            )
        return store

    @property
    def stores(self) -> tuple[TokenStore, ...]:
        """All token files, training then held-out."""
        orders = [*self._train, *self._validation.values()]
        return tuple(order.store for order in orders)

    def batch(self, position: int, count: int) -> Batch:
        """The ``count`` samples from ``position`` on: rows in the order of their positions."""
        source_B, index_B = self.mixture.sources(position, count)
        windows = [
            (self._train[source], self._train[source].window(index, self.sequence_length))
            for source, index in zip(source_B.tolist(), index_B.tolist(), strict=True)
        ]
        return self._assemble(windows, source_B)

    def _assemble(
        self, windows: list[tuple[DocumentOrder, int]], source_B: NDArray[np.int64]
    ) -> Batch:
        length = self.sequence_length
        window_BL = np.empty((len(windows), length + 1), np.int64)  # one token more than L
        ends = []
        for row, (order, index) in enumerate(windows):
            runs = order.read(index * length, window_BL[row])
            # The last run ends with the window, so its last input has a target; the others' do not.
            ends.append(np.cumsum(runs[:-1]) + row * length)
        tokens_BL = window_BL[:, :-1].copy()
        targets_BL = window_BL[:, 1:].copy()  # no memory shared with the tokens
        if not self.per_document:
            return Batch(tokens_BL, targets_BL, source_B, None)
        ends_C = np.concatenate(ends)
        targets_BL.reshape(-1)[ends_C - 1] = IGNORE
        row_ends = np.arange(1, len(windows) + 1) * length
        bounds = np.union1d(ends_C, row_ends)
        documents = PackedDocuments.of_lengths(np.diff(bounds, prepend=0), tokens_BL.shape)
        return Batch(tokens_BL, targets_BL, source_B, documents)

    def ledger(self, position: int) -> dict[str, int]:
        """Input tokens of each source in the first ``position`` samples: L a sample, exactly."""
        counts = self.mixture.counts(position).tolist()
        return {
            name: count * self.sequence_length
            for name, count in zip(self.sources, counts, strict=True)
        }

    def epochs(self, position: int) -> dict[str, float]:
        """How often each source was read in the first ``position`` samples."""
        return {
            name: tokens / order.store.num_tokens
            for (name, tokens), order in zip(
                self.ledger(position).items(), self._train, strict=True
            )
        }

    def validation(self, count: int, batch_sequences: int = 1) -> dict[str, list[Batch]]:
        """The first ``count`` sequences of each held-out split, in batches of one size.

        A last batch that is not full is filled with rows that do not count.
        Documents come in the order in which they are stored. A split of fewer than ``count``
        sequences gives what it has, which is logged; its last sequence goes on at the split's
        beginning, and the targets there do not count, so that none counts twice.
        """
        assert count > 0
        found = {}
        for name, order in self._validation.items():
            num_targets = order.store.num_tokens - 1
            available = -(-num_targets // self.sequence_length)
            if available < count:
                _log.warning(
                    "validation split of source %s has %d sequences of %d tokens, fewer than the "
                    "%d asked for (%s)",
                    *(name, available, self.sequence_length, count, order.store.prefix),
                )
            found[name] = [
                self._held_out(name, order, range(k, k + batch_sequences), min(count, available))
                for k in range(0, min(count, available), batch_sequences)
            ]
            if not any(batch.num_targets for batch in found[name]):
                raise UserError(
                    f"the first {count} sequences of {order.store.prefix} hold nothing to predict; "
                    "raise evaluation.sequences_per_source or prepare a larger held-out split"
                )
        return found

    def _held_out(self, name: str, order: DocumentOrder, indices: range, end: int) -> Batch:
        """The windows at ``indices``; those from ``end`` on are filling."""
        source_B = np.full(len(indices), self.sources.index(name), np.int64)
        batch = self._assemble([(order, min(index, end - 1)) for index in indices], source_B)
        num_targets = order.store.num_tokens - 1
        for row, index in enumerate(indices):
            remaining = num_targets - index * self.sequence_length if index < end else 0
            batch.targets_BL[row, max(0, remaining) :] = IGNORE
        return batch

    def fingerprints(self) -> dict[str, str]:
        """A name for the contents of each source's training files, wherever they are.

        It covers the whole index (every document's length), the number of tokens, and the first
        and last tokens: enough to notice another preparation, cheap enough for terabytes.
        """
        return {
            name: fingerprint_of(order.store)
            for name, order in zip(self.sources, self._train, strict=True)
        }

    def describe(self) -> dict[str, Any]:
        """What the data are, for a run's record: sizes, shares and fingerprints (JSON)."""
        sources = {}
        for name, share, order in zip(self.sources, self.mixture.shares, self._train, strict=True):
            held_out = self._validation.get(name)
            sources[name] = {
                "share": share,
                "train": _describe(order.store),
                "validation": None if held_out is None else _describe(held_out.store),
            }
        return {
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "packing": "per_document" if self.per_document else "concatenated",
            "sources": sources,
        }


def fingerprint_of(store: TokenStore) -> str:
    """SHA-256 (16 digits) of a store's document lengths, first and last tokens."""
    digest = hashlib.sha256(np.ascontiguousarray(store.lengths).tobytes())
    for document in (0, store.num_documents - 1):
        length = int(store.lengths[document])
        for start in (0, max(0, length - 4096)):
            tokens = store.read(document, start, min(length, start + 4096))
            digest.update(np.asarray(tokens, np.int64).tobytes())
    return digest.hexdigest()[:16]


def _describe(store: TokenStore) -> dict[str, Any]:
    recorded = manifest_of(store.prefix)
    return {
        "prefix": store.prefix,
        "documents": store.num_documents,
        "tokens": store.num_tokens,
        "dtype": store.dtype.name,
        "tokenizer_sha256": recorded[0].tokenizer.sha256 if recorded else None,
        "fingerprint": fingerprint_of(store),
        "files_sha256": (
            {name: file.sha256 for name, file in recorded[1].files.items()} if recorded else None
        ),
    }
