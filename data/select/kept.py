"""Selected documents of a source: a share of the tokens, by score."""

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
"""Number of sample documents shown of the kept and of the dropped documents."""
SAMPLE_TOKENS = 48


@dataclass(frozen=True)
class Selection:
    """Documents of ``store`` that ``select`` keeps: ``documents`` by number, ascending.

    ``ranked``: all documents with a score, in the order in which they are taken.
    """

    select: Select
    store: TokenStore
    scores: Scores
    ranked: NDArray[np.int64]
    documents: NDArray[np.int64]

    @property
    def fingerprint(self) -> str:
        """Identifier (16 digits) of the kept documents: score file, ``keep`` and ``side``."""
        said = f"{self.scores.record.sha256}:{self.select.keep!r}:{self.select.side}"
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """Return the sizes and settings of the selection, with sample documents (JSON)."""
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
        """Return a few of ``documents``, evenly spaced: number, score and first tokens of each."""
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
    """Return the scored documents in the order of selection, and the kept ones, ascending.

    Documents of the highest (``top``) or lowest (``bottom``) scores are taken until they have the
    share ``keep`` of the tokens, with ties by number; the last document is taken completely.
    ``middle`` drops the same number of tokens at both ends of the ascending scores: a document is
    kept if its first token is between them. Documents without a score are dropped.
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
    """Return the training documents that ``select`` of data source ``source`` keeps.

    Raises:
        UserError: the scores cannot be read or are of another store, or no token is kept.
    """
    scores = read_scores(select.scores, store)
    ranked, documents = kept_documents(scores.values, store.lengths, select.keep, select.side)
    if not len(documents) or not store.lengths[documents].any():
        raise UserError(
            f"data.sources {source}: select.keep={select.keep} of side={select.side} keeps no "
            f"token of {store.prefix} by {select.scores}; raise keep or take another side"
        )
    return Selection(select, store, scores, ranked, documents)
