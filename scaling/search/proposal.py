"""Proposed layout with all its predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from allometry.scaling.batch import BatchPlan, total_steps
from allometry.scaling.count import flops_per_token
from allometry.scaling.memory import MemoryEstimate
from allometry.scaling.planner.calibrate import predict
from allometry.scaling.planner.cost import COMMUNICATION, step_time
from allometry.scaling.search.case import left_out
from allometry.scaling.search.search import Search
from allometry.scaling.search.space import Choice, applied
from allometry.scaling.stages import places_of

HOUR, DAY, KWH = 3600.0, 86400.0, 3.6e6


@dataclass(frozen=True)
class Proposal:
    """Layout that fits on ``gpus`` GPUs.

    ``seconds``: step time with a 90 % interval (``low``, ``high``), which also applies to hours,
    days and cost; ``unseen``: no measurement for this card, precision and kind of model exists.
    ``mfu``: model FLOPs relative to the compute type's peak. ``bubble``, ``exposed``: shares of the
    step. ``days``, ``gpu_hours``, ``cost``, ``kwh``: for all ``tokens``, ``kwh`` at maximum power
    of cards and nodes; ``cost`` None without a price. ``terms``: seconds, the largest first.
    ``left_out``: aspects without a term.
    """

    choice: Choice
    gpus: int
    seconds: float
    low: float
    high: float
    unseen: bool
    tokens_per_second: float
    mfu: float
    bubble: float
    exposed: float
    memory: MemoryEstimate
    tokens: int
    days: float
    gpu_hours: float
    cost: float | None
    kwh: float
    terms: dict[str, float]
    left_out: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """Return the proposal as JSON."""
        same = ("gpus", "seconds", "low", "high", "unseen", "tokens_per_second", "mfu", "bubble")
        more = ("exposed", "tokens", "days", "gpu_hours", "cost", "kwh", "terms")
        return {
            "layout": self.choice.describe(self.gpus),
            **{name: getattr(self, name) for name in (*same, *more)},
            "memory": self.memory.describe(),
            "left_out": list(self.left_out),
        }


def budget(search: Search, tokens: int | None) -> int:
    """Return the tokens of the run; ``tokens`` None: as configured."""
    config = search.config
    if search.run.stages is not None and tokens is None:
        last = places_of(search.run)[-1]
        return last.batch.tokens_after(last.last_step)
    batch = BatchPlan(config.batch, config.data.sequence_length)
    steps = batch.steps_for_tokens(tokens) if tokens else total_steps(config.training, batch)
    return batch.tokens_after(steps)


def proposals(
    search: Search, choices: Sequence[Choice], tokens: int | None = None, price: float | None = None
) -> list[Proposal]:
    """Return the predictions for ``choices``; ``price``: price of a GPU hour.

    Steps of a ramp are assumed to cost as much per token as the full batch, and steps of other
    stages as much per token as the longest stage.
    """
    if not choices:
        return []
    asked, config, gpus = search.asked, search.config, search.world_size
    cases = search.cases(choices)
    timed, said = step_time(cases, asked.constants), predict(asked.calibration, cases)
    flops = flops_per_token(config.model, config.data.sequence_length).total
    peak = asked.hardware.gpu.peak_flops
    rate = peak[config.training.compute_dtype]  # type: ignore[index]  # Cases refuse what has none
    whole = budget(search, tokens)
    step_tokens = config.batch.sequences * config.data.sequence_length
    watts = most_watts(search)
    found = []
    for index, choice in enumerate(choices):
        estimate = search.memory(choice)
        assert estimate is not None, choice
        seconds, terms = float(said.seconds[index]), timed.explain(index)
        duration = whole / step_tokens * seconds
        hours = duration * gpus / HOUR
        speed = step_tokens / seconds / gpus
        messages = sum(terms.get(name, 0.0) for name in COMMUNICATION if name != "jitter")
        placed = applied(config, choice, gpus)
        found.append(
            Proposal(
                choice,
                gpus,
                seconds,
                float(said.low[index]),
                float(said.high[index]),
                bool(said.unseen[index]),
                tokens_per_second=speed,
                mfu=speed * flops / rate,
                bubble=(terms.get("bubble", 0.0) + terms.get("uneven stages", 0.0)) / seconds,
                exposed=messages / seconds,
                memory=estimate,
                tokens=whole,
                days=duration / DAY,
                gpu_hours=hours,
                cost=None if price is None else hours * price,
                kwh=duration * watts / KWH,
                terms=terms,
                left_out=tuple(left_out(placed)),
            )
        )
    return found


def most_watts(search: Search) -> float:
    """Return the maximum power of all cards and nodes, in watts."""
    hardware = search.asked.hardware
    nodes = -(-search.world_size // hardware.gpus_per_node)
    return search.world_size * hardware.gpu.power_w + nodes * hardware.host.power_w
