"""Suggestions if no layout fits: the nearest layout, and changes that make the run fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.scaling.search.search import Asked, Search
from allometry.scaling.search.space import Choice, Space

MOST_GPUS = 64  # maximum factor of the number of GPUs
CHANGES: tuple[dict[str, Any], ...] = (
    {"training.activation_offload": 1.0},
    {"precision.saved_activations": "fp8"},
    {"optimizer.states": {"kind": "fp8"}},
    {"parallel.zero.optimizer_states": {}},
    {"parallel.zero.optimizer_states": {"master_weights": True, "gradients": True}},
    {"parallel.zero.offload": "cpu", "parallel.zero.optimizer_states": None},
)
"""Changes that save memory and cost time, tried in this order, one at a time."""


@dataclass(frozen=True)
class Remedy:
    """A change that makes the run fit, with the smallest layout and its memory."""

    change: str
    gpus: int
    choice: Choice
    bytes: int

    def describe(self) -> dict[str, Any]:
        """Return the remedy as JSON."""
        layout = self.choice.describe(self.gpus)
        return {"change": self.change, "gpus": self.gpus, "layout": layout, "bytes": self.bytes}


def nearest(search: Search) -> tuple[Choice, int]:
    """Return the layout with the lowest memory, and its bytes; at least one layout must exist."""
    return min(search.cores.values(), key=lambda found: found[1])


def remedies(search: Search) -> Iterator[Remedy]:
    """Yield changes that make the run fit: more GPUs, or one of ``CHANGES``."""
    config, asked = search.run, search.asked
    number = 2
    while number <= MOST_GPUS:
        gpus = number * search.world_size
        if found := _fits(config, gpus, asked):
            yield Remedy(f"{gpus} GPUs", gpus, *found)
            break
        number *= 2
    for change in CHANGES:
        other = changed(config, change)
        if other is not None and (found := _fits(other, search.world_size, asked)):
            given = ((key, value) for key, value in change.items() if value is not None)
            words = ", ".join(f"{key}={_shown(value)}" for key, value in given)
            yield Remedy(words, search.world_size, *found)


def near_counts(config: RunConfig, gpus: int, asked: Asked, tries: int = 24) -> list[int]:
    """Return the valid numbers of GPUs closest to ``gpus``, below and above.

    Only complete nodes, or any number within one node.
    """
    node = asked.hardware.gpus_per_node
    step = 1 if gpus <= node else node
    below = range(gpus - 1 - (gpus - 1) % step, 0, -step)
    above = itertools.count(gpus + step - gpus % step, step)
    found = []
    for counts in (below, above):
        valid = (n for n in itertools.islice(counts, tries) if _valid(config, n, asked))
        found += [n for n in [next(valid, None)] if n is not None]
    return found


def changed(config: RunConfig, change: Mapping[str, Any]) -> RunConfig | None:
    """Return the run with changed keys; None if the change is invalid for the run.

    For example, ``changed(config, {"optimizer.states": {"kind": "fp8"}})``.
    """
    data = config.model_dump(mode="json")
    for key, value in change.items():
        *path, last = key.split(".")
        section = data
        for name in path:
            section = section[name]
        if last not in section:
            return None
        section[last] = value
    try:
        return RunConfig.model_validate(data)
    except ValidationError:
        return None


def _fits(config: RunConfig, gpus: int, asked: Asked) -> tuple[Choice, int] | None:
    try:
        search = Search(config, gpus, asked)
    except UserError:
        return None
    if not search.fitting:
        return None
    return nearest(search)


def _valid(config: RunConfig, gpus: int, asked: Asked) -> bool:
    space = Space(config, gpus, asked.hardware.gpus_per_node, asked.keep)
    if next(space.cores(), None) is None:
        return False
    return bool(Search(config, gpus, asked).cores)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        inside = ", ".join(f"{key}: {_shown(v)}" for key, v in value.items())
        return f"{{{inside}}}"
    return str(value).lower() if isinstance(value, bool) else str(value)
