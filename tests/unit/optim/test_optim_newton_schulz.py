"""Newton-Schulz in batches: equal to single matrices, and bitwise equal in any layout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from allometry.optim.newton_schulz import DION, newton_schulz, orthogonal, usual_batch
from rule_groups import by_singular_values, normal

SHAPES = ((24, 24), (30, 12), (12, 30), (5, 40))


def fixed(batch: int) -> Callable[[int, int, str], int]:
    return lambda rows, columns, device_type: batch


def given(count: int, dtype: torch.dtype) -> dict[int, Tensor]:
    """Return matrices of all shapes in turn."""
    return {
        i: normal(f"{i}", SHAPES[i % len(SHAPES)], torch.float64).to(dtype) for i in range(count)
    }


@pytest.mark.parametrize("batch", [0, 1, 3, 8])
def test_batches_act_on_singular_values(batch: int) -> None:
    matrices = given(14, torch.float64)
    found = dict(orthogonal(matrices.items(), DION, fixed(batch)))
    assert found.keys() == matrices.keys()
    for i, matrix in matrices.items():
        wanted = by_singular_values(matrix, DION)
        torch.testing.assert_close(found[i], wanted, rtol=0, atol=1e-12)
        assert torch.equal(matrix, given(14, torch.float64)[i]), "arguments are left alone"


def test_a_matrix_has_the_same_bits_in_any_company() -> None:
    """Alone, in small and large batches, first or last, as in any layout."""
    matrices = given(23, torch.bfloat16)
    wanted = {
        i: dict(orthogonal([(i, matrix)], DION, fixed(4)))[i] for i, matrix in matrices.items()
    }
    for chosen in (range(23), reversed(range(23)), range(3, 9), (0, 4, 8, 12, 16, 20)):
        found = dict(orthogonal([(i, matrices[i]) for i in chosen], DION, fixed(4)))
        assert all(torch.equal(found[i], wanted[i]) for i in found)
    assert not torch.equal(wanted[0], wanted[4])


def test_a_cpu_computes_one_by_one_and_a_gpu_what_fills_it() -> None:
    matrices = given(6, torch.bfloat16)
    for i, result in orthogonal(matrices.items(), DION):
        assert torch.equal(result, newton_schulz(matrices[i], DION))
    assert usual_batch(256, 768, "cpu") == 0
    found = [usual_batch(side, 4 * side, "cuda") for side in (64, 256, 768, 1024, 2048, 8192)]
    assert found == [64, 32, 4, 2, 1, 1]
    assert usual_batch(768, 256, "cuda") == usual_batch(256, 768, "cuda")


# The interpreter is selected when kernels are defined, so they use a separate process.
INTERPRETED = """
import torch
from allometry.optim.symmetric_cuda import symmetric_product
torch.manual_seed(0)
for batch, rows, columns in ((2, 130, 70), (1, 256, 256), (3, 64, 200), (1, 300, 129)):
    x = torch.randn(batch, rows, columns).to(torch.float16)
    add = torch.randn(batch, rows, rows)
    add = (add + add.mT).to(torch.float16)
    wide = x.double() @ x.double().mT
    for added, beta, alpha in ((None, 0.0, 1.0), (add, -4.775, 0.25)):
        wanted = alpha * wide if added is None else alpha * wide + beta * add.double()
        found = symmetric_product(x, added, beta, alpha)
        assert found.dtype == x.dtype and torch.equal(found, found.mT), (batch, rows, columns)
        error = float((found.double() - wanted).abs().max() / wanted.abs().max())
        assert error < 2.0**-10, (batch, rows, columns, error)
        alone = symmetric_product(x[-1:], None if added is None else added[-1:], beta, alpha)
        assert torch.equal(alone[0], found[-1]), "bits depend on no other matrix"
        wrong = float((found.double() - 1.01 * wanted).abs().max() / wanted.abs().max())
        assert wrong > 2.0**-10
"""


def test_the_symmetric_kernel_in_tritons_interpreter() -> None:
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
