"""Sensitivity of a choice to each assumption: change one and search for the best layout again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from allometry.configs.machine import HardwareConfig
from allometry.scaling.planner.constants import Constants
from allometry.scaling.planner.cost import step_time
from allometry.scaling.search.search import Search
from allometry.scaling.search.space import Choice

Changed = tuple[HardwareConfig, Constants]
LESS, MORE = 2 / 3, 3 / 2
RESERVES = (0.05, 0.2)


@dataclass(frozen=True)
class Turn:
    """A changed assumption, the best layout with it, and the loss of the present layout.

    ``loses``: relative excess of the present choice's step time over ``best``; None if the present
    choice does not fit any more. If the choice stays the same, ``best`` equals it and ``loses`` is
    0.
    """

    assumption: str
    to: str
    best: Choice | None
    loses: float | None

    def describe(self, gpus: int) -> dict[str, Any]:
        """Return the result as JSON."""
        best = None if self.best is None else self.best.describe(gpus)
        return {"assumption": self.assumption, "to": self.to, "best": best, "loses": self.loses}


def _card(**names: str) -> Callable[[Changed, float], Changed]:
    """Return a function that multiplies a number of the hardware's description."""

    def change(given: Changed, by: float) -> Changed:
        hardware, constants = given
        sections = {}
        for section, name in names.items():
            old = getattr(hardware, section)
            value = getattr(old, name)
            new = {k: v * by for k, v in value.items()} if isinstance(value, dict) else value * by
            sections[section] = old.model_copy(update={name: new})
        return hardware.model_copy(update=sections), constants

    return change


def _constant(*names: str) -> Callable[[Changed, float], Changed]:
    """Return a function that multiplies constants of the cost model."""

    def change(given: Changed, by: float) -> Changed:
        hardware, constants = given
        return hardware, replace(constants, **{n: getattr(constants, n) * by for n in names})

    return change


ASSUMPTIONS: dict[str, Callable[[Changed, float], Changed]] = {
    "bandwidth inside a node": _card(inside="bandwidth"),
    "bandwidth across nodes": _card(across="bandwidth"),
    "latency inside a node": _card(inside="latency_s"),
    "latency across nodes": _card(across="latency_s"),
    "rate of matrix products": _card(gpu="attainable"),
    "rate of attention": _card(gpu="attention"),
    "memory bandwidth": _card(gpu="memory_bandwidth"),
    "host time of launches": _constant("launch_eager_s", "launch_tuned_s"),
    "messages of gradients that hide": _constant("data_hidden"),
    "congestion of the network": _constant("congestion"),
    "bandwidth of the experts' exchange": _constant("experts_bandwidth"),
    "rate of the experts' products": _constant("experts_products"),
}


def sensitivity(search: Search, present: Choice) -> Iterator[Turn]:
    """Yield the effect of each assumption at two thirds and at three halves of its value.

    The price of an hour is not included, since it multiplies all costs equally.
    """
    given = search.asked.hardware, search.asked.constants
    one = search.cases([present])
    experts = search.config.model.kind == "moe"
    for name, change in ASSUMPTIONS.items():
        if "experts" in name and not experts:
            continue
        for by, word in ((LESS, "x 2/3"), (MORE, "x 3/2")):
            hardware, constants = change(given, by)
            best, seconds = next(search.ordered(hardware, constants))
            mine = step_time(search.cases([present], hardware), constants)
            yield Turn(name, word, best, max(0.0, float(mine.seconds[0]) / seconds - 1))
    for reserve in RESERVES:
        other = Search(
            search.run, search.world_size, replace(search.asked, reserve=reserve), search.known
        )
        first = next(other.ordered(), None)
        if first is None:
            yield Turn("memory left free", f"{reserve:.0%}", None, None)
            continue
        best, seconds = first
        estimate = search.memory(present)
        assert estimate is not None
        loses = None
        if estimate.total <= other.limit:
            mine = step_time(one, search.asked.constants)
            loses = max(0.0, float(mine.seconds[0]) / seconds - 1)
        yield Turn("memory left free", f"{reserve:.0%}", best, loses)
