"""Parallel streams of one model (ParScale, arXiv 2505.10475)."""

from __future__ import annotations

from pydantic import Field

from allometry.configs.base import Count, Section


class Streams(Section):
    """Streams with the same weights and their own prefixes, merged by learned weights (ParScale).

    Every sequence is computed ``count`` times. In each layer, the queries of a stream also attend
    to the stream's ``prefix_tokens`` learned keys and values. After the final norm a small network
    computes a weight of each stream for each token, and the weighted sum is the input of the head.
    """

    count: Count = Field(gt=1, description="number of streams; for one leave streams out")
    prefix_tokens: Count = Field(
        48,
        ge=0,
        description="number of learned keys (and values) of a stream in each layer, seen by every "
        "query of every document; 0: equal streams",
    )
    smoothing: float = Field(
        0.01,
        ge=0.0,
        le=1.0,
        description="share of a stream's weight that does not depend on the token: weights are "
        "(1 - smoothing) x softmax + smoothing / count",
    )
