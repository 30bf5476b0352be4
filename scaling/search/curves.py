"""Scaling of a run: the best layout and its rate from few GPUs to many."""

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
"""Numbers of GPUs: 8 to 16,384."""


@dataclass(frozen=True)
class Point:
    """Best layout on ``gpus`` GPUs; ``best`` None: see ``reason``.

    ``sequences``: size of the batch, the run's own (strong scaling) or proportional to the number
    of GPUs (weak). ``efficiency``: tokens per second and GPU relative to the first point that fits.
    """

    kind: Kind
    gpus: int
    sequences: int
    best: Proposal | None
    reason: str
    efficiency: float | None = None

    def describe(self) -> dict[str, Any]:
        """Return the point as JSON."""
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
    """Return the best layout on each number of GPUs, with the shortest predicted step.

    ``strong``: the batch is constant. ``weak``: the batch grows with the number of GPUs from the
    run's own at ``at`` GPUs, without a ramp; numbers with a fractional batch have a reason instead.
    For example, ``scale_curve(config, asked, "strong", at=8)``.
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
    """Return the run with a batch proportional to the GPUs, or the reason why it is fractional.

    For example, 256 sequences at 8 GPUs become 512 at 16.
    """
    sequences, rest = divmod(config.batch.sequences * gpus, at)
    if rest or not sequences:
        share = config.batch.sequences / at
        return None, f"{share:.3g} sequences a GPU make no whole batch"
    batch = config.batch.model_copy(update={"sequences": sequences, "ramp": None})
    return config.model_copy(update={"batch": batch}), ""


def best_of(
    config: RunConfig, gpus: int, asked: Asked, tokens: int | None, price: float | None = None
) -> tuple[Proposal | None, str]:
    """Return the first layout of a search, or the reason why there is none."""
    try:
        search = Search(config, gpus, asked)
    except UserError as error:
        return None, str(error)
    if not search.cores:
        return None, "no layout shares this batch"
    found = proposals(search, search.best(1), tokens, price)
    return (found[0], "") if found else (None, "does not fit")
