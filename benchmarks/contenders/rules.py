"""Update rules to compare, and the byte model for the comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from allometry.configs.model import DenseModel, ParameterizationConfig
from allometry.configs.optimization import OptimizerConfig

SIZES = {"10m": (256, 10), "2m": (192, 4), "tiny": (32, 2)}
"""Width and number of layers: 10.6M parameters, 2.4M, and a tiny model."""


def model(size: str) -> DenseModel:
    width, layers = SIZES[size]
    return DenseModel(
        vocab_size=128,
        width=width,
        num_layers=layers,
        num_heads=width // 16,
        ffn_width=4 * width,
        qk_norm=True,
    )


def _parameterization(values: dict[str, Any]) -> ParameterizationConfig:
    parsed: ParameterizationConfig = TypeAdapter(ParameterizationConfig).validate_python(values)
    return parsed


def hyperp(size: str) -> ParameterizationConfig:
    width, layers = SIZES[size]
    return _parameterization(
        {"kind": "hyperp", "embedding_std": 0.5, "base_width": width, "base_layers": layers}
    )


def standard() -> ParameterizationConfig:
    return _parameterization({"kind": "sp", "embedding_std": 0.5})


@dataclass(frozen=True)
class Contender:
    """Update rule, its parameterization, and the log2 rates at which tuning begins."""

    name: str
    optimizer: OptimizerConfig
    parameterization: ParameterizationConfig
    log2_lrs: tuple[float, ...]


def contenders(size: str) -> list[Contender]:
    parse = TypeAdapter(OptimizerConfig).validate_python
    made = [
        ("adamw", {"weight_decay": 0.1}, standard(), (-9.0, -8.0, -7.0)),
        ("muon", {"weight_decay": 0.1}, standard(), (-9.0, -8.0, -7.0)),
        ("muonh", {}, hyperp(size), (-7.0, -6.0, -5.0)),
        ("adamh", {}, hyperp(size), (-7.0, -6.0, -5.0)),
        ("sgd_sai", {"weight_decay": 0.1}, standard(), (-10.0, -9.0, -8.0)),
        ("apollo", {}, standard(), (-8.0, -7.0, -6.0)),
        ("apollo_mini", {}, standard(), (-8.0, -7.0, -6.0)),
    ]
    return [
        Contender(kind, parse({"kind": kind, "lr": 1.0, **settings}), parameterization, rates)
        for kind, settings, parameterization, rates in made
    ]
