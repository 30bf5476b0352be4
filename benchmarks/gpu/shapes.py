"""Models trained on one GPU, and the batch of their steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from allometry.configs.loader import load
from allometry.configs.model import DenseModel
from allometry.scaling.count import flops_per_token

WARMUP_STEPS = 3


@dataclass(frozen=True)
class Shape:
    """Model and its step: ``sequences`` of ``length`` tokens in micro-batches.

    ``model``: keys that override those of ``preset``. ``micro_batches`` are tried in order until
    one fits in device memory. ``timed_steps``: number of steps after the warm-up.
    """

    preset: str
    length: int
    sequences: int
    micro_batches: tuple[int, ...]
    timed_steps: int
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Return the tokens of a step."""
        return self.length * self.sequences


_125M = {"vocab_size": 50304, "width": 768, "num_layers": 12, "num_heads": 12, "ffn_width": 2048}
_7B_CUT = {"num_layers": 8, "vocab_size": 65536}
_TINY = {"vocab_size": 512, "width": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}

SHAPES = {
    "1b": Shape("dense_1b", 4096, 32, (8, 4, 2, 1), 8),
    "125m": Shape("dense_25m", 2048, 64, (64, 32, 16, 8), 20, _125M),
    "7b-cut": Shape("dense_7b", 4096, 32, (4, 2, 1), 5, _7B_CUT),
    "moe": Shape("moe_1b_a200m", 4096, 32, (8, 4, 2), 8),
}
"""Steps of 131k tokens: one GPU's share of ``dense_1b`` on a node of eight. ``7b-cut`` has 8 of the
32 layers of ``dense_7b`` and half its vocabulary."""

REHEARSED = {
    name: Shape(
        shape.preset,
        64,
        8,
        (4, 2),
        3,
        _TINY | ({} if name == "moe" else {"ffn_width": 192}),
    )
    for name, shape in SHAPES.items()
}
"""The same parts with tiny models, for a rehearsal on a CPU."""


def dense_model(shape: Shape) -> DenseModel:
    """Return the dense model of a shape: its preset with the keys of ``model`` applied."""
    changes = [f"model.{key}={value}" for key, value in shape.model.items()]
    model = load(f"preset:{shape.preset}", changes).model
    assert isinstance(model, DenseModel), shape.preset
    return model


def model_flops_per_token(shape: Shape) -> float:
    """Return the forward and backward FLOPs of a token, with causal attention."""
    return flops_per_token(dense_model(shape), shape.length).total
