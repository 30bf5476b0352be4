"""Reader of the files of trials of learning-rate sweeps (``studies/sweeps/trials.py``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from allometry.configs.errors import UserError
from allometry.laws.optimum import Sweep
from allometry.laws.runs import read_lines


@dataclass(frozen=True, slots=True)
class TrialFile:
    """Losses of a sweep over sizes and learning rates.

    ``settings``: the file's first line. ``losses``: by size, log2 of the rate, and seed; infinite
    for a run that diverged.
    """

    path: Path
    settings: Mapping[str, Any]
    losses: Mapping[int, Mapping[float, Mapping[int, float]]]

    @property
    def axis(self) -> str:
        """Name of the size axis: width, depth, experts or horizon."""
        return str(self.settings.get("axis", "size"))

    def sweep(self, size: int) -> tuple[Sweep, int]:
        """Return one size's table of losses, and the number of rates left out.

        During a sweep, rates may have different seeds: the table has the seeds and rates that make
        it largest.
        """
        rates = self.losses[size]
        sets = {frozenset(by_seed) for by_seed in rates.values()}
        having = {seeds: [r for r in rates if seeds <= set(rates[r])] for seeds in sets}
        chosen = max(having, key=lambda some: (len(some) * len(having[some]), len(some)))
        seeds, whole = sorted(chosen), sorted(having[chosen])
        losses = [[rates[rate][seed] for seed in seeds] for rate in whole]
        table = np.array(losses, np.float64).reshape(len(whole), len(seeds))
        return Sweep(tuple(whole), table), len(rates) - len(whole)


def read_trials(path: Path) -> TrialFile:
    """Read a file of trials, also while a sweep writes to it.

    Raises UserError: the file is missing, damaged or of another kind, or has no trial yet.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file; name what allometry transfer --trials wrote")
    rows = read_lines(path)
    if not rows or "axis" not in rows[0]:
        raise UserError(
            f"{path} is no file of trials: its first line has no 'axis'; name what allometry "
            "transfer --trials wrote"
        )
    losses: dict[int, dict[float, dict[int, float]]] = {}
    for number, row in enumerate(rows[1:], start=2):
        try:
            loss = math.inf if row["loss"] is None else float(row["loss"])
            size, rate, seed = int(row["size"]), float(row["log2_lr"]), int(row["seed"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{path}, line {number}, is no trial (size, log2_lr, seed, loss); remove that line"
            ) from error
        losses.setdefault(size, {}).setdefault(rate, {})[seed] = loss
    if not losses:
        raise UserError(f"{path} holds no trial yet; wait for the sweep's first one")
    return TrialFile(path, rows[0], dict(sorted(losses.items())))
