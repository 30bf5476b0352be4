"""Cheapest size, tokens and layout for a loss: ``allometry plan --fit FILE --loss L``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from allometry.configs.errors import UserError
from allometry.configs.format import human
from allometry.configs.model import ModelConfig
from allometry.configs.run import RunConfig
from allometry.launch.studies.plan_text import words
from allometry.launch.text import table
from allometry.laws.collect import COUNT_MEANING, CountName
from allometry.laws.fit.engine import Fit
from allometry.laws.observations import Observations
from allometry.scaling.count import count_parameters, flops_per_token
from allometry.scaling.search.curves import best_of
from allometry.scaling.search.proposal import Proposal
from allometry.scaling.search.search import Asked
from allometry.scaling.shapes import at_width, width_unit

RATIOS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
"""Candidate widths, as multiples of the run's width."""
LEAST_D, MOST_D = 1e6, 1e16


@dataclass(frozen=True)
class Size:
    """A model of the family that reaches the loss after ``tokens``, and its cheapest layout.

    ``parameters``: counted as in the law.
    """

    width: int
    parameters: float
    tokens: float
    flops: float
    best: Proposal

    def describe(self) -> dict[str, Any]:
        """Return the size as JSON."""
        same = {name: getattr(self, name) for name in ("width", "parameters", "tokens", "flops")}
        return {**same, "best": self.best.describe()}


def sizes(
    config: RunConfig,
    fit: Fit,
    loss: float,
    asked: Asked,
    counts: Sequence[int],
    price: float | None = None,
) -> tuple[list[Size], list[str]]:
    """Return the sizes that reach the loss, by increasing GPU-hours, and notes on them.

    The width varies with everything else in proportion (``scaling.shapes.at_width``); the batch is
    not changed. Raises UserError: no size reaches the loss, or the law has other inputs.
    """
    counted = _count(fit)
    others = [one.name for one in fit.form.inputs if one.name not in ("N", "D", "C", "M")]
    if others:
        raise UserError(
            f"--fit: {fit.form.name} needs {', '.join(others)} too; give a law of N and D, as "
            "chinchilla"
        )
    found, unreached = [], []
    for width in widths(config):
        run = config.model_copy(update={"model": at_width(config.model, width)})
        parameters = float(count_of(run.model, counted))
        tokens = tokens_for(fit, parameters, loss)
        if tokens is None:
            unreached.append(parameters)
            continue
        flops = flops_per_token(run.model, run.data.sequence_length).total * tokens
        for gpus in counts:
            best, _ = best_of(run, gpus, asked, round(tokens), price)
            if best is not None:
                found.append(Size(width, parameters, tokens, flops, best))
    if not found:
        why = "no size reaches it" if unreached else "nothing that reaches it fits"
        raise UserError(
            f"--loss={loss}: {why} among {len(RATIOS)} widths around {config.model.width}; ask "
            "for a higher loss, or give more --gpus or another model"
        )
    found.sort(key=lambda one: one.best.gpu_hours)
    rows = _rows([one.parameters for one in found], [one.tokens for one in found])
    return found, [*fit.warnings_for(rows), f"N counts {COUNT_MEANING[counted]}"]


def count_of(model: ModelConfig, counted: CountName) -> int:
    """Return the number of parameters of a model by a law's convention."""
    count = count_parameters(model)
    if counted == "with_head":
        return count.non_embedding + model.vocab_size * model.width
    return count.total if counted == "total" else count.non_embedding


def widths(config: RunConfig) -> list[int]:
    """Return widths of the family around the run's width, in increasing order."""
    unit = width_unit(config.model)
    near = {max(1, round(ratio * config.model.width / unit)) * unit for ratio in RATIOS}
    return sorted(near)


def tokens_for(fit: Fit, parameters: float, loss: float) -> float | None:
    """Return the fewest tokens with a predicted loss of at most ``loss``; None if never reached."""

    def above(log_d: float) -> bool:
        predicted = fit.predict(_rows([parameters], [np.exp(log_d)]))
        return not bool(predicted[0] <= loss)

    low, high = np.log(LEAST_D), np.log(MOST_D)
    if above(high):
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) else (low, middle)
    return float(np.exp(high))


def _rows(parameters: Sequence[float], tokens: Sequence[float]) -> Observations:
    n, d = np.array(parameters), np.array(tokens)
    return Observations.of({"N": n, "D": d, "C": 6 * n * d, "M": d / n})


def _count(fit: Fit) -> CountName:
    """Return the convention by which the fit counts N; ``total`` if the fit has none."""
    said = fit.observations.conventions.get("N", "")
    return next((name for name, meaning in COUNT_MEANING.items() if meaning == said), "total")


def target_text(found: Sequence[Size], notes: Sequence[str], loss: float, top: int) -> str:
    """Return the cheapest sizes as a table."""
    header = ["", "width", "N", "D", "D/N", "FLOPs", "GPUs", "layout", "recompute", "micro"]
    rows = [[*header, "MFU", "days", "GPU-hours", *(["cost"] if found[0].best.cost else [])]]
    for number, one in enumerate(found[:top], 1):
        best, choice = one.best, one.best.choice
        rows.append(
            [
                *(str(number), f"{one.width:,}", human(one.parameters), human(one.tokens)),
                *(f"{one.tokens / one.parameters:,.0f}", f"{one.flops:.3g}", f"{best.gpus:,}"),
                *(words(choice, best.gpus), choice.checkpointing, str(choice.micro_batch)),
                *(f"{best.mfu:.1%}", f"{best.days:.3g}", human(best.gpu_hours)),
                *([human(best.cost)] if best.cost else []),
            ]
        )
    least = min(found, key=lambda one: one.flops)
    lines = [f"a loss of {loss} by the law, sizes and tokens with their best layouts:", ""]
    lines += [table(rows, right=(0, 1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 13))]
    lines += ["", f"fewest FLOPs: width {least.width:,}, {human(least.tokens)} tokens"]
    return "\n".join([*lines, *notes])
