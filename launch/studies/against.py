"""Comparison of a sweep's regrets with a sweep under another parameterization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allometry.configs.errors import UserError
from allometry.laws.optimum import Sweep
from allometry.laws.regret import SHARE, Verdict, against, regret
from allometry.laws.trials import TrialFile, read_trials
from allometry.studies.sweeps.outcome import Transfer

DIFFERENT = ("parameterization", "optimizer")
"""Settings in which two compared sweeps may differ."""


@dataclass(frozen=True, slots=True)
class Compared:
    """Verdict on each size: regret at most a fifth of the other sweep's.

    ``percents``: the other sweep's regrets, in percent of the loss.
    """

    path: Path
    kind: str
    verdicts: Mapping[int, Verdict]
    percents: Mapping[int, float]

    def sentences(self, verdict: Verdict) -> list[str]:
        """Return sentences on the sizes with this verdict."""
        said = {"missed": "is more than", "undecided": "may be more than", "met": "is at most"}
        return [
            f"size {size}: the regret {said[verdict]} {SHARE:g} of that of {self.kind} "
            f"({self.percents[size]:.2f} % of the loss, {self.path})"
            for size, found in self.verdicts.items()
            if found == verdict
        ]

    def describe(self) -> dict[str, Any]:
        """Return the comparison as JSON."""
        return {
            "trials": str(self.path),
            "kind": self.kind,
            "share": SHARE,
            "verdicts": {str(size): found for size, found in self.verdicts.items()},
        }


def read_other(path: Path, settings: Mapping[str, Any]) -> TrialFile:
    """Return the other sweep's trials.

    Raises UserError: the file cannot be read, or its trials have another family, text or length.
    """
    file = read_trials(path)
    different = sorted(
        key for key in settings if key not in DIFFERENT and file.settings.get(key) != settings[key]
    )
    if different:
        raise UserError(
            f"--against={path} holds trials of another sweep ({', '.join(different)}); make them "
            "by the same command with another parameterization"
        )
    return file


def compared(file: TrialFile, transfer: Transfer) -> Compared:
    """Compare each size's regret with the other sweep's.

    Raises UserError: the other sweep lacks a size or a seed.
    """
    sweeps = {size: _sweep(file, size, len(transfer.seeds)) for size in transfer.sizes}
    base, *others = transfer.sizes
    verdicts, percents = {}, {}
    for size in others:
        ours = transfer.sweep(base), transfer.sweep(size)
        verdicts[size] = against(ours, (sweeps[base], sweeps[size]))
        percents[size] = regret(sweeps[base], sweeps[size]).percent
    kind = str(file.settings.get("parameterization", {}).get("kind", "the other"))
    return Compared(file.path, kind, verdicts, percents)


def _sweep(file: TrialFile, size: int, seeds: int) -> Sweep:
    """Return the learning rates of a size with a trial for each of ``seeds`` seeds."""
    by_rate = file.losses.get(size, {})
    whole = {rate: losses for rate, losses in by_rate.items() if set(range(seeds)) <= set(losses)}
    if len(whole) < 3:
        raise UserError(
            f"--against={file.path} has {len(whole)} rates of size {size} with {seeds} seeds, and "
            "three are the least; run it with the same --sizes and --seeds"
        )
    one = {rate: {seed: whole[rate][seed] for seed in range(seeds)} for rate in sorted(whole)}
    return TrialFile(file.path, file.settings, {size: one}).sweep(size)[0]
