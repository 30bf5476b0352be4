"""torchao's optimizers with compressed states, if torchao is installed.

Its states are blocks of 256 elements of the flattened tensor: E4M3 with one scale (``AdamWFp8``),
or codes of a table with 256 values (``AdamW8bit``, arXiv 2110.02861). Tensors with fewer than 4,096
elements, or with a size that 256 does not divide, stay in fp32.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

OPTIMIZERS = {"torchao FP8": "AdamWFp8", "torchao 8-bit": "AdamW8bit"}
BLOCK, LEAST = 256, 4096


def missing() -> str | None:
    """Return the reason why torchao is unavailable, or None."""
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed (pip install -e '.[benchmarks]'): left out"
    return None


def version() -> str | None:
    """Return the version of torchao, None without it."""
    return None if missing() else importlib.metadata.version("torchao")


def formats() -> dict[str, Callable[[Tensor, bool], Tensor]]:
    """Return functions (tensor, signed) -> rounded tensor, by name."""
    if missing():
        return {}
    from torchao.optim.subclass_8bit import OptimState8bit
    from torchao.optim.subclass_fp8 import OptimStateFp8

    def fp8(x: Tensor, signed: bool) -> Tensor:
        return _through(x, lambda: OptimStateFp8.zeros(x.shape, BLOCK, x.device, x.dtype))

    def eight_bits(x: Tensor, signed: bool) -> Tensor:
        return _through(x, lambda: OptimState8bit.zeros(x.shape, signed, BLOCK, x.device, x.dtype))

    return {"torchao FP8": fp8, "torchao 8-bit": eight_bits}


def _through(x: Tensor, zeros: Callable[[], Any]) -> Tensor:
    if x.numel() < LEAST or x.numel() % BLOCK:
        return x
    values: Tensor = zeros().copy_(x).dequantize()
    return values


def optimizer(name: str, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return torchao's AdamW over our parameter groups: rates, decay, betas and epsilon of each."""
    base: Any = getattr(importlib.import_module("torchao.optim"), OPTIMIZERS[name])

    class Rates(base):  # type: ignore[misc]
        """Optimizer whose rates are Python numbers between steps."""

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
            return super().step(closure)

    made: torch.optim.Optimizer = Rates([dict(group) for group in groups], block_size=BLOCK)
    return made


def held_bytes(tensor: Tensor) -> int:
    """Return the bytes of a state; for torchao's states, of their inner tensors."""
    parts = getattr(type(tensor), "tensor_attrs", None)
    if parts is None:
        return tensor.nbytes
    return sum(getattr(tensor, part).nbytes for part in parts)
