"""Benchmark trials stored as they end, and differences between them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from scipy import stats

Trial = TypeVar("Trial")


class Log(Generic[Trial]):
    """File of trials by settings, one line each; both are dataclasses of plain values."""

    def __init__(self, path: Path, settings: Any, kind: type[Trial]) -> None:
        self.path, self.settings = path, asdict(settings)
        self.known: dict[Trial, Any] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for row in map(json.loads, text.split("\n")[:-1]):
            if row["settings"] == self.settings:
                self.known[kind(**row["trial"])] = row["found"]

    def add(self, trial: Any, found: dict[str, Any]) -> None:
        """Store the result of a trial."""
        self.known[trial] = found
        row = {"settings": self.settings, "trial": asdict(trial), "found": found}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def interval(differences: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and half of the 95 % interval of paired differences (Student's t)."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, float(stats.t.ppf(0.975, len(differences) - 1)) * error
