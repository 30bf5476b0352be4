"""Laws of precision: where more tokens harm, and the value of bits."""

from __future__ import annotations

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.fit.engine import FitOptions, fit, predict, require_identified
from allometry.laws.forms.precision import (
    FloatTraining,
    PrecisionEffective,
    QuantisedTraining,
)
from allometry.laws.observations import Observations
from shell import Shell

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


def cautions(tokens: float, **changes: float) -> list[str]:
    base = {"N": 1e9, "D": tokens, "exponent_bits": 2, "mantissa_bits": 1, "block": 128}
    rows = Observations.of({name: [value] for name, value in (base | changes).items()})
    return FloatTraining().cautions(PAPER, rows)


def turn_of_the_loss() -> float:
    tokens = np.geomspace(1e9, 1e14, 20001)
    return float(tokens[np.argmin(float_loss(tokens.tolist()))])


def test_more_tokens_than_help_are_warned_of() -> None:
    turn = turn_of_the_loss()
    assert 1.1e9 < turn < 0.9e14
    assert cautions(turn * 0.995) == []
    (sentence,) = cautions(turn * 1.005)
    assert float(sentence.split(" at ")[-1].split()[0]) == pytest.approx(turn, rel=2e-3)


def test_more_bits_and_parameters_move_the_turn_up_and_larger_blocks_down() -> None:
    above, below = turn_of_the_loss() * 1.005, turn_of_the_loss() * 0.995
    assert cautions(above)
    for more in ({"mantissa_bits": 3}, {"exponent_bits": 4}, {"N": 2e9}, {"block": 1}):
        assert cautions(above, **more) == []
    assert cautions(below, block=512)


def test_predictions_say_where_more_tokens_harm(capsys: pytest.CaptureFixture[str]) -> None:
    law = ("predict", "--law", "float_training", "--published", "paper", "N=1e9", "block=128")
    law = (*law, "exponent_bits=2", "mantissa_bits=1", "D=1e10,1e14")
    (warning,) = (w for w in Shell(capsys).json(*law)["warnings"] if "more tokens" in w)
    assert warning.startswith("more tokens raise the loss at D=1e+14 and N=1e+09")


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
    assert not PrecisionEffective.published  # from memory: no reliable numbers


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
