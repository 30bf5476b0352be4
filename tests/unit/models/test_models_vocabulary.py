"""The loss with the vocabulary's columns divided over ranks, against full logits."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from allometry.models.loss import linear_cross_entropy, reference_cross_entropy
from allometry.models.vocabulary import SharedSoftmax
from loss_example import example, relative, results


class Parts:
    """Vocabulary divided into ``count`` parts, each on a thread: a synchronous exchange."""

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
        return results(linear_cross_entropy, mine_x, mine, targets, softmax=shared, **options)

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
    # One part, because two threads must not enter the compiler at once.
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
        relative(results(linear_cross_entropy, x, mine, targets, softmax=shared)[0], expected[0])
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
        return linear_cross_entropy(x, mine, targets, softmax=shared, z_loss=0.1, chunk_tokens=8)

    for got in parts.run(work):
        for some, other in zip(got, expected, strict=True):
            assert relative(some, other.detach()) < 1e-12
