"""Laws of full curves: their sums against plain loops, known coefficients recovered."""

from __future__ import annotations

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.areas import areas_of
from allometry.laws.fit.engine import FitOptions, fit, predict
from allometry.laws.forms.base import Form
from allometry.laws.forms.multi_power import MultiPower, MultiPowerWithWarmup
from allometry.laws.forms.tissue import Tissue
from allometry.laws.observations import LearningRates, Observations

PEAK, WARMUP, STEPS = 1e-3, 60, 1500
TISSUE = {"L0": 2.6, "A": 0.4, "C": 0.5, "alpha": 0.5, "memory": 300.0}
POWER = {"L0": 2.6, "A": 0.4, "B": 150.0, "alpha": 0.5, "C": 2.0, "beta": 0.6, "gamma": 0.64}


def rates(kind: str, steps: int = STEPS) -> np.ndarray:
    x = np.clip((np.arange(1, steps + 1) - WARMUP) / (steps - WARMUP), 0.0, 1.0)
    late = np.clip((np.arange(1, steps + 1) / steps - 0.7) / 0.3, 0.0, 1.0)
    found = (
        PEAK
        * {
            "constant": np.ones(steps),
            "cosine": 0.1 + 0.45 * (1 + np.cos(np.pi * x)),
            "linear to 0": 1 - x,
            "wsd": 1 - np.sqrt(late),
            "step": np.where(late > 0, 0.2, 1.0),
            "up again": np.where((x > 0.4) & (x < 0.6), 0.3, 1.0),
        }[kind]
    )
    found[:WARMUP] = PEAK * np.arange(1, WARMUP + 1) / WARMUP
    return found


def bare(*kinds: str, every: int = 25) -> Observations:
    steps = np.arange(WARMUP + 1, STEPS + 1, every)
    return Observations(
        {"step": np.tile(steps.astype(float), len(kinds))},
        tuple(kind for kind in kinds for _ in steps),
        {kind: LearningRates(rates(kind), WARMUP) for kind in kinds},
    )


def obeying(form: Form, values: dict[str, float], *kinds: str) -> Observations:
    rows = bare(*kinds)
    loss = predict(form, values, rows)
    return Observations({**rows.columns, "loss": loss}, rows.groups, rows.curves)


@pytest.mark.parametrize("kind", ["cosine", "linear to 0", "wsd", "step", "up again"])
@pytest.mark.parametrize("memory", [2.0, 5.3, 17.3, 1000.0, 43210.0])
def test_areas_are_those_of_the_running_sums(kind: str, memory: float) -> None:
    rows = bare(kind)
    areas = Tissue().prepare(rows)
    s1, s2 = areas_of(rates(kind), WARMUP, momentum=1.0 - 1.0 / memory)
    at = rows["step"].astype(int) - 1
    np.testing.assert_allclose(areas.s1_n, s1[at], rtol=1e-13)
    largest = np.abs(s2).max()
    np.testing.assert_allclose(areas.s2(memory)[0], s2[at], rtol=0, atol=5e-6 * largest)


def plain_multi_power(values: dict[str, float], curve: np.ndarray, step: int, first: int) -> float:
    """Sum over events, step by step."""
    gain = 0.0
    for k in range(first, step + 1):
        before = curve[k - 2] if k > 1 else 0.0
        area = curve[k - 1 : step].sum()
        power = max(curve[k - 1], 1e-9 * curve.max()) ** -values["gamma"]
        left = (1 + values["C"] * power * area) ** -values["beta"]
        gain += (before - curve[k - 1]) * (1 - left)
    past = curve[:step].sum() ** -values["alpha"]
    return float(values["L0"] + values["A"] * past - values["B"] * gain)


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear to 0", "wsd", "step", "up again"])
@pytest.mark.parametrize("warmup", [False, True])
def test_grouped_events_are_close_to_every_event(kind: str, warmup: bool) -> None:
    form = MultiPowerWithWarmup() if warmup else MultiPower()
    rows = bare(kind, every=240)
    first = 1 if warmup else WARMUP + 1
    plain = [plain_multi_power(POWER, rates(kind), int(step), first) for step in rows["step"]]
    # Steps of the ramp change the rate too much to be replaced by a group's mean.
    share = (2.5e-3 if warmup else 5e-4) * POWER["B"] * PEAK
    np.testing.assert_allclose(predict(form, POWER, rows), plain, rtol=0, atol=share)


def test_the_climb_of_the_warmup_is_an_event_of_one_form_alone() -> None:
    rows = bare("constant")
    none = {**POWER, "B": 0.0}
    assert predict(MultiPower(), POWER, rows) == pytest.approx(predict(MultiPower(), none, rows))
    risen = predict(MultiPowerWithWarmup(), POWER, rows) - predict(MultiPower(), none, rows)
    assert (risen > 0.0).all()
    assert risen[-1] == pytest.approx(POWER["B"] * PEAK, rel=0.25)


def test_long_curves_have_few_events() -> None:
    steps = np.arange(WARMUP + 128, 72_001, 128)
    curve = LearningRates(rates("cosine", 72_000), WARMUP)
    rows = Observations({"step": steps.astype(float)}, ("long",) * len(steps), {"long": curve})
    assert len(MultiPower().prepare(rows).fall_K) < 65 * len(steps)


@pytest.mark.parametrize(("form", "values"), [(Tissue(), TISSUE), (MultiPower(), POWER)])
def test_derivatives_are_those_of_complex_steps(form: Form, values: dict[str, float]) -> None:
    rows = bare("cosine", "wsd", "up again")
    prepared = form.prepare(rows)
    sets = {name: np.array([[value], [1.1 * value]]) for name, value in values.items()}
    found = form.derivatives(sets, prepared)
    assert found is not None
    predicted, slopes = found
    assert slopes.shape == (2, len(form.parameters), len(rows))
    np.testing.assert_allclose(predicted, form.predict(sets, prepared), rtol=1e-12)
    for index, parameter in enumerate(form.parameters):
        moved = {**sets, parameter.name: sets[parameter.name] + 1e-30j}
        expected = form.predict(moved, prepared).imag / 1e-30
        scale = np.abs(expected).max()
        np.testing.assert_allclose(slopes[:, index], expected, rtol=1e-7, atol=1e-9 * scale)


@pytest.mark.parametrize(("form", "values"), [(Tissue(), TISSUE), (MultiPower(), POWER)])
def test_blind_starts_find_known_coefficients_again(form: Form, values: dict[str, float]) -> None:
    rows = obeying(form, values, "constant", "cosine", "wsd", "step")
    found = fit(form, rows, FitOptions(loss="square", starts=16))
    assert found.values == pytest.approx(values, rel=1e-4)
    assert not found.certificate.unidentified
    other = obeying(form, values, "linear to 0")
    np.testing.assert_allclose(found.predict(other), other["loss"], rtol=1e-7)


@pytest.mark.parametrize(
    ("form", "values", "names"),
    [
        (Tissue(), TISSUE, {"C", "memory"}),
        (MultiPower(), POWER, {"B", "C", "beta", "gamma"}),
    ],
)
def test_a_rate_that_never_fell_identifies_no_gain(
    form: Form, values: dict[str, float], names: set[str]
) -> None:
    rows = obeying(form, values, "constant")
    found = fit(form, rows, FitOptions(loss="square", starts=8))
    assert set(found.certificate.unidentified) == names
    assert found.values["alpha"] == pytest.approx(values["alpha"], rel=1e-4)


@pytest.mark.parametrize("form", [Tissue(), MultiPower()])
@pytest.mark.parametrize("step", [0.0, 2.5, STEPS + 1.0])
def test_a_step_without_a_rate_is_refused(form: Form, step: float) -> None:
    rows = Observations(
        {"step": np.array([step])}, ("wsd",), {"wsd": LearningRates(rates("wsd"), WARMUP)}
    )
    with pytest.raises(UserError, match="step"):
        form.prepare(rows)


@pytest.mark.parametrize("form", [Tissue(), MultiPower()])
def test_a_group_without_rates_is_refused(form: Form) -> None:
    with pytest.raises(UserError, match="learning rate of each step"):
        form.prepare(Observations.of({"step": [100.0]}, ["a run"]))
