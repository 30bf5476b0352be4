"""How a run scales: the best layout and its rate from few GPUs to many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.scaling.search.proposal import Proposal, proposals
from allometry.scaling.search.search import Asked, Search

Kind = Literal["strong", "weak"]
GPUS = tuple(8 * 2**power for power in range(12))
"""8 to 16,384."""


@dataclass(frozen=True)
class Point:
    """The best layout on ``gpus`` GPUs; ``best`` None: why not.

    ``sequences``: of the batch, the run's own (strong scaling) or as many for each GPU as the run
    has (weak). ``efficiency``: tokens a second of one GPU over those of the first point that fits.
    """

    kind: Kind
    gpus: int
    sequences: int
    best: Proposal | None
    reason: str
    efficiency: float | None = None

    def describe(self) -> dict[str, Any]:
        """Return it as JSON."""
        same = {name: getattr(self, name) for name in ("kind", "gpus", "sequences", "reason")}
        found = None if self.best is None else self.best.describe()
        return {**same, "efficiency": self.efficiency, "best": found}


def scale_curve(
    config: RunConfig,
    asked: Asked,
    kind: Kind,
    at: int,
    tokens: int | None = None,
    gpus: Sequence[int] = GPUS,
) -> list[Point]:
    """Return the best layout on each number of GPUs, the fastest by predicted step.

    ``strong``: the batch stays as the run has it. ``weak``: it grows with the GPUs from the run's
    own at ``at`` GPUs, without a ramp; numbers that give no whole sequence are left out by reason.
    """
    points = []
    for number in sorted(gpus):
        run, why = (config, "") if kind == "strong" else grown(config, at, number)
        if run is None:
            points.append(Point(kind, number, 0, None, why))
            continue
        found, why = best_of(run, number, asked, tokens)
        points.append(Point(kind, number, run.batch.sequences, found, why))
    first = next((p.best for p in points if p.best is not None), None)
    return [
        p
        if p.best is None or first is None
        else Point(
            *(p.kind, p.gpus, p.sequences, p.best, p.reason),
            efficiency=p.best.tokens_per_second / first.tokens_per_second,
        )
        for p in points
    ]


def grown(config: RunConfig, at: int, gpus: int) -> tuple[RunConfig | None, str]:
    """Return the run with as many sequences for each GPU, or why there is none."""
    sequences, rest = divmod(config.batch.sequences * gpus, at)
    if rest or not sequences:
        share = config.batch.sequences / at
        return None, f"{share:.3g} sequences a GPU make no whole batch"
    batch = config.batch.model_copy(update={"sequences": sequences, "ramp": None})
    return config.model_copy(update={"batch": batch}), ""


def best_of(
    config: RunConfig, gpus: int, asked: Asked, tokens: int | None, price: float | None = None
) -> tuple[Proposal | None, str]:
    """Return the first layout of a search, or why there is none."""
    try:
        search = Search(config, gpus, asked)
    except UserError as error:
        return None, str(error)
    if not search.cores:
        return None, "no layout shares this batch"
    found = proposals(search, search.best(1), tokens, price)
    return (found[0], "") if found else (None, "does not fit")
