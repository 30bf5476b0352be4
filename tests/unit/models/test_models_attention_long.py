"""Attention at 4096 tokens with many documents: block edges, single tokens, one full-length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from allometry.models import attention_packed
from allometry.models.attention import attend
from allometry.models.attention_flex import BLOCK, document_mask
from allometry.models.documents import Documents

L, H = 4096, 8
# Document ends at kernel block edges (64, 128) and one position before or after, with single
# tokens.
EDGES = (64, 64, 128, 127, 1, 1, 127, 129, 256, 63, 65, 1, 1, 1, 125, 1000, 384, 512)
CASES = {
    "edges": (*EDGES, L - sum(EDGES)),
    "one": (L,),
    "singles": (*(1,) * 300, L - 300),
}


def documents(lengths: tuple[int, ...], sequences: int = 1) -> Documents:
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return Documents(ends, max(lengths), positions.view(sequences, -1))


def inputs(dtype: torch.dtype, length: int = L) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(1, length, n, H, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for n in (2, 1, 1)
    ]


def outcome(o_BLNH: Tensor, qkv: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, o_BLNH.numel(), dtype=torch.float64).sin()
    total = (o_BLNH.double() * weights.view(o_BLNH.shape)).sum()
    return [o_BLNH.detach().double(), *(g.double() for g in torch.autograd.grad(total, qkv))]


def error(some: list[Tensor], others: list[Tensor]) -> float:
    pairs = zip(some, others, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[Documents, list[Tensor]]:
    packed, qkv = documents(CASES[request.param]), inputs(torch.float64)
    return packed, outcome(attend(*qkv, packed, 0.3, "reference"), qkv)


@pytest.mark.parametrize("backend", ["packed", "masked"])
def test_gradients_equal_the_reference(backend: str, case) -> None:
    packed, expected = case
    qkv = inputs(torch.float64)
    assert error(outcome(attend(*qkv, packed, 0.3, backend), qkv), expected) < 1e-12


def test_flex_has_the_outputs_of_the_reference(case) -> None:
    """Outputs only: torch's flex_attention has no backward on a CPU."""
    packed, expected = case
    q, k, v = (x.detach() for x in inputs(torch.float64))
    o_BLNH = attend(q, k, v, packed, 0.3, "flex")
    assert error([o_BLNH], expected[:1]) < 1e-12


def test_a_boundary_one_token_off_is_seen(case) -> None:
    packed, expected = case
    ends = packed.cu_lengths
    ends = torch.cat([ends[:-1], ends[-1:] - 1, ends[-1:]])
    qkv = inputs(torch.float64)
    wrong = Documents(ends, packed.max_length, packed.positions_BL)
    assert error(outcome(attend(*qkv, wrong, 0.3, "packed"), qkv), expected) > 1e-3


def test_cudnns_batches_of_like_length(case) -> None:
    """Grouping of documents for cuDNN, with the CPU's kernel as a substitute."""
    packed, expected = case
    q, k, v = inputs(torch.float64)
    kernels = attention_packed.CUDNN._replace(
        forward=attention_packed.CPU.forward, backward=attention_packed.CPU.backward
    )
    flat = [x.detach().flatten(0, 1) for x in (q, k, v)]
    o_TNH, lse_NT = attention_packed.forward(kernels, *flat, packed.cu_lengths, 0.3)
    grad = torch.linspace(-1, 1, o_TNH.numel(), dtype=torch.float64).sin().view(o_TNH.shape)
    qkvo = (*flat, o_TNH)
    grads = attention_packed.backward(kernels, grad, qkvo, lse_NT, packed.cu_lengths, 0.3)
    assert error([x[None] for x in (o_TNH, *grads)], expected) < 1e-12


def test_cudnn_meets_few_shapes() -> None:
    shapes = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        lengths = torch.randint(1, 4097, (24,), generator=generator)
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
        likes = attention_packed._like_documents(ends, ends.device, attention_packed.CUDNN)
        shapes |= {tuple(like.rows_nP.shape) for like in likes}
    assert len(shapes) < 100
    assert {n for n, _ in shapes} <= {1, 2, 4, 8, 16}


def test_documents_are_sorted_once_and_forgotten_with_their_batch() -> None:
    ends, before = torch.tensor([0, 5, 5, 9], dtype=torch.int32), len(attention_packed._SORTED)
    device, cpu = ends.device, attention_packed.CPU
    found = attention_packed._like_documents(ends, device, cpu)
    assert attention_packed._like_documents(ends, device, cpu) is found
    assert attention_packed._like_documents(ends.clone(), device, cpu) is not found
    assert attention_packed._like_documents(ends, device, attention_packed.CUDNN) is not found
    del ends
    assert len(attention_packed._SORTED) == before


@pytest.mark.parametrize("lengths", [*CASES.values(), (300, 84), (5, 250, 129)], ids=str)
def test_blocks_of_the_flex_mask(lengths: tuple[int, ...]) -> None:
    """Listed blocks contain a visible pair; blocks without a mask are fully visible."""
    packed = documents(lengths)
    size = sum(lengths)
    mask = document_mask(packed.positions_BL)
    R = -(-size // BLOCK)
    padded = torch.zeros(R * BLOCK, R * BLOCK, dtype=torch.bool)
    padded[:size, :size] = packed.mask()[0]
    blocks = padded.view(R, BLOCK, R, BLOCK).transpose(1, 2).flatten(2)
    rows = torch.ones(R * BLOCK, dtype=torch.bool)
    rows[size:] = False  # queries past the end are not stored
    unseen = (~blocks.view(R, R, BLOCK, BLOCK) & rows.view(R, 1, BLOCK, 1)).flatten(2).any(-1)
    listed = torch.zeros(2, R, R, dtype=torch.int64)
    for place, (number, index) in enumerate(
        ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    ):
        for row in range(R):
            listed[place, row, index[0, 0, row, : number[0, 0, row]].long()] += 1
    part, whole = listed
    assert torch.equal(part + whole, blocks.any(-1).long()), "each block once, and no other"
    assert not (whole.bool() & unseen).any()


def test_the_flex_mask_of_two_sequences() -> None:
    lengths = (100, 156, 1, 255)
    packed = documents(lengths, sequences=2)
    mask = document_mask(packed.positions_BL)
    token = torch.arange(256)
    for b in range(2):
        seen = mask.mask_mod(torch.tensor(b), 0, token[:, None], token[None])
        assert torch.equal(seen, packed.mask()[b])


def test_flex_is_traced_whole() -> None:
    """The mask is built in compiled code; torch's eager kernel runs, for CPUs
    without a compiler."""
    packed = documents((200, 56, 1, 255), sequences=2)
    q, k, v = (x.detach().view(2, 256, -1, H) for x in inputs(torch.float64, 512))
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    expected = attend(q, k, v, packed, 0.3, "reference")
    assert error([compiled(q, k, v, packed, 0.3, "flex")], [expected]) < 1e-12
