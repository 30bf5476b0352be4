"""Seconds of the operators of a layer and the head for a micro-batch, from FLOPs and bytes."""

from __future__ import annotations

import numpy as np

from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.constants import Constants, Floats

HALF = 2  # bytes per element in the compute type
SAVED_FP8_BYTES = 6  # per saved element: 1 written and 2 read in forward, and the reverse
QUANTIZE_BYTES = {"fp8_tensorwise": 5, "fp8_rowwise": 6, "fp8_blockwise": 6}
"""Column quantize_bytes of ``Cases`` by ``precision.linears``: one pass for the maximum and one for
the cast (2 + 2 + 1), or two casts, along rows and along columns (2 + 1 each), since no product
reads both directions with one scale. Calculated, not measured on a GPU yet.
"""


def product_time(rows: Floats, k: Floats, n: Floats, rate: Floats, constants: Constants) -> Floats:
    """Return seconds of (rows, k) @ (k, n); slower for few rows or small weight dimensions."""
    slow = (1 + constants.rows_half / np.maximum(rows, 1)) * (
        1 + constants.width_half / np.maximum(np.minimum(k, n), 1)
    )
    return 2 * rows * k * n / rate * slow


def rank_tokens(cases: Cases) -> Floats:
    """Return the tokens of a micro-batch on a rank."""
    return cases.n["micro_batch"] * cases.n["sequence"] / cases.n["cp"]


def products_rate(cases: Cases, constants: Constants) -> Floats:
    """Return the FLOP/s of large products of the blocks."""
    narrow = np.isin(cases.precision, ("fp8", "fp4"))
    share = np.where(narrow, cases.n["narrow_share"], 0.0)
    wide = (1 - share) / (cases.hw["wide_products"] * constants.products)
    return 1 / (wide + share / (cases.hw["products"] * constants.fp8_products))


def attention_products(cases: Cases, constants: Constants) -> Floats:
    """Return seconds of one layer's projections, forward; latent attention if ``kv_rank`` > 0."""
    n, rate, rows = cases.n, products_rate(cases, constants), rank_tokens(cases)
    t, h, inner = n["tp"], n["width"], n["heads"] * n["head_dim"]

    def product(k: Floats, m: Floats) -> Floats:
        return product_time(rows, k, m, rate, constants)

    plain = product(h, (inner + 2 * n["kv_heads"] * n["head_dim"]) / t) + product(inner / t, h)
    values = n["heads"] * n["head_dim"] * 2 / 3  # 128 of 192: without the rotated part
    latent = (
        product(h, n["q_rank"] + n["kv_rank"] + n["head_dim"] / 3)
        + product(n["q_rank"], inner / t)
        + product(n["kv_rank"], 2 * values / t)
        + product(values / t, h)
    )
    return np.where(n["kv_rank"] > 0, latent, plain)


def ffn_products(cases: Cases, constants: Constants) -> Floats:
    """Return seconds of the feed-forward products of a mean layer, forward, including experts."""
    n, rate, rows = cases.n, products_rate(cases, constants), rank_tokens(cases)
    t, h, gates = n["tp"], n["width"], 1 + n["gated"]

    def ffn(rows: Floats, inner: Floats) -> Floats:
        up = product_time(rows, h, gates * inner / t, rate, constants)
        return up + product_time(rows, inner / t, h, rate, constants)

    experts = np.maximum(n["experts"], 1)
    local = np.maximum(experts / n["ep"], 1)
    each = rows * np.maximum(n["top_k"], 1) * n["ep"] / experts
    mixture = local * ffn(each, n["expert_ffn"]) / constants.experts_products
    mixture = mixture + ffn(rows, n["shared_experts"] * n["expert_ffn"])
    share = np.where(n["experts"] > 0, 1 - n["dense_layers"] / n["layers"], 0.0)
    return np.asarray(share * mixture + (1 - share) * ffn(rows, n["ffn"]))


def scores(cases: Cases, constants: Constants) -> Floats:
    """Return seconds of one layer's causal attention, forward.

    Unfused attention needs twice the FLOPs, and memory traffic.
    """
    n, rows = cases.n, rank_tokens(cases)
    inner = n["heads"] * n["head_dim"] / n["tp"]
    s = np.where(n["attended"] > 0, n["attended"], n["sequence"])
    rate = cases.hw["attention"] * n["attention_rate"] * constants.attention
    rate = rate / (1 + constants.attention_half / s)
    flash = 2 * rows * s * inner / rate
    bytes_moved = constants.unfused_attention * rows * s * n["heads"] / n["tp"]
    dense = 4 * rows * s * inner / (cases.hw["wide_products"] * constants.products)
    unfused = dense + bytes_moved / (cases.hw["memory"] * constants.memory)
    return np.where(n["flash"] > 0, flash, unfused)


def elementwise(cases: Cases, constants: Constants) -> Floats:
    """Return seconds of norms, activations, rotations and residuals of a mean layer, forward."""
    n = cases.n
    spread = np.where(n["sequence_parallel"] > 0, n["tp"], 1.0)
    share = np.where(n["experts"] > 0, 1 - n["dense_layers"] / n["layers"], 0.0)
    visits = n["top_k"] + n["shared_experts"]
    inner = share * visits * n["expert_ffn"] + (1 - share) * n["ffn"]
    passes = np.where(n["eager"] > 0, constants.passes_eager, constants.passes_tuned)
    values = passes * n["width"] / spread
    values = values + 2 * (1 + n["gated"]) * inner / n["tp"] + 4 * share * n["top_k"] * n["width"]
    return np.asarray(HALF * values * rank_tokens(cases) / (cases.hw["memory"] * constants.memory))


def casts(cases: Cases, constants: Constants) -> tuple[Floats, Floats]:
    """Return seconds of a mean layer's casts: (of FP8 products, of activations saved in FP8).

    A product casts its input in forward and its output's gradient in backward; weights are cast
    once per step and not counted. Forward and backward together.
    """
    n = cases.n
    share = np.where(n["experts"] > 0, 1 - n["dense_layers"] / n["layers"], 0.0)
    visits = share * (n["top_k"] + n["shared_experts"]) * n["expert_ffn"] + (1 - share) * n["ffn"]
    inner, gates = n["heads"] * n["head_dim"], 1 + n["gated"]
    rows = rank_tokens(cases) / (cases.hw["memory"] * constants.memory)
    kept = (3 * n["width"] + inner + (gates + 1) * visits) / n["tp"]
    given = (2 * n["width"] + inner + 2 * n["kv_heads"] * n["head_dim"] + gates * visits) / n["tp"]
    narrow = np.where(np.isin(cases.precision, ("fp8", "fp4")), n["narrow_share"], 0.0)
    products = narrow * n["quantize_bytes"] * (2 * n["width"] + inner + visits + given) * rows
    return products, n["saved_fp8"] * SAVED_FP8_BYTES * kept * rows


def head(cases: Cases, constants: Constants) -> Floats:
    """Return seconds of head and loss for a micro-batch, both passes, in the compute type."""
    n, rows = cases.n, rank_tokens(cases)
    columns = n["vocab"] / n["tp"]
    rate = cases.hw["wide_products"] * constants.products
    moved = np.where(n["eager"] > 0, constants.loss_eager, constants.loss_tuned)
    traffic = moved * rows * columns / (cases.hw["memory"] * constants.memory)
    return 3 * product_time(rows, n["width"], columns, rate, constants) + traffic


def collectives(cases: Cases) -> Floats:
    """Return the number of tensor-parallel collectives of a layer, both passes; 0 for tp=1.

    One all-reduce after attention and one after the feed-forward, in both passes; with sequence
    parallelism (arXiv 2205.05198) an all-gather and a reduce-scatter for each, and inputs are
    gathered again.
    """
    n = cases.n
    each = np.where(n["sequence_parallel"] > 0, 10.0, 4.0)
    again = np.where(n["sequence_parallel"] > 0, 4.0, 2.0)
    return np.where(n["tp"] > 1, each + np.where(cases.recompute == "full", again, 0.0), 0.0)


def launches(cases: Cases, constants: Constants) -> Floats:
    """Return host seconds of a layer and micro-batch, forward and backward."""
    n = cases.n
    each = np.where(n["eager"] > 0, constants.launch_eager_s, constants.launch_tuned_s)
    each = each * np.where(n["experts"] > 0, constants.launch_experts, 1.0)
    local = np.where(n["grouped"] > 0, 0.0, n["experts"] / n["ep"])
    each = each + local * constants.launch_expert_s
    each = each * np.where(cases.recompute == "full", 4 / 3, 1.0)
    send = np.where(n["eager"] > 0, constants.collective_eager_s, constants.collective_tuned_s)
    return np.asarray(each + collectives(cases) * send)


def layer_parameters(cases: Cases) -> tuple[Floats, Floats]:
    """Return parameters of a mean layer: (on all ranks, of experts)."""
    n = cases.n
    h, inner = n["width"], n["heads"] * n["head_dim"]
    plain = h * (2 * inner + 2 * n["kv_heads"] * n["head_dim"])
    latent = h * (n["q_rank"] + n["kv_rank"]) + inner * (n["q_rank"] + 4 / 3 * n["kv_rank"])
    latent = latent + inner * 2 / 3 * h
    sides = 2 + n["gated"]
    share = np.where(n["experts"] > 0, 1 - n["dense_layers"] / n["layers"], 0.0)
    dense = share * n["shared_experts"] * n["expert_ffn"] + (1 - share) * n["ffn"]
    attention = np.where(n["kv_rank"] > 0, latent, plain)
    return attention + sides * h * dense, share * sides * h * n["experts"] * n["expert_ffn"]
