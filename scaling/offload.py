"""Activations that wait on the host: which layers', what travels, and whether computing hides it.

Pure and without torch; ``parallel/offload`` does it.
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
"""Layers of a stage whose activations never go: one runs while another's are on their way."""


def offloaded_layers(share: float, layers: int) -> int:
    """Return how many of a stage's ``layers`` are offloaded: ``share`` of all but two.

    Rounded up, so that no more stays on the device than was planned.
    """
    return math.ceil(share * max(layers - STAYING, 0) - 1e-9)


def offloaded(share: float, stages: Sequence[range]) -> frozenset[int]:
    """Return the layers that are offloaded, the first ones of each stage."""
    return frozenset(
        layer for stage in stages for layer in stage[: offloaded_layers(share, len(stage))]
    )


def check_offload(config: RunConfig, layers: int) -> None:
    """Check offload of activations against a smallest stage of ``layers``.

    Raises UserError where none of them could go, or where two keys decide on the same activations.
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
    """Raise UserError for a pipeline stage with no more than the two layers that never offload."""
    if layers <= STAYING:
        raise UserError(
            f"{setting} leaves two layers of a stage where they are, and here the smallest "
            f"has {layers}; leave it out, or use fewer stages (parallel.pp, "
            "parallel.pipeline.stages_per_rank)"
        )


@dataclass(frozen=True)
class Traffic:
    """What travels between a rank and the host, estimated, on the first pipeline rank.

    ``layers`` are its offloaded ones; ``layer_bytes``: of one of them in one micro-batch, their
    mean; ``step_bytes``: in a step, to the host and as much back; ``host_bytes``: most that waits
    there at once, of all micro-batches in flight. ``copy_s`` is the time of one
    layer's copy, ``forward_s`` that of its forward, both at the rates that planning assumes
    (``parallel.context.costs``). Backward takes longer and has as much to bring, so a copy that
    hides behind the forward hides in both.
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
        """Return it for ``travelling`` bytes of all ``layers`` in a micro-batch of ``tokens``."""
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
        """Whether a layer's copy takes no longer than a layer's forward."""
        return self.copy_s <= self.forward_s

    def describe(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {**asdict(self), "hides": self.hides}
