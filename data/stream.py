"""The tokens of a run as a pure function of (seed, sample position)."""

# B sequences, L tokens in a sequence, S sources

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from allometry.configs.data import DocumentData, SequenceData
from allometry.configs.errors import UserError
from allometry.data.batch import IGNORE, Batch, PackedDocuments
from allometry.data.changes import DataStage
from allometry.data.documents import DocumentStream
from allometry.data.lines import Windows
from allometry.data.order import DocumentOrder
from allometry.data.sources import Sources


def open_stream(
    data: SequenceData | DocumentData, seed: int, stages: Sequence[DataStage] = ()
) -> Stream | DocumentStream:
    """Open the stream class for ``data.kind``. Raises UserError like ``Sources``.

    For example, ``open_stream(config.data, seed=0).batch(0, 8)`` returns the first 8 sequences of a
    run.
    """
    if data.kind == "documents":
        return DocumentStream(data, seed, stages)
    return Stream(data, seed, stages)


def missing_sources(data: SequenceData | DocumentData) -> list[str]:
    """Return the names of sources whose training files are missing on this machine."""
    return [source.name for source in data.sources if not Path(f"{source.train}.idx").exists()]


class Stream(Sources):
    """Training and held-out sequences of a data configuration.

    A sample is a window [w L, w L + L] of its source's token stream (see ``DocumentOrder``): L
    inputs and the L targets one token later, so that each token is a target once per epoch; the
    windows of an epoch are shuffled.
    """

    data: SequenceData

    def __init__(self, data: SequenceData, seed: int, stages: Sequence[DataStage] = ()) -> None:
        super().__init__(data, seed, stages, whole=data.packing == "per_document")

    @override
    def _settle(self) -> None:
        self.per_document = self.data.packing == "per_document"
        self._windows = [
            Windows(order, self.parts(source)) for source, order in enumerate(self._train)
        ]

    def _settings(self) -> dict[str, Any]:
        return {"packing": "per_document" if self.per_document else "concatenated"}

    def _epoch_squares(self, source: int) -> float:
        """Return the expected sum of squared document lengths, as cut by windows, in an epoch.

        Windows begin at any token of a document, so two tokens of a document at distance k are in
        the same window with probability 1 - k / L.
        """
        store, length = self._train[source].store, self.sequence_length
        if not self.per_document:
            return float(store.num_tokens * length)
        d = store.lengths.astype(np.float64)
        m = np.minimum(d, length)
        pairs = d * (m - 1) - (1 + d / length) * m * (m - 1) / 2
        pairs += (m - 1) * m * (2 * m - 1) / (6 * length)
        return float((d + 2 * pairs)[d > 0].sum())

    def batch(self, position: int, count: int) -> Batch:
        """Return the ``count`` samples from ``position`` on; row i is sample ``position`` + i."""
        source_B, index_B = self.samples(position, count)
        windows = [
            (self._train[source], list(self._windows[source].sample(index)))
            for source, index in zip(source_B.tolist(), index_B.tolist(), strict=True)
        ]
        return self._assemble(windows, source_B)

    def _assemble(
        self,
        windows: list[tuple[DocumentOrder, list[tuple[int, int]]]],
        source_B: NDArray[np.int64],
    ) -> Batch:
        """Return a batch from the runs of each row's window, L tokens in all."""
        length = self.sequence_length
        tokens_BL = np.empty((len(windows), length), np.int64)
        targets_BL = np.empty_like(tokens_BL)
        tokens, targets = tokens_BL.reshape(-1), targets_BL.reshape(-1)
        ends, bounds, at = [], [], 0
        for order, runs in windows:
            for place, count in runs:
                run = np.empty(count + 1, np.int64)  # inputs and one more token
                lengths = order.read(place, run)
                tokens[at : at + count], targets[at : at + count] = run[:-1], run[1:]
                # The last document continues behind the run, so only its last input has a target.
                ends.append(np.cumsum(lengths[:-1]) + at)
                at += count
                bounds.append(at)
        if not self.per_document:
            return Batch(tokens_BL, targets_BL, source_B, None)
        ends_C = np.concatenate(ends)
        targets[ends_C - 1] = IGNORE
        bounds_C = np.union1d(ends_C, bounds)
        documents = PackedDocuments.of_lengths(np.diff(bounds_C, prepend=0), tokens_BL.shape)
        return Batch(tokens_BL, targets_BL, source_B, documents)

    def _tokens_in(self, source: int, samples: int) -> int:
        return self._windows[source].tokens(samples)  # input tokens: L per sample

    def _unique_in(self, source: int, samples: int) -> int:
        return self._windows[source].unique(samples, self._train[source].places_of)

    def validation(self, count: int, batch_sequences: int = 1) -> dict[str, list[Batch]]:
        """Return ``count`` evenly spaced sequences of each held-out split, in batches of one size.

        Documents are in the order in which they are stored. The last batch is padded with rows
        whose targets are ``IGNORE``. A split of fewer than ``count`` sequences returns all of them,
        which is logged; its last sequence wraps around to the split's beginning, where targets are
        ``IGNORE``, so that each target counts once.
        """
        assert count > 0
        by_name = {}
        for name, order in self._validation.items():
            num_targets = order.store.num_tokens - 1
            available = -(-num_targets // self.sequence_length)
            windows = self._held_out_windows(name, available, count)
            by_name[name] = [
                self._held_out(name, order, windows[k : k + batch_sequences], batch_sequences)
                for k in range(0, len(windows), batch_sequences)
            ]
            if not any(batch.num_targets for batch in by_name[name]):
                raise UserError(
                    f"{len(windows)} sequences of {order.store.prefix} hold nothing to predict; "
                    "raise evaluation.sequences_per_source or prepare a larger held-out split"
                )
        return by_name

    def _held_out(self, name: str, order: DocumentOrder, windows: list[int], rows: int) -> Batch:
        """Return a batch of these windows, padded to ``rows`` with copies of the last window."""
        source_B = np.full(rows, self.sources.index(name), np.int64)
        filled = windows + windows[-1:] * (rows - len(windows))
        length = self.sequence_length
        batch = self._assemble([(order, [(w * length, length)]) for w in filled], source_B)
        num_targets = order.store.num_tokens - 1
        for row, window in enumerate(filled):
            remaining = num_targets - window * self.sequence_length if row < len(windows) else 0
            batch.targets_BL[row, max(0, remaining) :] = IGNORE
        return batch
