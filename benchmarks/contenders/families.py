"""Families of byte models for learning-rate transfer, and the expected outcomes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from allometry.configs.model import (
    AuxiliaryBalance,
    DenseModel,
    ModelConfig,
    MoEModel,
    ParameterizationConfig,
    RouterConfig,
    SwiGLUExperts,
)
from allometry.configs.optimization import AdamW, MuonH, OptimizerConfig
from allometry.scaling.shapes import Axis

LENGTH, SEQUENCES, STEPS, HELD_OUT = 64, 8, 80, 128
BASE = 32
ADAM, SPHERES, SPECTRAL = "adamw", "muonh", "muonh, spectral"


def model(width: int, layers: int) -> DenseModel:
    return DenseModel(
        vocab_size=128,
        width=width,
        num_layers=layers,
        num_heads=width // 16,
        ffn_width=4 * width,
        qk_norm=True,
    )


def mixture(width: int, number: int, visits: int, expert_width: int, gate: str) -> MoEModel:
    """Return a model of two MoE layers with an auxiliary balancing loss of coefficient .01."""
    return MoEModel(
        vocab_size=128,
        width=width,
        num_layers=2,
        num_heads=width // 16,
        qk_norm=True,
        experts=SwiGLUExperts(num_experts=number, experts_per_token=visits, width=expert_width),
        router=RouterConfig.model_validate(
            {"gate": gate, "balance": AuxiliaryBalance(coefficient=0.01)}
        ),
    )


def optimizer(kind: str, lr: float) -> OptimizerConfig:
    if kind == ADAM:
        return AdamW(lr=lr, weight_decay=0.0)
    return MuonH(lr=lr, step_norm="spectral" if kind == SPECTRAL else "frobenius")


def parameterization(**values: Any) -> ParameterizationConfig:
    parsed: ParameterizationConfig = TypeAdapter(ParameterizationConfig).validate_python(values)
    return parsed


def spheres(base_width: int = BASE, **changes: Any) -> ParameterizationConfig:
    return parameterization(
        kind="hyperp", embedding_std=0.5, base_width=base_width, base_layers=2, **changes
    )


def mssp(regime: str, base: MoEModel) -> ParameterizationConfig:
    return parameterization(
        kind="mssp",
        regime=regime,
        embedding_std=1.0,
        base_width=base.width,
        base_experts=base.experts.num_experts,
        base_experts_per_token=base.experts.experts_per_token,
        base_expert_width=base.experts.width,
    )


@dataclass(frozen=True)
class Asked:
    """Expected bounds of the drift (octaves), and expected exponent of the best rate."""

    least: float = 0.0
    most: float = math.inf
    exponent: float | None = None


@dataclass(frozen=True)
class Reading:
    """Reading of a variant's trials under another rule, which multiplies all rates by a power.

    If the rule differs from the variant's by the factor (size / first size)^-``power`` on every
    learning rate, the same runs are obtained at rates shifted by ``power`` octaves per doubling, so
    that no run is trained again.
    """

    name: str
    power: float
    asked: Asked = Asked()


@dataclass(frozen=True)
class Variant:
    """Row of the benchmark: a model family, its parameterization, sizes and initial rates."""

    name: str
    config: ParameterizationConfig
    kind: str
    sizes: tuple[int, ...]
    log2_lrs: tuple[float, ...]
    asked: Asked = Asked()
    axis: Axis = Axis.WIDTH
    model: ModelConfig = field(default_factory=lambda: model(BASE, 2))
    readings: tuple[Reading, ...] = ()

    @property
    def slug(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.name)
