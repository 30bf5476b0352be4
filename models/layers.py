"""Basic modules; each computes in the type of its activations, whatever the parameters' type."""

# B batch, L length, D width, V vocabulary, N heads, H head width, h = H/2

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allometry.configs.decoder import Activation
from allometry.models import fp8
from allometry.models.parameters import OwnsParameters, local_weight
from allometry.models.products import Joined, Stacked, multiply
from allometry.models.quantiser import kernels
from allometry.scaling.roles import ParamSpec


class Linear(OwnsParameters, nn.Linear):
    """``y = x @ weight.T``, plus a bias if its spec is given; weight [out, in]."""

    def __init__(self, spec: ParamSpec, bias: ParamSpec | None = None) -> None:
        # nn.Linear's own constructor would draw unused random numbers. The base class is needed
        # because torch's tensor-parallel styles check for nn.Linear.
        nn.Module.__init__(self)
        self.in_features, self.out_features = spec.fan_in, spec.fan_out
        self.own("weight", spec)
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.own("bias", bias)
        self.stacked = Stacked((self, "weight"))

    def forward(self, input: Tensor) -> Tensor:
        """Return [..., out] in ``input``'s type."""
        y = multiply(input, self.stacked)
        assert isinstance(y, Tensor)
        return self.plus_bias(y)

    def plus_bias(self, y: Tensor) -> Tensor:
        """Return the product ``y`` [..., out] plus the bias, if the layer has one."""
        return y if self.bias is None else y + local_weight(self.bias).to(y.dtype)


class Embedding(OwnsParameters, nn.Embedding):
    """Embedding table [V, D]; looked-up rows are returned in ``dtype``."""

    def __init__(self, spec: ParamSpec, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = spec.shape
        self.dtype = dtype
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.own("weight", spec)

    def forward(self, input: Tensor) -> Tensor:
        """Return [..., D] for token ids [...]."""
        # Look up, then cast: casting the used rows is cheaper than casting the table, and the
        # gradients of a frequent token are then summed in fp32.
        return F.embedding(input, local_weight(self.weight)).to(self.dtype)


class RMSNorm(OwnsParameters):
    """``x / rms(x) * weight`` over the last dimension (arXiv 1910.07467), computed in fp32.

    ``saves``: keep the input for backward in FP8. ``fused``: one kernel computes the norm and
    rounds both its input (for backward) and its output (for the product of ``feeds``).
    """

    weight: nn.Parameter

    def __init__(self, spec: ParamSpec, eps: float) -> None:
        super().__init__()
        self.eps, self.rms_norm = eps, F.rms_norm  # ``kernels.use_kernels`` may replace it
        self.saves, self.fused = False, False
        self.feeds: Stacked | None = None
        self.own("weight", spec)

    def forward(self, x: Tensor) -> Tensor:
        """Return x's shape and type; torch's operator widens half types to fp32 internally."""
        weight = local_weight(self.weight).to(x.dtype)
        if self.saves and torch.is_grad_enabled():
            own = kernels(self.fused)
            if own is not None and own.takes(x, fp8.SAVED):
                return _fused_norm(own, x, weight, self.eps, self.feeds)
            y: Tensor = _SavedNorm.apply(x, weight, self.eps, self.rms_norm)
            return y
        return self.rms_norm(x, (x.shape[-1],), weight, self.eps)


class _SavedNorm(torch.autograd.Function):
    """RMSNorm that keeps its input in FP8 and 1/rms of each row; same forward as RMSNorm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, norm: Any) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(*fp8.save(x), scale, weight)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        made: Tensor = norm(x, (x.shape[-1],), weight, eps)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_grad_norm(ctx, grad), None, None


class _FusedNorm(torch.autograd.Function):
    """Backward of RMSNorm for an output that a fused kernel has computed already."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        y: Tensor,
        scale: Tensor,
        values: Tensor,
        scales: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(values, scales, scale, weight)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return y.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_grad_norm(ctx, grad), None, None, None, None


def _fused_norm(own: Any, x: Tensor, weight: Tensor, eps: float, feeds: Stacked | None) -> Tensor:
    with torch.no_grad():
        made = own.norm(x, weight, eps, None if feeds is None else feeds.row_block)
    y: Tensor = _FusedNorm.apply(x, weight, made.y, made.scale, *made.saved)
    if feeds is not None and made.small is not None:
        feeds.ready = y, made.small
    return y


def _grad_norm(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    values, scales, scale, weight = ctx.saved_tensors
    unit = fp8.restore(values, scales, ctx.shape, scale.dtype) * scale
    grad = grad.to(scale.dtype)
    grad_weight = None
    if ctx.needs_input_grad[1]:
        summed = (grad * unit).reshape(-1, grad.shape[-1]).sum(0)
        grad_weight = summed.to(weight.dtype)
    grad = grad * weight
    along = (grad * unit).mean(-1, keepdim=True)
    grad_x = scale * (grad - unit * along)
    return grad_x.to(ctx.dtype), grad_weight


class Gate(NamedTuple):
    """Activation of the gate in a gated feed-forward.

    ``backward(grad, gate)`` is its derivative, written to ``grad_input`` if given.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[..., Tensor]


GATES: Mapping[Activation, Gate] = {
    "silu": Gate(F.silu, torch.ops.aten.silu_backward),
    "gelu_tanh": Gate(
        partial(F.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
}
"""Gate activations by ``model.activation``."""


def gated(
    gate_up: Joined,
    activation: Activation = "silu",
    *,
    saves: bool = False,
    feeds: Stacked | None = None,
) -> Tensor:
    """Return activation(gate) * up (arXiv 2002.05202), of a pair or of one tensor [..., 2F].

    One tensor gets one gradient tensor [..., 2F], as concatenating two halves would cost another
    pass. ``saves``: for backward, keep only ``gate_up``, in FP8. ``feeds``: the weights that
    multiply the result; if ``feeds.fused``, one kernel computes SwiGLU and rounds the result for
    that product. For example, ``gated((gate, up), "gelu_tanh")`` is GeGLU.
    """
    if not isinstance(gate_up, Tensor):
        gate, up = gate_up
        return GATES[activation].forward(gate) * up
    if saves and feeds is not None and activation == "silu" and torch.is_grad_enabled():
        own = kernels(feeds.fused)
        if own is not None and own.takes(gate_up, fp8.SAVED) and gate_up.shape[-1] % 32 == 0:
            return _fused_swiglu(own, gate_up, feeds)
    made: Tensor = (_SavedGated if saves else _Gated).apply(gate_up, activation)
    return made


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: Activation) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        active = GATES[activation].forward(gate)
        ctx.save_for_backward(gate_up, active)
        ctx.activation = activation
        return active * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gate_up, active = ctx.saved_tensors
        return _grad_gated(grad, gate_up, active, GATES[ctx.activation]), None


class _SavedGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: Activation) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        ctx.save_for_backward(*fp8.save(gate_up))
        ctx.shape, ctx.dtype, ctx.activation = gate_up.shape, gate_up.dtype, activation
        return GATES[activation].forward(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _grad_saved(ctx, grad, GATES[ctx.activation]), None


class _FusedSwiGLU(torch.autograd.Function):
    """Backward of SwiGLU for an output that a fused kernel has computed already."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, h: Tensor, values: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(values, scales)
        ctx.shape, ctx.dtype = gate_up.shape, gate_up.dtype
        return h.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _grad_saved(ctx, grad, GATES["silu"]), None, None, None


def _fused_swiglu(own: Any, gate_up: Tensor, feeds: Stacked) -> Tensor:
    with torch.no_grad():
        made = own.swiglu(gate_up, feeds.row_block)
    h: Tensor = _FusedSwiGLU.apply(gate_up, made.h, *made.saved)
    if made.small is not None:
        feeds.ready = h, made.small
    return h


def _grad_saved(ctx: Any, grad: Tensor, gate: Gate) -> Tensor:
    gate_up = fp8.restore(*ctx.saved_tensors, ctx.shape, ctx.dtype)  # type: ignore[call-arg]
    return _grad_gated(grad, gate_up, gate.forward(gate_up.chunk(2, dim=-1)[0]), gate)


def _grad_gated(grad: Tensor, gate_up: Tensor, active: Tensor, by: Gate) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    if torch.compiler.is_compiling():  # one output tensor as well, but without in-place writes
        return torch.cat([by.backward(grad * up, gate), grad * active], dim=-1)
    made = torch.empty_like(gate_up)
    of_gate, of_up = made.chunk(2, dim=-1)
    by.backward(grad * up, gate, grad_input=of_gate)
    torch.mul(grad, active, out=of_up)
    return made
