"""SGD-SaI: momentum with a rate for each tensor from its first gradient (arXiv 2412.11768)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from allometry.optim.matrix_ops import MatrixOps, partial_sums, squared_norms_of_parts
from allometry.optim.states import (
    Item,
    State,
    count_step,
    init_like_parameters,
    init_steps,
    local_states,
)


def init_states(items: Sequence[Item], state: State, ops: MatrixOps) -> None:
    """Create ``momentum_buffer`` like the parameter, ``gsnr`` [M] (ρ of each matrix), and ``step``.

    ρ is a state, so a resumed run continues with its initial value.
    """
    init_like_parameters(items, state, "momentum_buffer")
    init_steps(items, state)
    for item in items:
        if "gsnr" not in state[item.parameter]:
            count = item.parameter.shape[0] if item.parameter.dim() == 3 else 1
            state[item.parameter]["gsnr"] = torch.zeros(
                count, dtype=item.part.dtype, device=item.part.device
            )


def sgd_sai(items: Sequence[Item], state: State, ops: MatrixOps) -> None:
    """Update ``items`` in place.

    In the first step ρ = ``signal_to_noise`` of G for each logical matrix, and B ← G; later B ← μB
    + (1−μ)G. W ← (1−ηλ)W − ηρB. Each expert of a stack has its own ρ.
    """
    momenta = local_states(items, state, "momentum_buffer")
    first = [step == 1 for step in count_step(items, state)]
    _measure([item for item, new in zip(items, first, strict=True) if new], state, ops)
    parameters = [item.parameter for item in items]
    gains = ops.factors(parameters, [state[parameter]["gsnr"] for parameter in parameters])
    for item, momentum, gain, new in zip(items, momenta, gains, first, strict=True):
        keep, rate = item.group["momentum"], item.group["lr"]
        if new:
            momentum.copy_(item.gradient)
        else:
            momentum.mul_(keep).add_(item.gradient, alpha=1.0 - keep)
        item.part.mul_(1.0 - item.group["weight_decay"] * rate)
        item.part.sub_(momentum * (gain * rate))


def signal_to_noise(total: Tensor, squares: Tensor, count: int, eps: float) -> Tensor:
    """Return ρ = ‖g‖/(std(g) + ε) [M] from Σg and Σg² [M] of ``count`` elements each.

    The standard deviation is unbiased (0 for one element). ρ = √count·√(1 + (mean/std)²)
    approximately, so mostly √count. For a zero gradient ρ is undefined, and the result is √count.
    The published code gives 0 and never changes the tensor again: hidden matrices behind a head of
    zeros, or an expert without tokens in the first step.
    """
    variance = (squares - total.square() / count) / max(1, count - 1)
    deviation = variance.clamp(min=0.0).sqrt() if count > 1 else torch.zeros_like(variance)
    ratio = squares.sqrt() / (deviation + eps)
    return torch.where(squares > 0.0, ratio, torch.full_like(ratio, count**0.5))


def _measure(items: Sequence[Item], state: State, ops: MatrixOps) -> None:
    """Compute ρ of parameters in their first step, with one reduction for all parameters."""
    if not items:
        return
    parameters = [item.parameter for item in items]
    gradients = [item.gradient for item in items]
    partials = [*map(partial_sums, gradients), *squared_norms_of_parts(gradients)]
    sums = ops.sums([*parameters, *parameters], partials)
    totals, squares = sums[: len(items)], sums[len(items) :]
    for item, total, square in zip(items, totals, squares, strict=True):
        count = item.parameter.numel() // len(total)
        gsnr = signal_to_noise(total, square, count, item.group["eps"])
        state[item.parameter]["gsnr"].copy_(gsnr)
