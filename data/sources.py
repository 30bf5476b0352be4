"""The sources of a run: token files, shares of the samples, and facts for the record."""

# S sources

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from allometry.configs.data import DocumentData, SequenceData, Source
from allometry.configs.errors import UserError
from allometry.data.changes import DataStage
from allometry.data.manifest import manifest_of
from allometry.data.order import DocumentOrder
from allometry.data.reading import Reading
from allometry.data.select.kept import Selection, select_documents
from allometry.data.store import TokenStore
from allometry.data.tokenizer import check_tokenizer

_log = logging.getLogger(__name__)


class Sources(Reading):
    """Training and held-out documents of a data configuration; one ``DocumentOrder`` per source.

    ``mixture`` maps a position to a source's sample; sample i of a source corresponds to a window
    of L tokens in its token stream, and subclasses define the sample's content in this window.
    Results do not depend on earlier requests, on the number of ranks, or on the grouping of
    positions into batches.

    Raises UserError for token files that cannot be used or were made with different tokenizers.
    """

    def __init__(
        self,
        data: SequenceData | DocumentData,
        seed: int,
        stages: Sequence[DataStage] = (),
        *,
        whole: bool,
    ) -> None:
        """``whole``: targets do not cross documents, so a store needs a document of two tokens."""
        super().__init__(data, seed, stages)
        self.selections: dict[str, Selection] = {}
        """Selected training documents of sources with a ``select``."""
        self._train = [
            DocumentOrder(_checked(self._documents(source), whole=whole), source.name, seed)
            for source in data.sources
        ]
        self._validation = {
            source.name: DocumentOrder(
                _checked(TokenStore(source.validation), whole=whole), source.name, None
            )
            for source in data.sources
            if source.validation is not None
        }
        check_tokenizer(data.tokenizer, [store.prefix for store in self.stores])
        self._settle()

    def _documents(self, source: Source) -> TokenStore:
        """Return the training documents of a source, filtered by its ``select`` if it has one."""
        store = TokenStore(source.train)
        if source.select is None:
            return store
        kept = select_documents(store, source.select, source.name)
        self.selections[source.name] = kept
        return store.only(kept.documents)

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Return the settings in ``describe`` other than the sources."""

    @abstractmethod
    def _epoch_squares(self, source: int) -> float:
        """Return the expected sum of squared document lengths in an epoch, as trained."""

    def _epoch_tokens(self, source: int) -> int:
        return self._train[source].store.num_tokens

    def by_kind(self, tokens: Mapping[str, int]) -> dict[str, int]:
        """Return token counts by source kind; empty if all sources are natural.

        ``tokens``: tokens of each source, as returned by ``ledger``.
        """
        sums = sums_by_kind({source.name: source.kind for source in self.data.sources}, tokens)
        return {} if set(sums) <= {"natural"} else sums

    @property
    def stores(self) -> tuple[TokenStore, ...]:
        """All token files, training before held-out."""
        orders = [*self._train, *self._validation.values()]
        return tuple(order.store for order in orders)

    def squared_lengths_per_token(self, first: int = 0, last: int | None = None) -> float:
        """Return the expected sum of squared document lengths in training, divided by tokens.

        ``DocumentFlops`` computes the FLOPs of attention from this value, which needs the index
        alone. The average is over the samples from ``first`` to ``last`` (exclusive), or over the
        mixture at ``first`` if ``last`` is None.
        """
        squares = tokens = 0.0
        shares = list(self.mixture.shares(first).values())
        if last is not None and last > first:
            shares = (self.mixture.counts(last) - self.mixture.counts(first)).tolist()
        for source, share in enumerate(shares):
            weight = share / self._train[source].store.num_tokens  # a window's share of an epoch
            squares += weight * self._epoch_squares(source)
            tokens += weight * self._epoch_tokens(source)
        return squares / tokens

    def fingerprints(self) -> dict[str, str]:
        """Return an identifier of the contents of each source's training files.

        It is ``TokenStore.fingerprint``, which does not depend on paths, followed by the
        selection's fingerprint if the source has a ``select``.
        """
        found = {}
        for name, order in zip(self.sources, self._train, strict=True):
            kept = self.selections.get(name)
            found[name] = order.store.fingerprint + (f":{kept.fingerprint}" if kept else "")
        return found

    def describe(self) -> dict[str, Any]:
        """Return sizes, shares and fingerprints of the data for a run's record (JSON)."""
        sources = {}
        tags = {source.name: _tags(source) for source in self.data.sources}
        for (name, share), order in zip(self.mixture.shares().items(), self._train, strict=True):
            held_out = self._validation.get(name)
            sources[name] = {
                "share": share,
                **tags[name],
                "train": _describe(order.store),
                "validation": None if held_out is None else _describe(held_out.store),
            }
            if name in self.selections:
                sources[name]["select"] = self.selections[name].describe()
        settings = {"seed": self.seed, "sequence_length": self.sequence_length, **self._settings()}
        mixture = [change.describe() for change in self.mixture.changes]
        return {**settings, "sources": sources, "mixture": mixture}

    def _held_out_windows(self, name: str, available: int, count: int) -> list[int]:
        """Return ``count`` evenly spaced windows of a held-out split, or all if it has fewer.

        Fewer windows than ``count`` are logged.
        """
        if available < count:
            _log.warning(
                "validation split of source %s has %d sequences of %d tokens, fewer than the "
                "%d asked for (%s)",
                *(name, available, self.sequence_length, count),
                self._validation[name].store.prefix,
            )
        return evenly(available, min(count, available))


def sums_by_kind(kinds: Mapping[str, str], tokens: Mapping[str, int]) -> dict[str, int]:
    """Return the token counts of each source kind.

    For example, kinds {"web": "natural", "qa": "generated"} and tokens {"web": 8, "qa": 2} give
    {"natural": 8, "generated": 2}.
    """
    sums: dict[str, int] = {}
    for name, count in tokens.items():
        kind = kinds.get(name, "natural")
        sums[kind] = sums.get(kind, 0) + count
    return sums


def _tags(source: Source) -> dict[str, str]:
    """Return the kind and the parent of a source that is not natural, for ``describe``."""
    if source.kind == "natural":
        return {}
    return {"kind": source.kind} | ({} if source.parent is None else {"parent": source.parent})


def evenly(available: int, count: int) -> list[int]:
    """Return ``count`` of the numbers below ``available``, evenly spaced, in order.

    Adjacent documents are similar (files of one folder), so the first ones are not representative.
    For example, ``evenly(10, 2)`` returns [2, 7].
    """
    assert 0 <= count <= available, (count, available)
    return [(2 * k + 1) * available // (2 * count) for k in range(count)]


def _checked(store: TokenStore, *, whole: bool) -> TokenStore:
    longest = int(store.lengths.max()) if whole else store.num_tokens
    if longest < 2:
        raise UserError(
            f"token files {store.prefix} have no document of two tokens, so there is nothing to "
            "predict; prepare them from longer documents"
        )
    return store


def _describe(store: TokenStore) -> dict[str, Any]:
    recorded = manifest_of(store.prefix)
    return {
        "prefix": store.prefix,
        "documents": store.num_documents,
        "tokens": store.num_tokens,
        "dtype": store.dtype.name,
        "tokenizer_sha256": recorded[0].tokenizer.sha256 if recorded else None,
        "fingerprint": store.fingerprint,
        "files_sha256": (
            {name: file.sha256 for name, file in recorded[1].files.items()} if recorded else None
        ),
    }
