"""Products of activations with weights: those of one input in one, each weight cast once a step.

``Stacked`` names parameters that multiply the same input: gate and up, or queries, keys and values.
Parameters stay apart, in names, roles, checkpoints and optimizers; what a product reads is one
matrix, a copy in the compute type with their rows one below the other. ``cast_once`` fills these
copies at the start of a step, in memory that stays, and all micro-batches compute with them. Where
nothing is cast (fp32), nothing is copied either and each weight has a product of its own. What
FSDP2 gathers is cast already; it is put together where it is used and not kept for backward.

The gradient of a weight is made in the parameter's type by the product itself where torch can
(CUDA: cuBLAS accumulates in fp32 anyway and writes that), so micro-batches add up what was never
rounded to bf16; autograd keeps the first as it is and adds the others in place, in one pass.
"""

# T tokens, D input width, R output width of all weights together

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allometry.models import fp8
from allometry.models.gathered import quantised
from allometry.models.parameters import OwnsParameters, local_weight
from allometry.models.quantiser import quantise, save
from allometry.scaling.roles import Role

COMPUTE = (False, "", fp8.E4M3, False)
"""``Stacked.how`` where nothing is FP8."""

_WIDE_OUTPUT = "dtype" in torch.ops.aten.mm.overloads()


class Stacked:
    """Weights [..., out, in] of one input; ``places`` are their owners and names there.

    ``saves``: keep the input for backward in FP8. ``recipe``: how FP8 products are scaled, as in
    ``precision.linears``, "" for products in the compute type; ``gradients``: the type of incoming
    gradients in them; ``fused``: whether Triton's kernels round rows. ``ready``: an input and what
    the kernel that made it has made of it in FP8. ``watch`` sees each input while somebody looks.
    ``copy``: the weights in the compute type, one below the other, while ``cast_once`` lasts.
    ``plain``: leave derivatives to autograd, as schedules need that split a backward in two (a
    function of ours would compute both halves twice). It is the plain twin of the rest.
    """

    def __init__(self, *places: tuple[OwnsParameters, str]) -> None:
        self.places = places
        self.copy: Tensor | None = None
        self.plain = False
        self.saves, self.recipe, self.gradients, self.fused = COMPUTE
        self.ready: tuple[Tensor, fp8.Quantised] | None = None
        self.watch: Callable[[Tensor], None] | None = None
        self._memory: Tensor | None = None

    @property
    def role(self) -> Role:
        """What the weights are for: of one input, the same for all."""
        owner, name = self.places[0]
        return owner.specs[name].role

    @property
    def how(self) -> tuple[bool, str, torch.dtype, bool]:
        """``saves``, ``recipe``, ``gradients`` and ``fused``."""
        return self.saves, self.recipe, self.gradients, self.fused

    @property
    def row_block(self) -> fp8.Block | None:
        """The block of the input's scales, where it lies in a row; None: it does not, or no FP8."""
        block = fp8.ACTIVATION_BLOCKS[self.recipe] if self.recipe else fp8.SAVED
        return block if (self.recipe or self.saves) and block[0] == 1 else None

    def offer(self, x: Tensor, kept: fp8.Quantised) -> None:
        """Say what ``fp8.save`` has made of ``x``, which will be multiplied next.

        Compiled, equal results are one anyway.
        """
        wanted = self.saves and not self.recipe and self.ready is None
        if wanted and not torch.compiler.is_compiling():
            self.ready = x, kept

    def taken(self, x: Tensor) -> fp8.Quantised | None:
        """Return what is ``ready`` of this very input, and forget it."""
        if self.ready is None:
            return None
        (made_of, small), self.ready = self.ready, None
        return small if made_of is x else None

    def weights(self) -> tuple[Tensor, ...]:
        """Return this rank's part of each weight."""
        return tuple(local_weight(getattr(owner, name)) for owner, name in self.places)

    def joins(self, dtype: torch.dtype) -> bool:
        """Return whether one product takes all of them: they are cast, or gathered in half."""
        if self.saves or self.recipe:  # one input, kept and rounded once
            return True
        cast = self.copy is not None or getattr(*self.places[0]).dtype != dtype
        return cast or (len(self.places) > 1 and dtype.itemsize <= 2)

    def rows(self) -> list[int]:
        """Return the rows of each, here."""
        return [weight.shape[-2] for weight in self.weights()]

    def joined(self, dtype: torch.dtype) -> Tensor:
        """Return the copy, or make one of the weights, differentiable."""
        return join(self.parts(), dtype)

    def parts(self) -> tuple[Tensor, ...]:
        """Return the copy alone, or the weights."""
        return self.weights() if self.copy is None else (self.copy,)

    def room(self, dtype: torch.dtype) -> list[Tensor]:
        """Return the parts of ``copy``, to be filled; their memory is asked for once."""
        weights = self.weights()
        first = weights[0]
        rows = [weight.shape[-2] for weight in weights]
        shape = (*first.shape[:-2], sum(rows), first.shape[-1])
        kept = self._memory
        if kept is None or (kept.shape, kept.dtype, kept.device) != (shape, dtype, first.device):
            self._memory = torch.empty(shape, dtype=dtype, device=first.device)
        assert self._memory is not None
        self.copy = self._memory
        return list(self.copy.split(rows, dim=-2))


def join(weights: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """Return weights in ``dtype``, their rows one below the other."""
    cast = [weight.to(dtype) for weight in weights]
    return cast[0] if len(cast) == 1 else torch.cat(cast, dim=-2)


Joined = Tensor | tuple[Tensor, ...]
"""What several weights made of one input: side by side in one tensor [..., R], or each its own."""


def multiply(x: Tensor, stacked: Stacked) -> Joined:
    """Return x [..., D] times the weights [out, D] transposed, in x's type."""
    if stacked.watch is not None:
        stacked.watch(x)
    ready, weights = stacked.taken(x), stacked.weights()
    if not stacked.joins(x.dtype):
        made = tuple(F.linear(x, weight) for weight in weights)
        return made[0] if len(made) == 1 else made
    # Without gradients, too, as torch's compiler then counts the arguments of a function of ours.
    if not torch.is_grad_enabled() or (stacked.plain and not (stacked.saves or stacked.recipe)):
        return _forward(x, stacked.parts(), stacked.recipe, stacked.fused, ready)[0]
    y: Tensor = _Multiply.apply(x, ready, stacked.copy, *stacked.how, *weights)
    return y


def saved_linear(x: Tensor, weight: Tensor, kept: fp8.Quantised | None = None) -> Tensor:
    """Return ``F.linear(x, weight)`` in x's type, which keeps x for backward in FP8.

    ``kept``: what ``fp8.save`` has made of x.
    """
    if not torch.is_grad_enabled():
        return F.linear(x, weight.to(x.dtype))
    y: Tensor = _Multiply.apply(x, kept, None, True, *COMPUTE[1:], weight)
    return y


def separate(made: Joined, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """Return what each weight made; views where they are side by side."""
    return made.split(list(widths), dim=-1) if isinstance(made, Tensor) else made


def _forward(
    x: Tensor,
    weights: tuple[Tensor, ...],
    recipe: str,
    fused: bool,
    small: fp8.Quantised | None,
) -> tuple[Tensor, fp8.Quantised | None]:
    """Return the product, and x in FP8 where the product read that."""
    if not recipe:
        return F.linear(x, join(weights, x.dtype)), None
    if small is None:
        rows = x.reshape(-1, x.shape[-1])
        small = quantise(rows, fp8.ACTIVATION_BLOCKS[recipe], fused=fused)
    weight = quantised(weights)
    if weight is None:
        weight = quantise(join(weights, x.dtype), fp8.WEIGHT_BLOCKS[recipe], fused=fused)
    y_TR = fp8.scaled_product(small, weight, recipe, x.dtype, fast=True)
    return y_TR.view(*x.shape[:-1], -1), small


class _Multiply(torch.autograd.Function):
    """One product forward, one for x and one for all weights backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        ready: fp8.Quantised | None,
        whole_RD: Tensor | None,
        saves: bool,
        recipe: str,
        gradients: torch.dtype,
        fused: bool,
        *weights: Tensor,
    ) -> Tensor:
        ctx.rows = [len(weight) for weight in weights]
        ctx.dtype, ctx.shape, ctx.compute = weights[0].dtype, x.shape, x.dtype
        ctx.saves, ctx.how = saves, (recipe, gradients, fused)
        parts = weights if whole_RD is None else (whole_RD,)
        y, small = _forward(x, parts, recipe, fused, ready)
        kept: tuple[Tensor, ...] = ()
        if any(ctx.needs_input_grad[7:]):  # of frozen weights there is no gradient that reads x
            kept = (x,) if not saves else small or ready or save(x, fused=fused)
        ctx.kept = len(kept)
        # What is no step's copy is made again: FSDP2 frees weights, and gathers them for backward.
        ctx.save_for_backward(*kept, *(weights if whole_RD is None else (whole_RD,)))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing computes them again and hands them over
        kept, weights = saved[: ctx.kept], saved[ctx.kept :]
        grad_TR, grad_x = grad.reshape(-1, grad.shape[-1]), None
        if ctx.needs_input_grad[0]:
            grad_x = _of_input(grad_TR, weights, *ctx.how).view(ctx.shape)
        trained: Sequence[bool] = ctx.needs_input_grad[7:]
        made: list[Tensor | None] = [None] * len(ctx.rows)
        if kept:
            x_TD = _restored(ctx, kept).reshape(-1, ctx.shape[-1])
            rows = [n for n, wanted in zip(ctx.rows, trained, strict=True) if wanted]
            chosen_TR = chosen(grad_TR, ctx.rows, trained)
            of_weights = _of_weight(chosen_TR, x_TD, *ctx.how[:2], ctx.dtype).split(rows)  # type: ignore[call-arg]
            made = placed(of_weights, trained)
        return grad_x, None, None, None, None, None, None, *made


def chosen(grad_TR: Tensor, rows: Sequence[int], trained: Sequence[bool]) -> Tensor:
    """Return the columns of those of several weights, of so many ``rows``, that are trained."""
    if all(trained):
        return grad_TR
    parts = zip(grad_TR.split(list(rows), dim=1), trained, strict=True)
    return torch.cat([part for part, wanted in parts if wanted], dim=1)


def placed(made: Iterable[Tensor], trained: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradients ``made`` of trained weights, and None for each that is frozen."""
    each = iter(made)
    return [next(each) if wanted else None for wanted in trained]


def _restored(ctx: Any, kept: tuple[Tensor, ...]) -> Tensor:
    if not ctx.saves:
        return kept[0]
    block = fp8.ACTIVATION_BLOCKS[ctx.how[0]] if ctx.how[0] else fp8.SAVED
    return fp8.dequantise(fp8.Quantised(*kept), block, ctx.compute)


def _of_input(
    grad_TR: Tensor, weights: tuple[Tensor, ...], recipe: str, gradients: torch.dtype, fused: bool
) -> Tensor:
    if not recipe:
        return grad_TR @ join(weights, grad_TR.dtype)
    grad = quantise(grad_TR, fp8.ACTIVATION_BLOCKS[recipe], gradients, fused=fused)
    small = quantised(weights)
    if small is None:
        whole_DR = join(weights, grad_TR.dtype).t()
        small = quantise(whole_DR, fp8.WEIGHT_BLOCKS[recipe], fused=fused)
    else:
        small = fp8.Quantised(small.values.t(), small.scales)
    return fp8.scaled_product(grad, small, recipe, grad_TR.dtype)


def _of_weight(
    grad_TR: Tensor, x_TD: Tensor, recipe: str, gradients: torch.dtype, dtype: torch.dtype
) -> Tensor:
    # Scales of rows and blocks would here be of tokens that lie together by chance of the layout.
    if recipe != "fp8_tensorwise":
        return product(grad_TR.t(), x_TD, dtype)
    whole = fp8.ACTIVATION_BLOCKS[recipe]
    grad, x = fp8.quantise(grad_TR.t(), whole, gradients), fp8.quantise(x_TD.t(), whole)
    return fp8.scaled_product(grad, x, recipe, dtype)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b in ``dtype``, rounded to it alone where torch can."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda and _WIDE_OUTPUT and dtype == torch.float32:
        return _wide_mm(a, b) if torch.compiler.is_compiling() else _wide(a, b)
    return (a @ b).to(dtype)


def _wide(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()


# What compiled code calls: not all versions of its compiler know this product of torch's.
@torch.library.custom_op("allometry::_wide_mm", mutates_args=())
def _wide_mm(a: Tensor, b: Tensor) -> Tensor:
    return _wide(a, b)


@_wide_mm.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)


def add_product_(sum_: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add a @ b to ``sum_`` in place, rounded to its type alone where torch can."""
    if a.dtype == sum_.dtype:
        return sum_.addmm_(a, b)
    if a.is_cuda and _WIDE_OUTPUT and sum_.dtype == torch.float32:
        torch.ops.aten.addmm.dtype_out(sum_, a, b, sum_.dtype, out=sum_)
        return sum_
    return sum_.add_(a @ b)


@contextmanager
def cast_once(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Cast weights to ``dtype`` now and compute with these while the context lasts.

    Otherwise each micro-batch casts them again, and those in flight in a pipeline keep as many
    copies. Parameters must not change meanwhile, nor be sharded (what FSDP gathers is cast
    already). Gradients are the parameters', of whatever was computed inside.
    """
    chosen = [
        stacked
        for stacked in stacks(model)
        if any(getattr(owner, name).dtype != dtype for owner, name in stacked.places)
    ]
    room: list[Tensor] = []
    values: list[Tensor] = []
    for stacked in chosen:
        if stacked.plain:
            stacked.copy = join(stacked.weights(), dtype)
        else:
            room += stacked.room(dtype)
            values += stacked.weights()
    if room:
        with torch.no_grad():
            torch._foreach_copy_(room, values)
    try:
        yield
    finally:
        for stacked in chosen:
            stacked.copy = None


def stacks(model: nn.Module) -> list[Stacked]:
    """Return what multiplies in ``model``; a weight that is in a larger stack in that one alone."""
    found = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Stacked)
    ]
    larger = {(id(o), n) for stacked in found if len(stacked.places) > 1 for o, n in stacked.places}
    return [
        stacked
        for stacked in found
        if len(stacked.places) > 1 or (id(stacked.places[0][0]), stacked.places[0][1]) not in larger
    ]
