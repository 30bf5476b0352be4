"""On CUDA, parts of a step are timed and described as a GPU for the planner."""

from __future__ import annotations

import psutil
import pytest
import torch

from allometry.scaling.planner.constants import Constants
from allometry.studies.machine.describe import describe
from allometry.studies.machine.pieces import Clock, pieces
from allometry.studies.machine.ranks import measure_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_gpu_is_described_within_what_it_can_be() -> None:
    found = pieces(Clock(torch.device("cuda"), 0.05), ("bf16", "fp32"))
    memory = torch.cuda.get_device_properties(0).total_memory
    machine = {
        **{"name": torch.cuda.get_device_name(), "memory_bytes": memory, "ranks": 1},
        **{"host_memory_bytes": psutil.virtual_memory().total, "disk_bandwidth": 1e9},
        **{"adam_rate": found["adam_rate"], "asynchronous": True},
    }
    hardware = describe(found, machine)
    assert hardware.gpu.asynchronous
    assert 1e13 < hardware.gpu.peak_flops["bf16"] < 5e15
    assert 1e11 < hardware.gpu.memory_bandwidth < 1e13
    assert 1e9 < hardware.host.bandwidth < hardware.gpu.memory_bandwidth
    assert hardware.left(8) == (1.0, 1.0)
    Constants.of_hardware(hardware)


def test_gpus_send_each_other_messages_over_nccl() -> None:
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("needs two CUDA devices")
    found = measure_ranks(count, 1, 1, 1.0, {})
    assert all(one["seconds"] > 0 for one in found["messages"])
    assert "crowd" not in found
