"""On CUDA: FP8 products against emulated references, experts, compiled blocks, and a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from allometry.configs.model import DenseModel, StandardParameterization
from allometry.configs.precision import PrecisionConfig
from allometry.models import fp8
from allometry.models.build import build_model
from allometry.models.grouped import _offsets, _product
from allometry.models.init import initialize
from allometry.models.precision import use_precision
from allometry.models.products import cast_once
from allometry.scaling.parameterization import Parameterization

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a CUDA device of compute capability 9.0"),
]
RECIPES = ("fp8_tensorwise", "fp8_rowwise", "fp8_blockwise")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("gradients", [None, "e5m2"])
@pytest.mark.parametrize("columns", [512, 640])
def test_products_equal_their_twins(recipe: str, gradients: str | None, columns: int) -> None:
    torch.manual_seed(0)
    a = torch.randn(1000, columns, device="cuda").bfloat16()
    b = torch.randn(256, columns, device="cuda").bfloat16()
    for dtype in (fp8.E4M3, fp8.gradient_type(recipe, gradients)):
        left = fp8.quantise(a, fp8.ACTIVATION_BLOCKS[recipe], dtype)
        right = fp8.quantise(b, fp8.WEIGHT_BLOCKS[recipe])
        got = fp8.scaled_product(left, right, recipe, torch.bfloat16)
        twin = fp8.emulated_product(left, right, recipe, torch.float32)
        # One rounding to bf16; on Hopper, sums keep fewer bits than fp32.
        assert float((got.float() - twin).abs().max()) <= 2**-7 * float(twin.abs().max())


def test_the_gradient_of_a_weight_over_any_number_of_tokens() -> None:
    torch.manual_seed(0)
    grad, x = torch.randn(1003, 128, device="cuda"), torch.randn(1003, 256, device="cuda")
    whole = fp8.ACTIVATION_BLOCKS["fp8_tensorwise"]
    sides = fp8.quantise(grad.t(), whole, fp8.E5M2), fp8.quantise(x.t(), whole)
    got = fp8.scaled_product(*sides, "fp8_tensorwise", torch.float32)
    twin = fp8.emulated_product(*sides, "fp8_tensorwise", torch.float32)
    assert float((got - twin).abs().max()) <= 2**-10 * float(twin.abs().max())


def test_numbers_are_quantised_as_on_a_cpu() -> None:
    x = torch.randn(300, 200) * torch.logspace(-6, 6, 300)[:, None]
    x[7, 3] = float("inf")
    for block in (*fp8.ACTIVATION_BLOCKS.values(), fp8.SAVED):
        here, there = (fp8.quantise(x.to(device), block) for device in ("cpu", "cuda"))
        assert torch.equal(here.scales.nan_to_num(-1), there.scales.cpu().nan_to_num(-1))
        bits = [side.values.view(torch.uint8).cpu() for side in (here, there)]
        finite = here.values.float().isfinite()
        assert torch.equal(bits[0][finite], bits[1][finite])
        assert torch.equal(finite, there.values.float().isfinite().cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block", [fp8.SAVED, (1, None), (1, 128)])
def test_one_pass_has_the_bits_of_torchs_operators(dtype: torch.dtype, block: fp8.Block) -> None:
    from allometry.models import fp8_triton

    torch.manual_seed(0)
    scale_dtype = torch.bfloat16 if block == fp8.SAVED else torch.float32

    def check(got: fp8.Quantised, of: torch.Tensor, *how: Any) -> None:
        wanted = fp8.quantise(of.reshape(-1, of.shape[-1]), *how)
        assert torch.equal(got.scales, wanted.scales)
        bits = [side.values.view(torch.uint8) for side in (got, wanted)]
        assert torch.equal(*bits)

    for columns in (64, 2048, 5632):
        x = (torch.randn(300, columns, device="cuda") * 3.0).to(dtype)
        for kind in (fp8.E4M3, fp8.E5M2):
            how = block, kind, scale_dtype
            check(fp8_triton.quantise(x, *how), x, *how)
        saved = fp8.SAVED, fp8.E4M3, torch.bfloat16
        normed = fp8_triton.norm(x, torch.ones_like(x[0]), 1e-5, block)
        check(normed.saved, x, *saved)
        assert normed.small is not None
        check(normed.small, normed.y, block, fp8.E4M3, scale_dtype)
        twin = torch.nn.functional.rms_norm(x.float(), (columns,), eps=1e-5)
        assert float((normed.y.float() - twin).abs().max()) <= 2**-7 * float(twin.abs().max())
        gated = fp8_triton.swiglu(x, block)
        check(gated.saved, x, *saved)
        assert gated.small is not None
        check(gated.small, gated.h, block, fp8.E4M3, scale_dtype)
        gate, up = x.chunk(2, -1)
        twin = torch.nn.functional.silu(gate.float()) * up.float()
        assert float((gated.h.float() - twin).abs().max()) <= 2**-6 * float(twin.abs().max())


def test_experts_equal_their_twin() -> None:
    torch.manual_seed(0)
    x = torch.randn(700, 256).bfloat16()
    w = torch.randn(4, 128, 256).bfloat16()
    offsets = _offsets(torch.tensor([300, 0, 17, 383]))
    twin, _ = _product(x, w, offsets, "fp8_rowwise", fp8.E4M3)
    got, _ = _product(*(t.cuda() for t in (x, w, offsets)), "fp8_rowwise", fp8.E4M3)
    assert float((got.cpu().float() - twin.float()).abs().max()) <= 2**-7 * float(twin.abs().max())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("linears", ["compute", *RECIPES])
def test_a_step_in_fp8(linears: Any, compiled: bool) -> None:
    model = DenseModel.model_validate(
        {"vocab_size": 512, "width": 512, "num_layers": 2, "num_heads": 4, "ffn_width": 1280}
    )
    rules = Parameterization(StandardParameterization(), model)
    tokens = torch.randint(512, (4, 257), device="cuda")
    found = []
    for precision in (
        PrecisionConfig(),
        PrecisionConfig(saved_activations="fp8", linears=linears),
    ):
        torch._dynamo.reset()
        made = build_model(model, rules, "bf16")
        initialize(made, rules, seed=0)
        made.cuda()
        use_precision(made, precision)
        for block in made.blocks.values() if compiled else ():
            block.compile(fullgraph=True)
        before = torch.cuda.memory_allocated()
        with cast_once(made, torch.bfloat16):
            total = made(tokens[:, :-1], tokens[:, 1:]).total / tokens[:, 1:].numel()
            held = torch.cuda.memory_allocated() - before
            total.backward()
        row = torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])
        found.append((float(total.detach()), held, row))
    (loss, held, grad), (got_loss, got_held, got) = found
    assert got_held < held
    assert abs(got_loss - loss) < 0.02
    assert float(torch.cosine_similarity(grad, got, 0)) > (0.999 if linears == "compute" else 0.95)
