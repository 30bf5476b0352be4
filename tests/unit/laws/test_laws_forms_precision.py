"""Laws of precision: where more tokens harm, and what bits are worth."""

from __future__ import annotations

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.fit.engine import FitOptions, fit, predict, require_identified
from allometry.laws.forms.precision import (
    FloatTraining,
    PrecisionEffective,
    QuantisedTraining,
    critical_tokens,
)
from allometry.laws.observations import Observations

PAPER = FloatTraining.published["paper"]


def float_loss(
    tokens: list[float], block: float = 128.0, bits: tuple[int, int] = (2, 1)
) -> np.ndarray:
    number = len(tokens)
    rows = Observations.of(
        {
            "N": [1e9] * number,
            "D": tokens,
            "exponent_bits": [bits[0]] * number,
            "mantissa_bits": [bits[1]] * number,
            "block": [block] * number,
        }
    )
    return predict(FloatTraining(), PAPER, rows)


def test_the_loss_turns_at_the_critical_tokens() -> None:
    turn = critical_tokens(PAPER, parameters=1e9, exponent_bits=2, mantissa_bits=1, block=128)
    before, at, after = float_loss([turn / 1.5, turn, turn * 1.5])
    assert at < before
    assert at < after
    near = float_loss([turn * 0.999, turn, turn * 1.001])
    assert near[1] == near.min()


def test_more_bits_and_parameters_move_the_turn_up_and_larger_blocks_down() -> None:
    base = {"parameters": 1e9, "exponent_bits": 2, "mantissa_bits": 1, "block": 128}
    turn = critical_tokens(PAPER, **base)
    assert critical_tokens(PAPER, **{**base, "mantissa_bits": 3}) > turn
    assert critical_tokens(PAPER, **{**base, "exponent_bits": 4}) > turn
    assert critical_tokens(PAPER, **{**base, "parameters": 2e9}) > turn
    assert critical_tokens(PAPER, **{**base, "block": 512}) < turn
    assert critical_tokens(PAPER, **{**base, "block": 1}) == np.inf


def test_blocks_of_one_lose_nothing() -> None:
    rows = {"N": [1e9], "D": [1e11]}
    loss = float_loss([1e11], block=1.0)
    plain = (
        PAPER["n"] / 1e9 ** PAPER["alpha"] + PAPER["d"] / 1e11 ** PAPER["beta"] + PAPER["epsilon"]
    )
    np.testing.assert_allclose(loss, plain)
    assert float_loss(rows["D"], block=2.0) > loss


def test_no_mantissa_bits_is_a_number_too() -> None:
    assert np.isfinite(float_loss([1e10], bits=(4, 0))).all()


def test_quantisation_costs_more_on_small_models_and_large_groups() -> None:
    values = QuantisedTraining.published["w4a4"]
    rows = Observations.of(
        {"N": [1e8, 1e9, 1e8, 1e8], "D": [1e10, 1e10, 1e11, 1e10], "group_size": [32, 32, 32, 128]}
    )
    base, larger, longer, coarser = predict(QuantisedTraining(), values, rows)
    assert larger < base < longer
    assert coarser > base


def test_full_precision_is_the_whole_model_and_fewer_bits_a_smaller_one() -> None:
    values = {
        "E": 2.0, "A": 400.0, "alpha": 0.34, "B": 1500.0, "beta": 0.33,
        "gamma_w": 2.0, "gamma_a": 2.0, "gamma_kv": 2.0,
    }  # fmt: skip
    bits = [100.0, 4.0]
    rows = Observations.of(
        {
            "N": [1e9, 1e9],
            "D": [1e10, 1e10],
            "weight_bits": bits,
            "activation_bits": [100.0] * 2,
            "cache_bits": [100.0] * 2,
        }
    )
    full, four = predict(PrecisionEffective(), values, rows)
    assert full == pytest.approx(2.0 + 400.0 / 1e9**0.34 + 1500.0 / 1e10**0.33)
    size = 1e9 * (1.0 - np.exp(-2.0))
    assert four == pytest.approx(2.0 + 400.0 / size**0.34 + 1500.0 / 1e10**0.33)
    assert not PrecisionEffective.published  # from memory: no numbers to trust


def test_one_format_does_not_say_what_bits_do() -> None:
    sizes, tokens = np.repeat([1e8, 3e8, 1e9, 3e9], 4), np.tile([2e9, 8e9, 3e10, 1e11], 4)
    columns = {
        "N": sizes,
        "D": tokens,
        "exponent_bits": np.full(16, 4.0),
        "mantissa_bits": np.full(16, 3.0),
        "block": np.full(16, 128.0),
    }
    rows = Observations.of(columns)
    rows = Observations.of({**columns, "loss": predict(FloatTraining(), PAPER, rows)})
    found = fit(FloatTraining(), rows, FitOptions(loss="square", starts=32))
    with pytest.raises(UserError, match=r"cannot identify .*\bdelta\b"):
        require_identified(found)
