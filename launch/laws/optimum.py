"""Compute-optimal N and D by a law: ``allometry optimum``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from allometry.configs.errors import UserError
from allometry.launch.command import Report
from allometry.launch.laws.commands import Optimum
from allometry.launch.laws.predict import LEVEL, Law, conventions, interval
from allometry.launch.laws.sources import assignments, numbers
from allometry.launch.text import number, table
from allometry.laws.allocation import Allocation, best_share, compute_optimal

SAME_EXPONENT = 1e-4
"""Exponents of several budgets that differ by less come from one power law, up to rounding."""
OF_PARAMETERS = (
    "intervals of N and of the powers are of the law's parameters alone; that of the loss holds "
    "the form's error, too"
)
FLOPS_TOLERANCE = 0.1
"""Relative difference of FLOPs per parameter and token above which ``optimum`` warns."""


def optima(asked: Optimum) -> Report:
    """Return the N, D and loss of the compute-optimal model for each budget of FLOPs.

    Raises UserError: a budget is not a positive number, or the law does not read N and D.
    """
    law, per_token = Law.of(asked.fit, asked.law, asked.published), asked.flops_per_parameter_token
    if law.form.target.name != "loss":
        raise UserError(
            f"{law.form.name} predicts {law.form.target.name}, and FLOPs are spent for the "
            "least loss; give a law of the loss by N and D, as chinchilla"
        )
    fixed = numbers(assignments(asked.inputs, "--with"), "--with")
    free = [one.name for one in law.form.inputs if one.name not in ("N", "D", "C", "M")]
    for name in fixed:  # not an input of the law, or an input that follows from the budget
        if name not in free:
            raise UserError(
                f"--with {name}: {law.form.name} has "
                + (f"only {', '.join(free)} besides" if free else "no input besides")
                + " N, D and what follows from them; leave it out"
            )
    texts = [{"--flops": text.strip()} for text in asked.flops.split(",")]
    rows = [_best(law, numbers(one, "budget")["--flops"], per_token, fixed) for one in texts]
    repeated = [_repeated(law, row, fixed) for row in rows] if "U" in fixed else []
    warnings = list(dict.fromkeys(w for row in rows for w in row.warnings))
    warnings += [*law.warnings(), *_other_flops(law, per_token)]
    facts: dict[str, Any] = {
        "law": law.form.name,
        "from": law.origin,
        "unit": law.unit,
        "level": LEVEL,
        "flops_per_parameter_token": per_token,
        "optima": [_facts(row) for row in rows],
        "conventions": {} if law.fit is None else dict(law.fit.observations.conventions),
        "warnings": warnings,
    }
    for one, more in zip(facts["optima"], repeated, strict=False):
        one |= more
    header = ["FLOPs", "N", "95 % interval", "D", "D/N", "loss", "95 % interval"]
    lines = [
        table([header, *map(_cells, rows)]),
        f"N in parameters, D in tokens = FLOPs / ({per_token:g} N), loss in {law.unit}",
        *_growth(rows),
        *([OF_PARAMETERS] if law.bootstrap is not None else []),
        *(
            f"at {number(row.flops)} FLOPs {number(more['epochs'], 3)} epochs of U = "
            f"{number(fixed['U'])} tokens; if none had to be repeated the loss would be "
            f"{number(more['unique']['loss'])}, with N = {number(more['unique']['N'])}"
            for row, more in zip(rows, repeated, strict=False)
        ),
        *conventions(law),
        *(f"warning: {warning}" for warning in warnings),
    ]
    return Report(facts, "\n".join(lines))


def _facts(row: Allocation) -> dict[str, Any]:
    names = ("N", "D", "loss")
    return {
        "flops": row.flops,
        **{name: {"value": getattr(row, name), **_low_high(row, name)} for name in names},
        "exponents": _exponents(row),
        "tokens_per_parameter": row.tokens_per_parameter,
        "warnings": list(row.warnings),
    }


def _cells(row: Allocation) -> list[str]:
    """Return a row of the table, without the interval of D, which follows from that for N."""
    size, loss = _low_high(row, "N"), _low_high(row, "loss")
    best = [number(row.N), interval(size["low"], size["high"], 4), number(row.D)]
    there = [number(row.loss), interval(loss["low"], loss["high"], 4)]
    return [number(row.flops), *best, number(row.tokens_per_parameter, 3), *there]


def _other_flops(law: Law, per_token: float) -> list[str]:
    """Return a warning if the fitted runs spent other FLOPs per N and D than ``per_token``."""
    columns = {} if law.fit is None else law.fit.observations.columns
    if not all(name in columns for name in ("C", "N", "D")):
        return []
    spent = columns["C"] / (columns["N"] * columns["D"])
    low, high = float(spent.min()), float(spent.max())
    if low > per_token * (1 - FLOPS_TOLERANCE) and high < per_token * (1 + FLOPS_TOLERANCE):
        return []
    return [
        f"the fitted runs spent {number(low, 3)} to {number(high, 3)} FLOPs for each parameter and "
        f"token and the budget is shared out by {per_token:g}; set --flops-per-parameter-token to "
        "what models of the optimum's size need"
    ]


def _low_high(row: Allocation, name: str) -> dict[str, float | None]:
    low, high = (None, None) if row.intervals is None else row.intervals[name]
    return {"low": low, "high": high}


def _best(law: Law, flops: float, per_token: float, others: Mapping[str, float]) -> Allocation:
    if law.fit is None:
        return best_share(law.form, law.values, flops, per_token, others)
    return compute_optimal(
        law.fit, flops, per_token, bootstrap=law.bootstrap, level=LEVEL, others=others
    )


def _repeated(law: Law, row: Allocation, others: Mapping[str, float]) -> dict[str, Any]:
    """Return the epochs of an optimum on U unique tokens, and the optimum with unlimited tokens."""
    ample = {**others, "U": row.flops}  # more tokens than the budget can train on
    best = best_share(law.form, law.values, row.flops, row.flops_per_parameter_token, ample)
    unique = {"N": best.N, "D": best.D, "loss": best.loss}
    return {"epochs": row.D / others["U"], "unique": unique}


def _growth(rows: Sequence[Allocation]) -> list[str]:
    """Return the exponents of N and D in C: one line if equal for all budgets, else one each."""
    powers = [row.exponent for row in rows]
    same = max(powers) - min(powers) < SAME_EXPONENT

    def power(value: float, low: float | None, high: float | None) -> str:
        known = "" if low is None else f" (95 % interval {interval(low, high, 3)})"
        return f"C^{number(value, 3)}{known}"

    lines = []
    for row in rows[:1] if same else rows:
        size, tokens = (power(**one) for one in _exponents(row).values())
        at = "" if same else f"at {number(row.flops)} FLOPs "
        lines.append(f"{at}N grows as {size}, D as {tokens}")
    return lines


def _exponents(row: Allocation) -> dict[str, dict[str, Any]]:
    """Return the exponents of C in N and in D, with intervals; they sum to 1."""
    low, high = _low_high(row, "exponent").values()
    tokens = (None if end is None else 1.0 - end for end in (high, low))
    return {
        "N": {"value": row.exponent, "low": low, "high": high},
        "D": {"value": 1.0 - row.exponent, **dict(zip(("low", "high"), tokens, strict=True))},
    }
