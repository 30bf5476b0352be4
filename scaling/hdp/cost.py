"""Cost of a unit of documents on a rank: seconds from tokens, squared lengths and ring size.

A rank with a share 1/n of documents of s tokens each computes 1/n of their matrix products (linear
in s) and of their attention (quadratic in s; the zig-zag halves of ``parallel.hdp.shard`` have
equal cost). The rank also waits for the hops of keys and values that its attention blocks do not
hide (arXiv 2502.21231). FLOPs are computed by ``scaling.count``, activations by ``scaling.memory``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from allometry.configs.execution import ContextCosts, Zero
from allometry.configs.model import ModelConfig
from allometry.configs.precision import PrecisionConfig
from allometry.scaling.count import DocumentFlops, layer_flops
from allometry.scaling.memory import estimate_memory
from allometry.scaling.saved import COMPUTE

Floats = npt.NDArray[np.float64]

_ACCUMULATOR_BYTES = 4
"""Bytes per element of the gradients of keys and values in messages: fp32, or the activations' type
if wider.
"""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds and bytes of forward and backward of some layers on one rank.

    ``token_s``: matrix products of a token; ``pair_s``: attention of a document of s tokens takes
    ``pair_s * s * (s + 1)``; ``micro_batch_s``: fixed cost of a micro-batch. ``layer_s``: part of
    ``token_s`` of one layer. ``kv_bytes`` and ``gradient_bytes``: keys and values of a token in one
    layer, and their gradients in messages. ``activation_bytes``: bytes saved for backward per token
    in one layer. Bandwidths are in bytes per second. Backward takes twice as long as forward.
    """

    token_s: float
    pair_s: float
    micro_batch_s: float
    layer_s: float
    layers: int
    kv_bytes: float
    gradient_bytes: float
    activation_bytes: float
    bandwidth: float
    host_bandwidth: float

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        costs: ContextCosts,
        layers: int | None = None,
        compute_bytes: int = 2,
        tp: int = 1,
        checkpointing: Literal["none", "selective", "full"] = "none",
        precision: PrecisionConfig = COMPUTE,
    ) -> CostModel:
        """Return the costs of a model that is sharded over ``tp`` ranks.

        ``layers``: number of layers of a rank for pipeline stages of equal cost, with a
        proportional share of the head; None: the full model. ``checkpointing`` and ``precision``
        change the saved activations but not the times, since recomputation scales all documents
        equally.
        """
        number = model.num_layers if layers is None else layers
        share = number / model.num_layers
        rate = costs.tflops * 1e12 * tp
        flops = DocumentFlops.of(model)
        pairs = flops.per_pair + flops.per_windowed_pair
        in_layers = sum(layer_flops(model, 1)[1:-1]) * 3 - pairs
        features = model.num_streams * model.kv_heads * model.head_width / tp
        kept = estimate_memory(
            model,
            micro_batch_tokens=1024,
            compute_bytes=compute_bytes,
            zero=Zero(),
            hdp=1,
            checkpointing=checkpointing,
            precision=precision,
        ).activations
        return cls(
            token_s=share * flops.per_token / rate,
            pair_s=share * pairs / 2 / (rate * costs.attention_efficiency),
            micro_batch_s=number * costs.micro_batch_ms * 1e-3,
            layer_s=in_layers / model.num_layers / rate,
            layers=number,
            kv_bytes=2 * features * compute_bytes,
            gradient_bytes=2 * features * max(_ACCUMULATOR_BYTES, compute_bytes),
            activation_bytes=kept / 1024 / model.num_layers / tp,
            bandwidth=costs.bandwidth_gb_per_s * 1e9,
            host_bandwidth=costs.host_bandwidth_gb_per_s * 1e9,
        )

    def compute(self, tokens: Floats, pairs: Floats) -> Floats:
        """Return rank-seconds of computation only; ``pairs`` is the sum of s (s + 1)."""
        return self.token_s * tokens + self.pair_s * pairs

    def times(self, tokens: Floats, pairs: Floats, degree: npt.NDArray[np.int64] | int) -> Floats:
        """Return the seconds of a unit on each of its ``degree`` members."""
        n = np.asarray(degree, dtype=np.float64)
        return self.compute(tokens, pairs) / n + self.micro_batch_s + self.exposed(tokens, pairs, n)

    def exposed(self, tokens: Floats, pairs: Floats, n: Floats) -> Floats:
        """Return the seconds of a ring's hops that attention blocks do not hide.

        The forward of a layer has n - 1 hops of keys and values, each overlapped with one of n
        blocks. The backward has the same hops and as many hops of gradients, which follow one step
        behind, so the last gradient hop has no block to overlap with.
        """
        block = self.pair_s * pairs / (n * n) / self.layers
        keys, gradients = (
            tokens / n * size / self.bandwidth for size in (self.kv_bytes, self.gradient_bytes)
        )
        beside = gradients * np.maximum(n - 2, 0) / np.maximum(n - 1, 1)
        forward = np.maximum(keys - block / 3, 0.0)
        backward = np.maximum(keys + beside - block * 2 / 3, 0.0)
        seconds = (n - 1) * (forward + backward) + np.where(n > 1, gradients, 0.0)
        return np.asarray(self.layers * seconds)

    def unit(self, lengths: Iterable[int], degree: int = 1) -> float:
        """Return the seconds of documents of these lengths on each of ``degree`` ranks.

        For example, ``cost.unit([4096], 2)`` is the time of one document on a ring of two.
        """
        s = np.asarray(tuple(lengths), dtype=np.float64)
        return float(self.times(s.sum(), (s * (s + 1)).sum(), degree))

    def ring_bytes(self, tokens: int, degree: int) -> tuple[float, float]:
        """Return the bytes that a ring sends in forward and in backward, over all layers.

        Keys and values of every token make n - 1 hops, and their gradients as many in backward.
        """
        hops = (degree - 1) * tokens * self.layers
        return hops * self.kv_bytes, hops * (self.kv_bytes + self.gradient_bytes)

    def hidden_share(self, lengths: Floats) -> Floats:
        """Return the largest share r of layers whose activations can be offloaded without a stall.

        The forward of a layer must take as long as the average transfer per layer: T(s) >= r Act(s)
        / B (arXiv 2502.21231, eq. 3). Both sides decrease with the number of ranks in the same way.
        """
        forward = (self.layer_s + self.pair_s * (lengths + 1) / self.layers) / 3
        return np.minimum(1.0, forward * self.host_bandwidth / self.activation_bytes)
