"""Blocks of attention, and complete rings merged from them, against an explicit softmax."""

# Q queries, S keys, N query heads, K key/value heads, H head width

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from allometry.models.attention import attend
from allometry.models.documents import Documents
from allometry.parallel.hdp import kernels, kernels_cuda
from allometry.parallel.hdp.kernels import (
    Kernel,
    attention_block,
    attention_block_backward,
    choose_kernel,
    merge_block,
)
from allometry.parallel.hdp.kernels_cuda import Runs
from allometry.parallel.hdp.shard import Ring, ring_table
from ring_oracles import local_positions

SCALE = 0.3
CPU = torch.device("cpu")
# Largest difference over largest element.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
RUNS = [
    Runs((7,), (5,), causal=False),
    Runs((9,), (9,), causal=True),
    Runs((3, 1, 6), (4, 8, 1), causal=False),
    Runs((3, 1, 40), (3, 1, 40), causal=True),
]
by_type = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
by_heads = pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)


def random(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def rows(runs: Runs, heads: tuple[int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Return q, k, v and the output gradient as slices of wider tensors, as in layers."""
    N, K = heads
    q, grad = random(sum(runs.queries), 2 * N, 16, dtype=dtype, device=device).chunk(2, dim=1)
    k, v = random(sum(runs.keys), 2 * K, 16, dtype=dtype, device=device).chunk(2, dim=1)
    return [q, k, v, grad]


def written_out(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, runs: Runs) -> list[Tensor]:
    """Return output, log-sum-exp and gradients in fp64 on a CPU, run by run, by autograd."""
    q, k, v, grad = (x.detach().cpu().double() for x in (q, k, v, grad))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    outputs, lses = [], []
    by_run = (q.split(runs.queries), k.split(runs.keys), v.split(runs.keys))
    for q_, k_, v_ in zip(*by_run, strict=True):
        k_, v_ = (x.repeat_interleave(groups, dim=1) for x in (k_, v_))
        scores = SCALE * torch.einsum("qnh,snh->nqs", q_, k_)
        if runs.causal:
            later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        outputs.append(torch.einsum("nqs,snh->qnh", scores.softmax(-1), v_))
        lses.append(scores.logsumexp(-1))
    o = torch.cat(outputs)
    grads = torch.autograd.grad(o, (q, k, v), grad)
    return [x.detach() for x in (o, torch.cat(lses, dim=1), *grads)]


def worst(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    return max(
        float((a.cpu().double() - b).abs().max() / b.abs().max())
        for a, b in zip(got, wanted, strict=True)
    )


@by_type
@by_heads
@pytest.mark.parametrize("runs", RUNS, ids=str)
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_blocks_equal_autograd(device, written, runs, heads, dtype) -> None:
    kernel = kernels.WRITTEN_OUT if written else None
    q, k, v, grad = rows(runs, heads, dtype, device)
    wanted = written_out(q, k, v, grad, runs)
    o, lse = attention_block(q, k, v, runs, SCALE, kernel)
    grads = attention_block_backward(grad, q, k, v, o, lse, runs, SCALE, kernel)
    assert worst((o, lse, *grads), wanted) < TOLERANCE[dtype]
    assert all(x.dtype == dtype for x in (o, *grads))
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    assert [x.shape for x in grads] == [x.shape for x in (q, k, v)]


def ring_outcome(
    lengths: list[int], n: int, qkvg: list[Tensor], kernel: Kernel | None = None
) -> list[Tensor]:
    """Return output and gradients of documents on a ring simulated on one device.

    Does the same as ``ring_attention`` without messages; ``qkvg`` are full documents.
    """
    q, k, v, grad = qkvg
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).repeat_interleave(2 if n > 1 else 1)
    held = []
    for member in range(n):
        places, runs = local_positions(lengths, n, member)
        held.append(torch.from_numpy(places) + starts.repeat_interleave(torch.tensor(runs)))
    wide = torch.promote_types(q.dtype, torch.float32)
    o = q.new_zeros(q.shape)
    grads = [x.new_zeros(x.shape, dtype=wide) for x in (q, k, v)]
    for member in range(n):
        ring = Ring.of(ring_table(range(n), member, lengths, tag=0))
        mine = held[member]
        o_mine = q.new_zeros((len(mine), *q.shape[1:]), dtype=wide)
        lse_mine = o_mine.new_zeros(q.shape[1], len(mine))
        steps = []
        for source in map(ring.source, range(n)):
            pairing = ring.pairing(source)
            if pairing is None:
                continue
            runs = Runs(pairing.queries.lengths, pairing.keys.lengths, pairing.causal)
            index, theirs = pairing.queries.index(), held[source][pairing.keys.index()]
            index = index if isinstance(index, slice) else torch.from_numpy(index)
            steps.append((index, theirs, runs))
            part = attention_block(q[mine[index]], k[theirs], v[theirs], runs, SCALE, kernel)
            merge_block(o_mine, lse_mine, index, *part, first=source == member)
        o[mine] = o_mine.to(q.dtype)
        for index, theirs, runs in steps:
            at = mine[index]
            given = (grad[at], q[at], k[theirs], v[theirs], o[at], lse_mine[:, index])
            parts = attention_block_backward(*given, runs, SCALE, kernel)
            for whole, place, part in zip(grads, (at, theirs, theirs), parts, strict=True):
                whole[place] += part
    return [o, *grads]


@by_type
@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_merged_blocks_equal_attention_of_whole_documents(device, written, n, dtype) -> None:
    lengths = [33, 1, 2, 3, 50, 7]
    shape = (sum(lengths),)
    q, grad = random(*shape, 12, 16, dtype=dtype, device=device).chunk(2, dim=1)
    k, v = random(*shape, 4, 16, dtype=dtype, device=device).chunk(2, dim=1)
    got = ring_outcome(lengths, n, [q, k, v, grad], kernels.WRITTEN_OUT if written else None)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    inputs = [x.cpu().double()[None].requires_grad_() for x in (q, k, v)]
    o = attend(*inputs, Documents(bounds, max(lengths), positions), SCALE, "reference")
    wanted = torch.autograd.grad(o, inputs, grad.cpu().double()[None])
    assert worst(got, [x[0].detach() for x in (o, *wanted)]) < TOLERANCE[dtype]


def test_a_block_of_its_own_sum_is_not_the_share_of_the_whole() -> None:
    """The comparison above detects a backward with its own block's log-sum-exp."""
    runs = Runs((6,), (6,), causal=False)
    q, k, v, grad = rows(runs, (4, 4), torch.float64, "cpu")
    wanted = written_out(q, k, v, grad, runs)[2:]
    got = [torch.zeros_like(x) for x in (q, k, v)]
    half = Runs((6,), (3,), causal=False)
    for part in (slice(0, 3), slice(3, 6)):
        o, lse = attention_block(q, k[part], v[part], half, SCALE)
        dq, dk, dv = attention_block_backward(grad, q, k[part], v[part], o, lse, half, SCALE)
        got[0] += dq
        got[1][part], got[2][part] = dk, dv
    assert worst(got, wanted) > 0.1


@pytest.mark.parametrize(
    "runs",
    [
        Runs((3, 0), (3, 4), causal=False),
        Runs((3, 4), (7, 0), causal=False),
        Runs((3, 4), (4, 3), causal=True),
        Runs((3, 3), (3, 4), causal=False),
    ],
    ids=["no query", "no key", "causal but unequal", "rows left over"],
)
def test_runs_that_kernels_do_not_survive_are_refused(runs: Runs) -> None:
    q, k = random(7, 2, 8, dtype=torch.float32), random(7, 2, 8, dtype=torch.float32)
    with pytest.raises(AssertionError):
        attention_block(q, k, k, runs, SCALE)
    with pytest.raises(AssertionError):
        attention_block_backward(q, q, k, k, q, q[..., 0].t(), runs, SCALE)


def test_kernels_are_chosen_by_device_type_and_head(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    for package, flash in ((False, kernels.CUDA), (True, kernels.FLASH_ATTN)):
        monkeypatch.setattr(kernels_cuda, "has_flash_attn", lambda package=package: package)
        assert choose_kernel(CPU, torch.bfloat16, 64) == kernels.CPU
        assert choose_kernel(cuda, torch.bfloat16, 64) == flash
        assert choose_kernel(cuda, torch.float16, 256) == flash
        for dtype, width in ((torch.float32, 64), (torch.float64, 64), (torch.bfloat16, 20)):
            assert choose_kernel(cuda, dtype, width) == kernels.WRITTEN_OUT
        assert choose_kernel(cuda, torch.bfloat16, 264) == kernels.WRITTEN_OUT


@pytest.mark.parametrize("runs", RUNS, ids=str)
def test_torch_takes_what_its_cuda_kernels_are_given(runs: Runs) -> None:
    """Without a GPU only arguments and shapes are checked; with one, values are checked above."""
    q, k, v, grad = rows(runs, (6, 2), torch.bfloat16, "meta")
    o, lse = attention_block(q, k, v, runs, SCALE, kernels.CUDA)
    assert (o.shape, o.dtype) == (q.shape, torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((6, len(q)), torch.float32)
    grads = attention_block_backward(grad, q, k, v, o, lse, runs, SCALE, kernels.CUDA)
    assert [(x.shape, x.dtype) for x in grads] == [(x.shape, torch.bfloat16) for x in (q, k, v)]
