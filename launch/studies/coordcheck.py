"""Coordinate check: size dependence of activation changes: ``allometry coordcheck``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.launch.command import Report
from allometry.launch.figures.drawing import check_format, draw
from allometry.launch.figures.figure import Figure, Panel, Series, colours
from allometry.launch.studies import gates
from allometry.launch.studies.commands import CoordCheck
from allometry.launch.text import counted, table
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
class Outcome:
    """Result for one axis: changes of activations, their slopes over the size, and failures."""

    axis: Axis
    slopes: dict[str, float]
    bounds: Bounds
    failures: list[str]
    movements: list[Movement]


def checked(asked: CoordCheck) -> Report:
    """Run the check; passed if no axis has a failure."""
    config = asked.load()
    check_format(asked.out)
    if asked.lr is not None and not 0.0 < asked.lr < math.inf:
        raise UserError(f"--lr={asked.lr:g} must be a number above 0; give a rate as 0.01")
    for flag, bound in (("--block-bound", asked.block_bound), ("--logit-bound", asked.logit_bound)):
        if bound is not None and not 0.0 <= bound < math.inf:
            raise UserError(f"{flag}={bound:g} is no slope; give 0 or a number above it")
    axes = _axes(config, asked)
    length = min(asked.length, config.data.sequence_length)
    sequences = asked.sequences or _sequences(config, axes, length)
    (pool_PL,) = read_pools(config.data, config.run.seed, length, [asked.seeds * sequences])
    lr = config.optimizer.lr if asked.lr is None else asked.lr
    check = CoordinateCheck(
        model=config.model,
        parameterization=config.parameterization,
        optimizer=config.optimizer.model_copy(update={"lr": lr}),
        tokens_GBL=pool_PL.reshape(asked.seeds, sequences, length + 1),
        steps=asked.steps,
    )
    with gates.stoppable(lambda: "nothing is kept: a check is run from its beginning"):
        outcomes = [_outcome(check, axis, sizes, asked) for axis, sizes in axes.items()]
        draw(_figure(outcomes, asked), asked.out)
    passed = not any(outcome.failures for outcome in outcomes)
    facts = {
        "kind": config.parameterization.kind,
        "optimizer": config.optimizer.kind,
        "lr": lr,
        "steps": asked.steps,
        "sequences": sequences,
        "length": length,
        "passed": passed,
        "figure": str(asked.out),
        "axes": [asdict(outcome) for outcome in outcomes],
    }
    head = (
        f"coordinate check of {config.parameterization.kind} with {config.optimizer.kind}, "
        f"{counted(asked.steps, 'step')} of {sequences} x {length} tokens at {lr:.4g}, "
        f"{counted(asked.seeds, 'seed')}: rms of what moved"
    )
    lines = [line for outcome in outcomes for line in _lines(config, outcome)]
    verdict = f"{'passed' if passed else 'NOT passed'}; figure: {asked.out}"
    return Report(facts, "\n".join([head, *lines, verdict]), passed)


def _axes(config: RunConfig, asked: CoordCheck) -> dict[Axis, tuple[int, ...]]:
    """Return the requested sizes of each axis; by default widths, and depths if there is a rule.

    In a regime of MSSP whose experts grow with the width, the experts grow here as well.
    """
    growth = growth_axis(config.parameterization)
    given = {
        Axis.WIDTH: gates.numbers(asked.widths, "--widths"),
        Axis.DEPTH: gates.numbers(asked.depths, "--depths"),
        Axis.EXPERTS if growth == Axis.WIDTH else growth: gates.numbers(asked.experts, "--experts"),
    }
    chosen = {axis: sizes for axis, sizes in given.items() if sizes is not None}
    if chosen:
        return chosen
    kinds = [growth, *[Axis.DEPTH] * gates.has_depth_rule(config.parameterization)]
    return {axis: gates.default_sizes(config.model, axis, asked.steps) for axis in kinds}


def _sequences(config: RunConfig, axes: Mapping[Axis, tuple[int, ...]], length: int) -> int:
    """Return the sequences per batch: 4, or more for wide models with a fixed Frobenius norm.


    The rank of the gradient is at most the number of tokens. With few tokens such a step spreads
    over fewer singular values, each larger, and changes a model that is wider than its batch more.
    """
    if not fixes_frobenius_norm(config.optimizer):
        return SEQUENCES
    largest = max(resize(config.model, axis, max(sizes)).width for axis, sizes in axes.items())
    return max(SEQUENCES, math.ceil(TOKENS_PER_WIDTH * largest / length))


def _outcome(
    check: CoordinateCheck, axis: Axis, sizes: tuple[int, ...], asked: CoordCheck
) -> Outcome:
    movements = check.run(sizes, range(asked.seeds), axis, gates.processes_here(asked.processes))
    default = default_bounds(check.parameterization.kind, axis)
    blocks, logits = asked.block_bound, asked.logit_bound
    bounds = Bounds(
        default.blocks if blocks is None else (-blocks, blocks),
        default.logits if logits is None else (-logits, logits),
    )
    by_name = slopes(movements)
    return Outcome(axis, by_name, bounds, failures(by_name, bounds, axis), movements)


def _names(outcome: Outcome) -> list[str]:
    """Return the displayed names: for depth the stream, which sums over layers, else the blocks."""
    if outcome.axis == Axis.DEPTH:
        return [STREAM, LOGITS]
    return [name for name in outcome.slopes if name != STREAM]


def _lines(config: RunConfig, outcome: Outcome) -> list[str]:
    by_size = means(outcome.movements)
    rows = [[outcome.axis.value, *map(str, by_size), "slope"]]
    for name in _names(outcome):
        values = [f"{rms[name]:.4f}" for rms in by_size.values()]
        rows.append([f"  {name}", *values, f"{outcome.slopes[name]:+.2f}"])
    sizes = len(by_size)
    shown = table(rows, right=range(1, sizes + 2), least=(12, *[10] * sizes, 8), gap="")
    words = gates.depth_words(config.parameterization, outcome.axis) if outcome.failures else []
    return [shown, *(f"  FAILED: {one}" for one in outcome.failures), *(f"  {w}" for w in words)]


def _figure(outcomes: list[Outcome], asked: CoordCheck) -> Figure:
    panels = []
    mean = "1 seed" if asked.seeds == 1 else f"mean and range of {asked.seeds} seeds"
    for outcome in outcomes:
        sizes, names = sorted({move.size for move in outcome.movements}), _names(outcome)
        series: list[Series] = []
        for name, colour in zip(names, colours(range(len(names))), strict=True):
            of_size = [[m.rms[name] for m in outcome.movements if m.size == s] for s in sizes]
            label = f"{name} ({outcome.slopes[name]:+.2f})"
            series += gates.curve(label, colour, sizes, np.array(of_size).T)
        panels.append(
            Panel(
                f"over {outcome.axis} (slope): {mean}",
                AXIS_LABELS[outcome.axis],
                f"rms of what moved in {counted(asked.steps, 'step')}",
                tuple(series),
                x_log=True,
                y_log=True,
                log_base=2,
                x_marks=tuple(sizes),
            )
        )
    return Figure("coordcheck", tuple(panels), legend=True)
