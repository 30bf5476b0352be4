"""The back ends of attention: when each is used, what it keeps, which operators it runs.

One table, in order of preference, without torch: the choice in ``models/attention.py`` (which says
how each runs), selective checkpointing, ``allometry doctor`` and the memory estimate read it.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple


class AttentionCall(NamedTuple):
    """What attention is asked for.

    ``device``: cpu, cuda or meta; ``dtype``: bf16, fp16, fp32 or fp64; ``packed``: documents share
    a sequence; ``length``: tokens of a sequence; ``compiled``: whether torch.compile traces it.
    """

    device: str
    dtype: str
    packed: bool
    length: int
    compiled: bool


class AttentionBackend(NamedTuple):
    """One way to compute causal attention within documents.

    ``suits``: whether it can do a call on one of its ``devices`` (None: any) and is meant to.
    ``operators``: those of its forward as torch's dispatcher names them; some of them run in each
    call, and selective checkpointing keeps their results. ``package``: what must be installed
    beside torch, by import name, and ``install`` how.
    ``kept_bytes(heads, length, compute_bytes)``: bytes for each token that a backward needs beside
    queries, keys, values and output; the log-sum-exp in fp32 unless said.
    """

    name: str
    suits: Callable[[AttentionCall], bool]
    operators: tuple[str, ...]
    kept_bytes: Callable[[int, int, int], int] = lambda heads, length, compute_bytes: 4 * heads
    devices: tuple[str, ...] | None = None
    package: str | None = None
    install: str = ""


LONGEST_BLOCKED = 1024
"""Kept weights grow with L squared: longer sequences pay more memory than they save time."""

_SDPA = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::bmm",  # where no fused kernel takes the type
)


def _half_and_packed(call: AttentionCall) -> bool:
    return call.packed and call.dtype in ("bf16", "fp16")


BACKENDS: tuple[AttentionBackend, ...] = (
    AttentionBackend(  # products on blocks of queries, for short sequences in compiled code
        "blocked",
        lambda call: call.compiled and call.dtype == "bf16" and call.length <= LONGEST_BLOCKED,
        operators=("aten::bmm",),
        kept_bytes=lambda heads, length, compute_bytes: compute_bytes * heads * length,
        devices=("cpu",),
    ),
    AttentionBackend(  # torch's scaled_dot_product_attention
        "flash", lambda call: not call.packed, operators=_SDPA
    ),
    AttentionBackend(  # flash-attn's kernel for documents of any lengths
        "flash2",
        _half_and_packed,
        operators=("flash_attn::_flash_attn_varlen_forward",),
        devices=("cuda",),
        package="flash_attn",
        install="on a GPU machine with nvcc: pip install 'allometry[cuda]' --no-build-isolation",
    ),
    AttentionBackend(  # the same of torch
        "varlen",
        _half_and_packed,
        operators=("torch_attn::_varlen_attn",),
        devices=("cuda",),
    ),
    AttentionBackend(  # torch's flash kernel for CPUs on documents of like length
        "packed",
        lambda call: call.packed,
        operators=("allometry::packed_attention",),
        devices=("cpu",),
    ),
    AttentionBackend(  # scaled_dot_product_attention with a dense mask, which it keeps
        "masked",
        lambda call: call.packed,
        operators=_SDPA,
        kept_bytes=lambda heads, length, compute_bytes: 4 * heads + compute_bytes * length,
    ),
    AttentionBackend(  # softmax written out: what tests compare the others with
        "reference",
        lambda call: False,
        operators=("aten::bmm",),
        kept_bytes=lambda heads, length, compute_bytes: max(4, compute_bytes) * heads * length,
    ),
)


@functools.cache  # the file system is not to be asked in every layer
def installed(package: str | None) -> bool:
    """Return whether a package can be imported; None, torch alone, always can."""
    return package is None or importlib.util.find_spec(package) is not None


def choose_backend(
    call: AttentionCall, is_installed: Callable[[str | None], bool] = installed
) -> AttentionBackend:
    """Return the first back end of ``BACKENDS`` that suits the call."""
    for backend in BACKENDS:
        here = backend.devices is None or call.device in backend.devices
        if here and backend.suits(call) and is_installed(backend.package):
            return backend
    raise AssertionError(f"no back end of attention suits {call}")
