"""Forecast of a run's final loss, under its own or another schedule: ``allometry forecast``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from allometry.configs.errors import UserError
from allometry.configs.loader import load
from allometry.configs.optimization import ContinuedSchedule, WSDSchedule
from allometry.configs.run import RunConfig
from allometry.launch.command import Report
from allometry.launch.runs.commands import Forecast as ForecastCommand
from allometry.laws.comparable import check_comparable
from allometry.laws.forecast import PUBLISHED, Curve, Forecast, borrowed, forecast
from allometry.laws.losses import LossChoice, check_losses, loss_curve
from allometry.laws.observations import LearningRates
from allometry.laws.runs import Run, read_run
from allometry.optim.schedule import Decay
from allometry.trainer.record.rates import one_curve, planned_rates, with_history

SAME = ("model", "parameterization", "batch")
"""Config sections in which runs must be equal to be fitted by one law."""
KINDS = ("constant", "linear", "cosine", "wsd")
"""Schedules that can be requested; other schedules need keys that have no option."""
DECAY_KEYS = ("decay_fraction", "decay", "final_fraction")
UNIT = "nats per token"
_LAST = 0.02  # share of a finished run's rows whose mean is its final loss


@dataclass(frozen=True)
class RunCurve:
    """A run, its configuration, and its losses with the learning rate of each step."""

    run: Run
    config: RunConfig
    curve: Curve


def forecasted(asked: ForecastCommand) -> Report:
    """Forecast the end of the run, or of the same run with another schedule.

    ``schedule`` to ``total_steps`` replace keys of the run's own schedule (another ``schedule``
    starts from the defaults of its kind, with the run's warm-up). ``decay_now``: instead, the steps
    so far and a decay from their last learning rate. Raises UserError: a folder has no run, the
    runs differ in sections that one law requires to be equal, the schedule is invalid, or there are
    too few rows. For example,
    ``forecasted(Forecast(folder=Path("runs/a"), decay_now=True)).facts["loss"]``.
    """
    if not 0.0 < asked.level < 1.0:
        raise UserError(f"--level={asked.level} is no probability; use 0.95, say")
    for flag, value in (("--schedule", asked.schedule), ("--total-steps", asked.total_steps)):
        if asked.decay_now and value is not None:
            raise UserError(
                f"--decay-now says when the run ends; leave {flag}={value} out, or leave "
                "--decay-now out"
            )
    choice = LossChoice.parse(asked.loss)
    first = read_curve(asked.folder, choice, asked.at_step)
    others = [read_curve(folder, choice) for folder in asked.others]
    for other in others:
        check_comparable([first.run, other.run], choice)
        for section in SAME:
            if getattr(first.config, section) != getattr(other.config, section):
                raise UserError(
                    f"--with {other.run.folder}: its {section} section is not that of "
                    f"{first.run.folder}, so one law cannot hold for both; give runs that differ "
                    "in schedule, rate and length alone, or borrow from it (--like)"
                )
    target, words = _target(asked, first)
    prior = PUBLISHED
    if asked.like is not None:
        prior = borrowed([read_curve(asked.like, choice).curve], target, str(asked.like))
    curves = [first.curve, *(other.curve for other in others)]
    result = forecast(curves, target, prior=prior, level=asked.level)
    last = first.curve.losses_n[-max(1, int(_LAST * len(first.curve.losses_n))) :]
    facts = {
        "run": str(asked.folder),
        "with": [str(folder) for folder in asked.others],
        "loss_of": asked.loss,
        "target": words,
        "unit": UNIT,
        "last_loss": float(last.mean()),
        "last_loss_rows": len(last),
        **result.to_json(),
    }
    kind = "training" if choice.kind == "train" else "held-out"
    which = f"{kind} loss of {choice.source or 'the mixture'}"
    return Report(facts, _text(first, which, words, result, (float(last.mean()), len(last))))


def read_curve(folder: Path, choice: LossChoice, at_step: int | None = None) -> RunCurve:
    """Return a run with the curve of its loss and the learning rate of each of its steps."""
    run = read_run(folder)
    config = load(Path(folder) / "config.yaml", recorded=True)
    recorded = run.metrics["step"].astype(np.int64)
    rates = _as_recorded(planned_rates(config), run, config)
    if int(recorded[-1]) > len(rates.rates):
        raise UserError(
            f"{folder} recorded step {int(recorded[-1])} and its config.yaml plans "
            f"{len(rates.rates)} steps; restore the config.yaml that it was trained with"
        )
    used, planned = run.metrics["lr"], rates.rates[recorded - 1]
    wrong = ~np.isclose(used, planned, rtol=1e-6, atol=0.0)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise UserError(
            f"{folder}: step {recorded[row]} was trained at lr {used[row]:.6g} and its config.yaml "
            f"says {planned[row]:.6g}; restore the config.yaml (or the file of its schedule) that "
            "it was trained with"
        )
    steps, losses = loss_curve(run, choice)
    usable = steps <= (at_step or recorded[-1])
    if not usable.any():
        raise UserError(
            f"{folder} has no recorded loss up to step {at_step}; name a later step (--at-step)"
        )
    after = usable & (steps > rates.warmup_steps)
    check_losses(run, choice, steps[after], losses[after])
    usable &= np.isfinite(losses)  # in the warm-up, which laws do not read
    steps_n, losses_n = steps[usable].astype(np.int64), losses[usable]
    if config.stages is not None:  # other stages read other data and have curves of their own
        begin, _, rates = one_curve(config, min(at_step or recorded[-1], recorded[-1]) - 1)
        here = (steps_n >= begin) & (steps_n <= len(rates.rates))
        steps_n, losses_n = steps_n[here], losses_n[here]
    return RunCurve(run, config, Curve(str(folder), steps_n, losses_n, rates))


def _as_recorded(rates: LearningRates, run: Run, config: RunConfig) -> LearningRates:
    """Return the learning rates of a run, with the recorded rates for its parent's steps."""
    steps_n = run.metrics["step"].astype(np.int64)
    return with_history(rates, config.run.branched_at, steps_n, run.metrics["lr"])


def _target(asked: ForecastCommand, first: RunCurve) -> tuple[LearningRates, str]:
    """Return the learning rates of the requested run, and a description of the run."""
    if asked.decay_now:
        return _decayed(asked, first)
    given = {key: getattr(asked, key) for key in DECAY_KEYS if getattr(asked, key) is not None}
    if first.config.stages is not None:
        if asked.schedule is not None or given or asked.total_steps is not None:
            raise UserError(
                f"{first.run.folder} has stages, and --schedule, --total-steps and options of "
                "decays are for a run without; leave them out, or ask --decay-now"
            )
        return first.curve.rates, f"its stages up to step {len(first.curve.rates.rates)}"
    if asked.schedule is None and not given and asked.total_steps is None:
        return first.curve.rates, f"its own schedule ({first.config.schedule.kind})"
    overrides = []
    if asked.schedule is not None or given:
        overrides.append(f"schedule={json.dumps(_section(asked, first, given))}")
    if asked.total_steps is not None:
        overrides += ["training.total_tokens=null", f"training.total_steps={asked.total_steps}"]
    warmup = first.curve.rates.warmup_steps
    if asked.total_steps is not None and asked.total_steps <= warmup:
        raise UserError(
            f"--total-steps={asked.total_steps}: the warm-up of {warmup} steps is longer than "
            "the run; ask for more steps"
        )
    try:
        config = load(first.run.folder / "config.yaml", overrides, recorded=True)
        rates = _as_recorded(planned_rates(config), first.run, config)
    except UserError as error:
        raise UserError(_in_flags(str(error), asked, overrides)) from None
    text = ", ".join(f"{key} {value}" for key, value in given.items())
    return rates, config.schedule.kind + (f" ({text})" if text else "")


_FLAGS = {
    "schedule.kind": "--schedule",
    "schedule.decay_fraction": "--decay-fraction",
    "schedule.decay": "--decay",
    "schedule.final_fraction": "--final-fraction",
    "final_fraction": "--final-fraction",
    "decay": "--decay",
}


def _in_flags(message: str, asked: ForecastCommand, overrides: list[str]) -> str:
    """Rewrite a sentence about a configuration in terms of this command's options."""
    for override in overrides:
        message = message.removeprefix(f"override {override!r}: ").removeprefix("schedule: ")
    message = message.replace("wsd or wsd_s", "wsd")  # wsd_s needs keys without option
    message = re.sub(
        r"(?<![\w.-])(schedule\.\w+|final_fraction|decay(?=: ))(: |=)?",
        lambda key: _FLAGS.get(key[1], key[1]) + ("=" if key[2] else ""),
        message,
    )
    if message.startswith("--"):
        return message
    keys = ("schedule", *DECAY_KEYS, "total_steps")
    given = {key.replace("_", "-"): getattr(asked, key) for key in keys}
    flags = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return f"{' '.join(flags)}: {message}"


def _section(asked: ForecastCommand, first: RunCurve, given: dict[str, Any]) -> dict[str, Any]:
    """Return the requested schedule section."""
    own = first.config.schedule
    if asked.schedule not in (None, own.kind, *KINDS):
        raise UserError(
            f"--schedule={asked.schedule} is no schedule that a forecast can be asked for; use "
            f"{', '.join(KINDS)}"
        )
    if asked.schedule in (None, own.kind):
        return {**own.model_dump(exclude_none=True), **given}
    begun = own.before if isinstance(own, ContinuedSchedule) else own
    warmup = {"warmup_steps": begun.warmup_steps, "warmup_tokens": begun.warmup_tokens}
    kept = {key: value for key, value in warmup.items() if value is not None}
    return {"kind": asked.schedule, **kept, **given}


def _decayed(asked: ForecastCommand, first: RunCurve) -> tuple[LearningRates, str]:
    """Return the learning rates of the steps so far and of a decay from the last of them."""
    share = 0.1 if asked.decay_fraction is None else asked.decay_fraction
    if not 0.0 < share < 1.0:
        raise UserError(
            f"--decay-fraction={share} is no share of a run that has begun; use 0.1, say"
        )
    try:
        shape = WSDSchedule(
            decay=asked.decay or "1-sqrt",
            final_fraction=asked.final_fraction or 0.0,
            decay_fraction=share,
        )
    except ValidationError as error:
        raise UserError(
            f"--decay={asked.decay} --final-fraction={asked.final_fraction} is no decay "
            f"({error.errors()[0]['msg']}); use 1-sqrt, linear, or exponential with a final "
            "fraction above 0"
        ) from None
    now = int(first.curve.steps_n[-1])
    length = max(1, round(now * share / (1.0 - share)))
    done = first.curve.rates.rates[:now]
    if not done[-1] > 0.0:
        raise UserError(
            f"{first.run.folder} is at learning rate 0 at step {now}: there is nothing to decay; "
            "name an earlier step (--at-step) or leave --decay-now out"
        )
    decay = Decay(shape, now + length, 0, decay_steps=length)
    fall = [decay.fraction(step) for step in range(now + 1, now + length + 1)]
    rates = np.concatenate([done, done[-1] * np.array(fall)])
    words = f"a decay from now on ({shape.decay}, {length} steps)"
    return LearningRates(rates, first.curve.rates.warmup_steps), words


def _text(
    first: RunCurve, which: str, words: str, result: Forecast, last: tuple[float, int]
) -> str:
    """Return the forecast as text.

    ``which``: name of the loss, ``last``: its mean over the last rows and the number of these rows.
    """
    quality, values = result.quality, result.values
    rows = f"mean of the last {last[1]} rows" if last[1] > 1 else "the last row"
    lines = [
        f"{first.run.folder}: step {result.step}",
        f"now         {last[0]:.4f} {UNIT}, the {which} ({rows})",
        "law         L = {L0:.4f} + {A:.4f} S1^-{alpha:.3f} - {C:.4g} S2, memory "
        "{memory:.0f} steps (arXiv 2408.11029)".format(**values),
        f"            L in {UNIT}; S1, S2 in learning rate x steps: the sum of the rates, and how",
        "            far they were lowered over the memory",
        f"fit         {quality.rows} averaged rows, worth {quality.effective_rows:.0f} independent "
        f"ones; residual {quality.residual:.2%} of the loss",
        f"decay       gains {quality.gain.mean:.2%} +- {quality.gain.sd:.2%} of the loss (one "
        "deviation), " + ("hardly measured" if "gain" in quality.unmeasured else "measured"),
        f"forecast    {result.loss:.4f} {UNIT} at step {result.total_steps}, {words}",
        f"            {100 * result.level:g} % interval {result.low:.4f} to {result.high:.4f} "
        f"{UNIT}",
    ]
    return "\n".join([*lines, *(f"note        {warning}" for warning in result.warnings)])
