"""Cases in which rounding would turn a root into NaN."""

import pytest
import torch

from allometry.optim.sgd_sai import signal_to_noise


def test_variance_that_rounding_makes_negative_is_none() -> None:
    """Three equal elements: Σg² - (Σg)²/n may be below zero."""
    total, squares = torch.tensor([[3.0], [3.0 - 1e-12]], dtype=torch.float64)
    assert float(squares - total.square() / 3) < 0.0
    ratio = signal_to_noise(total, squares, 3, eps=1e-8)
    assert float(ratio) == pytest.approx(3**0.5 / 1e-8, rel=1e-6)
