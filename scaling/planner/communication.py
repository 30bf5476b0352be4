"""Seconds of communication: tensor, expert, context, pipeline and data parallelism."""

from __future__ import annotations

import numpy as np

from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.constants import Constants, Floats
from allometry.scaling.planner.operators import HALF, collectives, layer_parameters, rank_tokens

GRADIENT = 4  # bytes
OPTIMIZER_BYTES = 18  # per parameter: read and write master copy and gradient; states are extra
ACCUMULATE_BYTES = 10  # a micro-batch's gradient added into an fp32 buffer
HIDDEN = 0.9  # share of the computation that can hide messages of each micro-batch
BACKWARD = 2 / 3  # of a micro-batch's computation


def tensor(cases: Cases, constants: Constants) -> tuple[Floats, Floats]:
    """Return seconds of a layer's tensor parallelism: (transfer, latency); 0 for tp=1.

    An all-gather or reduce-scatter takes t-1 steps, an all-reduce twice as many of the same size.
    """
    n, hw = cases.n, cases.hw
    t, volume = n["tp"], 2.0 * rank_tokens(cases) * n["width"]
    within = t <= hw["gpus_per_node"]
    nodes = np.maximum(t / hw["gpus_per_node"], 1)
    inside = hw["inside"] * constants.inside
    shared = np.minimum(t, hw["gpus_per_node"]) * hw["across"] * constants.across
    shared = shared / nodes**constants.ring_nodes
    bandwidth = np.where(within, inside, np.minimum(inside, shared))
    # A ring has t-1 steps, each as slow as its slowest link.
    step = np.where(
        within,
        hw["inside_latency"] * constants.inside_latency,
        hw["across_latency"] * constants.across_latency,
    )
    halves = collectives(cases) * np.where(n["sequence_parallel"] > 0, 1, 2)
    return halves * (t - 1) / t * volume / bandwidth, halves * (t - 1) * step


def experts(cases: Cases, constants: Constants) -> Floats:
    """Return seconds of a layer's dispatch and combine, forward; 0 for ep=1 or a dense model."""
    n, hw = cases.n, cases.hw
    ep, k = n["ep"], n["top_k"]
    span = ep * n["tp"]
    nodes = np.maximum(span / hw["gpus_per_node"], 1)
    once = (nodes - 1) * (1 - (1 - 1 / nodes) ** k)
    few = np.minimum(n["nodes_of_token"] * (1 - 1 / nodes), once)
    once = np.where(n["nodes_of_token"] > 0, few, once)
    remote = np.where(n["deduplicated"] > 0, once, k * (1 - 1 / nodes))
    each = np.maximum(k * (1 - 1 / ep) / hw["inside"], remote / hw["across"])
    latency = np.where(nodes > 1, hw["across_latency"], hw["inside_latency"])
    share = 1 - n["dense_layers"] / n["layers"]
    volume = HALF * rank_tokens(cases) * n["width"] / n["tp"]
    seconds = 2 * (volume * each / constants.experts_bandwidth + latency) * share
    return np.where((ep > 1) & (n["experts"] > 0), seconds, 0.0)


def context(cases: Cases, constants: Constants, attention: Floats) -> Floats:
    """Return exposed seconds of ring attention's messages, forward; 0 for cp=1.

    Without document data; a plan of hybrid data parallelism is timed by its own makespan.
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
    """Return seconds of a micro-batch's messages between two stages, both ways; 0 for pp=1."""
    n, hw = cases.n, cases.hw
    within = n["tp"] * n["cp"] * n["dp"] * n["pp"] <= hw["gpus_per_node"]
    bandwidth = np.where(within, hw["inside"] * constants.inside, hw["across"] * constants.across)
    # Each tp rank sends its part (arXiv 2104.04473, section 4.1).
    volume = HALF * rank_tokens(cases) * n["width"] / n["tp"]
    host = np.where(n["eager"] > 0, constants.message_s, 0.0)
    exposed = np.where((n["overlap"] > 0) & (n["eager"] == 0), 0.1, 1.0)
    seconds = 2 * (volume / bandwidth * exposed + host) * n["chunks"]
    return np.where(n["pp"] > 1, seconds, 0.0)


def held(cases: Cases) -> tuple[Floats, Floats]:
    """Return parameters of a rank before sharding: (replicated over dp, of its experts)."""
    n = cases.n
    shared, of_experts = layer_parameters(cases)
    vocabulary = n["vocab"] * n["width"] * np.where((n["tied"] > 0) | (n["pp"] > 1), 1, 2)
    split = n["tp"] * n["pp"]
    return (
        (n["layers"] * shared) / split + vocabulary / n["tp"],
        n["layers"] * of_experts / split / n["ep"],
    )


def data(cases: Cases, constants: Constants, compute: Floats) -> Floats:
    """Return exposed seconds per step of gradient and parameter exchange; 0 for dp=1.

    ``compute``: seconds of a micro-batch's computation, (C,). Stage 0 all-reduces gradients once
    per step; stages 1 and 2 all-gather parameters and reduce-scatter gradients. Stage 2
    reduce-scatters in each micro-batch during its backward. Stage 3 also all-gathers for each
    forward and backward, while earlier blocks compute (``parallel/zero.py``). A pipeline
    reduce-scatters once. Replicas all-reduce their shards. Each message also takes the latency of
    its ring or tree.
    """
    n = cases.n
    ranks = n["dp"] * n["cp"]
    shared, of_experts = held(cases)
    experts = np.maximum(ranks / n["ep"], 1)
    whole, copies, steps, crossing = (np.zeros(len(cases)) for _ in range(4))
    for size, over, inner in ((shared, ranks, n["tp"]), (of_experts, experts, n["tp"] * n["ep"])):
        shards = np.where(n["zero"] > 0, np.maximum(over / n["replicas"], 1), over)
        whole = whole + size * (shards - 1) / shards / _rate(cases, constants, shards, inner)
        summed = n["zero"] == 0
        steps = steps + (size > 0) * _steps(cases, constants, shards, inner, summed)
        others = over / shards
        rate = _rate(cases, constants, others, inner * shards)
        copies = copies + size / shards * (others - 1) / others / rate
        crossing = crossing + (size > 0) * _steps(cases, constants, others, inner * shards, True)
    gather, reduce = n["gather_bytes"], n["reduce_bytes"]
    share = np.where(n["zero"] == 0, constants.data_hidden, constants.shard_hidden)
    apart = (n["overlap"] > 0) & (cases.hw["asynchronous"] > 0)  # else one processor does both
    behind = np.where(apart, np.minimum(share, 1.0) * compute, 0.0)
    each = n["reduces"] * np.maximum(cases.micro_batches - 1, 0)  # reduce-scatters before the last
    sharded = constants.shard_bytes * (gather + reduce) / (HALF + GRADIENT)
    once = np.where(n["zero"] == 0, 2 * reduce, sharded)
    messages = constants.data_messages * n["layers"] / n["pp"]
    steps, summing = steps * messages, copies * 2 * reduce + 2 * crossing * messages
    exposed = np.maximum(whole * once + 2 * steps + summing - behind, 0.0)
    beside = np.where(apart, HIDDEN, 0.0) * compute
    earlier = each * np.maximum(whole * reduce + steps - BACKWARD * beside, 0.0)
    exposed = exposed + earlier
    fully = whole * (2 * gather + reduce) + 3 * steps - beside
    fully = cases.micro_batches * np.maximum(fully, 0.0) + summing
    return np.asarray(np.where(n["zero"] == 3, fully, exposed))


def _rate(cases: Cases, constants: Constants, ranks: Floats, inner: Floats) -> Floats:
    """Return bytes/s of an exchange between ``ranks`` at a distance of ``inner`` ranks."""
    hw = cases.hw
    near = np.clip(hw["gpus_per_node"] / inner, 1, np.maximum(ranks, 1))
    within = ranks * inner <= hw["gpus_per_node"]
    bandwidth = np.where(within, hw["inside"], np.minimum(hw["inside"], near * hw["across"]))
    nodes = np.maximum(ranks * inner / hw["gpus_per_node"], 1)
    rate = bandwidth * constants.data_bandwidth / (1 + constants.congestion * np.log2(nodes))
    return np.asarray(rate)


def _steps(
    cases: Cases, constants: Constants, ranks: Floats, inner: Floats, summed: Floats | bool
) -> Floats:
    """Return one-way latency in seconds between ``ranks``, each ``inner`` ranks apart.

    All-gather and reduce-scatter use a ring of all ranks. An all-reduce (``summed``) may use a tree
    of nodes with a chain inside each node instead (NCCL chooses the faster one).
    """
    hw = cases.hw
    near = np.clip(hw["gpus_per_node"] / inner, 1, np.maximum(ranks, 1))
    nodes = np.maximum(ranks / near, 1)
    inside = hw["inside_latency"] * constants.inside_latency
    across = hw["across_latency"] * constants.across_latency
    crossings = np.where(nodes > 1, nodes, 0.0)
    ring = crossings * across + (ranks - np.maximum(crossings, 1)) * inside
    tree = np.log2(nodes) * across + (near - 1) * inside
    taken = np.where(summed, np.minimum(ring, tree), ring)
    return np.where(ranks > 1, taken, 0.0)


def optimizer(cases: Cases, constants: Constants) -> tuple[Floats, Floats]:
    """Return seconds per step of (the update, gradient accumulation): device memory traffic.

    If ranks run on a CPU, the update uses the measured rate of AdamW.
    """
    n = cases.n
    rate = cases.hw["memory"] * constants.memory
    adding = ACCUMULATE_BYTES * cases.micro_batches * sum(held(cases))
    adding = adding / np.where(n["zero"] == 3, n["dp"] * n["cp"], 1.0)
    own, moved = updated(cases), OPTIMIZER_BYTES + 2 * n["state_bytes"]
    of_gpus = cases.hw["asynchronous"] > 0
    update = np.where(of_gpus, moved * own / rate, own / cases.hw["adam"])
    return np.where(n["host_update"] > 0, 0.0, update), adding / rate


def updated(cases: Cases) -> Floats:
    """Return the number of parameters whose optimizer states a rank has."""
    n = cases.n
    shared, of_experts = held(cases)
    ranks = n["dp"] * n["cp"] / n["replicas"]
    each = shared / ranks + of_experts * np.minimum(n["ep"] / ranks, 1.0)
    return np.where(n["zero"] > 0, each, shared + of_experts)
