"""What a column of metrics.jsonl is; ``columns.py`` declares them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from allometry.scaling.roles import Role

_VARYING = {
    "SOURCE": r"[A-Za-z0-9][A-Za-z0-9._-]*",
    "KIND": "natural|rephrased|generated",
    "LAYER": r"\d+",
    "BRANCH": "attention|ffn",
    "ROLE": "|".join(Role),
    "PARAMETER": r"[A-Za-z_][\w.]*",
    "DEGREE": r"\d+",
    "STATE": "exp_avg|exp_avg_sq|momentum_buffer",
}
"""What the words in capitals of a column's name stand for."""


@dataclass(frozen=True)
class Column:
    """A column, or all those that ``name`` stands for: see the words in capitals below.

    ``made`` gives its value of a ``FinishedStep``, or values by what stands for the last word;
    None: ``by`` adds it.
    """

    name: str
    unit: str
    meaning: str
    made: Callable[[Any], float | int | Mapping[str, float | int]] | None = None
    by: str = "loop"

    def names(self, key: str) -> bool:
        """Whether a row's key is this column."""
        parts = (_VARYING.get(part, re.escape(part)) for part in self.name.split("/"))
        return re.fullmatch("/".join(f"(?:{part})" for part in parts), key) is not None
