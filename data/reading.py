"""Position of a run in each of its sources: next samples, and the data read so far."""

# B samples, S sources, L tokens in a sample

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from allometry.configs.data import DocumentData, SequenceData
from allometry.configs.errors import UserError
from allometry.data.changes import (
    Change,
    ChangingMixture,
    DataStage,
    changes_of,
    check_sum,
    declared,
    followed,
    passing_over,
)
from allometry.data.lines import Part


@dataclass(frozen=True)
class Account:
    """Tokens read of a source: ``tokens`` by this run, ``unique_tokens`` for the first time.

    ``epochs`` is the number of passes over the source and ``samples`` the number of its samples, by
    this run and the runs that it continues. Both are positions in the source, so skipped samples
    are included there, but not in the token counts.
    """

    tokens: int
    unique_tokens: int
    epochs: float
    samples: int


def samples_read(run: Mapping[str, Any], name: str) -> int | None:
    """Return the number of samples that a run has read of a source, from its export.

    None if the export does not record the data.
    """
    state = run.get("reading")
    return None if state is None else int(state["ledger"].get(name, {"samples": 0})["samples"])


class Reading(ABC):
    """The samples of a data configuration, as a function of their position.

    A run that resumes from a checkpoint uses ``resumed``; a run with the weights of another run may
    continue ``after`` the data of that run. Sources are numbered as in the configuration.
    """

    def __init__(
        self, data: SequenceData | DocumentData, seed: int, stages: Sequence[DataStage] = ()
    ) -> None:
        """``stages``: stages of the run, if any, with the same sources as ``data``."""
        self.data = data
        self.seed = seed
        self.stages = tuple(stages) or (DataStage(data),)
        self.sequence_length = data.sequence_length
        self.sources = tuple(source.name for source in data.sources)
        self.mixture = ChangingMixture(declared(*self.stages), self.sources)
        self.starts = np.zeros(len(self.sources), np.int64)
        """Samples of each source read before this run [S]."""
        self._inherited: dict[str, list[Part]] = {}  # lengths of those samples

    def in_stage(self, number: int) -> Self:
        """Return a copy for the samples of a stage, with its sequence length and limits."""
        made = copy.copy(self)
        made.data = self.stages[number].data
        made.sequence_length = made.data.sequence_length
        made._settle()
        return made

    @abstractmethod
    def _settle(self) -> None:
        """Rebuild state that depends on ``data`` and ``parts``, after these have changed."""

    def parts(self, source: int) -> list[Part]:
        """Return the sample lengths of a source, including samples before this run."""
        name, start = self.sources[source], int(self.starts[source])
        parts = list(self._inherited.get(name, ()))
        for change in self.mixture.changes:
            first = start + int(self.mixture.counts(change.position)[source]) if parts else 0
            while parts and parts[-1].first >= first:
                parts.pop()
            part = Part(first, change.length, change.limit)
            if not parts or parts[-1] != replace(part, first=parts[-1].first):
                parts.append(part)
        return parts

    @abstractmethod
    def _tokens_in(self, source: int, samples: int) -> int:
        """Return the tokens that the ledger counts in the first ``samples`` samples of a source."""

    @abstractmethod
    def _unique_in(self, source: int, samples: int) -> int:
        """Return the distinct tokens in the first ``samples`` samples of a source."""

    @abstractmethod
    def _epoch_tokens(self, source: int) -> int:
        """Return the tokens that the ledger counts in an epoch of a source."""

    def _epochs_in(self, source: int, samples: int) -> float:
        """Return the epochs in the first ``samples`` samples of a source."""
        return self._tokens_in(source, samples) / self._epoch_tokens(source)

    @abstractmethod
    def fingerprints(self) -> dict[str, str]:
        """Return a fingerprint of each source's training files and of its selection."""

    def samples(self, position: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the source of ``count`` samples from ``position`` on, and their numbers in it.

        Source and number (both int64) identify a sample: they determine its tokens.
        """
        source_B, index_B = self.mixture.sources(position, count)
        return source_B, index_B + self.starts[source_B]

    def ledger(self, position: int) -> dict[str, int]:
        """Return the exact number of tokens of each source in the first ``position`` samples."""
        read = self._read(position, unique=False)
        return {name: account.tokens for name, account in read.items()}

    def accounts(self, position: int) -> dict[str, Account]:
        """Return the exact account of each source after the first ``position`` samples."""
        return self._read(position, unique=True)

    def _read(self, position: int, *, unique: bool) -> dict[str, Account]:
        """Return ``accounts``, optionally without unique tokens, which take longer to count."""
        accounts = {}
        counts = self.mixture.counts(position).tolist()
        passed = list(self.mixture.passed_over(position))
        for source, (start, count) in enumerate(zip(self.starts.tolist(), counts, strict=True)):
            end, new = start + count, 0
            tokens = self._tokens_in(source, end) - self._tokens_in(source, start)
            if unique:
                new = self._unique_in(source, end) - self._unique_in(source, start)
            for first_S, last_S in passed:
                places = [start + int(each[source]) for each in (first_S, last_S)]
                before, after = (self._tokens_in(source, place) for place in places)
                tokens -= after - before
                if unique:
                    before, after = (self._unique_in(source, place) for place in places)
                    new -= after - before
            accounts[self.sources[source]] = Account(
                tokens=tokens,
                unique_tokens=new,
                epochs=self._epochs_in(source, end),
                samples=end,
            )
        return accounts

    def window_tokens(self, position: int) -> int:
        """Return the nominal number of tokens of ``position`` samples: their windows' length."""
        changes = self.mixture.changes
        ends = [*(change.position for change in changes[1:]), max(position, changes[-1].position)]
        return sum(
            change.length * max(0, min(end, position) - change.position)
            for change, end in zip(changes, ends, strict=True)
        )

    def tokens(self, position: int) -> int:
        """Return the number of tokens in the first ``position`` samples, over all sources."""
        return sum(self.ledger(position).values())

    def epochs(self, position: int) -> dict[str, float]:
        """Return the epochs over each source after the first ``position`` samples."""
        read = self._read(position, unique=False)
        return {name: account.epochs for name, account in read.items()}

    def unique_tokens(self) -> dict[str, int]:
        """Return the number of tokens in an epoch of each source."""
        return {name: self._epoch_tokens(source) for source, name in enumerate(self.sources)}

    def state(self, position: int) -> dict[str, Any]:
        """Return the state of the data after ``position`` samples, for a checkpoint (JSON)."""
        return {
            "mixture": [change.describe() for change in self.mixture.changes],
            "starts": dict(zip(self.sources, self.starts.tolist(), strict=True)),
            "parts": {
                name: [asdict(part) for part in self.parts(source)]
                for source, name in enumerate(self.sources)
            },
            "ledger": {name: asdict(account) for name, account in self.accounts(position).items()},
            "order": self._order(),
        }

    def resumed(self, state: Mapping[str, Any], position: int) -> Self:
        """Return a copy for a run that resumes at ``position`` from the ``state`` of a checkpoint.

        Samples before ``position`` are unchanged; from ``position`` on, the shares are those of
        this configuration. Each source continues with its next sample.

        Raises:
            UserError: a source that the run has read is missing.
        """
        past = changes_of(state)
        for change in past:
            gone = [n for n, share in change.shares.items() if share and n not in self.sources]
            if gone and change.position < position:
                raise UserError(
                    f"data.sources has no {gone[0]!r}, of which this run has read "
                    f"{state['ledger'][gone[0]]['tokens']} tokens; leave it there, with weight: 0 "
                    "if no more of it is to be read"
                )
        known = [
            replace(change, shares={n: s for n, s in change.shares.items() if n in self.sources})
            for change in past
        ]
        starts = {name: state["starts"].get(name, 0) for name in self.sources}
        inherited = {name: _parts_of(state, name, start) for name, start in starts.items()}
        return self._with(followed(known, declared(*self.stages), position), starts, inherited)

    def passing_over(self, position: int, samples: int) -> Self:
        """Return a copy that skips ``samples`` samples at ``position``; the run never reads them.

        After ``passing_over(1000, 64)``, for example, position 1000 has the sample that was at
        1064.
        """
        starts = dict(zip(self.sources, self.starts.tolist(), strict=True))
        changes = passing_over(self.mixture.changes, position, samples)
        return self._with(changes, starts, self._inherited)

    def after(self, ancestors: Sequence[Mapping[str, Any]]) -> Self:
        """Return a copy in which each source continues after the samples read by ``ancestors``.

        ``ancestors`` are the records of earlier runs from exports. A source that no ancestor has
        read begins at its first sample.

        Raises:
            UserError: there are no ancestors, or the data of an ancestor cannot be continued.
        """
        if not ancestors:
            raise UserError(
                "data.continue_sources: true has nothing to go on after, as no run is known that "
                "these weights come from; name it in run.initial with keep: [weights, data], or "
                "leave it out"
            )
        starts = dict.fromkeys(self.sources, 0)
        inherited: dict[str, list[Part]] = {}
        fingerprints = self.fingerprints()
        for run in ancestors:
            for name, fingerprint in run.get("data", {}).items():
                here = [n for n, known in fingerprints.items() if same_files(known, fingerprint)]
                if here and samples_read(run, name) != 0:
                    read = self._read_of(run, name, here)
                    if read > starts[name]:
                        starts[name] = read
                        inherited[name] = _parts_of(run["reading"], name, read)
        return self._with(self.mixture.changes, starts, inherited)

    def _read_of(self, run: Mapping[str, Any], name: str, here: list[str]) -> int:
        """Return the number of samples of source ``name`` that an ancestor has read.

        ``here``: the sources of this run with the same files.
        """
        state, problem = run.get("reading"), None
        order, now = (state or {}).get("order", {}), self._order()
        if state is None:
            problem = "its export does not say how much of them; export it again"
        elif order["run.seed"] != now["run.seed"]:
            problem = (
                f"in another order (run.seed={order['run.seed']}, and here "
                f"run.seed={now['run.seed']}); set it as it was there"
            )
        elif order.keys() != now.keys():
            problem = "as another data.kind; set it as it was there"
        elif run["data"][name] not in map(self.fingerprints().get, here):
            problem = "by another select (scores, keep or side); set it as it was there"
        elif name not in here:
            problem = f"under the name {name!r}, which their order depends on; name the source so"
        if problem is not None:
            raise UserError(
                f"data.continue_sources (or data in run.initial.keep) cannot go on in source "
                f"{here[0]!r}: {run['run']} has read its documents {problem}, or leave that out"
            )
        return int(state["ledger"][name]["samples"])  # type: ignore[index]

    def _order(self) -> dict[str, Any]:
        """Return the settings that determine the tokens of a source's samples."""
        return {"run.seed": self.seed, "data.sequence_length": self.sequence_length}

    def _with(
        self,
        changes: Sequence[Change],
        starts: Mapping[str, int],
        inherited: dict[str, list[Part]],
    ) -> Self:
        made = copy.copy(self)
        made.mixture = ChangingMixture(changes, self.sources)
        made.starts = np.array([starts[name] for name in self.sources], np.int64)
        made._inherited = inherited
        made._settle()
        return made

    def check_run(self, samples: int) -> None:
        """Check a run of ``samples`` samples before its first step, from the configuration alone.

        Raises:
            UserError: a source would be read more often than its ``max_epochs``; a change of
                ``replay`` is past the end; shares do not sum to 1.
        """
        for stage in self.stages:
            check_sum(stage.data)
            _check_replay(stage, samples - stage.position)
        read = self._read(samples, unique=False)
        for source in self.data.sources:
            wanted, most = read[source.name], source.max_epochs
            if most is not None and wanted.epochs > most:
                raise UserError(self._dry(source.name, wanted, most, samples))

    def _dry(self, name: str, wanted: Account, most: float, samples: int) -> str:
        """Return the message about a source that is too small for the run."""
        first = bisect_left(
            range(samples + 1),
            True,
            key=lambda position: self._read(position, unique=False)[name].epochs > most,
        )
        source = self.sources.index(name)
        epoch = self._epoch_tokens(source)
        before = self._tokens_in(source, int(self.starts[source]))
        return (
            f"data source {name!r} runs dry after {self.window_tokens(first - 1)} of the "
            f"run's {self.window_tokens(samples)} tokens: it has {epoch} tokens and may be read "
            f"max_epochs={most:g} times, but the run wants {wanted.tokens} tokens of it"
            + (f" after the {before} that runs before it have read" if before else "")
            + "; lower its weight (or data.replay.ratio), shorten the run, add data or raise "
            "max_epochs"
        )


def same_files(one: str, other: str) -> bool:
    """Return True if two of ``fingerprints`` are of the same files, ignoring ``select``."""
    return one.partition(":")[0] == other.partition(":")[0]


def _parts_of(state: Mapping[str, Any], name: str, samples: int) -> list[Part]:
    """Return the lengths of the first ``samples`` samples of a source, from a checkpoint."""
    if "parts" in state:
        return [Part(**part) for part in state["parts"].get(name, ()) if part["first"] < samples]
    order = state.get("order", {})  # format before stages had their own lengths
    length, limit = (order.get(f"data.{key}") for key in ("sequence_length", "max_document_tokens"))
    return [Part(0, length, limit)] if samples and length else []


def _check_replay(stage: DataStage, samples: int) -> None:
    """Raise UserError for a change of replay past the end of a stage or of the run."""
    samples = samples if stage.samples is None else stage.samples
    tokens = samples * stage.data.sequence_length
    of = "the run" if stage.name is None else f"stage {stage.name}"
    for change in stage.data.replay.changes if stage.data.replay else ():
        if change.after_tokens >= tokens:
            raise UserError(
                f"data.replay.changes: after_tokens={change.after_tokens} is past the end of "
                f"{of}, which has {tokens} tokens; lower it or leave it out"
            )
