"""Products of activations with weights: one product per input, each weight cast once per step.

``Stacked`` groups parameters that multiply the same input: gate and up, or queries, keys and
values. The parameters stay separate in names, roles, checkpoints and optimizers; the product reads
one matrix, their rows concatenated in the compute type. ``cast_once`` fills these copies at the
start of a step, in a persistent buffer, and all micro-batches use them. Without a cast (fp32) no
copy is made and each weight has its own product. FSDP2 gathers weights that are cast already; these
are concatenated in each use and not saved for backward.

Where torch can (CUDA), the product writes a weight's gradient in the parameter's type: cuBLAS
accumulates in fp32 anyway. Micro-batches then sum gradients that were never rounded to bf16;
autograd keeps the first gradient and adds the others in place, in one pass.
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
"""``Stacked.how`` without FP8."""

_WIDE_OUTPUT = "dtype" in torch.ops.aten.mm.overloads()


class Stacked:
    """Weights [..., out, in] that multiply one input; ``places`` are (owner, parameter name).

    For example, ``Stacked((gate, "weight"), (up, "weight"))`` computes gate and up in one product.

    ``saves``: keep the input for backward in FP8. ``recipe``: scaling of FP8 products, as in
    ``precision.linears``; "" for products in the compute type. ``gradients``: the FP8 type of
    incoming gradients. ``fused``: round rows with Triton kernels. ``ready``: an input and its FP8
    copy, written by the kernel that computed the input. ``watch``: called with each input while an
    ``Observer`` is active. ``copy``: the weights in the compute type, concatenated by rows, inside
    ``cast_once``. ``plain``: leave derivatives to autograd, for schedules that split a backward
    into input and weight gradients (a custom autograd function would compute both twice);
    ``plain`` is also the reference for the custom function.
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
        """Role of the weights; weights of one input have one role."""
        owner, name = self.places[0]
        return owner.specs[name].role

    @property
    def how(self) -> tuple[bool, str, torch.dtype, bool]:
        """Return ``saves``, ``recipe``, ``gradients`` and ``fused``."""
        return self.saves, self.recipe, self.gradients, self.fused

    @property
    def row_block(self) -> fp8.Block | None:
        """Block of the input's scales if it is a part of one row; None otherwise or without FP8."""
        block = fp8.ACTIVATION_BLOCKS[self.recipe] if self.recipe else fp8.SAVED
        return block if (self.recipe or self.saves) and block[0] == 1 else None

    def offer(self, x: Tensor, kept: fp8.Quantised) -> None:
        """Store the FP8 copy that ``fp8.save`` made of ``x``, the next input of ``multiply``.

        Does nothing in compiled code, where the compiler merges equal computations.
        """
        wanted = self.saves and not self.recipe and self.ready is None
        if wanted and not torch.compiler.is_compiling():
            self.ready = x, kept

    def taken(self, x: Tensor) -> fp8.Quantised | None:
        """Return and clear the FP8 copy in ``ready``; None if it was made of another tensor."""
        if self.ready is None:
            return None
        (made_of, small), self.ready = self.ready, None
        return small if made_of is x else None

    def weights(self) -> tuple[Tensor, ...]:
        """Return this rank's shard of each weight."""
        return tuple(local_weight(getattr(owner, name)) for owner, name in self.places)

    def joins(self, dtype: torch.dtype) -> bool:
        """Return True if one product reads all weights: FP8, cast, or several in a half type."""
        if self.saves or self.recipe:  # the shared input is saved and rounded once
            return True
        cast = self.copy is not None or getattr(*self.places[0]).dtype != dtype
        return cast or (len(self.places) > 1 and dtype.itemsize <= 2)

    def rows(self) -> list[int]:
        """Return the number of local rows of each weight."""
        return [weight.shape[-2] for weight in self.weights()]

    def joined(self, dtype: torch.dtype) -> Tensor:
        """Return the copy, or the weights cast and concatenated, differentiable."""
        return join(self.parts(), dtype)

    def parts(self) -> tuple[Tensor, ...]:
        """Return the copy as a tuple of one, or the weights."""
        return self.weights() if self.copy is None else (self.copy,)

    def room(self, dtype: torch.dtype) -> list[Tensor]:
        """Return one view of ``copy`` for each weight, to be filled; the buffer is reused."""
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
    """Return the weights cast to ``dtype`` and concatenated by rows."""
    cast = [weight.to(dtype) for weight in weights]
    return cast[0] if len(cast) == 1 else torch.cat(cast, dim=-2)


Joined = Tensor | tuple[Tensor, ...]
"""Outputs of several weights for one input: one tensor [..., R], or one tensor for each weight."""


def multiply(x: Tensor, stacked: Stacked) -> Joined:
    """Return x [..., D] times the transposed weights [out, D], in x's type."""
    if stacked.watch is not None:
        stacked.watch(x)
    ready, weights = stacked.taken(x), stacked.weights()
    if not stacked.joins(x.dtype):
        made = tuple(F.linear(x, weight) for weight in weights)
        return made[0] if len(made) == 1 else made
    # Also without gradients, where torch.compile checks the argument count of autograd functions.
    if not torch.is_grad_enabled() or (stacked.plain and not (stacked.saves or stacked.recipe)):
        return _forward(x, stacked.parts(), stacked.recipe, stacked.fused, ready)[0]
    y: Tensor = _Multiply.apply(x, ready, stacked.copy, *stacked.how, *weights)
    return y


def saved_linear(x: Tensor, weight: Tensor, kept: fp8.Quantised | None = None) -> Tensor:
    """Return ``F.linear(x, weight)`` in x's type, keeping x for backward in FP8.

    ``kept``: the FP8 copy of x from ``fp8.save``, if there is one already.
    """
    if not torch.is_grad_enabled():
        return F.linear(x, weight.to(x.dtype))
    y: Tensor = _Multiply.apply(x, kept, None, True, *COMPUTE[1:], weight)
    return y


def separate(made: Joined, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """Return the output of each weight, of the given ``widths``; views of one tensor."""
    if not isinstance(made, Tensor):
        return made
    # The backward pass of a split concatenates, also when there is only one part.
    return (made,) if len(widths) == 1 else made.split(list(widths), dim=-1)


def _forward(
    x: Tensor,
    weights: tuple[Tensor, ...],
    recipe: str,
    fused: bool,
    small: fp8.Quantised | None,
) -> tuple[Tensor, fp8.Quantised | None]:
    """Return the product, and the FP8 copy of x if the product used one."""
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
    """One product in forward; in backward one for x and one for all weights."""

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
        if any(ctx.needs_input_grad[7:]):  # only gradients of trained weights read x
            kept = (x,) if not saves else small or ready or save(x, fused=fused)
        ctx.kept = len(kept)
        # Without a step's copy, join again in backward: FSDP2 frees weights and gathers them again.
        ctx.save_for_backward(*kept, *(weights if whole_RD is None else (whole_RD,)))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: checkpointing recomputes and unpacks them only once
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
    """Return the columns of trained weights in ``grad_TR``; ``rows``: columns of each weight."""
    if all(trained):
        return grad_TR
    parts = zip(grad_TR.split(list(rows), dim=1), trained, strict=True)
    return torch.cat([part for part, wanted in parts if wanted], dim=1)


def placed(made: Iterable[Tensor], trained: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradients ``made`` of the trained weights, with None for each frozen weight."""
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
    # Here the scale of a row or block would span several tokens, and the layout decides which.
    if recipe != "fp8_tensorwise":
        return product(grad_TR.t(), x_TD, dtype)
    whole = fp8.ACTIVATION_BLOCKS[recipe]
    grad, x = fp8.quantise(grad_TR.t(), whole, gradients), fp8.quantise(x_TD.t(), whole)
    return fp8.scaled_product(grad, x, recipe, dtype)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b in ``dtype``, without first rounding to the inputs' type where torch can."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda and _WIDE_OUTPUT and dtype == torch.float32:
        return _wide_mm(a, b) if torch.compiler.is_compiling() else _wide(a, b)
    return (a @ b).to(dtype)


def _wide(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()


# For compiled code: some versions of torch.compile do not support ``mm`` with ``out_dtype``.
@torch.library.custom_op("allometry::_wide_mm", mutates_args=())
def _wide_mm(a: Tensor, b: Tensor) -> Tensor:
    return _wide(a, b)


@_wide_mm.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)


def add_product_(sum_: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add a @ b to ``sum_`` in place, without first rounding the product where torch can."""
    if a.dtype == sum_.dtype:
        return sum_.addmm_(a, b)
    if a.is_cuda and _WIDE_OUTPUT and sum_.dtype == torch.float32:
        torch.ops.aten.addmm.dtype_out(sum_, a, b, sum_.dtype, out=sum_)
        return sum_
    return sum_.add_(a @ b)


@contextmanager
def cast_once(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Cast weights to ``dtype`` on entry; products inside the context use these copies.

    Outside the context each micro-batch casts the weights again, and a pipeline keeps one copy for
    each micro-batch in flight. Inside, parameters must not change and must not be sharded by FSDP,
    whose all-gather casts already. Gradients go to the parameters. For example,
    ``with cast_once(model, torch.bfloat16):`` around the micro-batches of a step.
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
    """Return the ``Stacked`` products of ``model``, without single weights of a larger stack."""
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
