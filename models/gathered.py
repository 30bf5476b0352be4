"""Weights all-gathered in FP8, as a tensor subclass with the weight's own shape and type."""

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
    """Weight [R, D] stored as E4M3 ``values`` [R, D] and a 0-dim ``scale``; its type is ``dtype``.

    Autograd and FSDP2 see a tensor of ``dtype``, so the gradient has that type. ``products.py``
    reads ``values``; any other operator receives ``values * scale`` in ``dtype``.
    """

    values: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Gathered:
        """Wrap ``values`` and ``scale``; the weight has the strides of ``values``."""
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
        """Keep FP8 through the view operators of FSDP2; decode the weight for all others."""
        if func in _KEEP:
            weight = args[0]
            assert func is not _KEEP[2] or tuple(args[1]) == tuple(weight.shape), args[1]
            return cls(weight.values, weight.scale, weight.dtype)
        args, kwargs = tree_map_only(Gathered, cls.decoded, (args, kwargs or {}))
        return func(*args, **kwargs)

    def decoded(self) -> Tensor:
        """Return the weight as a plain tensor of its ``dtype``."""
        wide = torch.promote_types(self.dtype, torch.float32)
        return (self.values.to(wide) * self.scale.to(wide)).to(self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        """Return the names of the inner tensors and the type, for torch.compile."""
        return ["values", "scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], dtype: torch.dtype, size: Any, stride: Any
    ) -> Gathered:
        """Rebuild the tensor from its inner tensors, for torch.compile."""
        return Gathered(inner["values"], inner["scale"], dtype)


def quantised(weights: Sequence[Tensor]) -> fp8.Quantised | None:
    """Return the weights concatenated by rows under one scale; None if not gathered in FP8.

    Weights that multiply the same input are gathered with a common scale.
    """
    first = weights[0]
    if not isinstance(first, Gathered):
        return None
    parts = [weight.values.view(torch.uint8) for weight in weights if isinstance(weight, Gathered)]
    assert len(parts) == len(weights), "weights of one input are gathered alike"
    values = parts[0] if len(parts) == 1 else torch.cat(parts)
    return fp8.Quantised(values.view(fp8.E4M3), first.scale.view(1, 1))
