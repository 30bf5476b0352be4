"""Words and tables for what the commands about laws print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.laws.fit.bootstrap import Bootstrap
from allometry.laws.fit.certificate import Certificate
from allometry.laws.fit.validate import HeldOut

WIDEST = 88
"""Columns that a table may take."""


def number(value: float, digits: int = 5) -> str:
    """Return a number with as many digits as say something."""
    return f"{value:.{digits}g}"


def share(value: float) -> str:
    """Return a relative error as a percentage."""
    return f"{100 * value:.3g} %"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as columns of equal width; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def narrowed(rows: Sequence[Sequence[str]], inputs: int) -> str:
    """Return ``table``; one too wide has a line instead of input columns that never change."""
    text = table(rows)
    same = [i for i in range(inputs) if len({row[i] for row in rows[1:]}) == 1]
    if not same or max(map(len, text.splitlines())) <= WIDEST:
        return text
    at = ", ".join(f"{rows[0][i]} = {rows[1][i]}" for i in same)
    kept = [[cell for i, cell in enumerate(row) if i not in same] for row in rows]
    return f"at {at}\n{table(kept)}"


def certificate_words(certificate: Certificate) -> list[str]:
    """Return how sure the optimum is, a sentence each; what is doubtful says what to do."""
    found = certificate
    words = [
        f"{found.agreeing} of {found.finished} starts agree on it"
        + (f" (of {found.starts}, those not given up)" if found.finished < found.starts else "")
        + f"; gradient norm {found.gradient_norm:.1e}, condition {found.condition:.1e}"
    ]
    if found.agreeing < 2 <= found.finished:
        words.append(
            "only one start came here, so a better optimum may exist: raise --starts and compare"
        )
    if found.agreeing >= 2 and found.spread > 1e-2:
        words.append(
            f"starts that agree on the objective differ by {found.spread:.2g} in a parameter (or "
            "its log): the objective is flat there"
        )
    words.append(
        f"at a bound: {', '.join(found.at_bounds)}, so the law or its range may not fit the data"
        if found.at_bounds
        else "no parameter is at a bound"
    )
    return words


def edge_words(sampled: Bootstrap) -> list[str]:
    """Return a sentence for each parameter that is at an end of its 95 % interval, or outside."""
    words = []
    for parameter in sampled.fit.form.parameters:
        name, value = parameter.name, sampled.fit.values[parameter.name]
        if not sampled.at_edge(name):
            continue
        low, high = sampled.interval(name)
        at = f"at the edge of its interval: {name} = {number(value)}"
        if name in sampled.fit.certificate.at_bounds:
            side = "least" if value - parameter.low <= parameter.high - value else "most"
            words.append(
                f"{at}, the {side} that the law allows, "
                + (
                    "in every sample: the interval has no width and says nothing"
                    if low == high
                    else "so the interval is one-sided: only its other end says something"
                )
            )
        elif low <= value <= high:
            words.append(f"{at}: the samples lie to one side of the fit, so the interval is rough")
        else:
            words.append(
                f"outside of its interval: {name} = {number(value)}: the samples lie to one side "
                "of the fit, so neither is sure"
            )
    return words


@dataclass(frozen=True)
class Errors:
    """Held-out errors: relative ones wherever the target is positive, so that laws compare."""

    errors: NDArray[np.float64]
    relative: bool
    how: str

    @classmethod
    def of(cls, held_out: HeldOut, how: str) -> Errors:
        """Return the errors of held-out rows; ``how``: what was held out, in words."""
        relative = bool((held_out.measured > 0.0).all())
        return cls(errors_of(held_out.predicted, held_out.measured, relative), relative, how)

    @property
    def mean(self) -> float:
        """The mean size of an error."""
        return float(np.abs(self.errors).mean())

    @property
    def max(self) -> float:
        """The largest size of an error."""
        return float(np.abs(self.errors).max())

    def say(self, value: float) -> str:
        """Return a size of these errors with its sign for percent, where they are relative."""
        return share(value) if self.relative else number(value, 3)

    def words(self) -> str:
        """Return mean and maximum as a sentence."""
        return (
            f"{self.say(self.mean)} in the mean, {self.say(self.max)} at most, over "
            f"{len(self.errors)} rows ({self.how})"
        )

    def to_json(self, held_out: HeldOut) -> dict[str, Any]:
        """Return the rows and their errors as plain data."""
        return {
            "how": self.how,
            "relative": self.relative,
            "mean": finite(self.mean),
            "max": finite(self.max),
            "groups": list(held_out.groups),
            "predicted": [finite(value) for value in held_out.predicted],
            "measured": [finite(value) for value in held_out.measured],
        }


def errors_of(
    predicted: NDArray[np.float64], measured: NDArray[np.float64], relative: bool
) -> NDArray[np.float64]:
    """Return predicted/measured - 1, or predicted - measured."""
    return predicted / measured - 1.0 if relative else predicted - measured


def finite(value: float) -> float | None:
    """Return the number, or None where JSON has none for it."""
    return float(value) if np.isfinite(value) else None
