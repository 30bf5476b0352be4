"""Where a run stands in each of its sources: which sample comes next, and what was read so far."""

# B samples, S sources, L tokens in a sample

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from allometry.configs.data import DocumentData, SequenceData
from allometry.configs.errors import UserError
from allometry.data.changes import Change, ChangingMixture, check_sum, declared, followed


@dataclass(frozen=True)
class Account:
    """What was read of a source: ``tokens`` by this run, ``unique_tokens`` of them never before.

    ``epochs``: how often the source has been read through and ``samples`` how many of its samples
    have been read, by this run and those that it goes on after.
    """

    tokens: int
    unique_tokens: int
    epochs: float
    samples: int


def samples_read(run: Mapping[str, Any], name: str) -> int | None:
    """Samples of a source that a run has read, as its export tells; None: it does not tell."""
    state = run.get("reading")
    return None if state is None else int(state["ledger"].get(name, {"samples": 0})["samples"])


class Reading(ABC):
    """The samples of a data configuration, as a function of their position.

    A run that goes on at a checkpoint follows ``resumed``; one whose weights come from another run
    may go on ``after`` what that one has read. Sources are numbered as in the configuration.
    """

    def __init__(self, data: SequenceData | DocumentData, seed: int) -> None:
        self.data = data
        self.seed = seed
        self.sequence_length = data.sequence_length
        self.sources = tuple(source.name for source in data.sources)
        self.mixture = ChangingMixture(declared(data), self.sources)
        self.starts = np.zeros(len(self.sources), np.int64)
        """Samples of each source that this run goes on after [S]."""

    @abstractmethod
    def _tokens_in(self, source: int, samples: int) -> int:
        """Tokens that the ledger counts in the first ``samples`` samples of a source."""

    @abstractmethod
    def _unique_in(self, source: int, samples: int) -> int:
        """Of these the different ones."""

    @abstractmethod
    def _epoch_tokens(self, source: int) -> int:
        """Tokens that the ledger counts in an epoch of a source."""

    @abstractmethod
    def fingerprints(self) -> dict[str, str]:
        """A name for the contents of each source's training files."""

    def samples(self, position: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source of each of ``count`` samples from ``position`` on and its number in the source.

        A source and a number are a sample's identity: they say which tokens it holds.
        """
        source_B, index_B = self.mixture.sources(position, count)
        return source_B, index_B + self.starts[source_B]

    def ledger(self, position: int) -> dict[str, int]:
        """Tokens of each source in the first ``position`` samples, exactly."""
        read = self._read(position, unique=False)
        return {name: account.tokens for name, account in read.items()}

    def accounts(self, position: int) -> dict[str, Account]:
        """What the first ``position`` samples have read of each source, exactly."""
        return self._read(position, unique=True)

    def _read(self, position: int, *, unique: bool) -> dict[str, Account]:
        """``accounts``, or without counting unique tokens, which takes longer."""
        accounts = {}
        counts = self.mixture.counts(position).tolist()
        for source, (start, count) in enumerate(zip(self.starts.tolist(), counts, strict=True)):
            end, new = start + count, 0
            tokens = self._tokens_in(source, end)
            if unique:
                new = self._unique_in(source, end) - self._unique_in(source, start)
            accounts[self.sources[source]] = Account(
                tokens=tokens - self._tokens_in(source, start),
                unique_tokens=new,
                epochs=tokens / self._epoch_tokens(source),
                samples=end,
            )
        return accounts

    def tokens(self, position: int) -> int:
        """Tokens in the first ``position`` samples, all sources together."""
        return sum(self.ledger(position).values())

    def epochs(self, position: int) -> dict[str, float]:
        """How often each source has been read after the first ``position`` samples."""
        read = self._read(position, unique=False)
        return {name: account.epochs for name, account in read.items()}

    def state(self, position: int) -> dict[str, Any]:
        """What a checkpoint says of the data read in the first ``position`` samples (JSON)."""
        return {
            "mixture": [change.describe() for change in self.mixture.changes],
            "starts": dict(zip(self.sources, self.starts.tolist(), strict=True)),
            "ledger": {name: asdict(account) for name, account in self.accounts(position).items()},
            "order": self._order(),
        }

    def resumed(self, state: Mapping[str, Any], position: int) -> Self:
        """The same, of a run at ``position`` that has followed the ``state`` of a checkpoint.

        Its samples so far are what they were; from ``position`` on the shares are those of this
        configuration. Each source goes on at its next sample.

        Raises:
            UserError: a source that the run has read is missing.
        """
        past = [Change(**change) for change in state["mixture"]]
        for change in past:
            gone = [n for n, share in change.shares.items() if share and n not in self.sources]
            if gone and change.position < position:
                raise UserError(
                    f"data.sources has no {gone[0]!r}, of which this run has read "
                    f"{state['ledger'][gone[0]]['tokens']} tokens; leave it there, with weight: 0 "
                    "if no more of it is to be read"
                )
        known = [
            Change(change.position, {n: s for n, s in change.shares.items() if n in self.sources})
            for change in past
        ]
        starts = [state["starts"].get(name, 0) for name in self.sources]
        return self._with(followed(known, declared(self.data), position), starts)

    def after(self, ancestors: Sequence[Mapping[str, Any]]) -> Self:
        """The same, each source after what ``ancestors`` have read of it (as exports tell).

        A source of which they have read nothing begins at its beginning.

        Raises:
            UserError: there are no ancestors, or what one has read cannot be continued.
        """
        if not ancestors:
            raise UserError(
                "data.continue_sources: true has nothing to go on after, as no run is known that "
                "these weights come from; name it in run.initial with keep: [weights, data], or "
                "leave it out"
            )
        starts = [0] * len(self.sources)
        fingerprints = self.fingerprints()
        for run in ancestors:
            for name, fingerprint in run.get("data", {}).items():
                here = [n for n, known in fingerprints.items() if known == fingerprint]
                if here and samples_read(run, name) != 0:
                    read = self._read_of(run, name, here)
                    at = self.sources.index(name)
                    starts[at] = max(starts[at], read)
        return self._with(self.mixture.changes, starts)

    def _read_of(self, run: Mapping[str, Any], name: str, here: list[str]) -> int:
        """Samples that an ancestor has read of source ``name``, whose documents ``here`` has."""
        state, problem = run.get("reading"), None
        if state is None:
            problem = "its export does not say how much of them; export it again"
        elif state["order"] != self._order():
            before, now = (
                ", ".join(f"{key}={value}" for key, value in order.items())
                for order in (state["order"], self._order())
            )
            problem = f"in another order ({before}, and here {now}); set these as they were there"
        elif name not in here:
            problem = f"under the name {name!r}, which their order depends on; name the source so"
        if problem is not None:
            raise UserError(
                f"data.continue_sources (or data in run.initial.keep) cannot go on in source "
                f"{here[0]!r}: {run['run']} has read its documents {problem}, or leave that out"
            )
        return int(state["ledger"][name]["samples"])  # type: ignore[index]

    def _order(self) -> dict[str, Any]:
        """What decides which tokens a sample of a source holds, besides the source."""
        return {"run.seed": self.seed, "data.sequence_length": self.sequence_length}

    def _with(self, changes: Sequence[Change], starts: Sequence[int]) -> Self:
        made = copy.copy(self)
        made.mixture = ChangingMixture(changes, self.sources)
        made.starts = np.array(starts, np.int64)
        return made

    def check_run(self, samples: int) -> None:
        """Check a whole run of so many samples before its first one, from the plan alone.

        Raises:
            UserError: a source runs dry: it would be read more often than its ``max_epochs``; a
                change of ``replay`` lies past the end; shares do not sum to 1.
        """
        check_sum(self.data)
        tokens = samples * self.sequence_length
        for change in self.data.replay.changes if self.data.replay else ():
            if change.after_tokens >= tokens:
                raise UserError(
                    f"data.replay.changes: after_tokens={change.after_tokens} is past the end of "
                    f"the run, which has {tokens} tokens; lower it or leave it out"
                )
        read = self._read(samples, unique=False)
        for source in self.data.sources:
            wanted, most = read[source.name], source.max_epochs
            if most is not None and wanted.epochs > most:
                raise UserError(self._dry(source.name, wanted, most, samples))

    def _dry(self, name: str, wanted: Account, most: float, samples: int) -> str:
        """What a user should know of a source that is not enough for the run."""
        first = bisect_left(
            range(samples + 1),
            True,
            key=lambda position: self._read(position, unique=False)[name].epochs > most,
        )
        epoch = self._epoch_tokens(self.sources.index(name))
        before = round(wanted.epochs * epoch) - wanted.tokens
        return (
            f"data source {name!r} runs dry after {(first - 1) * self.sequence_length} of the "
            f"run's {samples * self.sequence_length} tokens: it has {epoch} tokens and may be read "
            f"max_epochs={most:g} times, but the run wants {wanted.tokens} tokens of it"
            + (f" after the {before} that runs before it have read" if before else "")
            + "; lower its weight (or data.replay.ratio), shorten the run, add data or raise "
            "max_epochs"
        )
