"""Constants of the cost model, identified by measurements."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.configs.machine import HardwareConfig

Floats = NDArray[Any]


def _constant(value: float, spread: float, between: float, what: str, card: float = 0.0) -> Any:
    believed = {"spread": spread, "between": between, "card": card, "what": what}
    return field(default=value, metadata=believed)


@dataclass(frozen=True)
class Constants:
    """Positive numbers; the defaults are prior means without a calibration.

    The defaults were set by hand, some after looking at published measurements (host launches,
    latencies). ``spread`` of a field is the prior standard deviation of its logarithm, ``between``
    the deviation between frameworks, ``card`` the deviation between card generations: the input of
    ``calibrate``. Rates are factors of the hardware's description, so they apply to other cards. A
    field is one value or has one value for each of C cases.
    """

    products: float = _constant(1.0, 0.05, 0.08, "factor of the rate of matrix products", 0.1)
    fp8_products: float = _constant(0.95, 0.15, 0.1, "the same in fp8 and fp4, casts too", 0.1)
    rows_half: float = _constant(300.0, 0.7, 0.2, "rows at which a product runs at half its rate")
    width_half: float = _constant(60.0, 0.7, 0.2, "smaller side of a weight, the same")
    attention: float = _constant(0.9, 0.2, 0.15, "factor of attention's rate, long sequences", 0.1)
    attention_half: float = _constant(700.0, 0.7, 0.2, "tokens at which attention reaches half")
    unfused_attention: float = _constant(10.0, 0.4, 0.2, "bytes a score moves without flash")
    passes_eager: float = _constant(24.0, 0.4, 0.2, "values moved per token and width, forward")
    passes_tuned: float = _constant(14.0, 0.4, 0.2, "the same with fused or compiled passes")
    memory: float = _constant(0.9, 0.1, 0.05, "factor of the copy rate that passes reach")
    loss_eager: float = _constant(30.0, 0.4, 0.2, "bytes a logit moves, forward and backward")
    loss_tuned: float = _constant(14.0, 0.4, 0.2, "the same with a fused loss")
    launch_eager_s: float = _constant(2e-3, 0.5, 0.3, "host seconds per layer and micro-batch")
    launch_tuned_s: float = _constant(3e-4, 0.7, 0.3, "the same, fused, compiled or as graphs")
    collective_eager_s: float = _constant(8e-5, 0.5, 0.4, "host seconds per collective")
    collective_tuned_s: float = _constant(2e-5, 0.7, 0.4, "the same, fused, compiled or as graphs")
    launch_experts: float = _constant(2.0, 0.4, 0.3, "factor of launches with experts")
    launch_expert_s: float = _constant(1e-4, 0.7, 0.4, "host seconds per expert, one by one")
    inside_latency: float = _constant(1.0, 0.7, 0.5, "factor of latencies inside a node")
    across_latency: float = _constant(1.0, 0.7, 0.5, "factor of latencies across nodes")
    inside: float = _constant(0.75, 0.2, 0.1, "share of the bandwidth inside a node")
    across: float = _constant(0.75, 0.2, 0.15, "share of the bandwidth across nodes")
    experts_bandwidth: float = _constant(0.65, 0.4, 0.2, "the same of the experts' exchange")
    experts_products: float = _constant(0.8, 0.2, 0.15, "factor of the rate of experts' products")
    data_bandwidth: float = _constant(0.6, 0.4, 0.3, "share of bandwidths in gradients' exchange")
    data_hidden: float = _constant(0.5, 0.4, 0.4, "share of a micro-batch that hides that exchange")
    shard_hidden: float = _constant(0.3, 0.6, 0.8, "the same of ZeRO's exchange")
    ring_nodes: float = _constant(0.5, 0.5, 0.5, "power of nodes that slows a ring across them")
    congestion: float = _constant(0.1, 0.7, 0.5, "exchange longer per doubling of its nodes")
    data_messages: float = _constant(4.0, 0.7, 0.5, "messages of a layer in gradients' exchange")
    shard_bytes: float = _constant(6.0, 0.2, 0.35, "bytes a parameter sends in ZeRO 1 and 2")
    message_s: float = _constant(5e-4, 0.7, 0.6, "host seconds per message between stages, eager")
    jitter: float = _constant(0.01, 0.4, 0.3, "share of a step lost per doubling from 8 GPUs on")
    overhead_s: float = _constant(5e-3, 0.4, 0.3, "seconds of a step outside of all else")

    @classmethod
    def of_hardware(cls, hardware: HardwareConfig) -> Constants:
        """Return the defaults, replaced by constants measured on this hardware.

        Raises UserError for an unknown name.
        """
        for name in hardware.constants:
            if name not in cls.names():
                raise UserError(
                    f"{hardware.name}: constants.{name} is no constant of the cost model; use some "
                    f"of {', '.join(cls.names())}"
                )
        return cls(**hardware.constants)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of the constants, in the order of every (K,)."""
        return tuple(f.name for f in fields(cls))

    @classmethod
    def spreads(cls, kind: str) -> Floats:
        """Return standard deviations of the logarithms, (K,): "spread", "between" or "card"."""
        return np.array([f.metadata[kind] for f in fields(cls)])

    @classmethod
    def of_card(cls) -> Floats:
        """Return the indices of the constants that differ between card generations."""
        return np.flatnonzero(cls.spreads("card"))

    def logs(self) -> Floats:
        """Return logarithms, (K,), in the order of ``names``."""
        return np.log([getattr(self, name) for name in self.names()])

    @classmethod
    def of_logs(cls, logs: Floats) -> Constants:
        """Return constants from logarithms, (K,) as in ``logs``, or (C, K) for each case."""
        return cls(**dict(zip(cls.names(), np.exp(logs).T, strict=True)))
