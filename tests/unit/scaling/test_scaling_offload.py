"""Device memory in the dry run with offloaded optimizer states."""

from typing import Any

import pytest

from allometry.configs.execution import Zero, bytes_of
from allometry.configs.model import DenseModel
from allometry.configs.optimization import AdamW, Muon, OptimizerConfig
from allometry.scaling.count import count_parameters
from allometry.scaling.memory import MemoryEstimate, estimate_memory

MODEL = DenseModel(
    kind="dense", vocab_size=8192, width=512, num_layers=8, num_heads=8, ffn_width=1536
)
STATES = 8 * count_parameters(MODEL).total
LARGEST = 8 * 8192 * 512 + 4  # and its step count
MUON = 4 * 1536 * 512


def estimate(zero: dict[str, Any], optimizer: OptimizerConfig | None = None) -> MemoryEstimate:
    return estimate_memory(
        MODEL,
        micro_batch_tokens=512,
        compute_bytes=2,
        zero=Zero.model_validate(zero),
        hdp=1,
        optimizer=optimizer,
    )


def on_device(optimizer: OptimizerConfig | None = None, **states: Any) -> int:
    return estimate({"optimizer_states": states}, optimizer).optimizer_states


def test_amounts_are_shares_or_bytes() -> None:
    assert bytes_of(0.25, 1001) == 250
    assert bytes_of("1.5 GiB", 10) == 3 << 29
    assert bytes_of("0 GiB", 10) == 0


@pytest.mark.parametrize("nvme", [None, "scratch"])
def test_what_stays_and_three_buckets_are_on_the_device(nvme: str | None) -> None:
    assert on_device(nvme=nvme, bucket_mib=1) == 3 << 20, "large parameters are cut"
    assert on_device(nvme=nvme, bucket_mib=40) == 120 << 20
    half = on_device(nvme=nvme, device=0.5, bucket_mib=1)
    assert half == pytest.approx(STATES / 2 + (3 << 20), abs=200)
    assert on_device(nvme=nvme, device="0.125 GiB", bucket_mib=1) == (1 << 27) + (3 << 20)
    # At most as much as without the section.
    assert on_device(nvme=nvme, device="100 GiB") == pytest.approx(STATES, abs=1000)


def test_matrices_that_are_updated_whole_are_not_cut() -> None:
    muon = Muon(kind="muon", lr=1e-3)
    assert on_device(muon, bucket_mib=1) == 3 * MUON
    assert on_device(AdamW(kind="adamw", lr=1e-3), bucket_mib=1) == 3 << 20


def test_masters_that_travel_leave_copies_in_bf16() -> None:
    plain = estimate({"stage": 3, "optimizer_states": {}})
    table = 4 * 8192 * 512
    away = estimate({"stage": 3, "optimizer_states": {"master_weights": True}})
    assert away.parameters == pytest.approx(table + (plain.parameters - table) / 2, abs=100)
    half = estimate({"stage": 3, "optimizer_states": {"master_weights": True, "device": 0.5}})
    assert half.parameters == pytest.approx(table + (plain.parameters - table) / 4, abs=100)
    assert away.gradients == plain.gradients


def test_gradients_that_leave_are_there_in_one_bucket() -> None:
    plain = estimate({"stage": 3, "optimizer_states": {}})
    away = estimate({"stage": 3, "optimizer_states": {"gradients": True, "bucket_mib": 4}})
    assert away.gradients == 4 << 20 < plain.gradients
    quarter = {"gradients": True, "bucket_mib": 4, "device": 0.25}
    kept = estimate({"stage": 3, "optimizer_states": quarter}).gradients
    assert kept == pytest.approx(plain.gradients / 4 + (4 << 20), abs=100)
    assert away.parameters == plain.parameters
