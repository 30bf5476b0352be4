"""Mixture of a run as a list of changes: as declared, and as followed so far.

A run's mixture is a tuple of ``Change`` objects, the first at sample 0. ``declared(data)`` returns
the changes of a configuration; if a run continues under another configuration,
``followed(past, wanted, position)`` keeps the past changes before ``position`` and takes later ones
from the new configuration. The order of data is therefore a pure function of the seed, the changes
and the position. An edit during a run, a ramp and a training stage have the same form: a change of
shares or of the sample length at a position.
"""

# S sources, L tokens in a sample

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.configs.data import DocumentData, Replay, SequenceData
from allometry.configs.errors import UserError
from allometry.data.mixture import Mixture

STAIRS = 64
"""Largest number of equal steps in a ramp; each step has the ratio at its middle."""


@dataclass(frozen=True)
class Change:
    """Shares of the sources and sample length from sample ``position`` on.

    Shares are multiples of 2**-32 and sum to 1; a source without an entry has share 0. ``length``
    is in tokens. ``limit``: ``max_document_tokens`` of complete documents. ``passed``: number of
    samples that these shares give before the sample at ``position`` and that the run skips.
    """

    position: int
    shares: Mapping[str, float]
    length: int
    limit: int | None = None
    passed: int = 0

    def describe(self) -> dict[str, Any]:
        """Return the change as JSON; ``changes_of`` restores the same bits."""
        said = {"position": self.position, "shares": dict(self.shares), "length": self.length}
        rest = {"limit": self.limit, "passed": self.passed or None}
        return said | {key: value for key, value in rest.items() if value is not None}


@dataclass(frozen=True)
class DataStage:
    """Data of a stage of a run, whose first sample is at ``position``.

    ``samples``: number of samples; None: unlimited. ``name`` None: the stage is the complete run.
    """

    data: SequenceData | DocumentData
    position: int = 0
    samples: int | None = None
    name: str | None = None


def changes_of(state: Mapping[str, Any]) -> tuple[Change, ...]:
    """Return the changes in a checkpoint's ``reading``.

    In older checkpoints, all changes have the only length of the run.
    """
    order = state.get("order", {})
    only = {"length": order.get("data.sequence_length")}
    only["limit"] = order.get("data.max_document_tokens")
    return tuple(Change(**(only | change)) for change in state["mixture"])


def declared(*stages: SequenceData | DocumentData | DataStage) -> tuple[Change, ...]:
    """Return the changes of a configuration, from the weights and ``replay`` of each stage.

    Changes of ``replay`` after the last sample of a stage are dropped. For example,
    ``declared(config.data)`` of data without ``replay`` has one change, at sample 0.
    """
    wanted: list[Change] = []
    for given in stages:
        stage = given if isinstance(given, DataStage) else DataStage(given)
        wanted += (
            replace(change, position=stage.position + change.position)
            for change in _declared(stage.data)
            if stage.samples is None or change.position < stage.samples
        )
    return _merged(wanted)


def _declared(data: SequenceData | DocumentData) -> Iterator[Change]:
    length = data.sequence_length
    limit = data.max_document_tokens if isinstance(data, DocumentData) else None
    weights = {source.name: source.weight for source in data.sources}
    if data.replay is None:
        yield Change(0, _shares(weights), length, limit)
        return
    for tokens, ratio in _ratios(data.replay, length):
        shares = _shares(_with_ratio(weights, data.replay, ratio))
        yield Change(-(-tokens // length), shares, length, limit)


def followed(past: Sequence[Change], wanted: Sequence[Change], position: int) -> tuple[Change, ...]:
    """Return the changes of a run that followed ``past`` up to ``position``, then ``wanted``.

    For example, ``followed(past, declared(data), 1000)`` is the mixture of a run whose data were
    changed at sample 1000.
    """
    kept = [change for change in past if change.position < position]
    rest = [change for change in wanted if change.position > position]
    now = replace(in_force(wanted, position), position=position, passed=0)
    return _merged([*kept, now, *rest])


def passing_over(changes: Sequence[Change], position: int, samples: int) -> tuple[Change, ...]:
    """Return the changes of a run that skips ``samples`` further samples at ``position``."""
    before = [change for change in changes if change.position < position]
    here = in_force(changes, position)
    passed = samples + (here.passed if here.position == position else 0)
    after = [change for change in changes if change.position > position]
    return (*before, replace(here, position=position, passed=passed), *after)


def in_force(changes: Sequence[Change], position: int) -> Change:
    """Return the change that applies to the sample at ``position``."""
    return changes[bisect_right(changes, position, key=lambda change: change.position) - 1]


def _merged(changes: Iterable[Change]) -> tuple[Change, ...]:
    """Drop changes without an effect, and changes replaced by the next one at the same position."""
    kept: list[Change] = []
    for change in changes:
        if kept and kept[-1].position == change.position:
            kept.pop()
        if not kept or change.passed or _present(kept[-1]) != _present(change):
            kept.append(change)
    return tuple(kept)


def _present(change: Change) -> tuple[dict[str, float], int, int | None]:
    shares = {name: share for name, share in change.shares.items() if share}
    return shares, change.length, change.limit


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    return dict(zip(weights, Mixture(list(weights.values())).shares, strict=True))


def check_sum(data: SequenceData | DocumentData) -> None:
    """Raise UserError for weights that look like shares of the batch but do not sum to 1."""
    given = [source.weight for source in data.sources if source.weight]
    total = sum(given)
    near = 0.5 <= total <= 1.5 and abs(total - 1.0) > 0.015  # three times 0.33 is accepted
    if data.replay is None and len(given) > 1 and max(given) < 1.0 and near:
        said = " + ".join(f"{weight:g}" for weight in given)
        raise UserError(
            f"the weights of data.sources, {said}, sum to {total:g} and not to 1; as shares of the "
            "batch they must sum to 1, and as weights that are relative alone write them as whole "
            "numbers"
        )


def _ratios(replay: Replay, length: int) -> Iterator[tuple[int, float]]:
    """Yield the first token of each replay ratio, and the ratio, in order."""
    ratio = replay.ratio
    yield 0, ratio
    for change in replay.changes:
        stairs = min(STAIRS, change.over_tokens // length)
        for stair in range(stairs):
            part = (stair + 0.5) / stairs
            tokens = change.after_tokens + stair * change.over_tokens // stairs
            yield tokens, ratio + part * (change.ratio - ratio)
        ratio = change.ratio
        yield change.after_tokens + change.over_tokens, ratio


def _with_ratio(weights: Mapping[str, float], replay: Replay, ratio: float) -> dict[str, float]:
    """Scale the weights so that ``replay.sources`` sum to ``ratio`` and the others to the rest."""
    old = math.fsum(weights[name] for name in replay.sources)
    new = math.fsum(w for name, w in weights.items() if name not in replay.sources)
    parts = {True: ratio / old if old else 0.0, False: (1.0 - ratio) / new if new else 0.0}
    return {name: weight * parts[name in replay.sources] for name, weight in weights.items()}


class ChangingMixture:
    """Schedule of sources under ``changes``; sources are numbered as in ``names``.

    The schedule is that of ``Mixture``, within a change and across changes: any position is
    computed without the positions before it. For example,
    ``ChangingMixture(declared(data), names).source(7)`` is the source of sample 7 and its number in
    the source.
    """

    def __init__(self, changes: Sequence[Change], names: Sequence[str]) -> None:
        assert changes[0].position == 0
        self.changes = tuple(changes)
        self.names = tuple(names)
        # Ties follow the order in which sources joined the run, so that an edit cannot change them.
        order = list(dict.fromkeys(name for change in changes for name in change.shares))
        assert set(order) <= set(names), (order, names)
        order += [name for name in names if name not in order]
        self._place = np.array([self.names.index(name) for name in order], np.int64)
        self._parts: list[Mixture] = []
        self._passed = [0]  # skipped samples before each part
        for change in changes:
            weights = [change.shares.get(name, 0.0) for name in order]
            self._parts.append(
                self._parts[-1].continued(weights, change.position + self._passed[-1])
                if self._parts
                else Mixture(weights)
            )
            self._passed.append(self._passed[-1] + change.passed)
        self._starts = [change.position for change in changes]

    def shares(self, position: int = 0) -> dict[str, float]:
        """Return each source's share of the samples at ``position``; the shares sum to 1."""
        shares = in_force(self.changes, position).shares
        return {name: shares.get(name, 0.0) for name in self.names}

    def sources(self, position: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return source and sample number of ``count`` samples from ``position`` on.

        Both are int64 [``count``]; the number counts the samples of the source.
        """
        found = []
        number = bisect_right(self._starts, position) - 1
        while True:
            last = number + 1 == len(self._parts)
            here = count if last else min(count, self._starts[number + 1] - position)
            found.append(self._parts[number].sources(position + self._passed[number + 1], here))
            number, position, count = number + 1, position + here, count - here
            if not count:
                break
        source, index = (np.concatenate(column) for column in zip(*found, strict=True))
        return self._place[source], index

    def source(self, position: int) -> tuple[int, int]:
        """Return the source of the sample at ``position`` and its number within the source."""
        source_B, index_B = self.sources(position, 1)
        return int(source_B[0]), int(index_B[0])

    def counts(self, position: int) -> NDArray[np.int64]:
        """Return the number of samples of each source before ``position``, skipped ones included.

        The result is int64, S; without skipped samples its sum is ``position``.
        """
        number = bisect_right(self._starts, position) - 1
        return self._counts(number, position + self._passed[number + 1])

    def passed_over(self, position: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield the skipped ranges up to ``position``: begin and end for each source.

        Both are sample numbers (int64, S); the end is exclusive.
        """
        for number, change in enumerate(self.changes):
            if change.passed and change.position <= position:
                first, last = (change.position + self._passed[number + end] for end in (0, 1))
                yield self._counts(number, first), self._counts(number, last)

    def _counts(self, number: int, place: int) -> NDArray[np.int64]:
        counts = np.zeros(len(self.names), np.int64)
        counts[self._place] = self._parts[number].counts(place)
        return counts
