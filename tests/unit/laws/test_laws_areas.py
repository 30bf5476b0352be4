from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray

from allometry.laws.areas import LearningRateAreas, areas_of


def rates(steps: int, warmup: int) -> NDArray[np.float64]:
    up = np.linspace(0.0, 1.0, warmup + 1)[1:]
    down = 0.5 * (1 + np.cos(np.linspace(0.0, 3.0, steps - warmup)))
    return 3e-4 * np.concatenate([up, down])


def by_definition(curve: NDArray[np.float64], warmup: int, momentum: float) -> float:
    """S2 = Σ_i m_i with m written out: m_i = Σ_{j<=i} λ^(i−j) (η_{j−1} − η_j), j after warm-up."""
    total = 0.0
    for i in range(1, len(curve) + 1):
        for j in range(max(2, warmup + 1), i + 1):
            total += momentum ** (i - j) * (curve[j - 2] - curve[j - 1])
    return total


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999])
def test_both_forms_equal_the_definition(warmup: int, momentum: float) -> None:
    curve = rates(60, warmup)
    running = LearningRateAreas(warmup, momentum)
    s1, s2 = areas_of(curve, warmup, momentum)
    for step, lr in enumerate(curve, start=1):
        running.update(float(lr))
        assert running.s1 == pytest.approx(s1[step - 1], rel=1e-12)
        assert running.s2 == pytest.approx(s2[step - 1], rel=1e-12, abs=1e-20)
    assert running.s1 == pytest.approx(float(curve.sum()), rel=1e-12)
    assert running.s2 == pytest.approx(by_definition(curve, warmup, momentum), rel=1e-10)
    assert running.s2 > 0.0


def test_by_hand() -> None:
    running = LearningRateAreas(warmup_steps=2, momentum=0.5)
    seen = []
    for lr in (1.0, 2.0, 2.0, 1.5, 1.0):
        running.update(lr)
        seen.append((running.s1, running.s2))
    # m: 0, 0, 0, .5, .25 + .5
    assert seen == [(1.0, 0.0), (3.0, 0.0), (5.0, 0.0), (6.5, 0.5), (7.5, 1.25)]


def test_the_rise_of_the_warmup_does_not_enter_s2() -> None:
    curve = np.concatenate([np.linspace(0.1, 1.0, 10), np.ones(20)])
    assert areas_of(curve, 10)[1][-1] == 0.0
    assert areas_of(curve, 0)[1][-1] < 0.0  # counted from the start, it would


def test_saved_state_goes_on_with_the_same_bits() -> None:
    curve = rates(50, 5)
    straight, first = LearningRateAreas(5), LearningRateAreas(5)
    for lr in curve:
        straight.update(float(lr))
    for lr in curve[:23]:
        first.update(float(lr))
    resumed = LearningRateAreas(5)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for lr in curve[23:]:
        resumed.update(float(lr))
    assert resumed.state_dict() == straight.state_dict()
