"""When a sweep's best learning rates say nothing."""

import math

import numpy as np
import pytest

from allometry.scaling.shapes import Axis
from allometry.studies.sweeps.transfer import Transfer, Trial


@pytest.mark.parametrize("shift", [0.0, -0.6])
def test_one_seed_and_a_flat_basin_decide_nothing(shift: float) -> None:
    """Neither way: a drift that is seen may be luck, and so may one that is not."""

    def losses(depth: float, seeds: int) -> Transfer:
        sizes, rates = (16, 32, 64), np.arange(-7.0, -2.0, 0.5)
        found = {
            Trial(size, rate, seed): 2.0 + depth * (rate + 4.3 - shift * math.log2(size / 16)) ** 2
            for size in sizes
            for rate in rates.tolist()
            for seed in range(seeds)
        }
        return Transfer(Axis.WIDTH, tuple(range(seeds)), found)

    flat = losses(0.03, 1)  # 0.0075 nats half an octave from the best
    assert len(flat.undecided(0.5)) == 3
    assert "width 16: a rate 0.5 octaves from the best one loses 0.0" in flat.undecided(0.5)[0]
    assert flat.failures(0.5) == []
    for found in (losses(0.2, 1), losses(0.03, 2)):
        assert found.undecided(0.5) == []
        assert bool(found.failures(0.5)) == (shift != 0.0)
