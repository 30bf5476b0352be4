"""Grouped products against a loop over groups, and rows permuted to the groups and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from allometry.models.grouped import grouped_linear, loop_linear, rounded
from allometry.models.visits import (
    Sorting,
    gather_rows,
    sort_by_expert,
    sorted_by_counting,
    sorted_by_sort,
    spread_rows,
)

D, F, E = 16, 8, 4
COUNTS = [[3, 0, 7, 2], [0, 0, 12, 0], [1, 1, 0, 0], [0, 0, 0, 0], [17, 0, 64, 530]]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(dtype)


def gradients(product, x: Tensor, weight: Tensor, counts: Tensor, mix: Tensor) -> list[Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = product(x, weight, counts)
    (y * mix).sum().backward()
    return [y.detach(), x.grad, weight.grad]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)],
)
def test_equals_the_loop(counts, dtype, tolerance):
    rows = sum(counts)
    x, weight, mix = random(rows, D), random(E, F, D, seed=1), random(rows, F, seed=2)
    expected = gradients(loop_linear, x, weight, torch.tensor(counts), mix)
    parts = [value.to(dtype) for value in (x, weight)]
    found = gradients(grouped_linear, *parts, torch.tensor(counts), mix.to(dtype))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert one.shape == other.shape
        if other.numel():
            assert (one.double() - other).abs().max() <= tolerance * max(1.0, other.abs().max())
    for e, count in enumerate(counts):
        assert found[2][e].any() == bool(count)


def test_every_type_takes_the_path_it_should(monkeypatch):
    """Aligned fp32 uses the kernel, the rest loops; 16-bit on a CPU rounds the rows."""
    calls: list[torch.dtype] = []
    kernel = torch._grouped_mm
    monkeypatch.setattr(torch, "_grouped_mm", lambda x, *a: calls.append(x.dtype) or kernel(x, *a))
    counts = torch.tensor([3, 0, 7, 2])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        grouped_linear(random(12, D, dtype=dtype), random(E, F, D, dtype=dtype), counts)
    assert calls == [torch.float32]
    odd = grouped_linear(random(12, 6, dtype=torch.float32), random(E, 5, 6).float(), counts)
    assert odd.shape == (12, 5)
    assert len(calls) == 1
    monkeypatch.delattr(torch, "_grouped_mm")
    grouped_linear(random(12, D).float(), random(E, F, D).float(), counts)


def test_rows_are_rounded_up_to_few_numbers():
    numbers = {rows: rounded(rows) for rows in range(1, 4097)}
    assert all(0 <= up - rows <= max(15, rows / 16) for rows, up in numbers.items())
    assert len(set(numbers.values())) == 16 + 4 * 16  # below 256, and of each octave to 4096


def test_half_products_on_a_cpu_are_of_few_shapes():
    """oneDNN caches code per shape: with the exact counts, memory would grow every step."""
    shapes: set[tuple[torch.Size, ...]] = set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "mm" in function.name():
                shapes.add(tuple(x.shape for x in args))
            return function(*args, **(kwargs or {}))

    rows, generator = 200, torch.Generator().manual_seed(9)
    x, weight = random(rows, D, dtype=torch.bfloat16), random(E, F, D).bfloat16()
    for _ in range(60):
        cuts = torch.randint(rows + 1, (E - 1,), generator=generator).sort().values.tolist()
        counts = torch.tensor([*cuts, rows]).diff(prepend=torch.tensor([0]))
        with Shapes():
            gradients(grouped_linear, x, weight, counts, torch.ones(rows, F).bfloat16())
    assert 3 < len(shapes) <= 3 * 13  # three products of at most 13 rounded numbers, 16 to 208


@pytest.mark.parametrize("make", ["expanded", "transposed"])
def test_any_strides_of_the_gradient(make):
    x = random(12, D, dtype=torch.float32).requires_grad_()
    weight = random(E, F, D, dtype=torch.float32).requires_grad_()
    y = grouped_linear(x, weight, torch.tensor([3, 0, 7, 2]))
    if make == "expanded":
        y.sum().backward()
    else:
        (y.t() * random(F, 12, seed=3).float()).sum().backward()
    assert x.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_sorting_is_stable_and_invertible():
    experts_Tk = torch.tensor([[2, 0], [0, 3], [2, 3], [0, 2]])
    token_S, row_Tk, counts_E = sort_by_expert(experts_Tk, 5)
    assert token_S.tolist() == [0, 1, 3, 0, 2, 3, 1, 2]
    assert counts_E.tolist() == [3, 0, 3, 2, 0]
    sorted_S = experts_Tk.flatten()[row_Tk.flatten().argsort()]
    assert sorted_S.tolist() == sorted(experts_Tk.flatten().tolist())
    empty = sort_by_expert(experts_Tk[:0], 5)
    assert empty.counts_E.tolist() == [0] * 5
    assert empty.row_Tk.shape == (0, 2)


def sorting(T: int, k: int) -> Sorting:
    scores = torch.rand(T, E, generator=torch.Generator().manual_seed(4))
    return sort_by_expert(scores.topk(k).indices, E)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_moving_rows_and_its_gradients(k):
    T = 6
    where = sorting(T, k)
    x, y = random(T, D).requires_grad_(), random(T * k, D, seed=1).requires_grad_()
    gates = random(T, k, seed=2).requires_grad_()
    assert torch.equal(spread_rows(x, where), x[where.token_S])
    expected = torch.zeros(T, D, dtype=torch.float64)
    for t in range(T):
        for visit in range(k):
            expected[t] += gates[t, visit].detach() * y[where.row_Tk[t, visit]].detach()
    torch.testing.assert_close(gather_rows(y, gates, where), expected)
    assert torch.autograd.gradcheck(lambda x: spread_rows(x, where), x)
    assert torch.autograd.gradcheck(lambda y, g: gather_rows(y, g, where), (y, gates))


def test_half_rows_are_added_in_fp32():
    """1 + 3 x 2**-9: in bf16 each addition would round back to 1."""
    where = sort_by_expert(torch.tensor([[0, 1, 2, 3]]), E)
    y = torch.tensor([[1.0], [2.0**-9], [2.0**-9], [2.0**-9]], dtype=torch.bfloat16)
    summed = gather_rows(y, torch.ones(1, 4), where)
    assert summed.dtype == torch.bfloat16
    assert summed.item() == 1.0 + 2.0**-7
    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    spread_rows(x, where).backward(y)
    assert x.grad.item() == 1.0 + 2.0**-7


@pytest.mark.parametrize(("T", "k", "experts"), [(0, 2, 5), (1, 1, 1), (64, 3, 3), (500, 4, 37)])
def test_counting_gives_the_order_of_a_stable_sort(T, k, experts):
    scores = torch.rand(T, experts, generator=torch.Generator().manual_seed(T))
    scores[:, 1::5] *= 0.01  # some experts receive no token
    chosen = scores.topk(k).indices
    counted, by_sort = sorted_by_counting(chosen, experts), sorted_by_sort(chosen, experts)
    for name, one, other in zip(Sorting._fields, counted, by_sort, strict=True):
        assert torch.equal(one, other), name
        assert one.dtype == other.dtype, name
    if T > 1 and experts > k:
        assert not torch.equal(counted.token_S, sorted_by_sort(chosen.flip(0), experts).token_S)


def test_counting_compiles_whole():
    chosen = torch.rand(90, 20, generator=torch.Generator().manual_seed(2)).topk(3).indices
    compiled = torch.compile(sorted_by_counting, backend="aot_eager", fullgraph=True)
    for one, other in zip(compiled(chosen, 20), sorted_by_sort(chosen, 20), strict=True):
        assert torch.equal(one, other)
