"""NCCL groups bound to a device, in a world of one GPU."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from allometry.configs.execution import ParallelConfig
from allometry.parallel.groups import Communicator, open_groups, warm_up
from allometry.parallel.mesh import open_mesh
from allometry.parallel.wire import sum_over

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MINUTE = timedelta(minutes=1)


def test_a_bound_communicator_is_split_and_sums() -> None:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl", store=dist.HashStore(), rank=0, world_size=1, timeout=MINUTE, device_id=device
    )
    try:
        # An additional dimension, so that one axis does not include all ranks.
        groups = open_groups({"pp": 1, "hdp": 1}, device, MINUTE, MINUTE)
        split = dist.split_group(split_ranks=[[0]], timeout=MINUTE, group_desc="alone")
        assert split is not None
        assert dist.get_backend(split) == "nccl"
        warm_up([Communicator(("pp",), split)], device)
        here = torch.ones(3)
        sum_over(here, split)
        assert here.device.type == "cpu"
        assert here.tolist() == [1.0, 1.0, 1.0]
        assert dist.get_backend(groups.host) == dist.get_backend(groups.checkpoint) == "gloo"
        dist.all_gather_object([None], "word", group=groups.host)
    finally:
        dist.destroy_process_group()


def test_the_mesh_of_one_gpu_has_gloo_for_host_objects_alone() -> None:
    with open_mesh(ParallelConfig()) as mesh:
        assert mesh.device.type == "cuda"
        assert dist.get_backend(mesh.hdp.group) == "nccl"
        assert dist.get_backend(mesh.host_group) == "gloo"
        assert mesh.gather_objects("word") == ["word"]
        total = torch.ones((), dtype=torch.float64)
        sum_over(total, mesh.hdp.group)
        assert float(total) == 1.0
