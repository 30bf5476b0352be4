"""Two areas under a learning-rate curve, from which laws predict its loss curve."""

# s: step from 1, η_s: learning rate of step s, W: warm-up steps, λ: momentum

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

MOMENTUM = 0.999
"""Momentum λ of arXiv 2408.11029."""


class LearningRateAreas:
    """Running sums S1 and S2 of Tissue et al. (arXiv 2408.11029), updated step by step.

    S1(s) = Σ_{i<=s} η_i, warm-up included. S2(s) = Σ_{i<=s} m_i with m_i = λ·m_{i−1} + (η_{i−1} −
    η_i): the annealing of the rate, with momentum λ. S2 counts from the end of the warm-up: its
    first difference is η_W − η_{W+1}, and m and S2 are 0 up to step W (without warm-up, up to step
    1).

    The state consists of S1, S2, m and the last rate, so that a resumed run continues bit-exactly.
    For example, ``areas = LearningRateAreas(100); areas.update(3e-4)``.
    """

    def __init__(self, warmup_steps: int, momentum: float = MOMENTUM) -> None:
        assert warmup_steps >= 0, warmup_steps
        assert 0.0 <= momentum < 1.0, momentum
        self.warmup_steps = warmup_steps
        self.momentum = momentum
        self.step = 0
        self.s1 = self.s2 = self._velocity = self._last = 0.0

    def update(self, lr: float) -> None:
        """Add the next step, with its learning rate."""
        self.step += 1
        self.s1 += lr
        if self.step > max(1, self.warmup_steps):
            self._velocity = self.momentum * self._velocity + (self._last - lr)
            self.s2 += self._velocity
        self._last = lr

    def skip(self) -> None:
        """Skip the next step, which made no update: the sums do not change."""
        self.step += 1

    def state_dict(self) -> dict[str, float | int]:
        """Return the state after this step, for ``load_state_dict``."""
        sums = {"s1": self.s1, "s2": self.s2, "velocity": self._velocity, "last": self._last}
        return {"step": self.step, **sums}

    def load_state_dict(self, state: Mapping[str, float | int]) -> None:
        """Restore the state returned by ``state_dict``."""
        self.step = int(state["step"])
        sums = (float(state[name]) for name in ("s1", "s2", "velocity", "last"))
        self.s1, self.s2, self._velocity, self._last = sums


def areas_of(
    learning_rates: ArrayLike, warmup_steps: int, momentum: float = MOMENTUM
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (S1, S2) [s] after each step from the complete curve η_1, η_2, ..."""
    from scipy.signal import lfilter  # import takes half a second; the running sums need none

    rates = np.asarray(learning_rates, dtype=np.float64)
    falls = np.zeros_like(rates)
    first = max(1, warmup_steps)
    falls[first:] = rates[first - 1 : -1] - rates[first:]
    velocity = lfilter([1.0], [1.0, -momentum], falls)
    return np.cumsum(rates), np.cumsum(velocity)
