"""Measured transfer of learning rates, as printed by ``allometry suggest``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from allometry.configs.model import MoEModel
from allometry.configs.run import RunConfig
from allometry.launch.text import table
from allometry.laws.regret import PERCENT
from allometry.laws.transfers import Measured, measured
from allometry.scaling.parameterizations.base import RunScale
from allometry.scaling.shapes import Axis

DENSE = (Axis.WIDTH, Axis.DEPTH, Axis.WIDTH_AND_DEPTH, Axis.HORIZON, Axis.BATCH)
MIXTURES = (*DENSE, Axis.EXPERTS, Axis.REGIME_II, Axis.REGIME_III)
UNITS = {Axis.HORIZON: " steps", Axis.BATCH: " sequences", Axis.DEPTH: " layers"}
SAID = {"met": "holds", "missed": "does not hold", "undecided": "undecided"}
RATE_ALONE = (
    "every other hyperparameter (weight decay, betas, epsilon, warm-up, clipping): nothing measured"
)


def facts(config: RunConfig, scale: RunScale) -> dict[str, Any]:
    """Return the measurements for this run's hyperparameters, as JSON."""
    found = measured(config.model, config.parameterization, config.optimizer)
    growth = _growth(config, scale)
    return {
        axis.value: None if axis not in found else _described(found[axis], growth.get(axis))
        for axis in _axes(config)
    }


def lines(config: RunConfig, scale: RunScale) -> list[str]:
    """Return the measurements as text: a table, and hyperparameters without measurements."""
    found = measured(config.model, config.parameterization, config.optimizer)
    kind = "mixtures" if isinstance(config.model, MoEModel) else "dense models"
    rules = f"{config.parameterization.kind} with {config.optimizer.kind}, {kind}"
    if not found:
        return [
            f"measured transfer ({rules}): nothing; allometry transfer measures what a rate that "
            "is carried over costs"
        ]
    growth = _growth(config, scale)
    rows = [["optimizer.lr over", "measured", "this run", "regret, % (95 %)", f"{PERCENT:g} %"]]
    for axis in _axes(config):
        rows.append([axis.value, *_cells(found.get(axis), axis, growth.get(axis))])
    said = [f"measured transfer ({rules}): what the rate of the smallest size costs at larger ones"]
    said.append(table(rows))
    by_setting: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for axis, one in found.items():
        by_setting.setdefault((one.setting, one.record, one.different), []).append(axis.value)
    for (setting, record, different), axes in by_setting.items():
        unlike = f"; other than here: {', '.join(different)}" if different else ""
        said.append(f"{', '.join(axes)}: {setting} ({record}){unlike}")
    return [*said, RATE_ALONE]


def _axes(config: RunConfig) -> tuple[Axis, ...]:
    return MIXTURES if isinstance(config.model, MoEModel) else DENSE


def _cells(one: Measured | None, axis: Axis, growth: float | None) -> list[str]:
    here = "-" if growth is None else f"{growth:.3g} x"
    if one is None:
        return ["nothing", here, "-", "-"]
    if growth is not None and growth > one.reach:
        here += ", beyond"
    span = f"{one.base} to {max(one.sizes)}{UNITS.get(axis, '')}"
    low, high = one.interval
    within = f" ({low:.2f} to {high:.2f})" if math.isfinite(high) else " (unknown)"
    cost = "unknown" if math.isnan(one.percent) else f"{one.percent:.2f}{within}"
    if one.percent == math.inf:
        cost = "diverges"
    return [f"{span} ({one.reach:g} x)", here, f"{cost} at {one.worst}", SAID[one.verdict]]


def _growth(config: RunConfig, scale: RunScale) -> dict[Axis, float]:
    """Return the run's size relative to its base, for each base in the parameterization."""
    bases: Mapping[str, Any] = config.parameterization.model_dump()
    sizes: Mapping[Axis, tuple[str, float]] = {
        Axis.WIDTH: ("base_width", config.model.width),
        Axis.DEPTH: ("base_layers", config.model.num_layers),
        Axis.HORIZON: ("base_tokens", scale.total_tokens),
        Axis.BATCH: ("base_batch_tokens", scale.batch_tokens),
    }
    return {axis: size / bases[name] for axis, (name, size) in sizes.items() if bases.get(name)}


def _described(one: Measured, growth: float | None) -> dict[str, Any]:
    return {
        "base": one.base,
        "sizes": list(one.sizes),
        "seeds": one.seeds,
        "worst_size": one.worst,
        "regret_percent": one.percent if math.isfinite(one.percent) else None,
        "diverged": one.percent == math.inf,
        "interval_95": [end if math.isfinite(end) else None for end in one.interval],
        "verdict": one.verdict,
        "this_run": growth,
        "beyond": None if growth is None else growth > one.reach,
        "setting": one.setting,
        "record": one.record,
        "different": list(one.different),
    }
