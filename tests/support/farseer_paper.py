"""Farseer's published coefficients as parameter values of our form."""

from __future__ import annotations

from collections.abc import Mapping

from allometry.laws.forms.farseer import NAMES, REFERENCE


def from_paper(coefficients: Mapping[str, float]) -> dict[str, float]:
    """Convert the paper's a1, α, b1, a2, β, b2, a3, γ, b3 to our values."""
    values = {}
    for level, a, power, b in NAMES:
        reach = coefficients[a] * REFERENCE ** coefficients[power]
        values[level] = coefficients[b] + reach
        values[f"{level}_slope"] = reach * coefficients[power]
        values[power] = coefficients[power]
    return values
