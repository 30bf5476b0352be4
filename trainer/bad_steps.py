"""Bad steps: whether an update is skipped, decided on the device."""

# W steps of the window; 2 numbers of a step: its loss and the norm of its gradient

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from allometry.configs.bad_steps import BadSteps
from allometry.configs.optimization import TrainingConfig

NORMAL = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""


class Judge:
    """Decides whether the update of a step is skipped, on the device and without waiting for it.

    A step is bad where its loss or gradient norm is not finite or is above the limit that the last
    W accepted steps give (``spike_limits``). A bad step leaves no trace in the window. All ranks
    give the same numbers, summed over all of them, and so decide alike.
    """

    def __init__(
        self, config: BadSteps, device: torch.device, facts: Mapping[str, Any] | None = None
    ) -> None:
        """``facts``: those of the checkpoint that the run goes on from; None: an empty window."""
        self._config = config
        self._window_2W = torch.full(
            (2, config.window_steps), math.nan, dtype=torch.float64, device=device
        )
        earlier = (facts or {}).get("accepted", {})
        kept = [earlier.get(key, [])[-config.window_steps :] for key in ("loss", "grad_norm")]
        if kept[0]:
            values = torch.tensor(kept, dtype=torch.float64, device=device)
            self._window_2W[:, -values.shape[1] :] = values

    @classmethod
    def of(
        cls, training: TrainingConfig, device: torch.device, facts: Mapping[str, Any] | None
    ) -> Judge | None:
        """Return what ``training.bad_steps`` asks for."""
        return None if training.bad_steps is None else cls(training.bad_steps, device, facts)

    def __call__(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Return (1 if the step is bad else 0, limit of the loss, limit of the norm), float64 [3].

        ``loss`` and ``norm`` are 0-dim float64 on the device. A limit is infinite where there is
        none. An accepted step enters the window.
        """
        numbers_2 = torch.stack([loss, norm])
        limits_2 = spike_limits(self._window_2W, self._config)
        bad = ~numbers_2.isfinite().all() | (numbers_2 > limits_2).any()
        moved_2W = torch.cat([self._window_2W[:, 1:], numbers_2[:, None]], dim=1)
        self._window_2W = torch.where(bad, self._window_2W, moved_2W)
        return torch.cat([bad.double()[None], limits_2])

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint says of the window (JSON; waits for the device)."""
        loss, norm = self._window_2W[:, ~self._window_2W.isnan().any(0)].tolist()
        return {"accepted": {"loss": loss, "grad_norm": norm}}


def spike_limits(window_2W: Tensor, config: BadSteps) -> Tensor:
    """Return the largest loss and norm [2] that are no spike; infinite if the window is not full.

    ``mad``: median + deviations * 1.4826 * median absolute deviation; the median of an even number
    is the mean of the two in the middle. ``sigma``: mean + deviations * standard deviation (the
    unbiased one), as OLMo-core's ``SkipStepOptimizer``.
    """
    if config.spikes == "sigma":
        spread_2 = window_2W.std(1)
        limits_2 = window_2W.mean(1) + config.deviations * spread_2
    elif config.spikes == "mad":
        center_2 = _median(window_2W)
        spread_2 = NORMAL * _median((window_2W - center_2[:, None]).abs())
        limits_2 = center_2 + config.deviations * spread_2
    else:
        limits_2 = torch.full_like(window_2W[:, 0], math.nan)
    full = ~window_2W.isnan().any()
    return torch.where(full & ~limits_2.isnan(), limits_2, math.inf)


def _median(x_2W: Tensor) -> Tensor:
    # torch.median is not deterministic on CUDA; of so few numbers sorting costs nothing.
    ordered_2W, count = x_2W.sort(dim=1).values, x_2W.shape[1]
    return (ordered_2W[:, (count - 1) // 2] + ordered_2W[:, count // 2]) / 2
