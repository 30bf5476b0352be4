"""Seconds of messages: tensor, expert and context parallelism, pipeline and data parallelism."""

from __future__ import annotations

import numpy as np

from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.constants import Constants, Floats
from allometry.scaling.planner.operators import HALF, layer_parameters, rank_tokens

GRADIENT = 4  # bytes
OPTIMIZER_BYTES = 34  # of AdamW a parameter: reads and writes of moments, master copy, gradient
ACCUMULATE_BYTES = 10  # a micro-batch's gradient added into an fp32 buffer
HIDDEN = 0.9  # share of the computation behind which ZeRO-3 can hide its messages


def tensor(cases: Cases, constants: Constants) -> tuple[Floats, Floats]:
    """Seconds of a layer's four collectives forward (two pairs): (transfer, latency); 0 for tp=1.

    The host and the network's steps run behind computation as far as there is some, so latency
    joins what the host takes.
    """
    n, hw = cases.n, cases.hw
    t, volume = n["tp"], 2.0 * rank_tokens(cases) * n["width"]
    within = t <= hw["gpus_per_node"]
    nodes = np.ceil(t / hw["gpus_per_node"])
    inside = hw["inside"] * constants.inside
    shared = np.minimum(t, hw["gpus_per_node"]) * hw["across"] * constants.across
    bandwidth = np.where(within, inside, np.minimum(inside, shared))
    steps = np.minimum(t, hw["gpus_per_node"]) - 1
    latency = steps * hw["inside_latency"] * constants.inside_latency
    latency = latency + (nodes - 1) * hw["across_latency"] * constants.across_latency
    return 4 * (t - 1) / t * volume / bandwidth, np.where(t > 1, 4 * latency, 0.0)


def experts(cases: Cases, constants: Constants) -> Floats:
    """Seconds of a layer's dispatch and combine, forward; 0 for ep=1 or a dense model."""
    n, hw = cases.n, cases.hw
    ep, k = n["ep"], n["top_k"]
    span = ep * n["tp"]
    nodes = np.maximum(span / hw["gpus_per_node"], 1)
    remote = (nodes - 1) * (1 - (1 - 1 / nodes) ** k)
    each = np.maximum(k * (1 - 1 / ep) / hw["inside"], remote / hw["across"])
    latency = np.where(nodes > 1, hw["across_latency"], hw["inside_latency"])
    share = 1 - n["dense_layers"] / n["layers"]
    volume = HALF * rank_tokens(cases) * n["width"] / n["tp"]
    seconds = 2 * (volume * each / constants.experts_bandwidth + latency) * share
    return np.where((ep > 1) & (n["experts"] > 0), seconds, 0.0)


def context(cases: Cases, constants: Constants, attention: Floats) -> Floats:
    """Seconds of a ring's keys and values that attention does not hide, forward; 0 for cp=1.

    Without documents; a plan of hybrid data parallelism is timed by its own makespan.
    """
    n, hw = cases.n, cases.hw
    cp = n["cp"]
    volume = 2 * HALF * rank_tokens(cases) * n["kv_heads"] * n["head_dim"] / n["tp"]
    within = cp * n["tp"] <= hw["gpus_per_node"]
    bandwidth = np.where(within, hw["inside"] * constants.inside, hw["across"] * constants.across)
    latency = np.where(
        within,
        hw["inside_latency"] * constants.inside_latency,
        hw["across_latency"] * constants.across_latency,
    )
    behind = np.where(hw["asynchronous"] > 0, attention, 0.0)
    return np.maximum((cp - 1) * (volume / bandwidth + latency) - behind, 0.0) * (cp > 1)


def between_stages(cases: Cases, constants: Constants) -> Floats:
    """Seconds of a micro-batch's messages between two stages, there and back; 0 for pp=1."""
    n, hw = cases.n, cases.hw
    within = n["tp"] * n["cp"] * n["dp"] * n["pp"] <= hw["gpus_per_node"]
    bandwidth = np.where(within, hw["inside"] * constants.inside, hw["across"] * constants.across)
    # Each rank of tp sends its part (arXiv 2104.04473, section 4.1).
    volume = HALF * rank_tokens(cases) * n["width"] / n["tp"]
    host = np.where(n["eager"] > 0, constants.message_s, 0.0)
    exposed = np.where((n["overlap"] > 0) & (n["eager"] == 0), 0.1, 1.0)
    seconds = 2 * (volume / bandwidth * exposed + host) * n["chunks"]
    return np.where(n["pp"] > 1, seconds, 0.0)


def held(cases: Cases) -> tuple[Floats, Floats]:
    """Parameters of a rank before sharding: (replicated over dp, of its experts)."""
    n = cases.n
    shared, of_experts = layer_parameters(cases)
    vocabulary = n["vocab"] * n["width"] * np.where((n["tied"] > 0) | (n["pp"] > 1), 1, 2)
    split = n["tp"] * n["pp"]
    return (
        (n["layers"] * shared) / split + vocabulary / n["tp"],
        n["layers"] * of_experts / split / n["ep"],
    )


def data(cases: Cases, constants: Constants, compute: Floats) -> Floats:
    """Seconds of a step's exchange of gradients and parameters that is not hidden; 0 for dp=1.

    ``compute``: seconds of a micro-batch's computation, (C,), which ZeRO-3 hides messages behind.
    """
    n, hw = cases.n, cases.hw
    shared, of_experts = held(cases)
    once = each = np.zeros(len(cases))
    for size, ranks, inner in (
        (shared, n["dp"] * n["cp"], n["tp"]),
        (of_experts, np.maximum(n["dp"] * n["cp"] / n["ep"], 1), n["tp"] * n["ep"]),
    ):
        near = np.clip(hw["gpus_per_node"] / inner, 1, np.maximum(ranks, 1))
        within = ranks * inner <= hw["gpus_per_node"]
        bandwidth = np.where(within, hw["inside"], np.minimum(hw["inside"], near * hw["across"]))
        nodes = np.maximum(ranks * inner / hw["gpus_per_node"], 1)
        rate = bandwidth * constants.data_bandwidth / (1 + constants.congestion * np.log2(nodes))
        part = size * (ranks - 1) / np.maximum(ranks, 1) / rate
        once = once + part * np.where(n["zero"] == 0, 2 * GRADIENT, constants.shard_bytes)
        each = each + part * 3 * HALF
    behind = np.minimum(constants.data_hidden, 1.0) * compute
    beside = hw["asynchronous"] > 0  # else what sends is what computes
    hidden = np.where((n["overlap"] > 0) & beside, behind, 0.0)
    hideable = np.where(beside, HIDDEN * compute, 0.0)
    fully = cases.micro_batches * np.maximum(each - hideable, 0.0)
    once = np.maximum(once - hidden, 0.0)
    # ZeRO 2 without a pipeline reduces in each micro-batch rather than in the last alone.
    scattered = np.maximum(each * GRADIENT / (3 * HALF) - hideable, 0.0)
    more = n["reduces"] * np.maximum(cases.micro_batches - 1, 0) * scattered
    return np.where(n["zero"] == 3, fully, once + more)


def optimizer(cases: Cases, constants: Constants) -> tuple[Floats, Floats]:
    """Seconds of (the update, adding up gradients) of a step: traffic of device memory.

    Where ranks are of a CPU, the update has the rate that was measured of AdamW there.
    """
    n = cases.n
    shared, of_experts = held(cases)
    rate = cases.hw["memory"] * constants.memory
    ranks = n["dp"] * n["cp"]
    own = np.where(
        n["zero"] > 0, shared / ranks + of_experts * n["ep"] / ranks, shared + of_experts
    )
    adding = ACCUMULATE_BYTES * cases.micro_batches * (shared + of_experts)
    adding = adding / np.where(n["zero"] == 3, ranks, 1.0)
    update = np.where(
        cases.hw["asynchronous"] > 0, OPTIMIZER_BYTES * own / rate, own / cases.hw["adam"]
    )
    return update, adding / rate
