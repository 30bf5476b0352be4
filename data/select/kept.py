"""Which documents a selection keeps: a share of the tokens, by score."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.configs.data import Select
from allometry.configs.errors import UserError
from allometry.data.select.scores import Scores, read_scores
from allometry.data.store import TokenStore

SAMPLES = 4
"""Documents shown of what is kept, and of what is dropped."""
SAMPLE_TOKENS = 48


@dataclass(frozen=True)
class Selection:
    """What ``select`` keeps of ``store``: ``documents`` by number, ascending.

    ``ranked``: all that have a score, in the order in which they are taken.
    """

    select: Select
    store: TokenStore
    scores: Scores
    ranked: NDArray[np.int64]
    documents: NDArray[np.int64]

    @property
    def fingerprint(self) -> str:
        """16 digits for which documents are kept: of the score file, ``keep`` and ``side``."""
        said = f"{self.scores.record.sha256}:{self.select.keep!r}:{self.select.side}"
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """What was kept by what, with samples of kept and dropped documents (JSON)."""
        record, values = self.scores.record, self.scores.values
        kept = np.zeros(self.store.num_documents, np.bool_)
        kept[self.documents] = True
        inside, outside = self.ranked[kept[self.ranked]], self.ranked[~kept[self.ranked]]
        lowest, highest = (float(end(values[self.documents])) for end in (np.min, np.max))
        return {
            "scores": str(self.scores.path),
            "sha256": record.sha256,
            "scorer": record.scorer,
            "settings": record.settings,
            "versions": record.versions,
            "keep": self.select.keep,
            "side": self.select.side,
            "documents": self.store.num_documents,
            "tokens": self.store.num_tokens,
            "kept_documents": len(self.documents),
            "kept_tokens": int(self.store.lengths[self.documents].sum()),
            "unscored_documents": record.unscored,
            "kept_scores": [lowest, highest],
            "samples": {"kept": self._samples(inside), "dropped": self._samples(outside)},
        }

    def _samples(self, documents: NDArray[np.int64]) -> list[dict[str, Any]]:
        """A few of ``documents``, evenly spread: number, score and first tokens of each."""
        filled = documents[self.store.lengths[documents] > 0]
        count = min(SAMPLES, len(filled))
        chosen = [int(filled[(2 * k + 1) * len(filled) // (2 * count)]) for k in range(count)]
        return [
            {
                "document": number,
                "score": float(self.scores.values[number]),
                "length": int(self.store.lengths[number]),
                "tokens": self.store.read(
                    number, 0, min(SAMPLE_TOKENS, int(self.store.lengths[number]))
                ).tolist(),
            }
            for number in chosen
        ]


def kept_documents(
    values: NDArray[np.float32], lengths: NDArray[np.int64], keep: float, side: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Documents in the order in which they are taken, and those that are kept, ascending.

    Of documents that have a score, those of the highest (``top``) or lowest (``bottom``) scores
    are taken until they have the share ``keep`` of the tokens, ties by number, the last one whole.
    ``middle`` leaves out as many tokens at either end, of ascending scores: a document is kept
    where its first token lies between.
    """
    scored = np.flatnonzero(~np.isnan(values))
    by = -values[scored] if side == "top" else values[scored]
    ranked = scored[np.argsort(by, kind="stable")]
    ends = np.cumsum(lengths[ranked])
    begins, total = ends - lengths[ranked], int(ends[-1]) if len(ends) else 0
    first = (1.0 - keep) / 2.0 * total if side == "middle" else 0.0
    kept = (begins >= first) & (begins < first + keep * total)
    return ranked, np.sort(ranked[kept])


def select_documents(store: TokenStore, select: Select, source: str) -> Selection:
    """What ``select`` of data source ``source`` keeps of its training documents.

    Raises:
        UserError: the scores cannot be read or are of another store, or nothing is kept.
    """
    scores = read_scores(select.scores, store)
    ranked, documents = kept_documents(scores.values, store.lengths, select.keep, select.side)
    if not len(documents) or not store.lengths[documents].any():
        raise UserError(
            f"data.sources {source}: select.keep={select.keep} of side={select.side} keeps no "
            f"token of {store.prefix} by {select.scores}; raise keep or take another side"
        )
    return Selection(select, store, scores, ranked, documents)
