"""What the dry run counts on the device where optimizer states live elsewhere."""

from typing import Any

import pytest

from allometry.configs.execution import Zero, bytes_of
from allometry.configs.model import DenseModel
from allometry.scaling.count import count_parameters
from allometry.scaling.memory import estimate_memory

MODEL = DenseModel(
    kind="dense", vocab_size=8192, width=512, num_layers=8, num_heads=8, ffn_width=1536
)
STATES = 8 * count_parameters(MODEL).total
LARGEST = 8 * 8192 * 512 + 4  # and its count of steps


def on_device(**states: Any) -> int:
    zero = Zero.model_validate({"optimizer_states": states})
    made = estimate_memory(MODEL, micro_batch_tokens=512, compute_bytes=2, zero=zero, hdp=1)
    return made.optimizer_states


def test_amounts_are_shares_or_bytes() -> None:
    assert bytes_of(0.25, 1001) == 250
    assert bytes_of("1.5 GiB", 10) == 3 << 29
    assert bytes_of("0 GiB", 10) == 0


@pytest.mark.parametrize("nvme", [None, "scratch"])
def test_what_stays_and_three_buckets_are_on_the_device(nvme: str | None) -> None:
    assert on_device(nvme=nvme, bucket_mib=1) == 3 * LARGEST
    assert on_device(nvme=nvme, bucket_mib=40) == 120 << 20
    half = on_device(nvme=nvme, device=0.5, bucket_mib=1)
    assert half == pytest.approx(STATES / 2 + 3 * LARGEST, abs=200)
    assert on_device(nvme=nvme, device="0.125 GiB", bucket_mib=1) == (1 << 27) + 3 * LARGEST
    # Never more than without the section.
    assert on_device(nvme=nvme, device="100 GiB") == pytest.approx(STATES, abs=1000)
