"""Activations that the weighted sum of parallel streams saves for its backward."""

from __future__ import annotations

from collections import Counter

from allometry.configs.model import ModelConfig
from allometry.scaling.saved import STREAMS, Kernels


def weighted_sum(model: ModelConfig, kernels: Kernels) -> Counter[str]:
    """Return bytes that the weighted sum of the streams saves for a token of all streams."""
    if model.streams is None:
        return Counter()
    count, width = model.streams.count, model.width
    # The streams as factors and as the input of a product; before and after silu; the weights.
    read = 2 * count * width + 2 * width + count
    cast = width if kernels.compute < kernels.wide else 0
    return Counter({STREAMS: kernels.compute * read + kernels.wide * (cast + count)})
