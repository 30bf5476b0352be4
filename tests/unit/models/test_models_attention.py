"""Every attention back end that runs on a CPU against an explicit softmax."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor

from allometry.models import attention_blocked, attention_cuda
from allometry.models.attention import RUN, attend, backend_of
from allometry.models.attention_packed import packed_attention, padded_lengths
from allometry.models.documents import Documents
from allometry.scaling.attention import BACKENDS, AttentionCall, choose_backend
from allometry.trainer.deterministic import algorithms

B, L, H = 2, 12, 8
LENGTHS = [5, 0, 6, 1, 12, 0]  # includes empty documents and one of a single token


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


def outcome(qkv: list[Tensor], packed: Documents | None, backend: str | None) -> list[Tensor]:
    o_BLNH = attend(*qkv, packed, 0.4, backend)
    weights = torch.linspace(-1, 1, o_BLNH.numel(), dtype=torch.float64).view(o_BLNH.shape)
    grads = torch.autograd.grad((o_BLNH * weights.to(o_BLNH.dtype)).sum(), qkv)
    return [o_BLNH.detach(), *grads]


CASES = [
    ("flash", False),
    ("masked", True),
    ("packed", True),
    ("blocked", False),
    ("blocked", True),
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
    expected = outcome(inputs(torch.float64, *heads), packed_documents, "reference")
    got = outcome(inputs(dtype, *heads), packed_documents, backend)
    for some, other in zip(got, expected, strict=True):
        assert some.dtype == dtype
        assert (some - other).abs().max() < tolerance * other.abs().max()


def test_reference_by_hand():
    q, k, v = (t.detach() for t in inputs(torch.float64, 4, 2))
    o_BLNH = attend(q, k, v, documents(), 0.4, "reference")
    starts = [0, 5, 11]  # of the documents of the first sequence
    for query in range(L):
        start = max(s for s in starts if s <= query)
        for head in range(4):
            keys = k[0, start : query + 1, head // 2]
            weights = (0.4 * keys @ q[0, query, head]).softmax(dim=0)
            expected = weights @ v[0, start : query + 1, head // 2]
            torch.testing.assert_close(o_BLNH[0, query, head], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("backend", "packed"), [*CASES, ("reference", True)])
def test_future_and_other_documents_have_no_effect(backend, packed):
    q, k, v = (t.detach() for t in inputs(torch.float64, 4, 2))
    packed_documents = documents() if packed else None
    before = attend(q, k, v, packed_documents, 0.4, backend)
    k[0, 7:], v[0, 7:] = 9.0, -9.0
    after = attend(q, k, v, packed_documents, 0.4, backend)
    assert torch.equal(before[0, :7], after[0, :7])
    assert torch.equal(before[1], after[1])
    # The document [5, 11) changes, and the single token at 11 takes the new value.
    assert (before[0, 7:] != after[0, 7:]).all()


def test_scale_is_felt():
    q, k, v = inputs(torch.float64, 4, 2)
    assert not torch.equal(attend(q, k, v, None, 0.4), attend(q, k, v, None, 0.5))


def test_strided_inputs():
    whole = torch.randn(B, L, 8, H, dtype=torch.float64)
    q, k, v = whole.split([4, 2, 2], dim=2)
    got = attend(q, k, v, documents(), 0.4, "packed")
    expected = attend(q, k, v, documents(), 0.4, "reference")
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_packed_operator_is_well_formed():
    q, k, v = (t.detach().flatten(0, 1).requires_grad_() for t in inputs(torch.float64, 4, 2))
    torch.library.opcheck(packed_attention, (q, k, v, documents().cu_lengths, 0.4))


def test_lengths_that_miss_tokens_are_refused():
    q, k, v = inputs(torch.float64, 4, 2)
    wrong = Documents(torch.tensor([0, 5], dtype=torch.int32), 5, documents().positions_BL)
    with pytest.raises(AssertionError):
        attend(q, k, v, wrong, 0.4)


CALL = AttentionCall("cpu", "bf16", packed=False, length=512, compiled=False)


def chosen(*, package: bool = False, **changes) -> str:
    here = {None, "flash_attn"} if package else {None}
    return choose_backend(CALL._replace(**changes), here.__contains__).name


@pytest.mark.parametrize(
    ("device", "dtype", "packed", "expected"),
    [
        ("cpu", "bf16", False, "flash"),
        ("cpu", "fp64", True, "packed"),
        ("cuda", "bf16", False, "flash"),
        ("cuda", "bf16", True, "varlen"),
        ("cuda", "fp16", True, "varlen"),
        ("cuda", "fp32", True, "masked"),
        ("cuda", "fp64", True, "masked"),
        ("meta", "fp32", True, "masked"),
    ],
)
def test_the_choice_is_explicit(device, dtype, packed, expected):
    assert chosen(device=device, dtype=dtype, packed=packed) == expected


def test_flash_attn_goes_first_where_it_is_installed():
    assert chosen(device="cuda", packed=True, package=True) == "flash2"
    assert chosen(device="cuda", packed=True, dtype="fp32", package=True) == "masked"
    assert chosen(packed=True, package=True) == "packed"


def test_short_sequences_are_blocked_where_a_cpu_compiles():
    for packed in (False, True):
        assert chosen(compiled=True, packed=packed) == "blocked"
        assert chosen(compiled=True, packed=packed, length=4096) != "blocked"
        assert chosen(packed=packed) != "blocked"
        assert chosen(compiled=True, packed=packed, dtype="fp32") != "blocked"
        assert chosen(compiled=True, packed=packed, device="cuda") != "blocked"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_attention_runs_what_was_chosen(monkeypatch, dtype, packed):
    q, k, v = inputs(dtype, 4, 2)
    within = documents() if packed else None
    name = backend_of(q, within, compiled=False).name
    assert name == chosen(dtype={8: "fp64", 2: "bf16"}[dtype.itemsize], packed=packed, length=L)
    ran = []
    run = RUN[name]
    monkeypatch.setitem(RUN, name, lambda *args: ran.append(name) or run(*args))
    attend(q, k, v, within, 0.4)
    assert ran == [name]


def test_what_is_installed_is_a_constant_of_compiled_code(monkeypatch):
    """The choice is traced; the test for installed packages must not be."""
    here = next(b for b in BACKENDS if b.name == "packed")._replace(package="math")
    monkeypatch.setattr("allometry.scaling.attention.BACKENDS", (here,))
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    q, k, v = inputs(torch.float64, 4, 2)
    assert torch.equal(compiled(q, k, v, documents(), 0.4), attend(q, k, v, documents(), 0.4))


@pytest.mark.parametrize("packed", [False, True])
def test_blocks_join_to_the_whole(packed, monkeypatch):
    monkeypatch.setattr(attention_blocked, "BLOCK", 5)  # three blocks, the last of them shorter
    within = documents() if packed else None
    expected = outcome(inputs(torch.float64, 4, 2), within, "reference")
    got = outcome(inputs(torch.float64, 4, 2), within, "blocked")
    for some, other in zip(got, expected, strict=True):
        assert (some - other).abs().max() < 1e-13 * other.abs().max()


class TestVarlenKernel:
    """Arguments of the CUDA kernels, checked with substitutes for the libraries."""

    @pytest.fixture(autouse=True)
    def _forget(self):
        attention_cuda.torch_spelling.cache_clear()
        yield
        attention_cuda.torch_spelling.cache_clear()

    def call(self, backend: str) -> None:
        attend(*inputs(torch.float64, 4, 2), documents(), 0.4, backend)

    def test_torch_with_window(self, monkeypatch):
        seen = {}

        def varlen_attn(
            q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
        ):
            seen.update(scale=scale, window=window_size, gqa=enable_gqa, keys=k.shape[1])
            return q

        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
        self.call("varlen")
        assert seen == {"scale": 0.4, "window": (-1, 0), "gqa": True, "keys": 2}

    def test_torch_with_is_causal(self, monkeypatch):
        seen = {}

        def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, *, scale=None):
            seen.update(scale=scale, is_causal=is_causal, keys=k.shape[1])
            return q

        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
        self.call("varlen")
        assert seen == {"scale": 0.4, "is_causal": True, "keys": 4}

    @pytest.mark.parametrize(
        "package", [("flash2", "flash_attn"), ("flash3", "flash_attn_interface")]
    )
    def test_flash_attn(self, package, monkeypatch):
        seen = {}

        def flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, deterministic
        ):
            assert torch.equal(cu_q, documents().cu_lengths)
            assert torch.equal(cu_k, cu_q)
            seen.update(scale=softmax_scale, causal=causal, keys=k.shape[1], longest=(max_q, max_k))
            seen["exact"] = deterministic
            return q

        def flash_attn_func(q, k, v, *, softmax_scale, causal, deterministic):
            seen.update(scale=softmax_scale, causal=causal, keys=k.shape[2], exact=deterministic)
            return q

        name, module = package
        stand_in = types.ModuleType(module)
        stand_in.flash_attn_varlen_func = flash_attn_varlen_func
        stand_in.flash_attn_func = flash_attn_func
        monkeypatch.setitem(sys.modules, module, stand_in)
        self.call(name)
        common = {"scale": 0.4, "causal": True, "keys": 2}
        assert seen == common | {"longest": (12, 12), "exact": False}
        seen.clear()
        with algorithms(deterministic=True):
            attend(*inputs(torch.float64, 4, 2), None, 0.4, name)
        assert seen == common | {"exact": True}

    @pytest.mark.parametrize("packed", [documents(), None], ids=["packed", "whole"])
    def test_flash_attn_counts_keys_before_a_querys_own(self, packed, monkeypatch):
        seen = []

        def function(q, *_, **options):
            seen.append(options["window_size"])
            return q

        stand_in = types.ModuleType("flash_attn")
        stand_in.flash_attn_varlen_func = stand_in.flash_attn_func = function
        monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
        attend(*inputs(torch.float64, 4, 2), packed, 0.4, "flash2", window=5)
        assert seen == [(4, 0)]

    def test_early_versions_also_return_the_log_sum_exp(self, monkeypatch):
        stand_in = types.ModuleType("flash_attn_interface")
        stand_in.flash_attn_varlen_func = lambda q, *_, **__: (q, None)
        stand_in.flash_attn_func = None
        monkeypatch.setitem(sys.modules, "flash_attn_interface", stand_in)
        q, k, v = inputs(torch.float64, 4, 2)
        assert torch.equal(attend(q, k, v, documents(), 0.4, "flash3"), q)


def test_padding_leaves_few_lengths_and_wastes_little():
    lengths = torch.arange(1, 8193)
    padded = padded_lengths(lengths)
    assert (padded >= lengths).all()
    assert (padded - lengths < torch.maximum(torch.tensor(32), lengths // 8 + 1)).all()
    assert len(padded.unique()) < 60
