"""FP8: numbers with scales, and products of them."""

# B sequences, L tokens in a sequence, T = B*L, D width, F hidden width

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from allometry.models import fp8
from allometry.models.grouped import multiply_groups
from allometry.models.layers import Linear
from allometry.models.parameters import OwnsParameters
from allometry.models.products import Stacked, multiply
from allometry.scaling.inventory import matrix
from allometry.scaling.roles import ParamSpec, Role

RECIPES = ("fp8_tensorwise", "fp8_rowwise", "fp8_blockwise")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# ------------------------------------------------------------------ numbers with scales


@pytest.mark.parametrize("dtype", [fp8.E4M3, fp8.E5M2])
@pytest.mark.parametrize("block", [(None, None), (1, None), (1, 128), (128, 128), (1, 16)])
def test_every_number_is_near_its_own(block: fp8.Block, dtype: torch.dtype) -> None:
    x = torch.randn(3, 150, 200) * torch.logspace(-3, 3, 150)[:, None]
    small = fp8.quantise(x, block, dtype)
    assert small.values.shape == x.shape
    assert small.values.dtype == dtype
    error = (fp8.dequantise(small, block, torch.float32) - x).abs()
    rows, columns = block[0] or 150, block[1] or 200
    scales = small.scales.repeat_interleave(rows, 1)[:, :150].repeat_interleave(columns, 2)
    # Half a unit in the last place: 3 or 2 bits, and the fixed step of the smallest numbers.
    bits, least = (2**-4, 2**-10) if dtype == fp8.E4M3 else (2**-3, 2**-17)
    assert bool((error <= x.abs() * bits * 1.001 + least * scales[..., :200] * 1.001).all())


def test_one_rounding_to_the_nearest() -> None:
    x = torch.tensor([[448.0, 17.0, 18.0, 19.0, 2**-9, 2**-10, 3 * 2**-11]])
    values = fp8.quantise(x, (1, None)).values.float()
    assert values.tolist() == [[448.0, 16.0, 18.0, 20.0, 2**-9, 0.0, 2**-9]]


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x = torch.randn(4, 32)
    x[1, 3] = bad
    made = fp8.restore(*fp8.save(x), x.shape, torch.float32)
    assert bool(made[1, :16].isnan().all()), "never 448"
    assert bool(made[1, 16:].isfinite().all())
    assert bool(made[[0, 2, 3]].isfinite().all())


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-38, 3e38])
def test_the_ends_of_the_range(size: float) -> None:
    x = torch.full((2, 16), size)
    made = fp8.restore(*fp8.save(x), x.shape, torch.float32)
    assert bool(((made - x).abs() <= 2**-4 * size).all())


def test_a_scale_that_is_rounded_down_clips_by_less_than_it_rounds() -> None:
    x = torch.rand(4096, 16) + 1.0
    made = fp8.restore(*fp8.save(x), x.shape, torch.float32)
    assert float(((made - x).abs() / x).max()) <= 2**-4 * 1.01


def test_rows_do_not_know_each_other() -> None:
    x = torch.randn(6, 40)
    whole = fp8.restore(*fp8.save(x), x.shape, torch.float32)
    parts = [fp8.restore(*fp8.save(p), p.shape, torch.float32) for p in x.split(2)]
    assert torch.equal(whole, torch.cat(parts))


# ------------------------------------------------------------------ products


def plain_product(a: fp8.Quantised, b: fp8.Quantised, recipe: str) -> Tensor:
    """Return the sum over quantised numbers times scales in fp64, block by block."""
    sides = []
    for side, block in ((a, fp8.ACTIVATION_BLOCKS[recipe]), (b, fp8.WEIGHT_BLOCKS[recipe])):
        values = side.values.double().clone()
        rows, columns = block[0] or values.shape[0], block[1] or values.shape[1]
        for m in range(side.scales.shape[0]):
            for k in range(side.scales.shape[1]):
                values[m * rows : (m + 1) * rows, k * columns : (k + 1) * columns] *= float(
                    side.scales[m, k]
                )
        sides.append(values)
    return sides[0] @ sides[1].t()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [fp8.E4M3, fp8.E5M2])
def test_products_equal_those_of_the_quantised_numbers(recipe: str, dtype: torch.dtype) -> None:
    a, b = torch.randn(37, 300) * torch.rand(37, 1), torch.randn(130, 300)
    left = fp8.quantise(a, fp8.ACTIVATION_BLOCKS[recipe], dtype)
    right = fp8.quantise(b, fp8.WEIGHT_BLOCKS[recipe])
    made = fp8.scaled_product(left, right, recipe, torch.float32)
    expected = plain_product(left, right, recipe)
    assert float((made - expected).abs().max()) <= 2e-6 * float(expected.abs().max())
    assert float((made - a @ b.t()).abs().max()) > 1e-3, "negative control: it is FP8"


def two(dtype: torch.dtype = torch.float32) -> tuple[Stacked, list[Tensor]]:
    layers = [Linear(matrix("weight", Role.HIDDEN, rows, 40)) for rows in (24, 56)]
    for layer in layers:
        torch.nn.init.normal_(layer.weight)
        layer.to(dtype)
    return Stacked(*((layer, "weight") for layer in layers)), [layer.weight for layer in layers]


@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_layer_equals_its_plain_twin(recipe: str, saves: bool) -> None:
    stacked, weights = two()
    stacked.saves, stacked.recipe, stacked.gradients = saves, recipe, fp8.E5M2
    x, grad = torch.randn(3, 50, 40, requires_grad=True), torch.randn(3, 50, 80)
    y = multiply(x, stacked)
    assert isinstance(y, Tensor)
    got = torch.autograd.grad(y, [x, *weights], grad)
    q, of_weights = fp8.quantise, fp8.WEIGHT_BLOCKS[recipe]
    of_rows = fp8.ACTIVATION_BLOCKS[recipe]
    rows, whole = x.detach().flatten(0, 1), torch.cat([w.detach() for w in weights])
    g = grad.flatten(0, 1)
    small = q(rows, of_rows)
    kept = fp8.dequantise(small, of_rows, torch.float32) if saves else rows
    if recipe == "fp8_tensorwise":
        gw = plain_product(q(g.t(), of_rows, fp8.E5M2), q(kept.t(), of_weights), recipe)
    else:
        gw = g.double().t() @ kept.double()
    expected = (
        plain_product(small, q(whole, of_weights), recipe).view(3, 50, 80),
        plain_product(q(g, of_rows, fp8.E5M2), q(whole.t(), of_weights), recipe).view(x.shape),
        *gw.split([24, 56]),
    )
    for some, other in zip((y, *got), expected, strict=True):
        assert float((some - other).abs().max()) <= 5e-6 * float(other.abs().max())
    with torch.no_grad():
        assert torch.equal(multiply(x, stacked), y), "an evaluation computes the same"


class Groups(OwnsParameters):
    def __init__(self) -> None:
        super().__init__()
        self.own("w", ParamSpec("w", Role.EXPERT_UP, (3, 24, 40), fan_in=40, fan_out=24))
        torch.nn.init.normal_(self.w)
        self.stacked = Stacked((self, "w"))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("counts", [[7, 0, 22], [0, 0, 0]])
def test_grouped_products_equal_those_of_each_group(recipe: str, counts: list[int]) -> None:
    groups = Groups()
    groups.stacked.saves, groups.stacked.recipe = True, recipe
    alone = "fp8_rowwise" if recipe == "fp8_tensorwise" else recipe
    x = torch.randn(sum(counts), 40, requires_grad=True)
    y = multiply_groups(x, groups.stacked, torch.tensor(counts))
    assert isinstance(y, Tensor)
    grad = torch.randn(y.shape)
    got = torch.autograd.grad(y, [x, groups.w], grad)
    of_rows, of_weights = fp8.ACTIVATION_BLOCKS[alone], fp8.WEIGHT_BLOCKS[alone]
    made, gx, gw = [], [], []
    for rows, g, w in zip(x.detach().split(counts), grad.split(counts), groups.w, strict=True):
        small, w = fp8.quantise(rows, of_rows), w.detach()
        kept = fp8.dequantise(small, of_rows, torch.float64)
        made.append(plain_product(small, fp8.quantise(w, of_weights), alone))
        both = fp8.quantise(g, of_rows), fp8.quantise(w.t(), of_weights)
        gx.append(plain_product(*both, alone))
        gw.append(g.double().t() @ kept)
    for some, other in zip(
        (y, *got), (torch.cat(made), torch.cat(gx), torch.stack(gw)), strict=True
    ):
        assert some.shape == other.shape
        if other.numel():
            assert float((some - other).abs().max()) <= 5e-6 * max(float(other.abs().max()), 1e-9)


def scaled_mm(a: Tensor, b: Tensor, **given: Any) -> Tensor:
    """Reference with the documented checks and result of torch._scaled_mm on CUDA."""
    assert a.stride(1) == 1 == b.stride(0)
    assert a.stride(0) > 1 < b.stride(1)
    assert not any(size % 16 for size in (a.shape[1], *b.shape))
    sides = []
    for values, scales in ((a, given["scale_a"]), (b.t(), given["scale_b"].t())):
        rows, columns = values.shape
        assert scales.dtype == torch.float32
        if scales.numel() > 1 and scales.shape[1] > 1:
            assert scales.shape[1] == -(-columns // 128)
            if scales.shape[0] == rows:
                assert scales.stride() == (1, rows), "along the rows"
            else:
                assert scales.stride(0) % 4 == 0
                assert scales.stride(1) == 1
        else:
            assert given["scale_a"].is_contiguous()
            assert given["scale_b"].is_contiguous()
        down, beside = -(-rows // scales.shape[0]), -(-columns // scales.shape[1])
        each = scales.repeat_interleave(down, 0)[:rows]
        blocks = 128 if scales.shape[1] > 1 else beside
        sides.append(values.double() * each.repeat_interleave(blocks, 1)[:, :columns])
    return (sides[0] @ sides[1].t()).to(given["out_dtype"])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("columns", [512, 640])
def test_the_kernel_is_given_what_it_takes(
    recipe: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = torch.randn(37, columns), torch.randn(256, columns)
    left = fp8.quantise(a, fp8.ACTIVATION_BLOCKS[recipe])
    right = fp8.quantise(b, fp8.WEIGHT_BLOCKS[recipe])
    twin = fp8.emulated_product(left, right, recipe, torch.float32)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = (fp8.Quantised(*map(mode.from_tensor, side)) for side in (left, right))
        made = fp8._on_cuda(*fake, recipe, torch.bfloat16, fast=True)
        assert made.shape == (37, 256)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    got = fp8._on_cuda(left, right, recipe, torch.float32, fast=True)
    torch.testing.assert_close(got, twin, rtol=1e-5, atol=1e-4)
    if recipe == "fp8_tensorwise":  # tokens, in the gradient of a weight
        odd = fp8.quantise(a[:, :37], (None, None)), fp8.quantise(b[:, :37], (None, None))
        got = fp8._on_cuda(*odd, recipe, torch.float32, fast=False)
        twin = fp8.emulated_product(*odd, recipe, torch.float32)
        torch.testing.assert_close(got, twin, rtol=1e-5, atol=1e-4)


def test_torchs_own_product_of_numbers_under_one_scale() -> None:
    """torch has this kernel for CPUs too."""
    a, b = torch.randn(48, 512), torch.randn(256, 512)
    sides = fp8.quantise(a, (None, None)), fp8.quantise(b, (None, None))
    got = fp8._on_cuda(*sides, "fp8_tensorwise", torch.bfloat16, fast=False)
    twin = fp8.emulated_product(*sides, "fp8_tensorwise", torch.float32)
    assert float((got - twin).abs().max()) <= 2**-8 * float(twin.abs().max())


def test_the_grouped_kernel_is_given_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = torch.tensor([7, 0, 22])
    x, w = torch.randn(29, 64), torch.randn(3, 32, 64)
    small, weights = fp8.quantise(x, (1, None)), fp8.quantise(w, (1, None))

    def grouped(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, **given: Any) -> Tensor:
        assert a.is_contiguous()
        assert b.transpose(1, 2).is_contiguous()
        assert (scale_a.shape, scale_b.shape) == ((29,), (3, 32))
        assert given["offs"].dtype == torch.int32
        rows = torch.cat(
            [
                p.double() @ m.double() * s
                for p, m, s in zip(a.split([7, 0, 22]), b, scale_b, strict=True)
            ]
        )
        return (rows * scale_a[:, None]).to(given["out_dtype"])

    monkeypatch.setattr(torch, "_scaled_grouped_mm", grouped)
    got = fp8.grouped_on_cuda(small, weights, counts.cumsum(0).int(), torch.float32)
    of = partial(fp8.dequantise, block=(1, None), dtype=torch.float64)
    expected = torch.cat(
        [p @ m.t() for p, m in zip(of(small).split([7, 0, 22]), of(weights), strict=True)]
    )
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)
