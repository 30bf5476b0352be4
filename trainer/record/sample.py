"""Select a few sequences of a step's batch for the monitors, the same tokens in every layout."""

# L tokens of a sequence

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from allometry.data.batch import IGNORE
from allometry.data.documents import DocumentStream
from allometry.data.sources import Sources
from allometry.data.stream import Stream
from allometry.models.documents import Documents
from allometry.parallel.mesh import Mesh
from allometry.trainer.feed import DeviceBatch

Line = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""Tokens, targets and positions [L]; a document begins at each position 0."""


class Sample:
    """The first ``sequences`` sequences of a step, or prefixes of its first documents.

    Documents are cut to their first ``longest`` tokens, which does not change the activations of
    these tokens in causal attention, so that each fits on one rank. Sequences are distributed over
    the hdp ranks as micro-batches of one sequence; a rank without a sequence runs one that is not
    counted, because all ranks gather sharded parameters together. Lines are padded to a multiple of
    tp; padding is not counted either.
    """

    def __init__(self, stream: Sources, sequences: int, longest: int, mesh: Mesh) -> None:
        assert isinstance(stream, Stream | DocumentStream)
        self._stream, self._mesh = stream, mesh
        self._sequences, self._longest = sequences, longest

    def __call__(self, position: int, count: int) -> list[DeviceBatch]:
        """Return this rank's micro-batches of the step of ``count`` samples from ``position``."""
        lines = self._lines(position, count)
        hdp = self._mesh.hdp
        made = []
        for turn in range(-(-len(lines) // hdp.size)):
            place = turn * hdp.size + hdp.rank
            idle = place >= len(lines)
            made.append(self._batch(lines[0 if idle else place](), position, idle))
        return made

    def _lines(self, position: int, count: int) -> list[Callable[[], Line]]:
        """Return a function that reads each line of the sample; there is at least one."""
        stream = self._stream
        if isinstance(stream, Stream):
            places = range(position, position + min(self._sequences, count))
            return [lambda at=place: _sequence(stream, at) for place in places]
        pieces = stream.pieces(position, count)

        def prefix(index: int) -> Line:
            length = min(int(pieces.lengths[index]), self._longest)
            tokens, targets = pieces.read(index, 0, length)
            return tokens, targets, np.arange(length)

        number = min(self._sequences, len(pieces))
        assert number, "a step without documents is refused before it is run"
        return [lambda index=i: prefix(index) for i in range(number)]

    def _batch(self, line: Line, position: int, idle: bool) -> DeviceBatch:
        tokens, targets, positions = line
        held = len(tokens)
        padding = -held % self._mesh.tp.size
        counted = np.arange(held + padding) < (0 if idle else held)
        positions = np.append(positions, np.arange(padding))
        starts = np.flatnonzero(positions == 0)
        cuts = np.append(starts, held + padding)

        def row(values: NDArray[np.int64], fill: int) -> torch.Tensor:
            padded = np.append(values, np.full(padding, fill, np.int64))
            return torch.as_tensor(padded, device=self._mesh.device)[None]

        documents = Documents(
            cu_lengths=torch.as_tensor(cuts.astype(np.int32), device=self._mesh.device),
            max_length=int(np.diff(cuts).max()),
            positions_BL=torch.as_tensor(positions, device=self._mesh.device)[None],
            counted_BL=torch.as_tensor(counted, device=self._mesh.device)[None],
            cu_host=torch.as_tensor(cuts.astype(np.int32)),
        )
        tokens_BL = row(tokens, 0)
        sources = torch.zeros_like(tokens_BL)
        return DeviceBatch(tokens_BL, row(targets, IGNORE), sources, documents, position)


def _sequence(stream: Stream, position: int) -> Line:
    batch = stream.batch(position, 1)
    tokens, targets = (
        np.asarray(x)[0].astype(np.int64) for x in (batch.tokens_BL, batch.targets_BL)
    )
    if batch.documents is None:
        return tokens, targets, np.arange(len(tokens))
    return tokens, targets, np.asarray(batch.documents.positions_BL)[0].astype(np.int64)
