"""Weights gathered in FP8: what a product reads, with the shape and type of the weight."""

# R output width, D input width

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from allometry.models import fp8

_KEEP = (
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.as_strided.default,
)


class Gathered(Tensor):
    """A weight [R, D] of the type ``dtype`` that is E4M3 ``values`` [R, D] times ``scale`` (0-dim).

    Autograd and FSDP2 see a tensor of ``dtype``, so its gradient has that type; ``products.py``
    reads ``values``. Whatever else computes with it gets the product of both.
    """

    values: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Gathered:
        """Make one, contiguous."""
        made: Gathered = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=dtype, device=values.device
        )
        made.values, made.scale = values, scale
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Keep FP8 through what FSDP2 makes of a parameter; decode for anything else."""
        if func in _KEEP:
            weight = args[0]
            assert func is not _KEEP[2] or tuple(args[1]) == tuple(weight.shape), args[1]
            return cls(weight.values, weight.scale, weight.dtype)
        args, kwargs = tree_map_only(Gathered, cls.decoded, (args, kwargs or {}))
        return func(*args, **kwargs)

    def decoded(self) -> Tensor:
        """Return the weight as a tensor like any other."""
        wide = torch.promote_types(self.dtype, torch.float32)
        return (self.values.to(wide) * self.scale.to(wide)).to(self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        """Tell torch's compiler what it is made of."""
        return ["values", "scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], dtype: torch.dtype, size: Any, stride: Any
    ) -> Gathered:
        """Make it again of its parts."""
        return Gathered(inner["values"], inner["scale"], dtype)


def quantised(weights: Sequence[Tensor]) -> fp8.Quantised | None:
    """Return weights, one below the other, under one scale; None: they were not gathered in FP8.

    Weights of one input are gathered under one scale.
    """
    first = weights[0]
    if not isinstance(first, Gathered):
        return None
    parts = [weight.values.view(torch.uint8) for weight in weights if isinstance(weight, Gathered)]
    assert len(parts) == len(weights), "weights of one input are gathered alike"
    values = parts[0] if len(parts) == 1 else torch.cat(parts)
    return fp8.Quantised(values.view(fp8.E4M3), first.scale.view(1, 1))
