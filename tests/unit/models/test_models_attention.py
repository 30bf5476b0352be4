"""Every attention back end that runs on a CPU against the softmax written out."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor

from allometry.models import attention_blocked, attention_cuda
from allometry.models.attention import Backend, attend, choose_backend
from allometry.models.attention_cpu import packed_attention, padded_lengths
from allometry.models.documents import Documents

B, L, H = 2, 12, 8
LENGTHS = [5, 0, 6, 1, 12, 0]  # empty documents and one of a single token among them


def documents(lengths: list[int] = LENGTHS) -> Documents:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths]).view(B, L)
    return Documents(ends, max(lengths), positions)


def inputs(dtype: torch.dtype, query_heads: int, key_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    heads = (query_heads, key_heads, key_heads)
    return [
        torch.randn(B, L, n, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for n in heads
    ]


def outcome(qkv: list[Tensor], packed: Documents | None, backend: Backend | None) -> list[Tensor]:
    o_BLNH = attend(*qkv, packed, 0.4, backend)
    weights = torch.linspace(-1, 1, o_BLNH.numel(), dtype=torch.float64).view(o_BLNH.shape)
    grads = torch.autograd.grad((o_BLNH * weights.to(o_BLNH.dtype)).sum(), qkv)
    return [o_BLNH.detach(), *grads]


CASES = [
    (Backend.FLASH, False),
    (Backend.MASKED, True),
    (Backend.PACKED, True),
    (Backend.BLOCKED, False),
    (Backend.BLOCKED, True),
]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 5e-6), (torch.bfloat16, 3e-2)],
    ids=str,
)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize(("backend", "packed"), CASES)
def test_backend_equals_reference(backend, packed, heads, dtype, tolerance):
    packed_documents = documents() if packed else None
    expected = outcome(inputs(torch.float64, *heads), packed_documents, Backend.REFERENCE)
    got = outcome(inputs(dtype, *heads), packed_documents, backend)
    for some, other in zip(got, expected, strict=True):
        assert some.dtype == dtype
        assert (some - other).abs().max() < tolerance * other.abs().max()


def test_reference_by_hand():
    q, k, v = (t.detach() for t in inputs(torch.float64, 4, 2))
    o_BLNH = attend(q, k, v, documents(), 0.4, Backend.REFERENCE)
    starts = [0, 5, 11]  # of the documents of the first sequence
    for query in range(L):
        start = max(s for s in starts if s <= query)
        for head in range(4):
            keys = k[0, start : query + 1, head // 2]
            weights = (0.4 * keys @ q[0, query, head]).softmax(dim=0)
            expected = weights @ v[0, start : query + 1, head // 2]
            torch.testing.assert_close(o_BLNH[0, query, head], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("backend", "packed"), [*CASES, (Backend.REFERENCE, True)])
def test_future_and_other_documents_have_no_effect(backend, packed):
    q, k, v = (t.detach() for t in inputs(torch.float64, 4, 2))
    packed_documents = documents() if packed else None
    before = attend(q, k, v, packed_documents, 0.4, backend)
    k[0, 7:], v[0, 7:] = 9.0, -9.0
    after = attend(q, k, v, packed_documents, 0.4, backend)
    assert torch.equal(before[0, :7], after[0, :7])
    assert torch.equal(before[1], after[1])
    # The document [5, 11) feels it, and the token alone at 11 takes the new value.
    assert (before[0, 7:] != after[0, 7:]).all()


def test_scale_is_felt():
    q, k, v = inputs(torch.float64, 4, 2)
    assert not torch.equal(attend(q, k, v, None, 0.4), attend(q, k, v, None, 0.5))


def test_strided_inputs():
    whole = torch.randn(B, L, 8, H, dtype=torch.float64)
    q, k, v = whole.split([4, 2, 2], dim=2)
    got = attend(q, k, v, documents(), 0.4, Backend.PACKED)
    expected = attend(q, k, v, documents(), 0.4, Backend.REFERENCE)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_packed_operator_is_well_formed():
    q, k, v = (t.detach().flatten(0, 1).requires_grad_() for t in inputs(torch.float64, 4, 2))
    torch.library.opcheck(packed_attention, (q, k, v, documents().cu_lengths, 0.4))


def test_lengths_that_miss_tokens_are_refused():
    q, k, v = inputs(torch.float64, 4, 2)
    wrong = Documents(torch.tensor([0, 5], dtype=torch.int32), 5, documents().positions_BL)
    with pytest.raises(AssertionError):
        attend(q, k, v, wrong, 0.4)


@pytest.mark.parametrize(
    ("device", "dtype", "packed", "expected"),
    [
        ("cpu", torch.bfloat16, False, Backend.FLASH),
        ("cpu", torch.float64, True, Backend.PACKED),
        ("cuda", torch.bfloat16, False, Backend.FLASH),
        ("cuda", torch.bfloat16, True, Backend.VARLEN),
        ("cuda", torch.float16, True, Backend.VARLEN),
        ("cuda", torch.float32, True, Backend.MASKED),
        ("cuda", torch.float64, True, Backend.MASKED),
        ("meta", torch.float32, True, Backend.MASKED),
    ],
)
def test_the_choice_is_explicit(device, dtype, packed, expected):
    assert choose_backend(torch.device(device), dtype, packed, 512, False) == expected


@pytest.mark.parametrize("packed", [False, True])
def test_short_sequences_are_blocked_where_a_cpu_compiles(packed):
    cpu, half = torch.device("cpu"), torch.bfloat16
    assert choose_backend(cpu, half, packed, 512, True) == Backend.BLOCKED
    for other in (
        choose_backend(cpu, half, packed, 4096, True),
        choose_backend(cpu, half, packed, 512, False),
        choose_backend(cpu, torch.float32, packed, 512, True),
        choose_backend(torch.device("cuda"), half, packed, 512, True),
    ):
        assert other != Backend.BLOCKED


@pytest.mark.parametrize("packed", [False, True])
def test_blocks_join_to_the_whole(packed, monkeypatch):
    monkeypatch.setattr(attention_blocked, "BLOCK", 5)  # three blocks, the last of them shorter
    chosen = documents() if packed else None
    expected = outcome(inputs(torch.float64, 4, 2), chosen, Backend.REFERENCE)
    got = outcome(inputs(torch.float64, 4, 2), chosen, Backend.BLOCKED)
    for some, other in zip(got, expected, strict=True):
        assert (some - other).abs().max() < 1e-13 * other.abs().max()


class TestVarlenKernel:
    """What is called on CUDA, seen through stand-ins for the libraries."""

    @pytest.fixture(autouse=True)
    def _forget(self):
        attention_cuda.varlen_options.cache_clear()
        yield
        attention_cuda.varlen_options.cache_clear()

    def call(self) -> None:
        q, k, v = (t.detach().flatten(0, 1) for t in inputs(torch.float64, 4, 2))
        packed = documents()
        attention_cuda.varlen_attention(q, k, v, packed.cu_lengths, packed.max_length, 0.4)

    def without_flash_attn(self, monkeypatch) -> None:
        monkeypatch.setattr(attention_cuda.importlib.util, "find_spec", lambda name: None)

    def test_torch_with_window(self, monkeypatch):
        seen = {}

        def varlen_attn(
            q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
        ):
            seen.update(scale=scale, window=window_size, gqa=enable_gqa, keys=k.shape[1])
            return q

        self.without_flash_attn(monkeypatch)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
        self.call()
        assert seen == {"scale": 0.4, "window": (-1, 0), "gqa": True, "keys": 2}

    def test_torch_with_is_causal(self, monkeypatch):
        seen = {}

        def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, *, scale=None):
            seen.update(scale=scale, is_causal=is_causal, keys=k.shape[1])
            return q

        self.without_flash_attn(monkeypatch)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
        self.call()
        assert seen == {"scale": 0.4, "is_causal": True, "keys": 4}

    def test_flash_attn_goes_first(self, monkeypatch):
        seen = {}

        def flash_attn_varlen_func(q, k, v, *_, softmax_scale, causal):
            seen.update(scale=softmax_scale, causal=causal, keys=k.shape[1])
            return q

        stand_in = types.ModuleType("flash_attn")
        stand_in.flash_attn_varlen_func = flash_attn_varlen_func
        monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
        monkeypatch.setattr(attention_cuda.importlib.util, "find_spec", lambda name: stand_in)
        self.call()
        assert seen == {"scale": 0.4, "causal": True, "keys": 2}


def test_padding_leaves_few_lengths_and_wastes_little():
    lengths = torch.arange(1, 8193)
    padded = padded_lengths(lengths)
    assert (padded >= lengths).all()
    assert (padded - lengths < torch.maximum(torch.tensor(32), lengths // 8 + 1)).all()
    assert len(padded.unique()) < 60
