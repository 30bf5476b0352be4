"""Implementation of ``allometry merge``: merge the last checkpoints of a run, or forecast it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from allometry.configs.errors import UserError
from allometry.launch.command import Report
from allometry.launch.runs.commands import Merge
from allometry.launch.runs.forecast import UNIT, read_curve
from allometry.launch.text import table
from allometry.laws.forecast import PUBLISHED, Curve, borrowed, forecast
from allometry.laws.losses import LossChoice
from allometry.laws.observations import LearningRates
from allometry.studies.merge import MergeReport, Window, merge_run, open_window

_SHAPES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "mean": lambda x: 1.0 - x,  # differs only in half of the first and last intervals
    "cosine": lambda x: (1.0 + math.cos(math.pi * x)) / 2.0,
    "sqrt": lambda x: 1.0 - math.sqrt(x),
}


def merged(asked: Merge) -> Report:
    """Merge checkpoints, or with ``--forecast`` measure the merges. Raises UserError."""
    if asked.forecast:
        if asked.out is not None:
            raise UserError(f"--out={asked.out} does not go with --forecast, which writes nothing")
        return _forecasted(asked)
    for name in ("against", "like", "device"):
        if getattr(asked, name) not in (None, ()):
            raise UserError(f"--{name} goes with --forecast; leave it out")
    if asked.out is None:
        raise UserError("--out is missing; name the folder to make, or say --forecast")
    report = merge_run(asked.run, asked.out, asked.last, asked.decay, asked.step)
    return Report(asdict(report), _text(report))


def _text(report: MergeReport) -> str:
    lines = [
        f"{report.source}, {len(report.steps)} checkpoints of steps {report.steps[0]} to "
        f"{report.steps[-1]} -> {report.target}, step 0",
        f"decay {report.decay}: coefficients "
        + " ".join(f"{value:.4f}" for value in report.coefficients),
        f"{report.tensors:,} tensors"
        + (f", of which {report.rescaled:,} keep the norms of the last" if report.rescaled else ""),
        *(f"note: {note}" for note in report.notes),
        f"begin a run with it: run.initial.folder={report.target}",
    ]
    return "\n".join(lines)


def _forecasted(asked: Merge) -> Report:
    from allometry.studies.merge_losses import branch_loss, held_out_loss, merged_losses

    window = open_window(asked.run, asked.last, asked.step)
    numbers = _numbers(asked.last)
    with held_out_loss(window, None if asked.device is None else _device(asked.device)) as loss:
        branches = [branch_loss(loss, window, folder) for folder in asked.against]
        found = list(merged_losses(loss, window, asked.decay, numbers))
    gains, note = _decays(asked, window, [one.first for one in found[1:]])
    last = found[0].mixture
    rows = [("merged", "from step", "share", "held-out loss", "less the last's", "decay, by law")]
    for one, gain in zip(found, [None, *gains], strict=True):
        share = "" if one.number == 1 else f"{(one.last - one.first) / one.last:.1%}"
        text = "" if gain is None else f"{gain[0]:+.4f} +- {gain[1]:.4f}"
        change = "" if one.number == 1 else f"{one.mixture - last:+.4f}"
        number = "the last" if one.number == 1 else str(one.number)
        rows.append((number, str(one.first), share, f"{one.mixture:.4f}", change, text))
    for branch in branches:
        share = f"{(branch.last - branch.first) / branch.last:.1%}"
        name = f"{Path(branch.run).name}, at step {branch.last}"
        change = f"{branch.mixture - last:+.4f}"
        rows.append((name, str(branch.first), share, f"{branch.mixture:.4f}", change, ""))
    notes = [*window.notes(), *([note] if note else [])]
    facts = {
        "run": str(asked.run),
        "step": window.steps[-1],
        "decay": asked.decay,
        "unit": UNIT,
        "merges": [asdict(one) for one in found],
        "decays": [None if gain is None else {"change": gain[0], "sd": gain[1]} for gain in gains],
        "branches": [asdict(branch) for branch in branches],
        "notes": notes,
    }
    head = f"{asked.run}, up to step {window.steps[-1]}, decay {asked.decay}: {UNIT}"
    lines = [head, table(rows, right=(1, 2, 3, 4, 5)), *(f"note: {text}" for text in notes)]
    return Report(facts, "\n".join(lines))


def _numbers(last: int) -> list[int]:
    """Return 2, 4, 8, ... up to ``last``, and ``last``."""
    doubled = (2**power for power in range(1, last.bit_length() + 1))
    return sorted({number for number in doubled if number <= last} | {last})


def _device(name: str) -> Any:
    import torch

    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"--device={name} is not known; use cpu, cuda or cuda:1, say") from None


def _decays(
    asked: Merge, window: Window, firsts: Sequence[int]
) -> tuple[list[tuple[float, float] | None], str | None]:
    """Forecast decays in place of merges by the law of ``allometry forecast``, with a note.

    For each first step in ``firsts``: the change of the training loss at the last step relative to
    the actual learning rates, and its standard deviation; None if the law gives no forecast.
    """
    last, choice = window.steps[-1], LossChoice.parse("train")
    try:
        curve = read_curve(asked.run, choice, last).curve
        prior = PUBLISHED
        changes = []
        for first in firsts:
            target = _decayed(curve, first, last, asked.decay)
            if asked.like is not None:
                prior = borrowed([read_curve(asked.like, choice).curve], target, str(asked.like))
            kept = LearningRates(curve.rates.rates[:last], curve.rates.warmup_steps)
            before, after = (forecast([curve], rates, prior=prior) for rates in (kept, target))
            sd = after.quality.gain.sd * before.loss
            changes.append((after.loss - before.loss, sd))
        measured = "gain" not in after.quality.unmeasured
    except UserError as error:
        return [None] * len(firsts), f"no forecast of decays: {error}"
    how = "as measured" if measured else "from its prior, as no decay was recorded (--like RUN)"
    return list(changes), f"decay, by law: change of the training loss, {how}; +- one deviation"


def _decayed(curve: Curve, first: int, last: int, decay: str) -> LearningRates:
    """Return the learning rates up to ``first``, followed by a decay to 0 at ``last``."""
    rates = curve.rates.rates[:last].copy()
    steps = np.arange(first + 1, last + 1)
    shape = [_SHAPES[decay]((step - first) / (last - first)) for step in steps]
    rates[first:] = rates[first - 1] * np.array(shape)
    return LearningRates(rates, curve.rates.warmup_steps)
