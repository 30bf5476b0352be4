"""Text output of the commands about laws: wide tables, certificates, held-out errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.launch.text import counted, finite, number, table
from allometry.laws.fit.certificate import Certificate
from allometry.laws.fit.engine import Fit
from allometry.laws.fit.validate import HeldOut

WIDEST = 88
"""Maximum width of a table in characters."""


def narrowed(rows: Sequence[Sequence[str]], inputs: int) -> str:
    """Return ``table``; if too wide, constant input columns are moved to a line above it."""
    text = table(rows)
    same = [i for i in range(inputs) if len({row[i] for row in rows[1:]}) == 1]
    if not same or max(map(len, text.splitlines())) <= WIDEST:
        return text
    said = "at " + ", ".join(f"{rows[0][i]} = {rows[1][i]}" for i in same)
    at = fill(said, WIDEST, break_long_words=False, break_on_hyphens=False)
    kept = [[cell for i, cell in enumerate(row) if i not in same] for row in rows]
    return f"{at}\n{table(kept)}"


def certificate_words(certificate: Certificate) -> list[str]:
    """Return the certainty of the optimum as sentences, with advice if it is doubtful."""
    given_up = certificate.finished < certificate.starts
    words = [
        f"{certificate.agreeing} of {certificate.finished} starts agree on it"
        + (f" (of {certificate.starts}, those not given up)" if given_up else "")
        + f"; gradient norm {certificate.gradient_norm:.1e}, condition {certificate.condition:.1e}"
    ]
    if certificate.agreeing < 2 <= certificate.finished:
        words.append(
            "only one start came here, so a better optimum may exist: raise --starts and compare"
        )
    if certificate.agreeing >= 2 and certificate.spread > 1e-2:
        words.append(
            f"starts that agree on the objective differ by {certificate.spread:.2g} in a parameter "
            "(or its log): the objective is flat there"
        )
    words.append(
        f"at a bound: {', '.join(certificate.at_bounds)}, so the law or its range may not fit the "
        "data"
        if certificate.at_bounds
        else "no parameter is at a bound"
    )
    return words


def doubts(fit: Fit) -> list[str]:
    """Return doubts about a fit outside of its data, for a fit with intervals."""
    found = []
    if loose := fit.certificate.loose:
        found.append(
            f"the data hardly say what {', '.join(loose)} of {fit.form.name} "
            f"{'is' if len(loose) == 1 else 'are'}: beyond the fitted range be wary of the "
            "prediction and of its interval"
        )
    at_bounds = [name for name in fit.certificate.at_bounds if name not in fit.vanished]
    if at_bounds:
        found.append(
            f"the data want {', '.join(at_bounds)} of {fit.form.name} outside of what the law "
            "allows, so it may not be their law: compare it with others (allometry compare)"
        )
    return found


@dataclass(frozen=True)
class Errors:
    """Held-out errors: relative if the target is positive, so that laws are comparable.

    ``how``: description of the held-out rows.
    """

    held_out: HeldOut
    how: str

    @property
    def relative(self) -> bool:
        """True if the errors are relative."""
        return bool((self.held_out.measured > 0.0).all())

    @property
    def sizes(self) -> NDArray[np.float64]:
        """Size of each error."""
        return sizes_of(self.held_out.predicted, self.held_out.measured, self.relative)

    @property
    def mean(self) -> float:
        """Mean size of an error."""
        return float(self.sizes.mean())

    @property
    def max(self) -> float:
        """Largest size of an error."""
        return float(self.sizes.max())

    def say(self, value: float) -> str:
        """Return an error of these as text, in percent if the errors are relative."""
        return f"{100 * value:.3g} %" if self.relative else number(value, 3)

    def words(self) -> str:
        """Return mean, maximum and coverage as a sentence."""
        words = (
            f"{self.say(self.mean)} in the mean, {self.say(self.max)} at most, over "
            f"{counted(len(self.sizes), 'row')} ({self.how})"
        )
        if (covered := self.held_out.covered) is None:
            return words
        inside, number_of = covered
        level = f"{100 * self.held_out.level:g} %"
        return f"{words}; {inside} of {number_of} in their {level} intervals of one run"

    def to_json(self) -> dict[str, Any]:
        """Return the rows and their errors as plain data."""
        covered = self.held_out.covered
        return {
            "how": self.how,
            "relative": self.relative,
            "mean": finite(self.mean),
            "max": finite(self.max),
            "level": self.held_out.level,
            "covered": None if covered is None else {"inside": covered[0], "of": covered[1]},
            "notes": list(self.held_out.notes),
            "groups": list(self.held_out.groups),
            "predicted": [finite(value) for value in self.held_out.predicted],
            "measured": [finite(value) for value in self.held_out.measured],
        }


def sizes_of(
    predicted: NDArray[np.float64], measured: NDArray[np.float64], relative: bool
) -> NDArray[np.float64]:
    """Return |predicted/measured - 1|, or |predicted - measured|."""
    return np.abs(predicted / measured - 1.0 if relative else predicted - measured)
