"""List of the laws with their inputs and ranges: ``allometry laws``."""

from __future__ import annotations

from collections.abc import Sequence
from shutil import get_terminal_size
from typing import Any

import numpy as np

from allometry.launch.command import Report
from allometry.launch.laws.commands import Laws
from allometry.launch.text import finite, number, table
from allometry.laws.forms.base import LOSS_UNIT, Form, Variable
from allometry.laws.registry import all_forms, form_named


def listed(asked: Laws) -> Report:
    """List the registry, or one law in detail. Raises UserError: the law does not exist."""
    if asked.name is not None:
        form = form_named(asked.name)
        return Report(describe(form), _details(form))
    forms = list(all_forms().values())
    shown = overview(forms, get_terminal_size((160, 24)).columns)
    text = f"{shown}\n\nallometry laws NAME says more of one."
    return Report([describe(form) for form in forms], text)


def overview(forms: Sequence[Form], width: int) -> str:
    """Return a line for each law; long cells are shortened to fit into ``width`` characters."""
    rows = [["law", "predicts", "from", "equation"]]
    rows += [[form.name, form.target.name, reads(form), form.equation] for form in forms]
    fixed = sum(max(len(row[i]) for row in rows) + 2 for i in (0, 1))
    from_width = min(max(len(row[2]) for row in rows), max(18, (width - fixed) // 3))
    rest = max(20, min(72, width - fixed - from_width - 2))
    return table(
        [[*row[:2], shortened(row[2], from_width), shortened(row[3], rest)] for row in rows]
    )


def shortened(text: str, width: int = 72) -> str:
    """Return the text, or its beginning with an ellipsis if it is longer than ``width``."""
    return text if len(text) <= width else text[: width - 1] + "…"


def reads(form: Form) -> str:
    """Return the names of a law's inputs."""
    return ", ".join(variable.name for variable in form.inputs) or "columns that you name"


def describe(form: Form) -> dict[str, Any]:
    """Return all declarations of a form, as plain data."""

    def variable(of: Variable) -> dict[str, str]:
        return {"name": of.name, "unit": of.unit, "description": of.description}

    return {
        "name": form.name,
        "equation": form.equation,
        "source": form.source,
        "valid": form.valid,
        "inputs": [variable(one) for one in form.inputs],
        "target": variable(form.target),
        "residual": form.residual,
        "parameters": [
            {"name": one.name, "unit": one.unit, "low": finite(one.low), "high": finite(one.high)}
            for one in form.parameters
        ],
        "published": {name: dict(values) for name, values in form.published.items()},
    }


def _details(form: Form) -> str:
    variables = [["column", "unit", "what it is"]]
    variables += [[one.name, one.unit, one.description] for one in (*form.inputs, form.target)]
    parameters = [["parameter", "unit", "between"]]
    for one in form.parameters:
        low, high = number(one.low, 4), number(one.high, 4)
        between = f"{low} and {high}" if np.isfinite(one.high) else f"at least {low}"
        parameters.append([one.name, one.unit, between])
    lines = [
        f"{form.name}: {form.equation}",
        f"source: {form.source}",
        f"shown for: {form.valid}",
        "",
        table(variables),
        "",
        table(parameters) if form.parameters else "name its columns: NAME:COLUMN,COLUMN",
    ]
    if any(one.unit == LOSS_UNIT for one in (*form.inputs, form.target)):
        lines.append(
            f"\n{LOSS_UNIT}: of run folders and of published coefficients; a fit to a table has "
            "the table's unit"
        )
    for name, values in form.published.items():
        shown = ", ".join(f"{key} {number(value, 6)}" for key, value in values.items())
        lines.append(f"published by {name}: {shown}")
    return "\n".join(lines)
