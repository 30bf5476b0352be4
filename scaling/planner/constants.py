"""The constants of the cost model that measurements identify."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np


def _constant(value: float, spread: float, what: str) -> Any:
    return field(default=value, metadata={"spread": spread, "what": what})


@dataclass(frozen=True)
class Constants:
    """Positive numbers; each default is a belief from before any calibration.

    ``spread`` of a field is the standard deviation of its logarithm in that belief: what
    ``calibrate`` starts from, and all there is where no measurement says more. Rates are factors of
    what the hardware's description says, so that they carry over to another card.
    """

    products: float = _constant(1.0, 0.1, "factor of the attainable rate of matrix products")
    fp8_products: float = _constant(0.9, 0.2, "the same for fp8 and fp4, casts included")
    rows_half: float = _constant(300.0, 0.7, "rows at which a product runs at half its rate")
    width_half: float = _constant(60.0, 0.7, "smaller side of a weight, the same")
    attention: float = _constant(0.8, 0.3, "factor of the attention rate at long sequences")
    attention_half: float = _constant(1000.0, 0.7, "tokens at which attention runs at half of it")
    unfused_attention: float = _constant(12.0, 0.4, "bytes a score moves, without flash attention")
    elementwise: float = _constant(24.0, 0.4, "values read or written per token and width, forward")
    memory: float = _constant(0.9, 0.15, "factor of the copy rate that other passes reach")
    loss: float = _constant(24.0, 0.5, "bytes a logit moves, forward and backward")
    launch_eager_s: float = _constant(2e-3, 0.5, "host seconds per layer and micro-batch, eager")
    launch_tuned_s: float = _constant(3e-4, 0.7, "the same, fused, compiled or as graphs")
    launch_tensor: float = _constant(1.6, 0.4, "factor of launches with tensor parallelism")
    launch_experts: float = _constant(2.0, 0.5, "factor of launches of a mixture of experts")
    inside_latency: float = _constant(1.0, 0.7, "factor of latencies inside a node")
    across_latency: float = _constant(1.0, 0.7, "factor of latencies across nodes")
    inside: float = _constant(0.75, 0.3, "share of the bandwidth inside a node")
    across: float = _constant(0.75, 0.3, "share of the bandwidth across nodes")
    experts_bandwidth: float = _constant(0.65, 0.4, "the same, of the experts' exchange")
    experts_products: float = _constant(0.8, 0.3, "factor of the rate of experts' products")
    data_bandwidth: float = _constant(0.6, 0.4, "share of bandwidths in the gradients' exchange")
    message_s: float = _constant(5e-4, 1.0, "host seconds per message between stages, eager")
    jitter: float = _constant(0.01, 1.0, "share of a step lost with each doubling from 8 GPUs on")
    overhead_s: float = _constant(5e-3, 0.7, "seconds of a step outside of everything else")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in fields(cls))

    @classmethod
    def spreads(cls) -> np.ndarray:
        """Standard deviations of the logarithms, (K,), before calibration."""
        return np.array([f.metadata["spread"] for f in fields(cls)])

    def logs(self) -> np.ndarray:
        """Logarithms, (K,), in the order of ``names``."""
        return np.log([getattr(self, name) for name in self.names()])

    @classmethod
    def of_logs(cls, logs_K: np.ndarray) -> Constants:
        return cls(**dict(zip(cls.names(), np.exp(logs_K).tolist(), strict=True)))
