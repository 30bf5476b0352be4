"""Number of kernels and products in a compiled block: each pass over activations is one kernel."""

from __future__ import annotations

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from allometry.configs.model import DenseModel, StandardParameterization
from allometry.models.build import build_model
from allometry.models.init import initialize
from allometry.models.products import cast_once
from allometry.scaling.parameterization import Parameterization

MODEL = DenseModel(
    vocab_size=64, width=64, num_layers=1, num_heads=4, num_kv_heads=2, ffn_width=96, qk_norm=True
)


def counts(dtype: str) -> list[tuple[int, int]]:
    """Return the numbers of products and of fused kernels, in forward and backward."""
    torch._dynamo.reset()
    rules = Parameterization(StandardParameterization(), MODEL)
    model = build_model(MODEL, rules, dtype)
    initialize(model, rules, seed=0)
    block = model.blocks["0"]
    block.compile(fullgraph=True)
    # Longer than the inputs for which attention uses its own products.
    x_BLD = torch.randn(1, 1280, 64, dtype=model.compute_dtype).requires_grad_()
    geometry = model._geometry(torch.zeros(1, 1280, dtype=torch.long), None)

    def run() -> None:
        y_BLD, _ = block(x_BLD, geometry)
        y_BLD.square().sum().backward()

    with cast_once(model, model.compute_dtype), torch._inductor.config.patch(fx_graph_cache=False):
        _, codes = run_and_get_code(run)
    return [
        (
            len(re.findall(r"extern_kernels\.\w*mm\(", code)),
            len(re.findall(r"^\s+cpp_fused\w*\(", code, re.MULTILINE)),
        )
        for code in codes
    ]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the kernels of a CPU")
def test_passes_of_a_compiled_block() -> None:
    """norm | qkv | split, qk-norm, rotation | attention | o | add, norm | gate, up | SwiGLU | down
    | add: four products and five passes forward; eight and at most seven backward."""
    (products, passes), (products_back, passes_back) = counts("bf16")
    assert (products, products_back) == (4, 8)
    assert passes <= 5
    assert passes_back <= 7
    (products, _), (products_back, _) = counts("fp32")
    assert (products, products_back) == (7, 14), "nothing is joined where nothing is cast"
