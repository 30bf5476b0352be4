"""``allometry transfer``: does the best learning rate stay where it is?"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
    numbers,
    processes_here,
    stoppable,
)
from allometry.scaling.shapes import Axis, growth_axis
from allometry.studies.sweeps.probe import read_pools
from allometry.studies.sweeps.transfer import Runner, Transfer, TransferSweep, Trial
from allometry.studies.sweeps.trials import TrialLog

HELD_OUT = 64
MOST_OCTAVES = 32
MOST_RATES = 200


@dataclass(frozen=True)
class Request:
    """What the command line asks for; None: the default."""

    axis: str | None = None
    sizes: str | None = None
    octaves: float = 1.0
    step: float = 0.5
    seeds: int = 2
    steps: int = 80
    warmup_steps: int = 0
    sequences: int = 8
    length: int = 64
    bound: float = 0.5
    processes: int | None = None
    trials: Path | None = None
    out: Path = Path("transfer.png")


def run(config: RunConfig, request: Request, *, as_json: bool) -> tuple[str, bool]:
    """Run the sweep; return the report and whether it is passed."""
    check_format(request.out)
    axis = growth_axis(config.parameterization) if request.axis is None else _axis(request.axis)
    if not 0.0 <= request.bound < math.inf:
        raise UserError(f"--bound={request.bound:g} is no number of octaves; use 0.5 or another")
    rates = _rates(config.optimizer.lr, request)
    sizes = numbers(request.sizes, "--sizes") or default_sizes(config.model, axis, request.steps)
    sweep = _sweep(config, request, axis, sizes)
    seeds = tuple(range(request.seeds))
    sweep.check(sizes, seeds)  # before the file of trials is begun
    log = None if request.trials is None else TrialLog(request.trials, sweep.settings())
    ended: dict[Trial, float] = {}
    runner = Runner(
        sweep,
        rates,
        request.step,
        processes_here(request.processes),
        known={} if log is None else log.known,
        done=ended.__setitem__ if log is None else log.add,
    )
    with stoppable(lambda: _kept(log, len(ended))):
        found = runner.run(sizes, seeds)
        _figure(found, request.out)
    wrong = found.failures(request.bound)
    if as_json:
        facts = {
            "kind": config.parameterization.kind,
            "optimizer": config.optimizer.kind,
            "bound_octaves": request.bound,
            "passed": not wrong,
            "failures": wrong,
            "figure": str(request.out),
            **found.describe(),
        }
        return json.dumps(facts, indent=2), not wrong
    return _text(config, request, found, wrong), not wrong


def _kept(log: TrialLog | None, ended: int) -> str:
    number = ended if log is None else len(log.known)
    if not number:
        return "no trial had ended"
    if log is not None:
        trials = "1 trial is" if number == 1 else f"{number} trials are"
        return f"{trials} kept in {log.path}, and the same command goes on from there"
    trials = (
        "the trial that had ended is" if ended == 1 else f"the {ended} trials that had ended are"
    )
    return f"{trials} lost: keep them with --trials FILE, from which the same command goes on"


def _axis(name: str) -> Axis:
    if name not in [axis.value for axis in Axis]:
        known = ", ".join(axis.value for axis in Axis)
        raise UserError(f"--axis={name} is not known; use one of {known}")
    return Axis(name)


def _rates(lr: float, request: Request) -> tuple[float, ...]:
    """log2 of the first rates: around the run's own, to a multiple of the step."""
    if not 0.0 < request.step <= request.octaves:
        raise UserError(
            f"--step={request.step:g} must be above 0 and at most --octaves={request.octaves:g}; "
            "change one of them"
        )
    if request.octaves > MOST_OCTAVES:
        raise UserError(
            f"--octaves={request.octaves:g} goes beyond any rate of use; choose at most "
            f"{MOST_OCTAVES}"
        )
    centre = round(math.log2(lr) / request.step)
    reach = round(request.octaves / request.step)
    if 2 * reach + 1 > MOST_RATES:
        raise UserError(
            f"--step={request.step:g} makes {2 * reach + 1:,} rates of each size; choose a larger "
            f"step, for at most {MOST_RATES}"
        )
    return tuple((centre + offset) * request.step for offset in range(-reach, reach + 1))


def _sweep(
    config: RunConfig, request: Request, axis: Axis, sizes: tuple[int, ...]
) -> TransferSweep:
    length = min(request.length, config.data.sequence_length)
    longest = max(sizes) if axis == Axis.HORIZON else request.steps
    pool_PL, held_out_HL = read_pools(
        config.data, config.run.seed, length, [longest * request.sequences, HELD_OUT]
    )
    return TransferSweep(
        model=config.model,
        parameterization=config.parameterization,
        optimizer=config.optimizer,
        pool_PL=pool_PL,
        held_out_HL=held_out_HL,
        axis=axis,
        steps=request.steps,
        sequences=request.sequences,
        warmup_steps=request.warmup_steps,
        clip=config.training.clip_grad_norm,
    )


def _text(config: RunConfig, request: Request, found: Transfer, wrong: list[str]) -> str:
    sweeps = {size: found.sweep(size) for size in found.sizes}
    lines = [
        f"best learning rates of {config.parameterization.kind} with {config.optimizer.kind} over "
        f"{found.axis}, {counted(len(found.seeds), 'seed')}, "
        f"{counted(request.sequences, 'sequence')} a step",
        f"{found.axis:<12}{'best lr':>12}{'log2':>9}{'loss':>9}{'seeds apart':>13}",
    ]
    for size, optimum in found.optima().items():
        spread = sweeps[size].spread()
        apart = f"{spread:.2f}" if math.isfinite(spread) else "-"
        loss = f"{optimum.loss:.4f}" if optimum.loss < 1000.0 else f"{optimum.loss:.2g}"
        lines.append(
            f"{size:<12}{2.0**optimum.log2_lr:>12.4g}{optimum.log2_lr:>9.2f}{loss:>9}{apart:>13}"
        )
    low, high = found.drift_interval()
    interval = f" (95 % over seeds: {low:.2f} to {high:.2f})" if math.isfinite(low) else ""
    drift = found.drift()
    lines.append("drift unknown" if math.isnan(drift) else f"drift {drift:.2f} octaves{interval}")
    lines += [f"FAILED: {failure}" for failure in wrong]
    lines += depth_words(config.parameterization, found.axis) if wrong else []
    verdict = "NOT passed" if wrong else f"passed: at most {request.bound:g} octaves"
    return "\n".join([*lines, f"{verdict}; figure: {request.out}"])


def _figure(found: Transfer, out: Path) -> None:
    lines: dict[str, Line] = {}
    several = len(found.seeds) > 1
    for size, optimum in found.optima().items():
        sweep = found.sweep(size)
        means = sweep.losses_RS.mean(axis=1)
        kept = np.isfinite(means)
        losses_RS = sweep.losses_RS[kept]
        name = f"{size} steps" if found.axis == Axis.HORIZON else f"{found.axis} {size}"
        lines[name] = Line(
            x=[float(x) for x in 2.0 ** np.array(sweep.log2_lrs)[kept]],
            y=[float(y) for y in means[kept]],
            low=[float(y) for y in losses_RS.min(axis=1)] if several else None,
            high=[float(y) for y in losses_RS.max(axis=1)] if several else None,
            mark=(2.0**optimum.log2_lr, optimum.loss) if optimum.interior else None,
        )
    mean = f"mean and range of {len(found.seeds)} seeds" if several else "1 seed"
    panel = Panel(
        title=f"over {found.axis}: {mean}; stars: best rates",
        x_label="peak learning rate",
        y_label="held-out loss, nats per token",
        lines=lines,
    )
    draw(out, [panel])
