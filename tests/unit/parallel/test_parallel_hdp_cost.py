"""The cost of a unit: the project's FLOP count, and the messages of a ring."""

import numpy as np
import pytest
import torch

from allometry.configs.execution import ContextCosts
from allometry.configs.model import DenseModel
from allometry.parallel.hdp.shard import ring_table
from allometry.scaling.count import flops_per_token
from allometry.scaling.hdp.cost import CostModel
from ring_oracles import ring_traffic

MODEL = DenseModel(
    vocab_size=1000, width=512, num_layers=6, num_heads=8, num_kv_heads=2, ffn_width=1024
)
FAST = ContextCosts(bandwidth_gb_per_s=1e9)
RATE = FAST.tflops * 1e12


@pytest.mark.parametrize("length", [1, 7, 4096, 1_000_000])
def test_a_document_costs_its_flops(length: int) -> None:
    cost = CostModel.of(MODEL, FAST)
    flops = flops_per_token(MODEL, length).total * length
    assert cost.unit([length], 1) * RATE == pytest.approx(flops, rel=1e-12)
    assert cost.unit([length] * 3, 1) * RATE == pytest.approx(3 * flops, rel=1e-12)


def test_ranks_share_a_document() -> None:
    cost = CostModel.of(MODEL, FAST)
    assert cost.unit([100_000], 5) == pytest.approx(cost.unit([100_000], 1) / 5, rel=1e-4)


def test_tensor_ranks_and_layers_divide_it() -> None:
    whole = CostModel.of(MODEL, FAST)
    half = CostModel.of(MODEL, FAST, tp=2)
    assert half.unit([5000]) == pytest.approx(whole.unit([5000]) / 2)
    assert half.kv_bytes == whole.kv_bytes / 2
    third = CostModel.of(MODEL, FAST, layers=2)
    assert third.unit([5000]) == pytest.approx(whole.unit([5000]) / 3)


def test_a_micro_batch_costs_something_in_each_layer() -> None:
    cost = CostModel.of(MODEL, ContextCosts(micro_batch_ms=2.0))
    assert cost.unit([1], 1) == pytest.approx(6 * 2e-3, rel=1e-3)


def test_attention_at_half_the_rate_takes_twice_as_long() -> None:
    slow = CostModel.of(MODEL, ContextCosts(attention_efficiency=0.5))
    assert slow.pair_s == pytest.approx(2 * CostModel.of(MODEL, ContextCosts()).pair_s)


@pytest.mark.parametrize("lengths", [[4096], [37, 1000, 4], [2]])
@pytest.mark.parametrize("degree", [2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_are_those_that_the_ring_sends(
    lengths: list[int], degree: int, dtype: torch.dtype
) -> None:
    cost = CostModel.of(MODEL, ContextCosts(), compute_bytes=dtype.itemsize)
    features = MODEL.kv_heads * MODEL.head_width
    ring = range(degree)
    for backward in (False, True):
        sent = sum(
            ring_traffic(
                ring_table(ring, member, lengths, 0), features, dtype, backward=backward
            ).bytes
            for member in ring
        )
        counted = cost.ring_bytes(sum(lengths), degree)[backward]
        assert counted == MODEL.num_layers * sent


def test_one_rank_sends_nothing() -> None:
    cost = CostModel.of(MODEL, ContextCosts(bandwidth_gb_per_s=1e-6))
    assert cost.ring_bytes(10_000, 1) == (0.0, 0.0)
    assert cost.unit([10_000], 1) == CostModel.of(MODEL, FAST).unit([10_000], 1)


def test_hops_are_hidden_by_long_chunks_only() -> None:
    """A chunk of 2 F h_kv / (h BW) tokens hides a forward hop (design: overlap rule)."""
    costs = ContextCosts(tflops=400.0, bandwidth_gb_per_s=50.0)
    cost = CostModel.of(MODEL, costs)
    degree = 64
    # 2 bytes, K and V, over 2 N H FLOPs of causal attention for each of the chunk's keys
    threshold = 2 * 400e12 * MODEL.kv_heads / MODEL.num_heads / 50e9

    def forward_hops(chunk: float) -> float:
        tokens = chunk * degree
        block = cost.pair_s * tokens * (tokens + 1) / degree**2 / cost.layers / 3
        return chunk * cost.kv_bytes / cost.bandwidth - block

    assert forward_hops(0.9 * threshold) > 0 > forward_hops(1.1 * threshold)
    long = np.float64(20 * threshold * degree)
    last_hop = long / degree * cost.gradient_bytes / cost.bandwidth * cost.layers
    exposed = cost.exposed(long, long * (long + 1), np.float64(degree))
    assert float(exposed) == pytest.approx(last_hop), "all but the last hop of gradients is hidden"
    short = np.float64(0.1 * threshold * degree)
    assert (
        cost.exposed(short, short * (short + 1), np.float64(degree)) > 10 * short / long * exposed
    )


def test_exposed_time_of_two_ranks() -> None:
    cost = CostModel.of(MODEL, ContextCosts(tflops=1e9, bandwidth_gb_per_s=1.0))
    keys, gradients = 50 * cost.kv_bytes / 1e9, 50 * cost.gradient_bytes / 1e9
    # Forward: keys; backward: keys again, then their gradients return.
    assert cost.unit([100], 2) == pytest.approx(6 * (2 * keys + gradients), rel=1e-3)


def test_offload_is_hidden_where_a_layer_lasts_longer_than_its_transfer() -> None:
    cost = CostModel.of(MODEL, ContextCosts(host_bandwidth_gb_per_s=10.0))
    lengths = np.array([1e3, 1e5, 1e7])
    share = cost.hidden_share(lengths)
    assert (np.diff(share) >= 0).all()
    assert share[-1] == 1.0
    forward = flops_per_token(MODEL, 1000).forward - 2 * MODEL.vocab_size * MODEL.width
    seconds = forward / MODEL.num_layers / RATE
    assert share[0] == pytest.approx(seconds * 10e9 / cost.activation_bytes, rel=1e-9)


def test_checkpointing_keeps_less() -> None:
    kept = CostModel.of(MODEL, FAST, checkpointing="full").activation_bytes
    assert kept < CostModel.of(MODEL, FAST).activation_bytes
