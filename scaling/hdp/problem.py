"""Input of the policies: the documents of a step, with the ranks each needs and their cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from allometry.configs.errors import UserError
from allometry.configs.execution import ContextConfig
from allometry.scaling.hdp.cost import CostModel, Floats
from allometry.scaling.offload import SELECTIVE, check_layers

Ints = npt.NDArray[np.int64]

_STEP = 1.1
"""Growth factor of tried degrees, if communication makes the first degree insufficient."""
_WORTH = 0.98
"""Maximum ratio of times that justifies more ranks if no degree reaches the goal."""


class Draft(NamedTuple):
    """A unit without assigned ranks."""

    documents: tuple[int, ...]
    degree: int
    cost: float
    offload: float


class Placed(NamedTuple):
    """Drafts, the ring of each draft, and the draft indices of each rank in order."""

    drafts: list[Draft]
    rings: list[tuple[int, ...]]
    orders: list[list[int | None]]


@dataclass(frozen=True)
class Problem:
    """Documents to assign, and the constraints.

    ``usable``: tokens of documents in one micro-batch of a rank: the capacity, rounded down to the
    multiple to which micro-batches are padded. ``layers``: layers of a rank whose activations the
    capacity refers to.

    Selective offload (arXiv 2502.21231, eq. 3): of l layers two keep their activations on the
    device, and k of the others may offload them, a share r = k / (l - 2). A member with c tokens
    then stores (l - k) Act(c), so c may exceed the capacity as long as (l - k) c <= l x capacity. k
    is limited by the transfers that computation hides (``CostModel.hidden_share``). Only documents
    longer than the capacity of a rank are offloaded.
    """

    lengths: Ints
    ranks: int
    context: ContextConfig
    cost: CostModel
    layers: int
    multiple: int
    pp: int

    @classmethod
    def of(
        cls,
        lengths: Sequence[int] | Ints,
        ranks: int,
        context: ContextConfig,
        cost: CostModel,
        layers: int,
        multiple: int,
        pp: int = 1,
    ) -> Problem:
        """Build the problem, and check that all documents fit.

        Raises:
            UserError: the longest document does not fit, or no layer can be offloaded; the message
                names the keys and valid values.
        """
        problem = cls(
            np.asarray(lengths, dtype=np.int64), ranks, context, cost, layers, multiple, pp
        )
        assert problem.lengths.size, "a step has documents"
        assert problem.lengths.min() >= 1, "a document has tokens"
        longest = int(problem.lengths.max())
        capacity = context.capacity_tokens
        if context.offload == "selective":
            check_layers(SELECTIVE, layers)
        if problem.usable == 0:
            raise UserError(
                f"parallel.context.capacity_tokens={capacity} is less than parallel.tp={multiple}, "
                f"to which micro-batches are filled up; use at least {multiple}"
            )
        static = context.policy == "static"
        if static and ranks % context.degree:
            raise UserError(
                f"parallel.context.degree={context.degree} must divide the {ranks} hdp ranks"
            )
        most = context.degree if static else ranks
        if longest > most * problem.usable:
            key = f"parallel.context.degree={most}" if static else f"parallel.hdp={ranks}"
            need = -(-longest // problem.usable)
            member = -(-longest // most)
            wide = -(-member // multiple) * multiple
            raise UserError(
                f"a document of {longest} tokens does not fit {key} x "
                f"parallel.context.capacity_tokens={capacity}; set data.max_document_tokens to "
                f"{most * problem.usable} or less, parallel.context.capacity_tokens to {wide} or "
                f"more, or {key.split('=')[0]} to {need} or more"
            )
        return problem

    @cached_property
    def usable(self) -> int:
        """Maximum tokens of documents in a micro-batch of one rank."""
        return self.context.capacity_tokens // self.multiple * self.multiple

    @cached_property
    def tokens(self) -> Floats:
        """Lengths as floats."""
        return self.lengths.astype(np.float64)

    @cached_property
    def pairs(self) -> Floats:
        """Twice the (query, key) pairs of each document: s (s + 1)."""
        return self.tokens * (self.tokens + 1)

    @cached_property
    def alone(self) -> Floats:
        """Rank-seconds of each document, with its share of the fixed cost of a full micro-batch."""
        own = self.cost.micro_batch_s / self.usable
        return self.cost.compute(self.tokens, self.pairs) + own * self.tokens

    @cached_property
    def ideal(self) -> float:
        """Seconds of the step for perfect balance without communication."""
        return float(self.alone.sum()) / self.ranks

    @cached_property
    def descending(self) -> Ints:
        """Document indices by descending length, ties by index."""
        return np.argsort(-self.lengths, kind="stable")

    @cached_property
    def fewest(self) -> Ints:
        """Smallest number of ranks on which each document fits."""
        most = np.full(self.lengths.shape, self.usable, dtype=np.int64)
        if self.context.offload == "selective":
            share = self.cost.hidden_share(self.tokens)
            away = np.floor(share * (self.layers - 2) + 1e-9).astype(np.int64)
            room = self.layers * self.context.capacity_tokens // (self.layers - away)
            most = np.maximum(most, room // self.multiple * self.multiple)
        return -(-self.lengths // most)

    def offloads(self, documents: Ints, degrees: Ints) -> Floats:
        """Return r, the share of layers that each document offloads on ``degrees`` ranks."""
        if self.context.offload == "none":
            return np.zeros(len(documents))
        member = -(-self.lengths[documents] // degrees)
        member = -(-member // self.multiple) * self.multiple
        kept = self.layers * self.context.capacity_tokens // member
        away = np.where(member > self.usable, self.layers - kept, 0)
        return np.asarray(away / (self.layers - 2))

    def degree_range(self, document: int) -> tuple[int, int]:
        """Return the smallest and the largest allowed degree of a document.

        Chunks have at least ``min_chunk_tokens``, unless the document needs the ranks to fit.
        """
        fewest = int(self.fewest[document])
        return fewest, max(fewest, min(int(self._finest[document]), self.ranks))

    def floor(self, documents: Ints, rest: float) -> float:
        """Return a lower bound of the step time for ``documents`` plus ``rest`` rank-seconds.

        In T seconds each document has a degree with a time of at most T, and uses at least the
        rank-seconds of the cheapest such degree; the total must not exceed ranks x T. The bound is
        found by bisection, to about one percent, since degrees are tried in steps of 5 percent.
        """
        if not len(documents):
            return rest / self.ranks
        lengths, counts = np.unique(self.lengths[documents], return_counts=True)
        first = np.searchsorted(-self.lengths[documents], -lengths)  # in descending order
        kept = documents[first]
        grid = np.unique(np.ceil(1.05 ** np.arange(200)).clip(max=self.ranks).astype(np.int64))
        fewest = self.fewest[kept][:, None]
        most = np.maximum(fewest, np.minimum(self._finest[kept], self.ranks)[:, None])
        degrees = np.clip(grid[None], fewest, most)
        tokens, pairs = (x[kept][:, None] for x in (self.tokens, self.pairs))
        seconds = self.cost.times(tokens, pairs, degrees)
        work = seconds * degrees * counts[:, None]
        cheapest = float(work.min(axis=1).sum()) + rest
        low = max(float(seconds.min(axis=1).max()), cheapest / self.ranks)
        high = 2 * low
        while self._needs(seconds, work, high) + rest > self.ranks * high:
            low, high = high, 2 * high
        for _ in range(8):
            middle = (low + high) / 2
            fits = self._needs(seconds, work, middle) + rest <= self.ranks * middle
            low, high = (low, middle) if fits else (middle, high)
        return low

    @staticmethod
    def _needs(seconds: Floats, work: Floats, goal: float) -> float:
        return float(np.where(seconds <= goal, work, np.inf).min(axis=1).sum())

    @cached_property
    def _finest(self) -> Ints:
        """Largest number of ranks with chunks of ``min_chunk_tokens``; may be 0."""
        return self.lengths // (2 * self.context.min_chunk_tokens)

    def degrees(self, documents: Ints, goal: float) -> Ints:
        """Return the smallest degree at which each document takes at most ``goal`` seconds.

        If communication prevents every degree from reaching the goal, returns the degree after
        which more ranks gain too little. Chunks have at least ``min_chunk_tokens``, unless a
        document needs the ranks to fit.
        """
        tokens, pairs = self.tokens[documents], self.pairs[documents]
        fewest = self.fewest[documents]
        most = np.maximum(fewest, np.minimum(self._finest[documents], self.ranks))
        best, seconds = fewest.copy(), self.cost.times(tokens, pairs, fewest)
        # The degree that would suffice without communication.
        goal_s = max(goal - self.cost.micro_batch_s, 1e-3 * goal)
        hoped = np.ceil(self.cost.compute(tokens, pairs) / goal_s)
        degree = np.maximum(np.minimum(hoped, self.ranks).astype(np.int64), fewest + 1)
        open_ = np.flatnonzero((seconds > goal) & (fewest < most))
        while open_.size:
            degree[open_] = np.minimum(degree[open_], most[open_])
            tried_s = self.cost.times(tokens[open_], pairs[open_], degree[open_])
            better = open_[(tried_s < _WORTH * seconds[open_]) | (tried_s <= goal)]
            best[better] = degree[better]
            seconds[open_] = np.minimum(seconds[open_], tried_s)
            open_ = open_[(tried_s > goal) & (degree[open_] < most[open_])]
            tried = np.ceil(degree[open_] * _STEP).astype(np.int64)
            degree[open_] = np.maximum(tried, degree[open_] + 1)
        return best

    def rings(self, documents: Ints, degrees: Ints) -> list[Draft]:
        """Return one unit for each document."""
        costs = self.cost.times(self.tokens[documents], self.pairs[documents], degrees)
        shares = self.offloads(documents, degrees)
        columns = (x.tolist() for x in (documents, degrees, costs, shares))
        return [Draft((d,), n, c, r) for d, n, c, r in zip(*columns, strict=True)]

    def packed(self, bins: Sequence[Sequence[int]], degree: int = 1) -> list[Draft]:
        """Return one unit for each bin of documents, on ``degree`` ranks."""
        if not bins:
            return []
        sizes = np.fromiter(map(len, bins), dtype=np.int64, count=len(bins))
        members = np.concatenate([np.asarray(each, dtype=np.int64) for each in bins])
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        tokens, pairs = (np.add.reduceat(x[members], starts) for x in (self.tokens, self.pairs))
        costs = self.cost.times(tokens, pairs, degree).tolist()
        return [Draft(tuple(b), degree, c, 0.0) for b, c in zip(bins, costs, strict=True)]
