"""``allometry coordcheck``: do activations move alike at every size?"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.launch.runs.plot import check_format
from allometry.launch.studies.gates import (
    Line,
    Panel,
    counted,
    default_sizes,
    depth_words,
    draw,
    has_depth_rule,
    numbers,
    processes_here,
    stoppable,
)
from allometry.scaling.shapes import Axis, growth_axis, resize
from allometry.scaling.update_rules import fixes_frobenius_norm
from allometry.studies.sweeps.coordinate import (
    Bounds,
    CoordinateCheck,
    Movement,
    default_bounds,
    failures,
    means,
    slopes,
)
from allometry.studies.sweeps.probe import LOGITS, STREAM, read_pools

SEQUENCES, TOKENS_PER_WIDTH = 4, 4

AXIS_LABELS = {
    Axis.WIDTH: "width",
    Axis.DEPTH: "depth, layers",
    Axis.EXPERTS: "routed experts",
    Axis.REGIME_II: "routed experts, width and visits in proportion",
    Axis.REGIME_III: "routed experts, width, visits and width of experts in proportion",
}


@dataclass(frozen=True)
class Request:
    """What the command line asks for; None: the default."""

    widths: str | None = None
    depths: str | None = None
    experts: str | None = None
    lr: float | None = None
    steps: int = 5
    seeds: int = 3
    sequences: int | None = None
    length: int = 64
    processes: int | None = None
    block_bound: float | None = None
    logit_bound: float | None = None
    out: Path = Path("coordcheck.png")


@dataclass(frozen=True)
class Outcome:
    """One axis: what moved, how it goes with the size, and what is wrong with that."""

    axis: Axis
    movements: list[Movement]
    slopes: dict[str, float]
    bounds: Bounds
    failures: list[str]

    def describe(self) -> dict[str, Any]:
        """JSON."""
        return {
            "axis": self.axis.value,
            "slopes": self.slopes,
            "bounds": {"blocks": self.bounds.blocks, "logits": self.bounds.logits},
            "failures": self.failures,
            "movements": [movement.describe() for movement in self.movements],
        }


def run(config: RunConfig, request: Request, *, as_json: bool) -> tuple[str, bool]:
    """Run the check; return the report and whether it is passed."""
    check_format(request.out)
    _check_numbers(request)
    axes = _axes(config, request)
    length = min(request.length, config.data.sequence_length)
    sequences = request.sequences or _sequences(config, axes, length)
    (pool_PL,) = read_pools(config.data, config.run.seed, length, [request.seeds * sequences])
    lr = config.optimizer.lr if request.lr is None else request.lr
    check = CoordinateCheck(
        model=config.model,
        parameterization=config.parameterization,
        optimizer=config.optimizer.model_copy(update={"lr": lr}),
        tokens_GBL=pool_PL.reshape(request.seeds, sequences, length + 1),
        steps=request.steps,
    )
    with stoppable(lambda: "nothing is kept: a check is run from its beginning"):
        outcomes = [_outcome(check, axis, sizes, request) for axis, sizes in axes.items()]
        _figure(outcomes, request)
    passed = not any(outcome.failures for outcome in outcomes)
    if as_json:
        facts = {
            "kind": config.parameterization.kind,
            "optimizer": config.optimizer.kind,
            "lr": lr,
            "steps": request.steps,
            "sequences": sequences,
            "length": length,
            "passed": passed,
            "figure": str(request.out),
            "axes": [outcome.describe() for outcome in outcomes],
        }
        return json.dumps(facts, indent=2), passed
    batch = f"{sequences} x {length} tokens"
    return _text(config, request, lr, batch, outcomes), passed


def _check_numbers(request: Request) -> None:
    if request.lr is not None and not 0.0 < request.lr < math.inf:
        raise UserError(f"--lr={request.lr:g} must be a number above 0; give a rate as 0.01")
    bounds = {"--block-bound": request.block_bound, "--logit-bound": request.logit_bound}
    for flag, bound in bounds.items():
        if bound is not None and not 0.0 <= bound < math.inf:
            raise UserError(f"{flag}={bound:g} is no slope; give 0 or a number above it")


def _axes(config: RunConfig, request: Request) -> dict[Axis, tuple[int, ...]]:
    """The sizes of each axis that is asked for; else widths, and depths where a rule has them.

    In a regime of MSSP that has experts grow with the width, they do so here.
    """
    growth = growth_axis(config.parameterization)
    given = {
        Axis.WIDTH: numbers(request.widths, "--widths"),
        Axis.DEPTH: numbers(request.depths, "--depths"),
        Axis.EXPERTS if growth == Axis.WIDTH else growth: numbers(request.experts, "--experts"),
    }
    asked = {axis: sizes for axis, sizes in given.items() if sizes is not None}
    if asked:
        return asked
    kinds = [growth]
    kinds += [Axis.DEPTH] * has_depth_rule(config.parameterization)
    return {axis: default_sizes(config.model, axis, request.steps) for axis in kinds}


def _sequences(config: RunConfig, axes: Mapping[Axis, tuple[int, ...]], length: int) -> int:
    """The sequences of a batch: 4, or for steps of a fixed Frobenius norm enough to be wide.

    The gradient of so many tokens has at most their rank. Such a step spreads over fewer singular
    values then, each larger, and moves a model that is wider than its batch more.
    """
    if not fixes_frobenius_norm(config.optimizer):
        return SEQUENCES
    largest = max(resize(config.model, axis, max(sizes)).width for axis, sizes in axes.items())
    return max(SEQUENCES, math.ceil(TOKENS_PER_WIDTH * largest / length))


def _outcome(
    check: CoordinateCheck, axis: Axis, sizes: tuple[int, ...], request: Request
) -> Outcome:
    movements = check.run(sizes, range(request.seeds), axis, processes_here(request.processes))
    default = default_bounds(check.parameterization.kind, axis)
    blocks, logits = request.block_bound, request.logit_bound
    bounds = Bounds(
        default.blocks if blocks is None else (-blocks, blocks),
        default.logits if logits is None else (-logits, logits),
    )
    found = slopes(movements)
    return Outcome(axis, movements, found, bounds, failures(found, bounds, axis))


def _text(
    config: RunConfig, request: Request, lr: float, batch: str, outcomes: list[Outcome]
) -> str:
    lines = [
        f"coordinate check of {config.parameterization.kind} with {config.optimizer.kind}, "
        f"{counted(request.steps, 'step')} of {batch} at {lr:.4g}, "
        f"{counted(request.seeds, 'seed')}: rms of what moved"
    ]
    for outcome in outcomes:
        by_size = means(outcome.movements)
        names = [name for name in outcome.slopes if name != STREAM or outcome.axis == Axis.DEPTH]
        if outcome.axis == Axis.DEPTH:
            names = [STREAM, LOGITS]
        lines.append(
            f"{outcome.axis:<12}" + "".join(f"{size:>10}" for size in by_size) + "   slope"
        )
        for name in names:
            values = "".join(f"{rms[name]:>10.4f}" for rms in by_size.values())
            lines.append(f"  {name:<10}{values}{outcome.slopes[name]:>+8.2f}")
        lines += [f"  FAILED: {failure}" for failure in outcome.failures]
        if outcome.failures:
            lines += [f"  {words}" for words in depth_words(config.parameterization, outcome.axis)]
    verdict = "NOT passed" if any(o.failures for o in outcomes) else "passed"
    return "\n".join([*lines, f"{verdict}; figure: {request.out}"])


def _figure(outcomes: list[Outcome], request: Request) -> None:
    panels = []
    mean = "1 seed" if request.seeds == 1 else f"mean and range of {request.seeds} seeds"
    for outcome in outcomes:
        by_size = means(outcome.movements)
        names = [STREAM, LOGITS] if outcome.axis == Axis.DEPTH else [*outcome.slopes]
        panels.append(
            Panel(
                title=f"over {outcome.axis} (slope): {mean}",
                x_label=AXIS_LABELS[outcome.axis],
                y_label=f"rms of what moved in {counted(request.steps, 'step')}",
                lines={
                    f"{name} ({outcome.slopes[name]:+.2f})": _line(outcome.movements, name, by_size)
                    for name in names
                    if name != STREAM or outcome.axis == Axis.DEPTH
                },
                ticks=[*by_size],
                log_y=True,
            )
        )
    draw(request.out, panels)


def _line(movements: list[Movement], name: str, by_size: Mapping[int, Mapping[str, float]]) -> Line:
    of_seeds = [[m.rms[name] for m in movements if m.size == size] for size in by_size]
    several = len(of_seeds[0]) > 1
    return Line(
        x=[*by_size],
        y=[rms[name] for rms in by_size.values()],
        low=[min(values) for values in of_seeds] if several else None,
        high=[max(values) for values in of_seeds] if several else None,
    )
