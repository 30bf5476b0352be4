"""Decide on the device whether the update of a step is skipped."""

# W steps in the window; 2 numbers of each step: loss and gradient norm

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from allometry.configs.bad_steps import BadSteps
from allometry.configs.optimization import TrainingConfig

NORMAL = 1.4826
"""Standard deviation of a normal distribution divided by its median absolute deviation."""


class Judge:
    """Decides on the device, without a host synchronization, whether an update is skipped.

    A step is bad if its loss or gradient norm is not finite or exceeds the limit computed from the
    last W accepted steps (``spike_limits``). A bad step does not enter the window. All ranks pass
    the same global loss and norm and therefore reach the same decision.
    """

    def __init__(
        self, config: BadSteps, device: torch.device, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Create the judge; ``facts`` of a checkpoint restore the window, None leaves it empty."""
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
        """Return the judge of ``training.bad_steps``, None if the key is not set."""
        return None if training.bad_steps is None else cls(training.bad_steps, device, facts)

    def __call__(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Return (1 if the step is bad else 0, limit of the loss, limit of the norm), float64 [3].

        ``loss`` and ``norm`` are 0-dim float64 tensors on the device. A limit is infinite while the
        window is not full. An accepted step enters the window.
        """
        numbers_2 = torch.stack([loss, norm])
        limits_2 = spike_limits(self._window_2W, self._config)
        bad = ~numbers_2.isfinite().all() | (numbers_2 > limits_2).any()
        moved_2W = torch.cat([self._window_2W[:, 1:], numbers_2[:, None]], dim=1)
        self._window_2W = torch.where(bad, self._window_2W, moved_2W)
        return torch.cat([bad.double()[None], limits_2])

    def facts(self) -> dict[str, Any]:
        """Return the window as JSON for a checkpoint (synchronizes with the device)."""
        loss, norm = self._window_2W[:, ~self._window_2W.isnan().any(0)].tolist()
        return {"accepted": {"loss": loss, "grad_norm": norm}}


def spike_limits(window_2W: Tensor, config: BadSteps) -> Tensor:
    """Return the largest accepted loss and norm [2]; infinite if the window is not full.

    ``mad``: median + deviations * 1.4826 * median absolute deviation; the median of an even number
    of values is the mean of the two middle ones. ``sigma``: mean + deviations * standard deviation
    (unbiased), as in OLMo-core's ``SkipStepOptimizer``. For example, ``mad`` with ``deviations=6``
    and a window of losses with median 2.0 and median absolute deviation 0.1 gives 2.0 + 6 * 0.14826
    = 2.89.
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
    # torch.median is not deterministic on CUDA; sorting so few numbers is cheap.
    ordered_2W, count = x_2W.sort(dim=1).values, x_2W.shape[1]
    return (ordered_2W[:, (count - 1) // 2] + ordered_2W[:, count // 2]) / 2
