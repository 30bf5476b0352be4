"""Triton kernels of grouped products in Triton's interpreter, against plain torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# The interpreter is selected when kernels are defined, so this test uses a separate process.
INTERPRETED = """
import torch
from allometry.models.grouped_cuda import zero_empty_groups_
for counts in ([3, 0, 7, 2], [0, 0, 12, 0], [0, 0, 0, 0], [1, 1, 1, 1]):
    for dtype in (torch.float32, torch.bfloat16):
        counts_E = torch.tensor(counts)
        y = torch.randn(4, 70, 90).to(dtype)
        y[counts_E == 0] = float("nan")
        wanted = y.masked_fill((counts_E == 0)[:, None, None], 0.0)
        zero_empty_groups_(y, counts_E.cumsum(0).to(torch.int32))
        assert torch.equal(y, wanted), (counts, dtype)
"""


def test_only_empty_groups_become_zeros() -> None:
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
