"""Measured transfer of learning rates: ``transfers.json``, by axis.

``benchmarks/transfer_table.py`` writes this file from results of ``benchmarks/transfer.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from allometry.configs.model import ModelConfig, MoEModel, ParameterizationConfig
from allometry.configs.optimization import OptimizerConfig
from allometry.laws.regret import Verdict
from allometry.scaling.shapes import Axis

FILE = Path(__file__).with_name("transfers.json")
RULES: Mapping[str, tuple[Axis, ...] | None] = {
    "kind": None,
    "regime": None,
    "base_layers": (Axis.DEPTH, Axis.WIDTH_AND_DEPTH),
    "depth_alpha": (Axis.DEPTH, Axis.WIDTH_AND_DEPTH),
    "output_multiplier": None,
    "head_std": None,
    "batch_rule": (Axis.BATCH,),
    "batch_exponent": (Axis.BATCH,),
    "data_exponent": (Axis.HORIZON,),
    "data_exponent_scope": (Axis.HORIZON,),
}
"""Keys of a parameterization that must equal the measured ones, by axis (None: all axes).

For ``base_layers`` only its presence is compared.
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """Result of one sweep for a rate transferred along an axis, from ``base`` to ``sizes``.

    ``worst``: size of the largest regret, in ``percent`` of its loss, with its 95 % interval over
    seeds (NaN: unknown); infinite if runs diverged. ``verdict``: "met" if all sizes are within 0.5
    %. ``different``: keys in which the measured runs had other values.
    """

    axis: Axis
    base: int
    sizes: tuple[int, ...]
    seeds: int
    worst: int
    percent: float
    interval: tuple[float, float]
    verdict: Verdict
    setting: str
    record: str
    different: tuple[str, ...]

    @property
    def reach(self) -> float:
        """The largest size over the base."""
        return max(self.sizes) / self.base


@cache
def entries() -> tuple[Mapping[str, Any], ...]:
    """Return the rows of ``transfers.json``, the largest setting last."""
    found = json.loads(FILE.read_text(encoding="utf-8"))
    assert found["kind"] == "allometry.transfers", FILE
    return tuple(found["entries"])


def measured(
    model: ModelConfig, parameterization: ParameterizationConfig, optimizer: OptimizerConfig
) -> dict[Axis, Measured]:
    """Return the measurements of these rules with this optimizer, by axis.

    For a mixture of experts the measurements of mixtures, otherwise of dense models; the last of
    several measurements over one axis.
    """
    found = {}
    for entry in entries():
        axis = Axis(entry["axis"])
        alike = entry["mixture"] == isinstance(model, MoEModel)
        if alike and _same_rules(entry, parameterization, optimizer, axis):
            found[axis] = _measured(entry, axis, parameterization)
    return found


def _same_rules(
    entry: Mapping[str, Any],
    parameterization: ParameterizationConfig,
    optimizer: OptimizerConfig,
    axis: Axis,
) -> bool:
    ours, theirs = parameterization.model_dump(mode="json"), entry["parameterization"]
    if any(
        entry["optimizer"].get(key) != getattr(optimizer, key, None)
        for key in ("kind", "step_norm")
    ):
        return False
    for key, axes in RULES.items():
        if axes is not None and axis not in axes:
            continue
        mine, other = ours.get(key), theirs.get(key)
        if key == "base_layers":
            mine, other = mine is None, other is None
        if mine != other:
            return False
    return True


def _measured(
    entry: Mapping[str, Any], axis: Axis, parameterization: ParameterizationConfig
) -> Measured:
    by_size = {int(size): one for size, one in entry["regrets"].items()}
    percents = {
        size: math.inf if one["diverged"] else _number(one["percent"])
        for size, one in by_size.items()
    }
    known = {size: percent for size, percent in percents.items() if not math.isnan(percent)}
    worst = max(known, key=lambda size: known[size]) if known else max(by_size)
    verdicts = {one["verdict"] for one in by_size.values()}
    order: tuple[Verdict, ...] = ("missed", "undecided", "met")
    low, high = by_size[worst]["interval"]
    ours = parameterization.model_dump(mode="json")
    different = [
        f"parameterization.{key}={value}"
        for key, value in entry["parameterization"].items()
        if key not in RULES and not key.startswith("base_") and ours.get(key) != value
    ]
    return Measured(
        axis=axis,
        base=entry["base"],
        sizes=tuple(by_size),
        seeds=entry["seeds"],
        worst=worst,
        percent=percents[worst],
        interval=(_number(low), _number(high)),
        verdict=next(one for one in order if one in verdicts),
        setting=entry["setting"],
        record=entry["record"],
        different=tuple(different),
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value
