"""Prototypes: scores by distance to the nearest cluster centre (arXiv 2206.14486)."""

# N documents, K clusters

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.data.select.features import (
    batches,
    drawn,
    embedder,
    largest_id,
    read,
    require,
    stacked,
)
from allometry.data.store import TokenStore

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Prototypes:
    """Scores: distance to the nearest centre; NaN for empty documents and duplicates.

    ``clusters`` (int32, N): the nearest centre, -1 for empty documents. ``duplicates``: number of
    documents that lost their score as near-duplicates.
    """

    scores: NDArray[np.float32]
    clusters: NDArray[np.int32]
    duplicates: int


def prototypes(
    store: TokenStore,
    count: int,
    *,
    sample: int = 1_000_000,
    kind: str = "tfidf",
    duplicates_from: float | None = 0.95,
    seed: int = 0,
) -> Prototypes:
    """Score documents by their distance to the nearest of ``count`` k-means centres.

    Centres are fitted to ``sample`` documents, as unit vectors. Within a cluster, a document whose
    cosine to an earlier document is at least ``duplicates_from`` loses its score (2308.12284
    removes these before the ranking); None keeps all. For example,
    ``prototypes(store, 100).scores``.

    Raises:
        UserError: scikit-learn is missing, the embedder is unknown, or there are too few documents.
    """
    cluster = require("sklearn.cluster")
    sampled = drawn(store, sample, seed)
    if len(sampled) < 2 * count:
        raise UserError(
            f"--k={count} clusters of {len(sampled)} documents have fewer than two each; lower --k"
        )
    width = 1 + largest_id(store, np.flatnonzero(store.lengths))
    embed = embedder(kind, [(store, sampled)], width)
    means = cluster.MiniBatchKMeans(
        count, random_state=seed, n_init=3, batch_size=max(1024, 2 * count)
    ).fit(stacked(embed.rows, store, sampled))
    scores = np.full(store.num_documents, np.nan, np.float32)
    clusters = np.full(store.num_documents, -1, np.int32)
    for part in batches(store, np.flatnonzero(store.lengths > 0)):
        distances_NK = means.transform(embed.rows(read(store, part)))
        clusters[part] = distances_NK.argmin(1)
        scores[part] = distances_NK.min(1)
    dropped = 0
    if duplicates_from is not None:
        for number in range(count):
            again = _duplicates(store, embed, np.flatnonzero(clusters == number), duplicates_from)
            scores[again] = np.nan
            dropped += len(again)
    return Prototypes(scores, clusters, dropped)


def _duplicates(
    store: TokenStore, embed: Any, members: NDArray[np.int64], from_cosine: float
) -> NDArray[np.int64]:
    """Return the ``members`` whose cosine to an earlier one is ``from_cosine`` or more."""
    if len(members) < 2:
        return members[:0]
    rows = embed.rows(read(store, members))
    again = np.zeros(len(members), np.bool_)
    for start in range(0, len(members), _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, len(members))
        cosines = rows[start:stop] @ rows[:stop].T
        cosines = cosines.toarray() if hasattr(cosines, "toarray") else np.asarray(cosines)
        before = np.arange(stop)[None, :] < np.arange(start, stop)[:, None]
        again[start:stop] = (before & (cosines >= from_cosine)).any(1)
    return members[again]
