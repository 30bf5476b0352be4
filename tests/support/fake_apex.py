"""Substitute for the parts of NVIDIA's apex that a run calls, in torch, with call counts."""

from __future__ import annotations

import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Counter[str]:
    """Make ``apex`` and ``amp_C`` importable, also for find_spec; return the call counts."""
    calls: Counter[str] = Counter()
    place = folder / "apex"
    for package in ("", "optimizers", "normalization"):
        (place / package).mkdir(parents=True, exist_ok=True)
        (place / package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(folder))
    for name in ("apex", "apex.optimizers", "apex.normalization"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def multi_tensor_applier(kernel: Any, skip: Tensor, lists: list[list[Tensor]], *rest: Any):
        calls["applier"] += 1
        return kernel(65536, skip, lists, *rest)

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    functions = {
        "apex.multi_tensor_apply": {"multi_tensor_applier": multi_tensor_applier},
        "apex.normalization.fused_layer_norm": {
            "fused_rms_norm_affine": counted("norm", _fused_rms_norm_affine)
        },
        "amp_C": {"multi_tensor_adam_capturable": counted("adam", _multi_tensor_adam_capturable)},
    }
    for name, members in functions.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def _fused_rms_norm_affine(
    input: Tensor, weight: Tensor, normalized_shape: Any, eps: float = 1e-6
) -> Tensor:
    assert tuple(normalized_shape) == tuple(weight.shape) == input.shape[-1:]
    assert input.dtype == weight.dtype
    return torch.nn.functional.rms_norm(input, normalized_shape, weight, eps)


def _multi_tensor_adam_capturable(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: list[list[Tensor]],
    lr: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: Tensor,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    inv_scale: Tensor,
) -> None:
    assert (mode, bias_correction) == (1, 1), "decoupled decay, and both corrections"
    assert noop_flag.dtype == step.dtype == torch.int32
    assert (int(noop_flag), float(inv_scale)) == (0, 1.0)
    for g, p, m, v in zip(*tensor_lists, strict=True):
        assert g.shape == p.shape == m.shape == v.shape
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        first, second = 1 - beta1 ** int(step), 1 - beta2 ** int(step)
        update = (m / first) / ((v / second).sqrt() + epsilon) + weight_decay * p
        p.sub_(lr * update)
