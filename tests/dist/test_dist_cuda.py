"""Two gloo ranks that share one GPU: buckets are reduced while the backward still runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny
from allometry.configs.execution import ParallelConfig
from allometry.parallel.mesh import open_mesh
from allometry.parallel.reduce import FlatReducer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RunRanks = Callable[..., list[Any]]


def overlapped_error(micro_batches: int) -> float:
    """Return the worst error of several steps, with one bucket per parameter."""
    run = tiny.config(0, "fp32")
    with open_mesh(ParallelConfig(timeout_s=30), torch.device("cuda", 0)) as mesh:
        model = tiny.initialized(run, mesh.device)
        lines = [(list(model.parameters()), mesh.hdp)]
        sync = FlatReducer(lambda: lines, mesh.tp, bucket_bytes=1, overlap=True)
        alone = tiny.initialized(run, mesh.device)
        worst = 0.0
        for step in range(5):
            batches = tiny.micro_batches(micro_batches * mesh.hdp.size, step, str(mesh.device))
            model.zero_grad(set_to_none=True)
            alone.zero_grad(set_to_none=True)
            tiny.backward_shared(model, sync, batches, mesh)
            tiny.backward_alone(alone, batches)
            worst = max(worst, tiny.worst_error(tiny.gradients(model), tiny.gradients(alone)))
        return worst


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_overlapped_buckets_on_cuda(run_ranks: RunRanks, micro_batches: int) -> None:
    assert max(run_ranks(overlapped_error, 2, micro_batches)) < 1e-5
