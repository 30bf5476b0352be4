"""The chunked loss against the full-logits reference."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from allometry.models.loss import (
    IGNORE,
    GradientSum,
    _chunks,
    default_chunk_tokens,
    linear_cross_entropy,
    reference_cross_entropy,
)
from loss_example import example, relative, results

ROOT = Path(__file__).parents[3]


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
    """As in pipelines that compute gradients of inputs and of weights separately."""
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


def parts_of(x: Tensor, targets: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    return [
        (mine.detach().requires_grad_(), t)
        for mine, t in zip(x.chunk(count), targets.chunk(count), strict=True)
    ]


ORDERS = {
    "all forwards first": [0, 1, 2, 3, -1, -2, -3, -4],
    "in turn": [0, -1, 1, -2, 2, -3, 3, -4],
    "two in flight": [0, 1, -1, 2, -2, 3, -4, -3],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("split", [False, True])
def test_a_sum_over_calls_is_the_gradient_of_the_whole(order, split):
    x, weight, targets = example(torch.float64)
    expected = results(reference_cross_entropy, x, weight, targets, z_loss=1e-2)
    calls, totals, gradient_sum = parts_of(x, targets, 4), {}, GradientSum()
    factor = torch.tensor(0.3, dtype=torch.float64)
    for number in order:
        mine, some = calls[number if number >= 0 else -number - 1]
        if number >= 0:
            totals[number] = linear_cross_entropy(
                mine, weight, some, z_loss=1e-2, chunk_tokens=8, gradient_sum=gradient_sum
            )[0]
            continue
        total = totals.pop(-number - 1)
        if split:  # inputs first, as in schedules with a split backward
            (mine.grad,) = torch.autograd.grad(total, mine, factor, retain_graph=True)
            (grad_weight,) = torch.autograd.grad(total, weight, factor)
            weight.grad = grad_weight if weight.grad is None else weight.grad + grad_weight
        else:
            total.backward(factor)
    assert gradient_sum.pending_VD is None
    assert relative(torch.cat([mine.grad for mine, _ in calls]), expected[2]) < 1e-12
    assert relative(weight.grad, expected[3]) < 1e-12


@pytest.mark.parametrize("summed", [False, True])
def test_calls_in_flight_keep_one_gradient_of_the_weight(summed):
    x, weight, targets = example(torch.float64)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    gradient_sum = GradientSum() if summed else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        totals = [
            linear_cross_entropy(mine, weight, some, gradient_sum=gradient_sum)[0]
            for mine, some in parts_of(x, targets, 4)
        ]
    large = [tensor for tensor in kept if tensor.numel() >= weight.numel()]
    assert len(large) == (0 if summed else 4)
    buffer = gradient_sum.pending_VD.data_ptr() if summed else 0
    totals[0].backward()
    assert not summed or weight.grad.data_ptr() == buffer, "handed over without a copy"


def test_calls_of_one_sum_have_one_factor():
    x, weight, targets = example(torch.float64)
    gradient_sum = GradientSum()

    def total():
        return linear_cross_entropy(x, weight, targets, gradient_sum=gradient_sum)[0]

    first, second = total(), total()
    first.backward()
    with pytest.raises(RuntimeError, match="differentiated with different factors"):
        (2 * second).backward()
    # Interrupted work does not affect the next forward.
    total()
    gradient_sum.begin()
    weight.grad = None
    (3 * total()).backward()
    (expected,) = torch.autograd.grad(3 * reference_cross_entropy(x, weight, targets)[0], weight)
    assert relative(weight.grad, expected) < 1e-12


def test_a_sum_in_bf16_adds_up_in_fp32():
    x, weight, targets = example(torch.float64, tokens=4096)
    exact = results(reference_cross_entropy, x, weight, targets)
    weight16, gradient_sum = weight.detach().bfloat16().requires_grad_(), GradientSum()
    totals = [
        linear_cross_entropy(mine.bfloat16(), weight16, some, gradient_sum=gradient_sum)[0]
        for mine, some in parts_of(x, targets, 64)
    ]
    for total in totals:
        (total * 0.3).backward()
    assert weight16.grad.dtype == torch.bfloat16
    assert relative(weight16.grad, exact[3]) < 1e-2


def test_bf16_keeps_fp32_where_it_matters():
    x, weight, targets = example(torch.float64, tokens=4096)
    exact = results(reference_cross_entropy, x, weight, targets)
    x16 = x.detach().bfloat16().requires_grad_()
    weight32 = weight.detach().float().requires_grad_()
    got = results(linear_cross_entropy, x16, weight32, targets, chunk_tokens=64)
    assert [t.dtype for t in got] == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    assert relative(got[0], exact[0]) < 1e-3
    # 64 chunks accumulated in bf16 would be wrong by several per cent.
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
    """A smaller version of the 128k x 4k case measured by benchmarks/loss_memory.py."""
    command = [sys.executable, "benchmarks/loss_memory.py", "--json"]
    sizes = ["--vocabulary", "32768", "--tokens", "4096", "--width", "32"]
    done = subprocess.run(command + sizes, cwd=ROOT, capture_output=True, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["full_mib"] > 1.9 * 32768 * 4096 * 4 / 2**20  # the measurement includes the logits
    assert row["ratio"] < 0.1
    assert row["gradient_error"] < 1e-6
