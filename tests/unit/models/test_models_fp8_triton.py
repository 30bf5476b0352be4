"""Rounding to FP8 in one pass, in Triton's interpreter, against torch's operators.

Triton selects the interpreter when it is imported, so the tests run in a separate process.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from allometry.configs.model import DenseModel, MoEModel, StandardParameterization
from allometry.configs.precision import PrecisionConfig
from allometry.models import fp8
from allometry.models.build import build_model
from allometry.models.init import initialize
from allometry.models.kernels import use_kernels
from allometry.models.moe import begin_step
from allometry.models.precision import use_precision
from allometry.models.products import stacks
from allometry.scaling.parameterization import Parameterization

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton; pip install triton"
)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the process with TRITON_INTERPRET=1")
BLOCKS = (fp8.SAVED, (1, None), (1, 128))


@pytest.mark.skipif(INTERPRETED, reason="starts the process with TRITON_INTERPRET=1")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed, 1 skipped" in done.stdout, done.stdout


def spread(rows, columns, dtype):
    """Return numbers of all sizes, a row of zeros, ties, and rows with non-finite values."""
    torch.manual_seed(0)
    x = torch.randn(rows, columns) * torch.logspace(-9, 9, rows)[:, None]
    x[:, ::3] *= torch.logspace(-4, 0, len(x[0, ::3]))
    x[1] = 0.0
    x[2] = (torch.arange(columns) - columns / 2) / 16.0  # includes halves of a step
    x[2, 0] = 448.0
    x[3, 1], x[4, 2] = float("inf"), float("nan")
    x[5, :4] = -0.0
    return x.to(dtype)


def assert_bits(got, wanted):
    scales = [side.scales.float().nan_to_num(-1.0) for side in (got, wanted)]
    assert torch.equal(*scales)
    numbers = [side.values.float().isnan() for side in (got, wanted)]
    assert torch.equal(*numbers)
    codes = [side.values.view(torch.uint8)[~numbers[0]] for side in (got, wanted)]
    assert torch.equal(*codes)
    assert got.scales.dtype == wanted.scales.dtype


@inside
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", [fp8.E4M3, fp8.E5M2])
def test_rows_have_the_twins_bits(dtype, block, kind):
    from allometry.models import fp8_triton

    for columns in (48, 200):
        x = spread(12, columns, dtype)
        assert fp8_triton.takes(x, block)
        scale_dtype = torch.bfloat16 if block == fp8.SAVED else torch.float32
        got = fp8_triton.quantise(x, block, kind, scale_dtype)
        assert_bits(got, fp8.quantise(x, block, kind, scale_dtype))


@inside
def test_every_number_is_rounded_as_torch_casts():
    from allometry.models import fp8_triton

    torch.manual_seed(0)
    bits = torch.randint(0, 2**31 - 1, (20, 512), dtype=torch.int32)
    x = bits.view(torch.float32).nan_to_num(0.0, 0.0, 0.0).clamp(-448.0, 448.0)
    x = torch.where(torch.rand_like(x) < 0.5, x, torch.randn_like(x) * 0.01)
    x[:, 0] = 448.0  # so that scales are one
    got = fp8_triton.quantise(x, (1, None), fp8.E4M3, torch.float32)
    assert bool((got.scales == 1.0).all())
    assert torch.equal(got.values.view(torch.uint8), x.to(fp8.E4M3).view(torch.uint8))


@inside
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block", [None, *BLOCKS])
def test_behind_a_norm(dtype, block):
    from allometry.models import fp8_triton

    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 208).to(dtype), torch.randn(208).to(dtype)
    made = fp8_triton.norm(x, weight, 1e-5, block)
    root = (x.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(made.scale, root, rtol=1e-6, atol=0)
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    # One rounding to bf16; in fp32, the roundings of sum, root, quotient and two products.
    step = 2**-8 if dtype == torch.bfloat16 else 5 * 2**-24
    assert float(((made.y.double() - exact).abs() / exact.abs()).max()) <= step
    assert made.y.dtype == dtype
    assert_bits(made.saved, fp8.save(x))
    check_small(made.y, made.small, block)


@inside
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block", [None, *BLOCKS])
def test_behind_swiglu(dtype, block):
    from allometry.models import fp8_triton

    torch.manual_seed(0)
    gate_up = (3.0 * torch.randn(2, 3, 2 * 176)).to(dtype)
    made = fp8_triton.swiglu(gate_up, block)
    gate, up = gate_up.chunk(2, -1)
    wanted = F.silu(gate) * up
    # An exponential may differ in its last bit, and later roundings by one step.
    step = 2**-7 if dtype == torch.bfloat16 else 2**-20
    assert float(((made.h - wanted).float().abs() / wanted.float().abs()).max()) <= step
    assert float((made.h == wanted).float().mean()) > (0.99 if dtype == torch.bfloat16 else 0.3)
    assert_bits(made.saved, fp8.save(gate_up))
    check_small(made.h, made.small, block)


def check_small(whole, small, block):
    """Check that the next product reads the same numbers as the reference."""
    assert (small is None) == (block is None)
    if small is not None:
        scale_dtype = torch.bfloat16 if block == fp8.SAVED else torch.float32
        rows = whole.reshape(-1, whole.shape[-1])
        assert_bits(small, fp8.quantise(rows, block, scale_dtype=scale_dtype))


MODELS = {
    "dense": {"kind": "dense", "ffn_width": 48},
    "experts": {
        "kind": "moe",
        "experts": {
            **{"kind": "swiglu", "num_experts": 4, "experts_per_token": 2, "width": 32},
            "num_shared_experts": 1,
        },
    },
}


@inside
@pytest.mark.parametrize(
    ("name", "linears"),
    [("dense", "fp8_rowwise"), ("experts", "compute"), ("experts", "fp8_rowwise")],
)
def test_a_step_of_a_model(name, linears, monkeypatch):
    """Values rounded by norms and SwiGLU are not rounded again."""
    from allometry.models import fp8_triton

    shape = {"vocab_size": 32, "width": 32, "num_layers": 1, "num_heads": 2, "qk_norm": True}
    kind = DenseModel if name == "dense" else MoEModel
    model = kind.model_validate({**shape, **MODELS[name]})
    rules = Parameterization(StandardParameterization(), model)
    tokens = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(0))
    alone, found = [], []
    own = fp8_triton.quantise
    monkeypatch.setattr(
        fp8_triton, "quantise", lambda x, *how: alone.append(tuple(x.shape)) or own(x, *how)
    )
    for kernel in ("torch", "triton"):
        made = build_model(model, rules, "fp32")
        initialize(made, rules, seed=1)  # with 0, a number is 1e-7 from a tie
        use_precision(made, PrecisionConfig(saved_activations="fp8", linears=linears))
        use_kernels(made, quantise=kernel)
        begin_step(made, 16)
        loss = made(tokens[:, :-1], tokens[:, 1:]).total / 16
        forward = len(alone)
        loss.backward()
        row = torch.cat([p.grad.flatten() for p in made.parameters()])
        found.append((loss.detach(), row))
        assert not any(s.ready for s in stacks(made)), "what was rounded is taken, or forgotten"
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=0)
    assert float(torch.cosine_similarity(found[0][1], found[1][1], 0)) > 0.9999
    by_itself = [shape for shape in alone[:forward] if len(shape) == 2 and shape[0] == 16]
    # Attention's output; for experts the router's input, and tokens with different scales.
    assert len(by_itself) == (1 if name == "dense" else 2 + (linears != "compute")), by_itself


def test_blocks_of_several_rows_are_left_to_torch():
    from allometry.models import fp8_triton

    x = torch.ones(4, 64)
    assert not fp8_triton.takes(x, (None, None))
    assert not fp8_triton.takes(x, (128, 128))
    assert not fp8_triton.takes(x.double(), (1, None))
    assert not fp8_triton.takes(torch.ones(1, 20000), (1, None))
