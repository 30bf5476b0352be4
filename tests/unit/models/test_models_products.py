"""Several weights as one product: equal numbers, separate gradients, minimal saved tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allometry.models.grouped import loop_linear, multiply_groups
from allometry.models.layers import Linear, gated
from allometry.models.parameters import OwnsParameters
from allometry.models.products import (
    COMPUTE,
    Stacked,
    _Multiply,
    _wide_mm,
    add_product_,
    cast_once,
    multiply,
    product,
    separate,
    stacks,
)
from allometry.scaling.inventory import experts, matrix
from allometry.scaling.roles import Role

ROWS = (6, 2, 3)


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Linear(matrix("weight", Role.HIDDEN, rows, 4)) for rows in ROWS)
        self.together = Stacked(*((layer, "weight") for layer in self.layers))
        for layer in self.layers:
            nn.init.normal_(layer.weight)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    total = sum(
        (y.double() * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum()
        for y in outputs
    )
    return torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("given", [False, True], ids=["joined", "copy"])
def test_equals_the_twin_in_fp64(given: bool) -> None:
    model = Three().double()
    weights = [layer.weight for layer in model.layers]
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    whole = torch.cat([w.detach() for w in weights]) if given else None
    made = separate(_Multiply.apply(x, None, whole, *COMPUTE, *weights), ROWS)
    twin = tuple(F.linear(x, w) for w in weights)
    got, expected = (gradients(outputs, [x, *weights]) for outputs in (made, twin))
    for some, other in zip((*made, *got), (*twin, *expected), strict=True):
        assert float((some - other).detach().abs().max()) <= 1e-14 * float(
            other.detach().abs().max()
        )


@pytest.mark.parametrize("plain", [False, True])
def test_a_step_casts_once_and_adds_up_in_the_parameters_type(plain: bool) -> None:
    model = Three()
    model.together.plain = plain
    weights = [layer.weight for layer in model.layers]
    xs = [torch.randn(7, 4).bfloat16() for _ in range(3)]
    expected = [torch.zeros_like(w) for w in weights]
    for x in xs:
        outputs = tuple(F.linear(x, w.to(x.dtype)) for w in weights)
        for sum_, grad in zip(expected, gradients(outputs, weights), strict=True):
            sum_ += grad
    with cast_once(model, torch.bfloat16):
        assert model.together.copy is not None
        memory = model.together.copy.data_ptr()
        assert all(layer.stacked.copy is None for layer in model.layers), "copied once, not twice"
        for x in xs:
            made = separate(multiply(x, model.together), ROWS)
            for weight, grad in zip(weights, gradients(made, weights), strict=True):
                weight.grad = grad if weight.grad is None else weight.grad + grad
    for weight, sum_ in zip(weights, expected, strict=True):
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32
        torch.testing.assert_close(weight.grad, sum_, rtol=0, atol=2**-8 * float(sum_.abs().max()))
    with torch.no_grad():
        weights[0].zero_()
    with cast_once(model, torch.bfloat16):
        assert not separate(multiply(xs[0], model.together), ROWS)[0].any(), "the values are new"
        assert plain or model.together.copy.data_ptr() == memory, "in the memory of before"
    assert model.together.copy is None


def kept_bytes(x: Tensor, model: Three) -> int:
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        multiply(x, model.together)
    for tensor in (x, *(layer.weight for layer in model.layers)):
        found.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(found.values())


def test_weights_that_have_been_gathered_are_not_kept_in_a_copy() -> None:
    model = Three().bfloat16()
    x = torch.randn(7, 4).bfloat16().requires_grad_()
    assert kept_bytes(x, model) == 0
    model.together.plain = True
    assert kept_bytes(x, model) == 2 * sum(ROWS) * 4, "negative control"


def test_fp32_is_neither_cast_nor_copied() -> None:
    model = Three()
    x = torch.randn(7, 4)
    with cast_once(model, torch.float32):
        assert model.together.copy is None
        made = multiply(x, model.together)
    assert isinstance(made, tuple)
    for some, layer in zip(made, model.layers, strict=True):
        assert torch.equal(some, F.linear(x, layer.weight))


def test_a_weight_belongs_to_the_largest_stack() -> None:
    model = Three()
    assert stacks(model) == [model.together]


def test_gradients_are_kept_by_autograd_without_a_copy() -> None:
    """The first micro-batch's rows of the product are the gradients; the next adds in place."""
    model = Three()
    made = []
    for layer in model.layers:
        layer.weight.register_hook(lambda grad: made.append(grad.untyped_storage().data_ptr()))
    x = torch.randn(7, 4).bfloat16()
    with cast_once(model, torch.bfloat16):
        for _ in range(2):
            y = multiply(x, model.together)
            assert isinstance(y, Tensor)
            y.sum().backward()
    grads = [layer.weight.grad for layer in model.layers]
    assert all(grad is not None for grad in grads)
    storages = {grad.untyped_storage().data_ptr() for grad in grads if grad is not None}
    assert len(storages) == 1, "one product made them"
    assert storages == {made[0]}, "and they are still its memory"


def test_compiled_without_a_break_and_once_for_both_micro_batches() -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = Three()
    weights = [layer.weight for layer in model.layers]

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return separate(multiply(x, model.together), model.together.rows())

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 4).bfloat16().requires_grad_()
    for _ in range(2):
        with cast_once(model, torch.bfloat16):
            for _ in range(2):
                got, expected = (gradients(f(x), [x, *weights]) for f in (compiled, run))
                for some, other in zip(got, expected, strict=True):
                    assert torch.equal(some, other)
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_without_gradients() -> None:
    torch._dynamo.reset()
    model = Two(torch.float32)
    weights = [model.gate[0], model.up[0]]
    for count in (1, 2):
        owners = [Linear(matrix("weight", Role.HIDDEN, len(w), 8)) for w in weights[:count]]
        stacked = Stacked(*((owner, "weight") for owner in owners))
        for owner, weight in zip(owners, weights, strict=False):
            owner.weight.data.copy_(weight.detach())

        def run(x: Tensor, stacked: Stacked = stacked) -> Tensor:
            made = multiply(x, stacked)
            assert isinstance(made, Tensor)
            return made

        x = torch.randn(7, 8).bfloat16()
        with torch.no_grad():
            assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


def test_wide_products() -> None:
    a, b = torch.randn(5, 7).bfloat16(), torch.randn(7, 3).bfloat16()
    assert torch.equal(product(a, b, torch.float32), (a @ b).float())
    assert torch.equal(_wide_mm(a, b), (a @ b).float())
    assert product(a, b, torch.bfloat16).dtype == torch.bfloat16
    torch.library.opcheck(_wide_mm, (a.t().contiguous().t(), b))
    sum_ = torch.randn(5, 3)
    assert torch.equal(add_product_(sum_.clone(), a, b), sum_ + (a @ b).float())


def test_swiglu_of_one_tensor_equals_that_of_two() -> None:
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    one, two = gated(x), gated(x.split(6, dim=-1))
    assert torch.equal(one, two)
    (got,), (expected,) = (gradients((y,), [x]) for y in (one, two))
    assert float((got - expected).abs().max()) <= 1e-15 * float(expected.abs().max())


class Two(OwnsParameters):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for name, rows in (("gate", 8), ("up", 16)):
            self.own(name, experts(name, Role.EXPERT_UP, 3, rows, 8))
            nn.init.normal_(getattr(self, name))
        self.to(dtype)
        self.together = Stacked((self, "gate"), (self, "up"))


@pytest.mark.parametrize("gathered", [False, True])
def test_groups_as_one_product(gathered: bool) -> None:
    """Against the loop in fp64 over the same rounded numbers; the last group is empty."""
    model = Two(torch.bfloat16 if gathered else torch.float32)
    weights = [model.gate, model.up]
    counts = torch.tensor([4, 3, 0])
    x = torch.randn(7, 8).bfloat16().requires_grad_()
    with cast_once(model, torch.bfloat16):
        assert (model.together.copy is None) == gathered
        made = separate(multiply_groups(x, model.together, counts), (8, 16))
    got = gradients(made, [x, *weights])
    wide = [w.detach().bfloat16().double().requires_grad_() for w in weights]
    x64 = x.detach().double().requires_grad_()
    twin = tuple(loop_linear(x64, w, counts) for w in wide)
    for some, other in zip((*made, *got), (*twin, *gradients(twin, [x64, *wide])), strict=True):
        assert float((some - other).detach().abs().max()) <= 2**-6 * float(
            other.detach().abs().max()
        )
    assert [grad.dtype for grad in got[1:]] == [w.dtype for w in weights]


HOW = {
    "compute": COMPUTE,
    "saved in fp8": (True, *COMPUTE[1:]),
    "fp8 products": (True, "fp8_rowwise", *COMPUTE[2:]),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("frozen", [(1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("how", HOW)
def test_frozen_weights_have_no_gradient_and_keep_no_input(
    how: str, frozen: tuple[int, ...], compiled: bool
) -> None:
    model = Three()
    weights = [layer.weight for layer in model.layers]
    x = torch.randn(48, 4).bfloat16().requires_grad_()
    others = [w for place, w in enumerate(weights) if place not in frozen]

    def run(x: Tensor) -> Tensor:
        return _Multiply.apply(x, None, None, *HOW[how], *weights)

    whole = gradients((run(x),), [x, *others])
    for place in frozen:
        weights[place].requires_grad_(False)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = run(x)
    of_weights = {w.untyped_storage().data_ptr() for w in weights}
    assert bool(set(kept) - of_weights) == bool(others), "x or what FP8 has made of it"
    if compiled:
        torch.compiler.reset()
        made = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    got = gradients((made,), [x, *others])
    assert torch.equal(got[0], whole[0])
    for some, other in zip(got[1:], whole[1:], strict=True):
        torch.testing.assert_close(some, other)
    assert all(weights[place].grad is None for place in frozen)
