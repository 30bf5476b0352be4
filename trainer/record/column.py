"""Description of a column of metrics.jsonl; ``columns.py`` declares the columns."""

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
    "DEPTH": r"\d+",
    "STATE": "exp_avg|exp_avg_sq|momentum_buffer",
}
"""Patterns of the placeholders in a column's name."""


@dataclass(frozen=True)
class Column:
    """A column, or all columns that match the placeholders in ``name``.

    For example, ``loss/SOURCE`` matches ``loss/web``. ``made`` returns the value for a
    ``FinishedStep``, or a mapping with the values by the last placeholder; if None, ``by`` adds the
    column.
    """

    name: str
    unit: str
    meaning: str
    made: Callable[[Any], float | int | Mapping[str, float | int]] | None = None
    by: str = "loop"

    def names(self, key: str) -> bool:
        """Return True if a row's key belongs to this column."""
        parts = (_VARYING.get(part, re.escape(part)) for part in self.name.split("/"))
        return re.fullmatch("/".join(f"(?:{part})" for part in parts), key) is not None
