"""AdamW for the flat partitions of DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

MOMENTS = ("exp_avg", "exp_avg_sq")


class FlatAdamW(torch.optim.Optimizer):
    """torch's fused AdamW, on every device, with the same update as runs without DeepSpeed.

    DeepSpeed's own AdamW accumulates powers of beta by multiplication, so a resumed run would
    differ from an uninterrupted one. States are allocated on first access rather than by a step.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        super().__init__([dict(group) for group in groups], {})

    def made(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the states of a flat partition, which are zeros before the first step."""
        state: dict[str, Tensor] = self.state[flat]
        if not state:
            state |= {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the partitions that DeepSpeed has placed in the parameter groups."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for flat in group["params"]:
                state = self.made(flat)
                adamw(
                    *([flat], [flat.grad], *([state[key]] for key in MOMENTS), []),
                    [state["step"]],
                    foreach=False,
                    fused=True,
                    amsgrad=False,
                    beta1=beta1,
                    beta2=beta2,
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
