"""The AdamW that DeepSpeed is given for its flat parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

MOMENTS = ("exp_avg", "exp_avg_sq")


class FlatAdamW(torch.optim.Optimizer):
    """torch's fused AdamW, on every device: the update of any other run of ours.

    DeepSpeed's own multiplies powers of beta up as it goes, so that a run which resumes would
    differ from one that does not. States are made when they are asked for, not by a step.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        super().__init__([dict(group) for group in groups], {})

    def made(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the states of a flat part, zeros before the first step."""
        state: dict[str, Tensor] = self.state[flat]
        if not state:
            state |= {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parts that DeepSpeed has put into the groups."""
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
