"""On CUDA: products with fp32 output, row kernels of the loss, and tensors saved by the loss."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from allometry.models.loss import (
    linear_cross_entropy,
    reference_cross_entropy,
    row_kernels,
)
from allometry.models.products import COMPUTE, _Multiply, add_product_, product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).parents[2]


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("compiled", [False, True])
def test_products_are_rounded_to_fp32_alone(compiled: bool) -> None:
    torch.manual_seed(0)
    x, grad = (torch.randn(512, 256, device="cuda").bfloat16() for _ in range(2))
    exact = grad.double().t() @ x.double()

    def made(grad: Tensor, x: Tensor) -> Tensor:
        return product(grad.t(), x, torch.float32)

    got = (torch.compile(made, fullgraph=True) if compiled else made)(grad, x)
    assert got.dtype == torch.float32
    assert error(got, exact) < 1e-5
    assert error((grad.t() @ x).float(), exact) > 1e-4, "negative control"
    sum_ = torch.randn(256, 256, device="cuda")
    expected = sum_.double() + exact
    assert error(add_product_(sum_, grad.t(), x), expected) < 1e-5


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_joined_weights(compiled: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 256, device="cuda").bfloat16().requires_grad_()
    weights = [torch.randn(n, 256, device="cuda", requires_grad=True) for n in (128, 64)]
    torch._dynamo.reset()

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return _Multiply.apply(x, None, *COMPUTE, *weights)

    y = (torch.compile(run, fullgraph=True) if compiled else run)(x, *weights)
    grads = torch.autograd.grad(y.float().square().sum(), [x, *weights])
    x64 = x.detach().double().requires_grad_()
    wide = [w.detach().bfloat16().double().requires_grad_() for w in weights]
    y64 = x64 @ torch.cat(wide).t()
    exact = torch.autograd.grad(y64.square().sum(), [x64, *wide])
    for got, expected in zip(grads, exact, strict=True):
        assert error(got, expected) < 2e-2
    assert grads[1].dtype == grads[2].dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("vocabulary", [1000, 131072])
def test_loss_and_gradients_against_fp64(
    vocabulary: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    x = torch.randn(300, 64, device="cuda", dtype=dtype)
    weight = (torch.randn(vocabulary, 64, device="cuda") / 8).to(dtype)
    targets = torch.randint(vocabulary, (300,), device="cuda")
    targets[:7] = -100
    assert row_kernels(x) is not None
    found = []
    for loss, kind in ((linear_cross_entropy, dtype), (reference_cross_entropy, torch.float64)):
        inputs = [tensor.to(kind).requires_grad_() for tensor in (x, weight)]
        total, nll_T = loss(*inputs, targets, logit_scale=0.5, z_loss=1e-3)
        found.append([total.detach(), nll_T, *torch.autograd.grad(total, inputs)])
    torch.backends.cuda.matmul.allow_tf32 = tf32
    for got, exact in zip(*found, strict=True):
        assert error(got, exact) < tolerance


def test_the_same_logits_give_the_same_bits() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(512, 50304, device="cuda").bfloat16()
    targets = torch.randint(50304, (512,), device="cuda")
    kernels = row_kernels(inputs)
    some, others = inputs.clone(), inputs.clone()
    for logits in (some, others):
        kernels.gradient_(logits, targets, 1.0, 1e-4, -100)
    assert torch.equal(some, others)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_loss_keeps_a_tenth_of_full_logits(dtype: str) -> None:
    command = [sys.executable, "benchmarks/loss_memory.py", "--json", "--device", "cuda"]
    done = subprocess.run(
        [*command, "--dtype", dtype], cwd=ROOT, capture_output=True, text=True, check=True
    )
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["ratio"] <= 0.10, row
