"""The chunked loss against its full-logits twin."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from allometry.models.loss import (
    IGNORE,
    _chunks,
    default_chunk_tokens,
    linear_cross_entropy,
    reference_cross_entropy,
)
from allometry.models.vocabulary import SharedSoftmax

ROOT = Path(__file__).parents[3]


def example(dtype: torch.dtype, tokens: int = 37, ignored: int = 5) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    x_TD = torch.randn(tokens, 16, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(61, 16, generator=generator, dtype=torch.float64) / 4
    targets_T = torch.randint(61, (tokens,), generator=generator)
    targets_T[:ignored] = IGNORE
    return x_TD.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(), targets_T


def results(loss, x, weight, targets, **options):
    total, nll_T = loss(x, weight, targets, **options)
    # A factor, as the caller divides by the global count.
    grads = torch.autograd.grad(total * 0.3, (x, weight))
    return total.detach(), nll_T, *grads


def relative(some: Tensor, other: Tensor) -> float:
    return float((some - other).abs().max() / other.abs().max())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str
)
@pytest.mark.parametrize("chunk_tokens", [1, 8, 37, 1000])
@pytest.mark.parametrize(("logit_scale", "z_loss"), [(1.0, 0.0), (0.25, 0.0), (0.5, 1e-2)])
def test_equals_the_twin(dtype, tolerance, chunk_tokens, logit_scale, z_loss):
    options = {"logit_scale": logit_scale, "z_loss": z_loss}
    expected = results(reference_cross_entropy, *example(dtype), **options)
    got = results(linear_cross_entropy, *example(dtype), chunk_tokens=chunk_tokens, **options)
    for some, other in zip(got, expected, strict=True):
        assert some.dtype == other.dtype
        assert relative(some, other) < tolerance


def test_the_twin_is_what_it_says():
    x, weight, targets = example(torch.float64)
    logits = 0.5 * x.detach() @ weight.detach().T
    expected = 0.0
    for row, target in zip(logits, targets.tolist(), strict=True):
        if target != IGNORE:
            log_z = row.exp().sum().log()
            expected += float(log_z - row[target] + 0.01 * log_z**2)
    total, _ = reference_cross_entropy(x, weight, targets, logit_scale=0.5, z_loss=0.01)
    assert total.item() == pytest.approx(expected, rel=1e-12)


def test_z_loss_and_scale_are_felt():
    inputs = example(torch.float64)
    totals = {
        linear_cross_entropy(*inputs, logit_scale=s, z_loss=z)[0].item()
        for s, z in itertools.product((1.0, 0.5), (0.0, 1e-2))
    }
    assert len(totals) == 4


def test_ignored_targets_have_no_effect():
    x, weight, targets = example(torch.float64, ignored=5)
    total, nll_T, grad_x, grad_weight = results(linear_cross_entropy, x, weight, targets, z_loss=1)
    assert not nll_T[:5].any()
    assert not grad_x[:5].any()
    assert nll_T[5:].all()
    rest = x.detach()[5:].requires_grad_(), weight, targets[5:]
    expected = results(linear_cross_entropy, *rest, z_loss=1)
    assert relative(total, expected[0]) < 1e-14
    assert relative(grad_weight, expected[3]) < 1e-14


def test_all_ignored_is_zero_with_zero_gradients():
    x, weight, targets = example(torch.float32, ignored=37)
    for tensor in results(linear_cross_entropy, x, weight, targets, z_loss=1.0):
        assert not tensor.any()


def test_no_tokens():
    x, weight, targets = example(torch.float32, tokens=0, ignored=0)
    total, nll_T, _, grad_weight = results(linear_cross_entropy, x, weight, targets)
    assert float(total) == 0.0
    assert nll_T.shape == (0,)
    assert not grad_weight.any()


def test_large_logits_stay_finite():
    x, weight, targets = example(torch.float32)
    with torch.no_grad():
        x.mul_(1e3)
    for tensor in results(linear_cross_entropy, x, weight, targets, chunk_tokens=8):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("which", [0, 1])
def test_frozen_inputs_get_no_gradient(which):
    inputs = example(torch.float64)
    inputs[which].requires_grad_(False)
    total, _ = linear_cross_entropy(*inputs, chunk_tokens=8)
    total.backward()
    assert inputs[which].grad is None
    expected = results(reference_cross_entropy, *example(torch.float64))
    assert relative(inputs[1 - which].grad * 0.3, expected[2 + 1 - which]) < 1e-12


def test_without_gradients_only_the_loss(monkeypatch):
    def never(*_):
        raise AssertionError("gradients were computed")

    monkeypatch.setattr("allometry.models.loss.softmax_gradient_", never)
    inputs = example(torch.float64)
    options = {"logit_scale": 0.5, "z_loss": 0.1}
    with torch.no_grad():
        got = linear_cross_entropy(*inputs, chunk_tokens=8, **options)
    assert not got[0].requires_grad
    expected = reference_cross_entropy(*inputs, **options)
    for some, other in zip(got, expected, strict=True):
        assert relative(some, other.detach()) < 1e-12
    with pytest.raises(AssertionError, match="gradients were computed"):
        linear_cross_entropy(*inputs)


def test_backward_in_two_halves_is_backward():
    """As pipelines do that take the gradients of inputs and of weights one after the other."""
    expected = results(reference_cross_entropy, *example(torch.float64))
    x, weight, targets = example(torch.float64)
    total, _ = linear_cross_entropy(x, weight, targets)
    factor = torch.tensor(0.3, dtype=torch.float64)
    (grad_x,) = torch.autograd.grad(total, x, factor, retain_graph=True)
    (grad_weight,) = torch.autograd.grad(total, weight, factor)
    assert relative(grad_x, expected[2]) < 1e-12
    assert relative(grad_weight, expected[3]) < 1e-12


def test_a_second_backward_with_another_factor_is_refused():
    total, _ = linear_cross_entropy(*example(torch.float64))
    total.backward(torch.tensor(0.3, dtype=torch.float64), retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated before, with another factor"):
        total.backward(torch.tensor(0.4, dtype=torch.float64))


def test_the_weight_gradient_is_handed_over_without_a_copy():
    x, weight, targets = example(torch.float64)
    total, _ = linear_cross_entropy(x, weight, targets)
    saved = total.grad_fn.saved_tensors[1].data_ptr()
    total.backward()
    assert weight.grad.data_ptr() == saved


def test_bf16_keeps_fp32_where_it_matters():
    x, weight, targets = example(torch.float64, tokens=4096)
    exact = results(reference_cross_entropy, x, weight, targets)
    x16 = x.detach().bfloat16().requires_grad_()
    weight32 = weight.detach().float().requires_grad_()
    got = results(linear_cross_entropy, x16, weight32, targets, chunk_tokens=64)
    assert [t.dtype for t in got] == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    assert relative(got[0], exact[0]) < 1e-3
    # 64 chunks added up in bf16 would be off by several per cent.
    assert relative(got[3], exact[3]) < 1e-2
    assert relative(got[2], exact[2]) < 3e-2


def test_tied_weight_gets_both_gradients():
    def grads(loss):
        _, weight, targets = example(torch.float64)
        tokens = torch.arange(37) % 61
        total, _ = loss(weight[tokens] * 2.0, weight, targets)
        return torch.autograd.grad(total, weight)[0]

    assert relative(grads(linear_cross_entropy), grads(reference_cross_entropy)) < 1e-12


@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 128, 129, 1000, 2048, 4097])
def test_chunks_cover_every_token_once(tokens):
    for largest in (1, 50, 128, 1024):
        parts = list(_chunks(tokens, largest))
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(tokens))
        assert all(part.stop - part.start <= largest for part in parts)


def test_chunks_at_large_vocabularies_stay_small():
    for vocab_size in (256, 8192, 131072, 262144):
        tokens = default_chunk_tokens(4096, vocab_size, torch.bfloat16, "cpu")
        assert tokens == 128 or tokens * vocab_size <= 2**22
        assert default_chunk_tokens(4096, vocab_size, torch.float32, "cpu") <= tokens
        assert tokens <= default_chunk_tokens(4096, vocab_size, torch.bfloat16, "cuda")


def test_peak_memory_below_a_tenth_of_full_logits():
    """A smaller twin of the 128k x 4k case, which benchmarks/loss_memory.py measures."""
    command = [sys.executable, "benchmarks/loss_memory.py", "--json"]
    sizes = ["--vocabulary", "32768", "--tokens", "4096", "--width", "32"]
    done = subprocess.run(command + sizes, cwd=ROOT, capture_output=True, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["full_mib"] > 1.9 * 32768 * 4096 * 4 / 2**20  # the measurement sees the logits
    assert row["ratio"] < 0.1
    assert row["gradient_error"] < 1e-6


class Parts:
    """A vocabulary cut in ``count`` parts, each worked on by a thread: an exchange that waits."""

    def __init__(self, size: int, count: int):
        self.columns = -(-size // count)
        self.slices = [slice(i * self.columns, (i + 1) * self.columns) for i in range(count)]
        self.held: list[Tensor | None] = [None] * count
        self.barrier = threading.Barrier(count, timeout=20)

    def exchange(self, part: int, values: Tensor, combine) -> None:
        self.held[part] = values.clone()
        self.barrier.wait()
        result = combine(torch.stack(self.held))
        self.barrier.wait()
        values.copy_(result)

    def run(self, function):
        with ThreadPoolExecutor(len(self.slices)) as pool:
            return list(pool.map(function, range(len(self.slices))))


class Part:
    def __init__(self, parts: Parts, part: int):
        self.parts, self.part = parts, part
        self.columns, self.first = parts.columns, part * parts.columns

    def max_(self, values):
        self.parts.exchange(self.part, values, lambda all_: all_.amax(0))

    def sum_(self, values):
        self.parts.exchange(self.part, values, lambda all_: all_.sum(0))


def results_in_parts(count, dtype, vocabulary=Part, compiled=False, tokens=37, **options):
    x, weight, targets = example(dtype, tokens=tokens)
    parts = Parts(len(weight), count)

    def work(part):
        mine_x = x.detach().clone().requires_grad_()
        mine = weight.detach()[parts.slices[part]].clone().requires_grad_()
        shared = SharedSoftmax(vocabulary(parts, part))
        if compiled:
            shared.compile(fullgraph=True)
        return results(linear_cross_entropy, mine_x, mine, targets, shared=shared, **options)

    totals, nlls, xs, weights = zip(*parts.run(work), strict=True)
    assert all(
        torch.equal(nll, nlls[0]) and torch.equal(t, totals[0])
        for nll, t in zip(nlls, totals, strict=True)
    )
    return totals[0], nlls[0], sum(xs), torch.cat(weights)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str
)
@pytest.mark.parametrize("chunk_tokens", [8, 1000])
@pytest.mark.parametrize(("logit_scale", "z_loss"), [(1.0, 0.0), (0.5, 1e-2)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_parts_of_the_vocabulary_equal_the_twin(
    dtype, tolerance, chunk_tokens, logit_scale, z_loss, count
):
    options = {"logit_scale": logit_scale, "z_loss": z_loss}
    expected = results(reference_cross_entropy, *example(dtype), **options)
    got = results_in_parts(count, dtype, chunk_tokens=chunk_tokens, **options)
    for some, other in zip(got, expected, strict=True):
        assert some.dtype == other.dtype
        assert relative(some, other) < tolerance


def test_parts_of_the_vocabulary_in_bf16():
    exact = results(reference_cross_entropy, *example(torch.float64), z_loss=1e-2)
    whole = results(linear_cross_entropy, *example(torch.bfloat16), z_loss=1e-2)
    got = results_in_parts(2, torch.bfloat16, chunk_tokens=8, z_loss=1e-2)
    for some, one, other in zip(got, whole, exact, strict=True):
        assert some.dtype == one.dtype
        assert relative(some, other) < 1.5 * relative(one, other) + 1e-3


def test_compiled_parts_of_the_vocabulary_equal_the_twin():
    # One part, as the compiler is not to be entered by two threads at once.
    expected = results(reference_cross_entropy, *example(torch.float32), z_loss=1e-2)
    got = results_in_parts(1, torch.float32, compiled=True, chunk_tokens=64, z_loss=1e-2)
    for some, other in zip(got, expected, strict=True):
        assert relative(some, other) < 1e-6


class Lonely(Part):
    def max_(self, values):
        pass

    sum_ = max_


def test_the_comparison_sees_a_part_that_does_not_hear_of_the_others():
    expected = results(reference_cross_entropy, *example(torch.float64))
    x, weight, targets = example(torch.float64)
    mine = weight.detach()[:31].clone().requires_grad_()
    shared = SharedSoftmax(Lonely(Parts(len(weight), 2), 0))
    assert (
        relative(results(linear_cross_entropy, x, mine, targets, shared=shared)[0], expected[0])
        > 0.05
    )


def test_parts_of_the_vocabulary_without_gradients():
    x, weight, targets = example(torch.float64)
    expected = reference_cross_entropy(x, weight, targets, z_loss=0.1)
    parts = Parts(len(weight), 2)

    @torch.no_grad()
    def work(part):
        shared = SharedSoftmax(Part(parts, part))
        mine = weight[parts.slices[part]]
        return linear_cross_entropy(x, mine, targets, shared=shared, z_loss=0.1, chunk_tokens=8)

    for got in parts.run(work):
        for some, other in zip(got, expected, strict=True):
            assert relative(some, other.detach()) < 1e-12
