"""Continue a launch's data after the samples read before its checkpoint or by its ancestors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from allometry.configs.run import RunConfig
from allometry.data.changes import Change, declared, in_force, passing_over
from allometry.data.reading import samples_read
from allometry.data.sources import Sources
from allometry.trainer.state import checkpoint
from allometry.trainer.state.branch import stored_config
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.initial import choose_initial
from allometry.trainer.state.integrity import FACTS

S = TypeVar("S", bound=Sources)


def continued(stream: S, facts: dict[str, Any] | None) -> S:
    """Return the data as they continue after a checkpoint with these ``facts``; None: a new run.

    Raises:
        UserError: sources of the run are missing, or ``data.continue_sources`` is impossible.
    """
    position = 0
    if facts is not None and not weights_only(facts):
        position = facts["position_sequences"]
        stream = stream.resumed(facts["reading"], position)
    elif _goes_on(stream, facts):
        stream = stream.after(_ancestors(facts))
    passed = (facts or {}).get("pass_over", 0)
    return stream.passing_over(position, passed) if passed else stream


def read_again(facts: dict[str, Any] | None, stream: Sources) -> list[str]:
    """Return the sources whose documents the weights' earlier runs have read in the same order."""
    again: set[str] = set()
    fingerprints = stream.fingerprints()
    for origin in _ancestors(facts) if weights_only(facts) else ():
        data = origin.get("data", {}).items() if origin.get("seed") == stream.seed else ()
        same = {name for name, known in data if fingerprints.get(name) == known}
        again |= {name for name in same if samples_read(origin, name) != 0}
    starts = zip(stream.sources, stream.starts, strict=True)
    return [name for name, start in starts if name in again and not start]


def data_events(
    facts: dict[str, Any] | None, stream: Sources
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield events about the data: changed mixture, passed-over samples, continued sources."""
    position = 0
    if facts is not None and not weights_only(facts):
        position = facts["position_sequences"]
        before = tuple(Change(**change) for change in facts["reading"]["mixture"])
        if _with_passed(before, facts) != stream.mixture.changes:
            yield (
                "mixture_changed",
                {
                    "position": position,
                    "before": in_force(before, position).shares,
                    "after": stream.mixture.shares(position),
                    "tokens": stream.ledger(position),
                },
            )
    if facts is not None and (passed := facts.get("pass_over", 0)):
        yield "passed_over", {"position": position, "samples": passed}
    if position == 0 and _goes_on(stream, facts):
        accounts = stream.accounts(position)
        epochs = {name: account.epochs for name, account in accounts.items()}
        yield "sources_continued", {"epochs": epochs}


def _with_passed(changes: tuple[Change, ...], facts: dict[str, Any]) -> tuple[Change, ...]:
    passed, position = facts.get("pass_over", 0), facts["position_sequences"]
    return passing_over(changes, position, passed) if passed else changes


def _goes_on(stream: Sources, facts: dict[str, Any] | None) -> bool:
    """Return True if a new run's sources continue after the samples read by its ancestors."""
    return stream.data.continue_sources or "data" in (facts or {}).get("keep", ())


def weights_only(facts: dict[str, Any] | None) -> bool:
    """Return True for a checkpoint of a run that begins with imported weights, before training.

    ``run.initial`` and ``allometry convert`` write such checkpoints.
    """
    return bool(facts and facts.get("weights_only", False))


def _ancestors(facts: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the known runs from which imported weights come, the last run first."""
    found = []
    origin = (facts or {}).get("origin")
    while origin:
        found += [origin] if "run" in origin else []
        origin = origin.get("origin")
    return found


def standing(config: RunConfig) -> dict[str, Any] | None:
    """Return the facts of the checkpoint at which a run is or would begin, for inspection, or None.

    Raises UserError if the run cannot begin from ``run.initial.folder``.
    """
    folder, parent, initial = RunFolder(config.run.folder), config.run.parent, config.run.initial
    if folder.is_new():
        if initial is not None and initial.folder is not None:
            return choose_initial(config, initial).facts
        path = None
        if parent is not None:
            folder = RunFolder(parent.folder)
            path = folder.checkpoints / f"step-{parent.step}"
    else:
        path = next(reversed(checkpoint.saved(folder)), None)
    if path is None or not (path / FACTS).is_file():
        return None
    return with_reading(checkpoint.read_facts(path), stored_config(folder))


def with_reading(facts: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Return the facts with a ``reading`` entry; older facts were read as ``config`` declares."""
    if "reading" in facts or weights_only(facts):
        return facts
    tokens = facts.get("ledger_tokens", {})
    reading = {
        "mixture": [change.describe() for change in declared(config.data)],
        "starts": {},
        "ledger": {name: {"tokens": number} for name, number in tokens.items()},
    }
    return {**facts, "reading": reading}
