"""Offloading of activations: layers, transferred bytes, and overlap with computation.

The module is pure and without torch; ``parallel/offload`` implements the transfers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from allometry.configs.errors import UserError
from allometry.configs.execution import ContextCosts
from allometry.configs.model import ModelConfig
from allometry.configs.run import RunConfig
from allometry.scaling.count import attention_flops, layer_flops

SELECTIVE = "parallel.context.offload=selective"
STAYING = 2
"""Layers of a stage that are never offloaded: one computes while another's data are in transfer."""


def offloaded_layers(share: float, layers: int) -> int:
    """Return the number of offloaded layers of a stage: ``share`` of all but two, rounded up.

    Rounding up ensures that the device stores no more than planned. For example, a share of 0.5 of
    10 layers offloads 4.
    """
    return math.ceil(share * max(layers - STAYING, 0) - 1e-9)


def offloaded(share: float, stages: Sequence[range]) -> frozenset[int]:
    """Return the offloaded layers, which are the first ones of each stage.

    For example, a share of 0.5 of one stage of 10 layers gives layers 0 to 3.
    """
    return frozenset(
        layer for stage in stages for layer in stage[: offloaded_layers(share, len(stage))]
    )


def check_offload(config: RunConfig, layers: int) -> None:
    """Check activation offload for a smallest stage of ``layers`` layers.

    Raises UserError if no layer can be offloaded, or if two keys control the same activations.
    """
    share, selective = config.training.activation_offload, config.parallel.context.offload
    if share > 0.0 and selective != "none":
        raise UserError(
            f"training.activation_offload={share} sends activations of every document and "
            f"{SELECTIVE} those of long ones alone; leave one of them out"
        )
    if share > 0.0:
        check_layers(f"training.activation_offload={share}", layers)
    elif selective == "selective":
        check_layers(SELECTIVE, layers)


def check_layers(setting: str, layers: int) -> None:
    """Raise UserError if a pipeline stage has only the two layers that are never offloaded."""
    if layers <= STAYING:
        raise UserError(
            f"{setting} leaves two layers of a stage where they are, and here the smallest "
            f"has {layers}; leave it out, or use fewer stages (parallel.pp, "
            "parallel.pipeline.stages_per_rank)"
        )


@dataclass(frozen=True)
class Traffic:
    """Estimated transfers between a rank and the host, on the first pipeline rank.

    ``layers``: number of offloaded layers; ``layer_bytes``: mean bytes of such a layer in one
    micro-batch; ``step_bytes``: bytes per step in each direction; ``host_bytes``: maximum bytes on
    the host, of all micro-batches in flight. ``copy_s`` is the time of one layer's copy and
    ``forward_s`` of its forward, both at the assumed rates (``parallel.context.costs``). Backward
    takes longer with the same transfer, so a copy that is hidden by the forward is always hidden.
    """

    layers: int
    layer_bytes: int
    step_bytes: int
    host_bytes: int
    copy_s: float
    forward_s: float

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        layers: frozenset[int],
        *,
        travelling: int,
        tokens: int,
        sequence_length: int,
        tp: int,
        micro_batches: int,
        in_flight: int,
        costs: ContextCosts,
    ) -> Traffic:
        """Return the estimate for ``travelling`` bytes of all ``layers`` per micro-batch."""
        number = len(layers)
        flops = layer_flops(model, sequence_length)[1:-1]
        slow = 1 / costs.attention_efficiency - 1
        forward = sum(
            flops[layer] + slow * attention_flops(model, sequence_length, model.window_of(layer))
            for layer in layers
        )
        forward /= number
        return cls(
            layers=number,
            layer_bytes=travelling // number,
            step_bytes=travelling * micro_batches,
            host_bytes=travelling * in_flight,
            copy_s=travelling / number / (costs.host_bandwidth_gb_per_s * 1e9),
            forward_s=forward * tokens / tp / (costs.tflops * 1e12),
        )

    @property
    def hides(self) -> bool:
        """True if a layer's copy takes no longer than its forward."""
        return self.copy_s <= self.forward_s

    def describe(self) -> dict[str, Any]:
        """Return the estimate as JSON."""
        return {**asdict(self), "hides": self.hides}
