"""Known coefficients are recovered from uninformed starts; each form accepts complex values."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.fit.bootstrap import bootstrap
from allometry.laws.fit.engine import FitOptions, fit, predict
from allometry.laws.forms.base import Form
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named

MIXTURES = [
    (0.8, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.1, 0.8), (0.4, 0.3, 0.3), (0.5, 0.5, 0.0),
    (0.5, 0.0, 0.5), (0.0, 0.5, 0.5), (0.6, 0.3, 0.1), (0.1, 0.3, 0.6), (0.3, 0.6, 0.1),
]  # fmt: skip
SIZES, TOKENS = (4e7, 1.3e8, 4e8, 1.2e9), (2e9, 8e9, 3e10, 1.2e11)
BITS = [(1, 2), (2, 1), (2, 3), (3, 2), (4, 3), (5, 6)]

# Published coefficients if available; the others have the order of reported ones.
TRUTH: dict[str, dict[str, float]] = {
    "over_training": {"E": 1.8, "a": 210.0, "b": 370.0, "eta": 0.136},
    "downstream_error": {"epsilon": 0.86, "k": 2.2, "gamma": 0.71},
    "downstream_sigmoid": {"chance": 0.3, "gain": 0.93, "k": 6.0, "L0": 0.9},
    "efficiency_leverage": dict(form_named("efficiency_leverage").published["ling"]),
    "clark_moe": {
        "a": -0.083, "b": -0.12, "c": 0.0105, "d": 1.11, "E_start": 1.9, "E_max": 300.0,
    },
    "granularity": dict(form_named("granularity").published["krajewski"]),
    "float_training": dict(form_named("float_training").published["paper"]),
    "qat": dict(form_named("qat").published["w4a4"]),
    "precision_effective": {
        "E": 2.0, "A": 400.0, "alpha": 0.34, "B": 1500.0, "beta": 0.33,
        "gamma_w": 2.5, "gamma_a": 2.2, "gamma_kv": 1.0,
    },
    "parallel_scaling": {"E": 0.7, "A": 2e8, "k": 0.39, "alpha": 0.2},
    "critical_batch": {"B_star": 2e8, "alpha_B": 0.21},
    "steps_to_loss": {"S_min": 4000.0, "E_min": 1.6e9},
    "hyperparameter_surface": {
        "L_min": 2.3, "lr_best": 2e-3, "B_best": 3e5, "p": 0.012, "q": 0.006, "rho": -0.4,
    },
    "learning_rate_law": dict(form_named("learning_rate_law").published["step_law"]),
    "batch_law": dict(form_named("batch_law").published["step_law"]),
    "aspect_ratio": {
        "E": 1.8, "A": 400.0, "B": 1500.0, "alpha": 0.34, "beta": 0.33, "eps": 2e-3, "gamma": 0.6,
    },
    "width_depth": {
        "E": 1.7, "A": 30.0, "G": 1.2, "B": 1500.0, "alpha": 0.7, "gamma": 1.0, "beta": 0.33,
    },
    "mixing_additive:a,b,c": {
        "E": 1.2, "A": 400.0, "B": 1500.0, "alpha": 0.34, "beta": 0.33,
        "C_a": 2.0, "C_b": 1.0, "C_c": 0.5, "g_a": 0.5, "g_b": 0.8, "g_c": 0.3,
    },
    "mixing_joint:a,b,c": {
        "E": 1.2, "alpha": 0.34, "beta": 0.33, "mu": 0.8, "nu": 1.2,
        "C_a": 2.0, "C_b": 1.0, "C_c": 0.5, "g_a": 0.5, "g_b": 0.8, "g_c": 0.3,
        "A_a": 0.5, "A_b": 1.2, "A_c": 0.3, "B_a": 0.9, "B_b": 0.4, "B_c": 1.3,
    },
}  # fmt: skip


def rows(names: tuple[str, ...], *axes: object) -> dict[str, list[float]]:
    """Return columns of the product of axes; an axis can contain tuples of several columns."""
    flat = [
        [x for part in point for x in (part if isinstance(part, tuple) else (part,))]
        for point in product(*axes)  # type: ignore[call-overload]
    ]
    return dict(zip(names, map(list, zip(*flat, strict=True)), strict=True))


DESIGN: dict[str, dict[str, list[float]]] = {
    "over_training": rows(("N", "D"), SIZES, TOKENS),
    "downstream_error": rows(("loss",), (2.4, 2.7, 3.0, 3.4, 4.0, 5.0)),
    "downstream_sigmoid": rows(("loss",), np.linspace(0.4, 1.6, 15)),
    "efficiency_leverage": rows(
        ("activation", "granularity", "C"),
        (0.01, 0.05, 0.2, 1.0), (2, 4, 8, 16), (1e18, 1e19, 1e20),
    ),
    "clark_moe": rows(("N", "experts"), SIZES, (1, 2, 4, 8, 16, 64, 256, 512)),
    "granularity": rows(("N", "D", "granularity"), SIZES, TOKENS, (1, 2, 4, 8, 16)),
    "float_training": rows(
        ("N", "D", "exponent_bits", "mantissa_bits", "block"), SIZES, TOKENS, BITS, (32, 512)
    ),
    "qat": rows(("N", "D", "group_size"), SIZES, TOKENS, (32, 64, 128, 256)),
    "precision_effective": rows(
        ("N", "D", "weight_bits", "activation_bits", "cache_bits"),
        SIZES, TOKENS, [(3, 16, 16), (6, 16, 16), (16, 3, 16), (16, 5, 16), (16, 16, 3), (4, 4, 4)],
    ),
    "parallel_scaling": rows(("N", "streams"), SIZES, (1, 2, 4, 8)),
    "critical_batch": rows(("loss",), (2.2, 2.6, 3.0, 4.0, 5.0)),
    "steps_to_loss": rows(("B",), (2**14, 2**16, 2**18, 2**20, 2**22)),
    "hyperparameter_surface": rows(
        ("lr", "B"), (5e-4, 1e-3, 2e-3, 4e-3, 8e-3), (1e5, 2e5, 4e5, 8e5)
    ),
    "learning_rate_law": rows(("N", "D"), SIZES, TOKENS),
    "batch_law": rows(("D",), TOKENS),
    "aspect_ratio": rows(
        ("N", "width", "layers", "D"),
        [(12.0 * w**2 * k, w, k) for w in (256, 512, 1024, 2048) for k in (4, 8, 16, 32)], TOKENS,
    ),
    "width_depth": rows(("width", "layers", "D"), (256, 512, 1024, 2048), (4, 8, 16, 32), TOKENS),
    "mixing_additive:a,b,c": rows(("N", "D", "a", "b", "c"), SIZES[:3], TOKENS[:3], MIXTURES),
    "mixing_joint:a,b,c": rows(("N", "D", "a", "b", "c"), SIZES[:3], TOKENS[:3], MIXTURES),
}  # fmt: skip


def truly(name: str, noise: float = 0.0, seed: int = 0) -> tuple[Form, Observations]:
    """Return the form, and rows of its design that follow the truth up to relative noise."""
    form = form_named(name)
    bare = Observations.of(DESIGN[name])
    exact_n = predict(form, TRUTH[name], bare)
    drawn_n = np.random.default_rng(seed).standard_normal(len(bare))
    return form, Observations.of(
        {**bare.columns, form.target.name: exact_n * (1.0 + noise * drawn_n)}
    )


@pytest.mark.parametrize("name", TRUTH)
def test_blind_starts_find_known_coefficients_again(name: str) -> None:
    form, observations = truly(name)
    found = fit(form, observations, FitOptions(loss="square"))
    for parameter in form.parameters:
        true = TRUTH[name][parameter.name]
        assert found.values[parameter.name] == pytest.approx(true, rel=1e-3, abs=1e-6), parameter
    assert not found.certificate.at_bounds
    assert not found.certificate.unidentified


@pytest.mark.parametrize("name", TRUTH)
def test_noise_moves_coefficients_no_further_than_intervals_say(name: str) -> None:
    form, observations = truly(name, noise=1e-3, seed=1)
    found = fit(form, observations, FitOptions(loss="square", starts=64))
    assert found.certificate.agreeing >= 5  # on exact rows the minimum is rounding error
    exact_n = predict(form, TRUTH[name], observations)
    error_n = np.abs(found.predict(observations) / exact_n - 1.0)
    # With n rows of noise 1e-3, the error of the fitted surface is below that noise.
    assert np.sqrt(np.mean(error_n**2)) < 1e-3
    assert error_n.max() > 0.0  # the noise had an effect
    drawn = bootstrap(found, samples=100)
    apart = [
        parameter.name
        for parameter in form.parameters
        if not _within(TRUTH[name][parameter.name], drawn.interval(parameter.name, 0.999))
    ]
    assert not apart, {p: (TRUTH[name][p], found.values[p]) for p in apart}


def _within(value: float, interval: tuple[float, float]) -> bool:
    # Percentiles of few rows are narrow: add half the width on each side.
    low, high = interval
    return low - 0.5 * (high - low) <= value <= high + 0.5 * (high - low)


@pytest.mark.parametrize("name", TRUTH)
def test_derivatives_by_complex_steps_are_those_of_differences(name: str) -> None:
    form, observations = truly(name)
    prepared = form.prepare(observations)
    size = np.abs(predict(form, TRUTH[name], observations))
    for parameter in form.parameters:
        value = TRUTH[name][parameter.name]
        step = 1e-5 * max(abs(value), 1e-3)

        def at(moved: complex, key: str = parameter.name) -> np.ndarray:
            return form.predict({**TRUTH[name], key: moved}, prepared)

        by_complex = np.imag(at(value + 1e-30j)) / 1e-30
        by_difference = np.real(at(value + step) - at(value - step)) / (2.0 * step)
        noise = float(1e-14 * size.max() / step)
        np.testing.assert_allclose(by_complex, by_difference, rtol=1e-5, atol=noise)


@pytest.mark.parametrize("name", TRUTH)
def test_many_sets_at_once_are_each_alone(name: str) -> None:
    form, observations = truly(name)
    prepared = form.prepare(observations)
    factors = np.array([1.0, 0.97, 1.02])
    many = form.predict(
        {key: (value * factors)[:, None] for key, value in TRUTH[name].items()}, prepared
    )
    assert many.shape == (3, len(observations))
    for row, factor in zip(many, factors, strict=True):
        one = form.predict({key: value * factor for key, value in TRUTH[name].items()}, prepared)
        np.testing.assert_allclose(row, one, rtol=1e-13)


@pytest.mark.parametrize("name", TRUTH)
def test_what_is_called_linear_is(name: str) -> None:
    form, observations = truly(name)
    prepared = form.prepare(observations)
    linear = [p.name for p in form.parameters if p.linear]
    base = {**TRUTH[name], **dict.fromkeys(linear, 0.0)}
    whole = form.predict(TRUTH[name], prepared)
    if not linear:
        return
    parts = sum(form.predict({**base, key: TRUTH[name][key]}, prepared) for key in linear)
    rest = form.predict(base, prepared)
    np.testing.assert_allclose(whole, parts - (len(linear) - 1) * rest, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "column", "value", "demand"),
    [
        ("clark_moe", "experts", 0.5, "a positive number of at least 1"),
        ("efficiency_leverage", "activation", 3.1, "a positive number of at most 1"),
        ("float_training", "mantissa_bits", -1.0, "a number of at least 0"),
        ("float_training", "block", 0.5, "a positive number of at least 1"),
        ("qat", "group_size", 1.0, "a positive number of at least 2"),
        ("parallel_scaling", "streams", 0.0, "a positive number of at least 1"),
        ("over_training", "N", -1.0, "a positive number"),
        ("over_training", "N", float("nan"), "a positive number"),
    ],
)
def test_inputs_that_no_law_can_take_are_refused(
    name: str, column: str, value: float, demand: str
) -> None:
    form, observations = truly(name)
    columns = {key: np.array(values) for key, values in observations.columns.items()}
    columns[column][1] = value
    with pytest.raises(UserError, match=f"{column} of row 2 .* {name} needs {demand}; mend"):
        form.prepare(Observations.of(columns))


def test_published_sets_are_complete_and_within_bounds() -> None:
    for name in TRUTH:
        form = form_named(name)
        for label, values in form.published.items():
            assert set(values) == {p.name for p in form.parameters}, (name, label)
            for parameter in form.parameters:
                assert parameter.low <= values[parameter.name] <= parameter.high, (name, label)
