"""On CUDA: every back end against the reference, and the model against its CPU result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from allometry.configs.model import DenseModel, StandardParameterization
from allometry.models.attention import attend, backend_of
from allometry.models.build import build_model
from allometry.models.documents import Documents
from allometry.models.init import initialize
from allometry.models.transformer import Transformer
from allometry.scaling.parameterization import Parameterization

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
B, L = 2, 64
LENGTHS = [20, 0, 43, 1, 64]


def documents(device: str) -> Documents:
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    positions_BL = torch.cat([torch.arange(n) for n in LENGTHS]).view(B, L)
    return Documents(ends.to(device), max(LENGTHS), positions_BL.to(device))


def outcome(
    dtype: torch.dtype, device: str, heads: tuple[int, int], packed: bool, backend: str | None
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    qkv = [
        torch.randn(B, L, n, 64, generator=generator).to(device, dtype).requires_grad_()
        for n in (heads[0], heads[1], heads[1])
    ]
    o_BLNH = attend(*qkv, documents(device) if packed else None, 0.125, backend)
    weights = torch.linspace(-1, 1, o_BLNH.numel()).view(o_BLNH.shape).to(device, dtype)
    return [x.cpu() for x in (o_BLNH, *torch.autograd.grad((o_BLNH * weights).sum(), qkv))]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 5e-5), (torch.bfloat16, 3e-2)],
    ids=str,
)
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_chosen_backend_equals_reference(packed, heads, dtype, tolerance):
    expected = outcome(torch.float64, "cpu", heads, packed, "reference")
    got = outcome(dtype, "cuda", heads, packed, None)
    queries = torch.empty(B, L, heads[0], 64, dtype=dtype, device="cuda")
    chosen = backend_of(queries, documents("cuda") if packed else None, compiled=False).name
    for some, other in zip(got, expected, strict=True):
        assert (some - other).abs().max() < tolerance * other.abs().max(), chosen


def small(dtype: str, device: str) -> Transformer:
    config = DenseModel(
        vocab_size=101, width=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64,
        ffn_width=96, qk_norm=True, z_loss=1e-3,
    )  # fmt: skip
    rules = Parameterization(StandardParameterization(), config)
    with torch.device("meta"):
        model = build_model(config, rules, dtype)
    model.to_empty(device=device)
    initialize(model, rules, seed=0)
    return model.double() if dtype == "fp64" else model


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("fp64", 1e-10), ("fp32", 1e-4), ("bf16", 6e-2)], ids=str
)
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_equal_those_of_a_cpu(packed, dtype, tolerance, compiled):
    torch._dynamo.reset()
    tokens_BL = torch.randint(101, (B, L), generator=torch.Generator().manual_seed(0))
    targets_BL = torch.randint(101, (B, L), generator=torch.Generator().manual_seed(1))
    grads = []
    for device, kind in (("cpu", "fp64"), ("cuda", dtype)):
        model = small(kind, device)
        if compiled and device == "cuda":
            for block in model.blocks.values():
                block.compile(fullgraph=True)
            model.head.compile(fullgraph=True)
        there = [x.to(device) for x in (tokens_BL, targets_BL)]
        model(*there, documents(device) if packed else None).total.backward()
        grads.append({name: p.grad.cpu() for name, p in model.named_parameters()})
    for name, expected in grads[0].items():
        difference = (grads[1][name] - expected).abs().max()
        assert difference < tolerance * expected.abs().max(), name
