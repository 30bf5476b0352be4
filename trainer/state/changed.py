"""Compare the configs of a run before and after a step, and check the allowed changes.

A branch, a resumed run with an edited config and a training stage are the same case: the steps
taken stay as they are, and the new config applies from then on. ``differences`` lists the changes
that affect the computation, ``check_possible`` refuses changes that are impossible in mid-run, and
each difference is recorded as an event ``config_changed``. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from allometry.configs.errors import UserError
from allometry.configs.lineage import Parent, covers
from allometry.configs.run import RunConfig

# Keys that change how a run is carried out and recorded, but not its results.
FREE = (
    "run.folder",
    "run.resume",
    "parallel",
    "evaluation",
    "checkpoint",
    "record",
    "batch.micro_batch_sequences",
    "training.compile",
    "training.cuda_graphs",
    "training.activation_checkpointing",
    "training.activation_offload",
    "training.deterministic",
    "kernels",
    "data.tokenizer",
    "data.allow_epochs",
)
UPDATE = "parallel.zero.optimizer_states.update"
"""Enables updates that are one step late: the only key of ``parallel`` that changes results."""
RATES = ("schedule", "training.total_steps", "training.total_tokens")
"""Keys that, with ``optimizer.lr``, determine the learning rate of each step."""
MIXTURE = ("data.sources", "data.replay")
"""Keys that determine the next samples; each source continues (``Reading.resumed``)."""
SKIPS = ("training.bad_steps", "training.skip_steps")
"""Keys that determine the steps without an update."""
POSSIBLE = (
    *RATES,
    *MIXTURE,
    *SKIPS,
    UPDATE,
    "optimizer",
    "precision",
    "training.clip_grad_norm",
    "training.compute_dtype",
    "model.dropout",
    "model.z_loss",
    "model.router.z_loss",
    "model.router.balance",
    "model.streams",
)
"""Keys whose value may change at a step."""
_IMPOSSIBLE = ("optimizer.kind", "optimizer.rank", "model.router.balance.kind")
# The paths of a source's files may change, because contents are compared by fingerprint.
_PATHS = ("train", "validation", "scores")


class Difference(NamedTuple):
    """A key whose value changed from ``before`` to ``after``; None where the key does not exist."""

    key: str
    before: Any
    after: Any

    @property
    def name(self) -> str:
        """Name of the change for users: ``data``, ``schedule``, ``optimizer.lr``."""
        if any(covers(section, self.key) for section in MIXTURE):
            return "data"
        if self.key == UPDATE:
            return UPDATE
        parts = self.key.split(".")
        whole = parts[0] in ("schedule", "precision")
        return parts[0] if whole else ".".join(parts[:2])


def differences(old: RunConfig, new: RunConfig, *, rates: bool = False) -> Iterator[Difference]:
    """Yield the differences between two configs that affect results, by key; sources by name.

    ``rates``: also yield differences of schedule and length, which may not affect the first steps.
    """
    before, after = leaves(_plain(old)), leaves(_plain(new))
    for each in (before, after):
        each.setdefault(UPDATE, "exact")
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key):
            continue
        # Dropout masks are drawn per micro-batch.
        masks = key == "batch.micro_batch_sequences" and new.model.dropout > 0
        decides = rates and any(covers(section, key) for section in RATES)
        if masks or decides or not _is_free(key):
            yield Difference(key, before.get(key), after.get(key))


def is_possible(key: str) -> bool:
    """Return True if a run can continue with another value of this key.

    For example, ``is_possible("optimizer.lr")`` is True and ``is_possible("model.width")`` False.
    """
    if any(covers(name, key) for name in _IMPOSSIBLE):
        return False
    return any(covers(name, key) for name in POSSIBLE)


def check_possible(changes: Iterable[Difference], where: str, initial: str) -> None:
    """Raise UserError for the first difference with which no run can continue.

    ``where`` ends the clause about the earlier value ("of run.parent.folder=..."); ``initial`` is
    the checkpoint in the notation of ``run.initial`` ("folder: runs/trunk, step: 120").
    """
    never = [change for change in changes if not is_possible(change.key)]
    if not never:
        return
    # The kind of a section explains more than the keys that depend on the kind.
    key, before, after = min(never, key=lambda one: not one.key.endswith(".kind"))
    raise UserError(
        f"{key}={after!r} differs from {before!r} {where}, and cannot change where a run goes on; "
        f"restore it{_way_out(key, initial)}"
    )


def check_named(changes: Iterable[Difference], parent: Parent) -> None:
    """Raise UserError for differences of a branch that ``run.parent.changes`` does not name."""
    for change in changes:
        if not parent.may_change(change.key):
            raise UserError(
                f"{change.key}={change.after!r} differs from {change.before!r} of run.parent."
                f"folder={parent.folder}, and run.parent.changes does not name it; add "
                f"{change.name} to run.parent.changes or restore it"
            )


def check_names(parent: Parent, *runs: RunConfig) -> None:
    """Raise UserError for unknown or unchangeable keys in ``run.parent.changes``."""
    keys = {key for run in runs for key in leaves(_plain(run), empty=True)}
    for name in parent.changes:
        place = f"run.parent.changes: {name!r}"
        if not any(covers(name, key) for key in keys):
            raise UserError(f"{place} is no key of this run; name a key or section of it")
        if name == "run":
            raise UserError(f"{place} is where and what the branch is; leave it out")
        if covers("schedule", name) and name != "schedule":
            raise UserError(
                f"{place} is a part of the schedule, which counts from the branch as a whole or "
                "not at all; name schedule"
            )
        if not any(is_possible(key) or _is_free(key) for key in keys if covers(name, key)):
            raise UserError(
                f"{place} cannot change where a run goes on; leave it out"
                f"{_way_out(name, f'folder: {parent.folder}, step: {parent.step}')}"
            )


def change_events(changes: Iterable[Difference]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the event of each difference."""
    for change in changes:
        yield "config_changed", change._asdict()


def _way_out(key: str, initial: str) -> str:
    """Return how a run with another value of ``key`` can still begin from the checkpoint."""
    if key.startswith(("model", "precision")):
        return ""
    if key.startswith("parameterization") or key == "optimizer.kind":
        keep = "weights, data"
    elif key == "run.seed" or key.startswith("data"):
        keep = "weights, optimizer"
    else:
        keep = "weights, optimizer, data"
    keep = "weights" if key.startswith("optimizer.") and key != "optimizer.kind" else keep
    return (
        f", or begin a new run there instead of a branch: run.initial={{{initial}, keep: [{keep}]}}"
    )


def _is_free(key: str) -> bool:
    if key == UPDATE:
        return False
    parts = key.split(".")
    if parts[:2] == ["data", "sources"] and parts[-1] in _PATHS:
        return True
    return any(covers(free, key) for free in (*FREE, *RATES))


def _plain(config: RunConfig) -> dict[str, Any]:
    """Return the config as a dict, with sources keyed by name and their names in order."""
    plain = config.model_dump(mode="json")
    sources = plain["data"].pop("sources")
    plain["data.sources"] = ", ".join(source["name"] for source in sources)
    for source in sources:
        plain[f"data.sources.{source.pop('name')}"] = source
    return plain


def leaves(value: Any, path: str = "", *, empty: bool = False) -> dict[str, Any]:
    """Return a nested config as {dotted key: value}; empty lists and sections too if ``empty``.

    For example, ``leaves({"a": {"b": 1}})`` returns ``{"a.b": 1}``.
    """
    if empty and value in ([], {}):
        return {path: value}
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)  # type: ignore[assignment]
    else:
        return {path: value}
    found: dict[str, Any] = {}
    for key, inner in items:
        found |= leaves(inner, f"{path}.{key}" if path else str(key), empty=empty)
    return found
