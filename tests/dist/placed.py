"""Layouts of a tiny mixture of experts, and tensors sharded by torch like its parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

import tiny

# Rows of 61, 24, 12, 21, 26 and 10, and 6 experts: 4 ranks get unequal shards, and one of them an
# empty one.
MOE = {
    "kind": "moe",
    "vocab_size": tiny.VOCAB,
    "width": 21,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "first_dense_layers": 1,
    "ffn_width": 26,
    "experts": {"kind": "swiglu", "num_experts": 6, "experts_per_token": 2, "width": 10},
    "router": {"gate": "sigmoid", "balance": {"kind": "bias", "rate": 0.01}},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "alone-zero3": (1, {"zero": {"stage": 3}}),
    "zero0": (2, {}),
    "zero1": (2, {"zero": {"stage": 1}}),
    "zero2": (2, {"zero": {"stage": 2}}),
    "zero3-offloaded": (2, {"zero": {"stage": 3, "offload": "cpu"}}),
    "zero0-4": (4, {}),
    "zero3-4": (4, {"zero": {"stage": 3}}),
    "replicas2-zero3": (4, {"zero": {"stage": 3, "replicas": 2}}),
    "tp2": (2, {"tp": 2}),
    "tp2-zero3": (4, {"tp": 2, "zero": {"stage": 3}}),
    "ep2": (2, {"ep": 2}),
    "ep2-zero3": (4, {"ep": 2, "zero": {"stage": 3}}),
    "ep2-tp2-zero1": (4, {"ep": 2, "tp": 2, "zero": {"stage": 1}}),
    "pp2": (2, {"pp": 2}),
    "pp2-zero1": (4, {"pp": 2, "zero": {"stage": 1}}),
    "pp2-tp2": (4, {"pp": 2, "tp": 2}),
}


def given(name: str, shape: Sequence[int]) -> Tensor:
    """Return an unsharded tensor of normal numbers, determined by name and shape."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def like(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's shard of ``whole``, sharded by torch like the parameter."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()
