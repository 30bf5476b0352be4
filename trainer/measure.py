"""Time kernels on a run's own shapes, forward and backward."""

# B sequences of a micro-batch, L tokens in a sequence, T = B*L, N query heads, K key/value heads,
# H head width, D width

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from allometry.models.attention import RUN
from allometry.models.documents import Documents
from allometry.models.kernels import NORMS
from allometry.models.quantiser import quantise
from allometry.optim import adamw
from allometry.optim.matrix_ops import LocalMatrixOps
from allometry.optim.states import Item
from allometry.trainer.record.timing import clock_of

Outcome = float | str
"""Milliseconds of a call, or the reason why it failed."""

REPEATS, WARM_UP = 7, 2
# Maximum difference divided by the largest element. Kernels in bf16 round at different points of a
# sum.
TOLERANCE = 5e-2
ADAMW_ELEMENTS = 2**22, 8
"""Elements of a tensor, and number of tensors, for which AdamW's step is timed."""


@dataclass(frozen=True)
class AttentionShape:
    """Shape of one micro-batch in the attention of one rank.

    ``documents``: lengths of the documents in the T tokens; None: each sequence is one document.
    ``compiled``: True if the run compiles its blocks. ``window``: window of the model's windowed
    layers, which are timed if the model has such layers.
    """

    sequences: int
    length: int
    heads: int
    kv_heads: int
    head_width: int
    dtype: torch.dtype
    documents: tuple[int, ...] | None
    compiled: bool
    window: int | None = None

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return random q, k and v that require gradients, without using the run's generators."""
        own = torch.Generator(device).manual_seed(0)
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (
            torch.randn(
                *(self.sequences, self.length, n, self.head_width), generator=own, device=device
            )
            .to(self.dtype)
            .requires_grad_()
            for n in heads
        )
        return q, k, v

    def packed(self, device: torch.device) -> Documents | None:
        """Return the documents in the form that the model receives."""
        if self.documents is None:
            return None
        ends = torch.tensor([0, *self.documents], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        positions = torch.cat([torch.arange(n) for n in self.documents])
        return Documents(
            ends.to(device),
            max(self.documents),
            positions.view(self.sequences, self.length).to(device),
            cu_host=ends,
        )


def time_attention(
    names: Sequence[str],
    shape: AttentionShape,
    device: torch.device,
    run: Mapping[str, Callable[..., Tensor]] = RUN,
) -> dict[str, Outcome]:
    """Time attention back ends; a back end that differs from the first working one has failed.

    Each back end is compiled if the run compiles its blocks. For example,
    ``time_attention(["flash", "flash2"], shape, device)`` returns ``{"flash": 1.1, "flash2": 0.8}``
    in milliseconds.
    """
    qkv, documents = shape.inputs(device), shape.packed(device)
    scale, more = shape.head_width**-0.5, {}
    if shape.window is not None and shape.window < shape.length:
        more["window"] = shape.window
    expected: list[Tensor] = []
    times: dict[str, Outcome] = {}
    for name in names:
        attend = torch.compile(run[name], fullgraph=True) if shape.compiled else run[name]

        def once(attend: Callable[..., Tensor] = attend) -> list[Tensor]:
            o_BLNH = attend(*qkv, documents, scale, **more)
            return [o_BLNH, *torch.autograd.grad(o_BLNH, qkv, qkv[0].detach())]

        times[name] = _timed(once, device, expected)
    return times


def time_norms(
    names: Sequence[str], rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Outcome]:
    """Time the kernels of RMSNorm on [rows, width]."""
    own = torch.Generator(device).manual_seed(0)
    x_TD = torch.randn(rows, width, generator=own, device=device).to(dtype).requires_grad_()
    weight_D = torch.ones(width, device=device, dtype=dtype, requires_grad=True)
    expected: list[Tensor] = []

    def once(name: str) -> list[Tensor]:
        y_TD = NORMS[name](x_TD, (width,), weight_D, 1e-5)
        return [y_TD, *torch.autograd.grad(y_TD, (x_TD, weight_D), x_TD.detach())]

    return {name: _timed(lambda name=name: once(name), device, expected) for name in names}


def time_quantisers(
    names: Sequence[str], rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Outcome]:
    """Time the kernels that round rows to FP8, on [rows, width]."""
    own = torch.Generator(device).manual_seed(0)
    x_TD = torch.randn(rows, width, generator=own, device=device).to(dtype)
    expected: list[Tensor] = []

    def once(name: str) -> list[Tensor]:
        made = quantise(x_TD, (1, None), fused=name == "triton")
        return [made.values.float(), made.scales]

    return {name: _timed(lambda name=name: once(name), device, expected) for name in names}


def time_adamw(names: Sequence[str], device: torch.device) -> dict[str, Outcome]:
    """Time the fused kernels of AdamW on a few large parameters."""
    elements, number = ADAMW_ELEMENTS
    expected: list[Tensor] = []

    def step_by(name: str) -> Callable[[], list[Tensor]]:
        group = {
            "kernel": name,
            **{"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
        }
        parameters = [torch.ones(elements, device=device) for _ in range(number)]
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.full_like(parameter, 1.0 + index)
        items = [Item(str(index), each, group) for index, each in enumerate(parameters)]
        state: dict[Tensor, dict[str, Tensor]] = {each: {} for each in parameters}
        adamw.init_states(items, state)

        def step() -> list[Tensor]:
            adamw.adamw(items, state, LocalMatrixOps())
            return parameters

        return step

    return {name: _timed(step_by(name), device, expected) for name in names}


def _timed(
    once: Callable[[], list[Tensor]], device: torch.device, expected: list[Tensor]
) -> Outcome:
    """Return the median time, or the reason of a failure or of a difference from ``expected``."""
    clock = clock_of(device)
    try:
        found = [tensor.detach().clone() for tensor in once()]
        for some, other in zip(found, expected or found, strict=True):
            error = (some.double() - other.double()).abs().max() / other.abs().max()
            if not float(error) <= TOLERANCE:  # also true for NaN
                return f"gives other numbers (by {float(error):.1e} of the largest)"
        times = []
        for repeat in range(WARM_UP + REPEATS):
            start = clock.mark()
            once()
            seconds = clock.seconds(start, clock.mark())
            if repeat >= WARM_UP:
                times.append(1e3 * seconds)
    except (torch.OutOfMemoryError, MemoryError):
        return "does not fit the device's memory"
    except Exception as error:  # a kernel made for other devices can raise any exception
        return f"fails here ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    if not expected:
        expected.extend(found)
    return statistics.median(times)
