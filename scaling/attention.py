"""Attention back ends: conditions of use, saved tensors and operators.

The module is one table, in order of preference, without torch. The selection in
``models/attention.py`` (which implements the back ends), the measurement at the start of a run,
selective checkpointing, ``allometry doctor`` and the memory estimate read this table.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple


class AttentionCall(NamedTuple):
    """Properties of an attention call.

    ``device``: cpu, cuda or meta; ``dtype``: bf16, fp16, fp32 or fp64; ``packed``: several
    documents share a sequence; ``length``: tokens of a sequence; ``compiled``: True if
    torch.compile traces the call; ``deterministic``: the same call must return the same bits;
    ``window``: maximum number of keys per query, None: unlimited.
    """

    device: str
    dtype: str
    packed: bool
    length: int
    compiled: bool
    head_width: int = 64
    deterministic: bool = False
    window: int | None = None

    @property
    def windowed(self) -> bool:
        """True if the window is shorter than the sequence."""
        return self.window is not None and self.window < self.length


def _always(call: AttentionCall) -> bool:
    return True


class AttentionBackend(NamedTuple):
    """An implementation of causal attention within documents.

    ``takes``: True if it supports a call on one of its ``devices`` (None: any); ``needs`` describes
    this condition; ``windows``: supports sliding windows; ``narrow_values``: supports values that
    are narrower than keys; ``meant``: True if it may be selected automatically. ``operators``:
    dispatcher names of its forward; each call runs some of these, and selective checkpointing saves
    their results. ``package``: import name of a package required in addition to torch; ``install``:
    command to install the package. ``deterministic``: the backward can be deterministic.
    ``kept_bytes(heads, length, compute_bytes)``: bytes per token saved for backward in addition to
    queries, keys, values, output and a mask; by default the log-sum-exp in fp32. ``dense_mask``:
    saves a mask [L, L] in the compute type, of each sequence if documents are packed, else one for
    all sequences.
    """

    name: str
    takes: Callable[[AttentionCall], bool]
    needs: str
    operators: tuple[str, ...]
    meant: Callable[[AttentionCall], bool] = _always
    kept_bytes: Callable[[int, int, int], int] = lambda heads, length, compute_bytes: 4 * heads
    devices: tuple[str, ...] | None = None
    package: str | None = None
    install: str = ""
    deterministic: bool = True
    windows: bool = False
    narrow_values: bool = False
    dense_mask: bool = False

    def kept(self, call: AttentionCall, heads: int, compute_bytes: int, sequences: int) -> int:
        """Return the bytes per token saved for the backward of a call with ``sequences``."""
        mask = compute_bytes * call.length if self.dense_mask else 0
        masks = mask if call.packed else mask // sequences
        return self.kept_bytes(heads, call.length, compute_bytes) + masks

    def able(self, call: AttentionCall) -> bool:
        """Return True if the back end supports the call, provided that its package is installed."""
        here = self.devices is None or call.device in self.devices
        bits = self.deterministic or not call.deterministic
        return here and self.takes(call) and bits and (self.windows or not call.windowed)


LONGEST_BLOCKED = 1024
"""Maximum length for ``blocked``. The saved attention weights grow with L squared: for longer
sequences they cost more memory than the time saved is worth.
"""

_SDPA = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::bmm",  # types without a fused kernel
)
_FLASH_ATTN = "on a GPU machine with nvcc: pip install 'allometry[cuda]' --no-build-isolation"
_HOPPER = "on an H100 or H200 with nvcc: python setup.py install in flash-attention's folder hopper"


def _half(widest: int, call: AttentionCall) -> bool:
    return call.dtype in ("bf16", "fp16") and call.head_width % 8 == 0 and call.head_width <= widest


_HALF = "bf16 or fp16 and heads of at most {} in steps of 8"

BACKENDS: tuple[AttentionBackend, ...] = (
    AttentionBackend(  # products on blocks of queries, for short sequences in compiled code
        "blocked",
        _always,
        "a CPU",
        operators=("aten::bmm",),
        meant=lambda call: (
            call.compiled and call.dtype == "bf16" and call.length <= LONGEST_BLOCKED
        ),
        kept_bytes=lambda heads, length, compute_bytes: compute_bytes * heads * length,
        devices=("cpu",),
        windows=True,
        narrow_values=True,
    ),
    AttentionBackend(  # torch's flash kernel; another SDPA kernel for wide types on CUDA
        "flash",
        lambda call: not call.packed,
        "sequences that are not packed with documents",
        operators=_SDPA,
    ),
    AttentionBackend(  # flash-attn's kernels for Hopper
        "flash3",
        functools.partial(_half, 256),
        _HALF.format(256),
        operators=("flash_attn_3::_flash_attn_forward", "flash_attn_3::fwd"),
        devices=("cuda",),
        package="flash_attn_interface",
        install=_HOPPER,
        windows=True,
    ),
    AttentionBackend(  # flash-attn's kernels
        "flash2",
        functools.partial(_half, 256),
        _HALF.format(256),
        operators=("flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward"),
        devices=("cuda",),
        package="flash_attn",
        install=_FLASH_ATTN,
        windows=True,
    ),
    AttentionBackend(  # torch's flash kernel for documents of any lengths
        "varlen",
        lambda call: call.packed and _half(256, call),
        "packed documents, " + _HALF.format(256),
        operators=("torch_attn::_varlen_attn",),
        devices=("cuda",),
    ),
    AttentionBackend(  # cuDNN's kernel; documents in batches of similar length
        "cudnn",
        functools.partial(_half, 128),
        _HALF.format(128),
        operators=("aten::_scaled_dot_product_cudnn_attention", "allometry::packed_attention"),
        devices=("cuda",),
        deterministic=False,
    ),
    AttentionBackend(  # torch's flex_attention, generated for document masks
        "flex",
        lambda call: (call.packed or call.windowed) and _half(256, call),
        "packed documents or sliding windows, " + _HALF.format(256),
        operators=("flex_attention",),
        devices=("cuda",),
        windows=True,
    ),
    AttentionBackend(  # torch's flash kernel for CPUs on documents of similar length
        "packed",
        lambda call: call.packed,
        "packed documents",
        operators=("allometry::packed_attention",),
        devices=("cpu",),
    ),
    AttentionBackend(  # scaled_dot_product_attention with a dense mask, which is saved
        "masked",
        lambda call: call.packed or call.windowed,
        "packed documents or sliding windows",
        operators=_SDPA,
        windows=True,
        dense_mask=True,
    ),
    AttentionBackend(  # explicit softmax: the reference of the tests
        "reference",
        _always,
        "nothing",
        operators=("aten::bmm",),
        meant=lambda call: False,
        windows=True,
        narrow_values=True,
        kept_bytes=lambda heads, length, compute_bytes: max(4, compute_bytes) * heads * length,
    ),
)

Installed = Callable[[str | None], bool]


@functools.cache  # avoids file system access in every layer
def installed(package: str | None) -> bool:
    """Return True if a package can be imported; None (torch alone) is always installed."""
    return package is None or importlib.util.find_spec(package) is not None


def choose_backend(call: AttentionCall, is_installed: Installed = installed) -> AttentionBackend:
    """Return the first back end of ``BACKENDS`` that supports the call and may be selected.

    For example, packed bf16 documents on CUDA without flash-attn select ``varlen``.
    """
    for backend in BACKENDS:
        if backend.able(call) and backend.meant(call) and is_installed(backend.package):
            return backend
    raise AssertionError(f"no back end of attention suits {call}")


def named(name: str) -> AttentionBackend:
    """Return the back end called ``name``."""
    return next(backend for backend in BACKENDS if backend.name == name)


def worth_measuring(call: AttentionCall, is_installed: Installed = installed) -> tuple[str, ...]:
    """Return the back ends that may be the fastest for a call on a GPU, in order of preference.

    The dense mask is excluded unless no other back end supports the call.
    """
    able = [b for b in BACKENDS if b.able(call) and b.meant(call) and is_installed(b.package)]
    return tuple(b.name for b in able if b.name != "masked") or ("masked",)


def refusal(name: str, call: AttentionCall, is_installed: Installed = installed) -> str | None:
    """Return the reason why a back end does not support a call, with a remedy; None if it does.

    For example, ``refusal("flash2", call)`` of a call on a CPU names the devices of ``flash2``.
    """
    backend = named(name)
    able = [b.name for b in BACKENDS if b.able(call) and is_installed(b.package)]
    others = f"use {', '.join(able)}"
    if backend.devices is not None and call.device not in backend.devices:
        return f"runs on {' or '.join(backend.devices)}, not on {call.device}; {others}"
    if not is_installed(backend.package):
        return f"needs {backend.package}, which is not installed; install it ({backend.install})"
    if call.deterministic and not backend.deterministic:
        return (
            "cannot give the same bits twice, which training.deterministic asks for; set "
            f"training.deterministic: false or {others}"
        )
    if call.windowed and not backend.windows:
        return f"has no sliding windows, which model.window={call.window} asks for; {others}"
    if not backend.takes(call):
        documents = "packed documents" if call.packed else "whole sequences"
        return (
            f"takes {backend.needs}, not {documents} in {call.dtype} with heads of "
            f"{call.head_width}; {others}"
        )
    return None
