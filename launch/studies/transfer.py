"""Transfer of the best learning rate over sizes: ``allometry transfer``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import numpy as np
import torch

from allometry.configs.errors import UserError
from allometry.configs.optimization import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    ScheduleConfig,
    WSDSchedule,
)
from allometry.configs.run import RunConfig
from allometry.launch.command import Report
from allometry.launch.figures.drawing import check_format, draw
from allometry.launch.figures.figure import Figure, Panel, Series, colours
from allometry.launch.studies import gates
from allometry.launch.studies.against import compared, read_other
from allometry.launch.studies.commands import Transfer as TransferCommand
from allometry.launch.text import counted, table
from allometry.laws.regret import SHARE, Regret
from allometry.scaling.shapes import Axis, growth_axis
from allometry.studies.sweeps.outcome import Transfer, Trial
from allometry.studies.sweeps.probe import read_pools
from allometry.studies.sweeps.runner import Engine, Runner
from allometry.studies.sweeps.stacked import check_stackable
from allometry.studies.sweeps.transfer import SCHEDULE, TransferSweep
from allometry.studies.sweeps.trials import TrialLog

HELD_OUT = 64
LOSS = "held-out loss, nats per token"
ANY_LENGTH = (ConstantSchedule, LinearSchedule, CosineSchedule, WSDSchedule)
"""Schedules that define the learning rates of a run of any length."""
ENOUGH_SEEDS = 3
MOST_OCTAVES = 32
MOST_RATES = 200


def swept(asked: TransferCommand) -> Report:
    """Run the sweep; passed if no size's regret is above ``regret_bound``."""
    config = asked.load()
    check_format(asked.out)
    axis = growth_axis(config.parameterization)
    if asked.axis is not None:
        if asked.axis not in [axis.value for axis in Axis]:
            known = ", ".join(axis.value for axis in Axis)
            raise UserError(f"--axis={asked.axis} is not known; use one of {known}")
        axis = Axis(asked.axis)
    _check_bounds(asked)
    rates = _rates(config.optimizer.lr, asked)
    sizes = gates.numbers(asked.sizes, "--sizes") or gates.default_sizes(
        config.model, axis, asked.steps, asked.sequences
    )
    engine = _engine(config, asked)
    sweep = _sweep(config, asked, axis, sizes)
    seeds = tuple(range(asked.seeds))
    sweep.check(sizes, seeds)  # before the file of trials is created
    other = None if asked.against is None else read_other(asked.against, sweep.settings())
    log = None if asked.trials is None else TrialLog(asked.trials, sweep.settings())
    ended: dict[Trial, float] = {}
    runner = Runner(
        sweep,
        rates,
        asked.step,
        1 if asked.device == "cuda" else gates.processes_here(asked.processes),
        known={} if log is None else log.known,
        done=ended.__setitem__ if log is None else log.add,
        engine=engine,
        device=asked.device,
        runs_at_once=asked.runs_at_once,
        place_first=asked.place_first,
    )
    with gates.stoppable(lambda: _kept(log, len(ended))):
        transfer = runner.run(sizes, seeds)
        draw(_figure(transfer), asked.out)
    bounds = asked.regret_bound, asked.bound
    wrong, unsure = transfer.failures(*bounds), transfer.undecided(*bounds)
    held = None if other is None else compared(other, transfer)
    if held is not None:
        wrong += held.sentences("missed")
        unsure += held.sentences("undecided")
    facts = {
        "kind": config.parameterization.kind,
        "optimizer": config.optimizer.kind,
        "engine": engine,
        "bound_percent": asked.regret_bound,
        "bound_octaves": asked.bound,
        "passed": not (wrong or unsure),
        "failures": wrong,
        "undecided": unsure,
        "against": None if held is None else held.describe(),
        "figure": str(asked.out),
        **transfer.describe(),
    }
    return Report(facts, _text(config, asked, transfer, wrong, unsure), not (wrong or unsure))


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


def _engine(config: RunConfig, asked: TransferCommand) -> Engine:
    """Return the requested engine. Raises UserError: the engine cannot train these runs."""
    engine = next((name for name in get_args(Engine) if name == asked.engine), None)
    if engine is None:
        raise UserError(f"--engine={asked.engine} is not known; use processes or stacked")
    if asked.device not in ("cpu", "cuda"):
        raise UserError(f"--device={asked.device} is not known; use cpu or cuda")
    if engine == "processes":
        given = {"device": asked.device != "cpu", "runs-at-once": asked.runs_at_once is not None}
        for flag in (flag for flag, is_given in given.items() if is_given):
            raise UserError(
                f"--{flag} is of stacked runs, and --engine=processes trains each by itself on a "
                f"CPU; use --engine stacked, or leave --{flag} out"
            )
        return "processes"
    check_stackable(config.model, config.optimizer)
    if asked.device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device=cuda: torch finds no GPU here; use --device cpu")
        if (asked.processes or 1) > 1:
            raise UserError(
                f"--processes={asked.processes} with --device=cuda: stacks take turns on one GPU; "
                "leave --processes out"
            )
    return "stacked"


def _rates(lr: float, asked: TransferCommand) -> tuple[float, ...]:
    """Return log2 of the first rates: around the run's own, rounded to multiples of the step."""
    if not 0.0 < asked.step <= asked.octaves:
        raise UserError(
            f"--step={asked.step:g} must be above 0 and at most --octaves={asked.octaves:g}; "
            "change one of them"
        )
    if asked.octaves > MOST_OCTAVES:
        raise UserError(
            f"--octaves={asked.octaves:g} goes beyond any rate of use; choose at most "
            f"{MOST_OCTAVES}"
        )
    centre = round(math.log2(lr) / asked.step)
    reach = round(asked.octaves / asked.step)
    if 2 * reach + 1 > MOST_RATES:
        raise UserError(
            f"--step={asked.step:g} makes {2 * reach + 1:,} rates of each size; choose a larger "
            f"step, for at most {MOST_RATES}"
        )
    return tuple((centre + offset) * asked.step for offset in range(-reach, reach + 1))


def _sweep(
    config: RunConfig, asked: TransferCommand, axis: Axis, sizes: tuple[int, ...]
) -> TransferSweep:
    length = min(asked.length, config.data.sequence_length)
    longest = max(sizes) if axis == Axis.HORIZON else asked.steps
    # For the axis batch, every size has the tokens of --steps steps of --sequences.
    pool_PL, held_out_HL = read_pools(
        config.data, config.run.seed, length, [longest * asked.sequences, HELD_OUT]
    )
    return TransferSweep(
        model=config.model,
        parameterization=config.parameterization,
        optimizer=config.optimizer,
        pool_PL=pool_PL,
        held_out_HL=held_out_HL,
        axis=axis,
        steps=asked.steps,
        sequences=asked.sequences,
        warmup_steps=asked.warmup_steps,
        clip=config.training.clip_grad_norm,
        schedule=_schedule(config, asked),
    )


def _schedule(config: RunConfig, asked: TransferCommand) -> ScheduleConfig:
    """Return the schedule of all runs, without its warm-up, which is ``--warmup``."""
    if asked.schedule == "linear":
        return SCHEDULE
    if asked.schedule != "run":
        raise UserError(f"--schedule={asked.schedule} is not known; use linear or run")
    if not isinstance(config.schedule, ANY_LENGTH):
        raise UserError(
            f"schedule.kind={config.schedule.kind} is that of one run, and a sweep's have another "
            "length; use --schedule linear, or schedule.kind: wsd"
        )
    return config.schedule.model_copy(update={"warmup_steps": None, "warmup_tokens": None})


def _check_bounds(asked: TransferCommand) -> None:
    """Raise UserError for bounds that are not finite, non-negative numbers."""
    if not 0.0 <= asked.regret_bound < math.inf:
        raise UserError(
            f"--regret-bound={asked.regret_bound:g} is no percentage; use 0.5 or another"
        )
    if asked.bound is not None and not 0.0 <= asked.bound < math.inf:
        raise UserError(f"--bound={asked.bound:g} is no number of octaves; use 0.5 or another")


def _text(
    config: RunConfig,
    asked: TransferCommand,
    transfer: Transfer,
    wrong: Sequence[str],
    unsure: Sequence[str],
) -> str:
    low, high = transfer.drift_interval()
    interval = f" (95 % over seeds: {low:.2f} to {high:.2f})" if math.isfinite(low) else ""
    drift = transfer.drift()
    verdict = f"passed: at most {asked.regret_bound:g} % of the loss"
    if asked.against is not None:
        verdict += f", at most {SHARE:g} of {asked.against}'s"
    if asked.bound is not None:
        verdict += f", at most {asked.bound:g} octaves"
    if wrong or unsure:
        verdict = "NOT passed" if wrong else "UNDECIDED"
    if unsure and not wrong and len(transfer.seeds) < ENOUGH_SEEDS:
        verdict += f"; repeat it with --seeds {ENOUGH_SEEDS}"
    lines = [
        f"best learning rates of {config.parameterization.kind} with {config.optimizer.kind} over "
        f"{transfer.axis}, {counted(len(transfer.seeds), 'seed')}, "
        + (
            "the tokens of a run constant"
            if transfer.axis == Axis.BATCH
            else f"{counted(asked.sequences, 'sequence')} a step"
        ),
        _table(transfer),
        f"regret: loss at the rate of {transfer.axis} {transfer.sizes[0]} minus loss at the own "
        "best rate, in % of that (95 % over seeds)",
        "drift unknown" if math.isnan(drift) else f"drift {drift:.2f} octaves{interval}",
        *(f"FAILED: {failure}" for failure in wrong),
        *(f"undecided: {reason}" for reason in unsure),
        *(gates.depth_words(config.parameterization, transfer.axis) if wrong else []),
        f"{verdict}; figure: {asked.out}",
    ]
    return "\n".join(lines)


def _table(transfer: Transfer) -> str:
    rows = [[transfer.axis.value, "best lr", "log2", "loss", "seeds apart", "regret, nats", "%"]]
    regrets = transfer.regrets()
    for size, best in transfer.optima().items():
        spread = transfer.sweep(size).spread()
        apart = f"{spread:.2f}" if math.isfinite(spread) else "-"
        loss = f"{best.loss:.4f}" if best.loss < 1000.0 else f"{best.loss:.2g}"
        cells = _regret(regrets[size]) if size in regrets else ["", ""]
        rows.append([str(size), f"{2.0**best.log2_lr:.4g}", f"{best.log2_lr:.2f}", loss, apart])
        rows[-1] += cells
    return table(rows, right=(1, 2, 3, 4, 5, 6), least=(16, 12, 9, 9, 13, 14, 26), gap="")


def _regret(regret: Regret) -> list[str]:
    if regret.nats == math.inf:
        return ["diverges", ""]
    if math.isnan(regret.nats):
        return ["unknown", ""]
    low, high = regret.percent_interval
    within = f" ({low:.2f} to {high:.2f})" if math.isfinite(low) else " (unknown)"
    return [f"{regret.nats:.4f}", f"{regret.percent:.2f}{within}"]


def _figure(transfer: Transfer) -> Figure:
    """Return the loss at each size against the rate, without diverged rates."""
    optima, series = transfer.optima(), list[Series]()
    for (size, best), colour in zip(optima.items(), colours(range(len(optima))), strict=True):
        sweep = transfer.sweep(size)
        kept = np.isfinite(sweep.losses_RS.mean(axis=1))
        name = f"{size} steps" if transfer.axis == Axis.HORIZON else f"{transfer.axis} {size}"
        series += gates.curve(
            name,
            colour,
            2.0 ** np.array(sweep.log2_lrs)[kept],
            sweep.losses_RS[kept].T,
            (2.0**best.log2_lr, best.loss) if best.interior else None,
        )
    seeds = len(transfer.seeds)
    mean = f"mean and range of {seeds} seeds" if seeds > 1 else "1 seed"
    title = f"over {transfer.axis}: {mean}; stars: best rates"
    panel = Panel(title, "peak learning rate", LOSS, tuple(series), x_log=True, log_base=2)
    return Figure("transfer", (panel,), legend=True)
