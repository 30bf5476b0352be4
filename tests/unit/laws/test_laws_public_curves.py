"""Published loss curves: held-out schedules predicted by laws fitted from uninformed starts."""

# The data are steps, rates and losses of 9 schedules of three models (arXiv 2503.12811).

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from allometry.laws.fit.engine import Fit, FitOptions, fit, predict
from allometry.laws.fit.validate import leave_one_group_out
from allometry.laws.forecast import Curve, forecast
from allometry.laws.forms.base import Form
from allometry.laws.forms.multi_power import MultiPower, MultiPowerWithWarmup
from allometry.laws.forms.tissue import Tissue
from allometry.laws.observations import LearningRates, Observations
from law_data import law_data

SIZES = (25, 100, 400)
WARMUP, PEAK = 2160, 3e-4
TRAINED = ("constant_24000", "cosine_24000", "wsdcon_9")
HELD_OUT = (
    "constant_72000",
    "cosine_72000",
    "wsd_20000_24000",
    "wsdcon_18",
    "wsdcon_3",
    "wsdld_20000_24000",
)


def rates(name: str) -> np.ndarray:
    kind, *numbers = name.split("_")
    first, last = int(numbers[0]), int(numbers[-1])
    steps = np.arange(1, (16_000 if kind == "wsdcon" else last) + 1)
    x = np.clip((steps - first) / max(last - first, 1), 0.0, 1.0)
    found = (
        PEAK
        * {
            "constant": lambda: np.ones(last),
            "cosine": lambda: 0.1 + 0.45 * (1 + np.cos(np.pi * (steps - WARMUP) / (last - WARMUP))),
            "wsd": lambda: 0.1**x,
            "wsdld": lambda: 1 - 0.9 * x,
            "wsdcon": lambda: np.where(steps < 8000, 1.0, first * 1e-5 / PEAK),
        }[kind]()
    )
    found[:WARMUP] = PEAK * np.arange(1, WARMUP + 1) / WARMUP
    return found


@cache
def rows(size: int, *names: str) -> Observations:
    folder = law_data("multipowerlaw") / f"csv_{size}"
    tables = [np.loadtxt(folder / f"{name}.csv", delimiter=",", skiprows=1) for name in names]
    curves = {name: LearningRates(rates(name), WARMUP) for name in names}
    for name, table in zip(names, tables, strict=True):  # the schedule is read from the file
        steps = table[:, 0].astype(int)
        np.testing.assert_allclose(curves[name].rates[steps - 1], table[:, 1], rtol=1e-9)
    return Observations(
        {"step": np.concatenate([t[:, 0] for t in tables]),
         "loss": np.concatenate([t[:, 2] for t in tables])},
        tuple(name for name, t in zip(names, tables, strict=True) for _ in t),
        curves,
    )  # fmt: skip


@cache
def fitted(form: Form, size: int, *names: str) -> Fit:
    return fit(form, rows(size, *names), FitOptions(starts=16))


def errors(form: Form, values: dict[str, float], size: int, *names: str) -> np.ndarray:
    """Return the mean relative error of each curve."""
    return np.array(
        [
            np.abs(predict(form, values, found) / found["loss"] - 1.0).mean()
            for found in (rows(size, name) for name in names)
        ]
    )


@pytest.mark.parametrize(("size", "error"), [(25, 1.15e-3), (100, 1.55e-3), (400, 1.69e-3)])
def test_published_coefficients_predict_as_published(size: int, error: float) -> None:
    form = MultiPowerWithWarmup()
    found = errors(form, dict(form.published[f"{size}M"]), size, *HELD_OUT).mean()
    assert found == pytest.approx(error, abs=1e-5)


# The goals for Multi-Power are 0.12, 0.15 and 0.18 %. The optimum of its own fitting loss, which
# uninformed starts reach, does not predict better than this, nor does any other method of fitting
# that cross-validation on the three curves selects (benchmarks/schedule_laws.py).
@pytest.mark.parametrize(
    ("form", "size", "error"),
    [
        (Tissue(), 25, 1.31e-3),
        (Tissue(), 100, 1.45e-3),
        (Tissue(), 400, 2.33e-3),
        (MultiPower(), 25, 1.39e-3),
        (MultiPower(), 100, 1.76e-3),
        (MultiPower(), 400, 2.27e-3),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_three_curves_predict_six_others(form: Form, size: int, error: float) -> None:
    found = fitted(form, size, *TRAINED)
    certificate = found.certificate
    assert certificate.decrease < 1e-9
    if (form.name, size) == ("multi_power", 25):  # a valley: only the product B·beta is identified
        assert {"B", "beta"} <= set(certificate.loose)
    else:
        assert certificate.agreeing >= 0.75 * certificate.starts
    mean = errors(form, found.values, size, *HELD_OUT).mean()
    assert 0.5 * error < mean <= error


@pytest.mark.parametrize("size", SIZES)
def test_published_coefficients_are_no_optimum(size: int) -> None:
    """Shows why the goals are missed: those coefficients fit the training curves worse."""
    form = MultiPowerWithWarmup()
    found = fitted(form, size, *TRAINED)
    problem = found.problem()
    residuals = problem.residuals(problem.coordinates(form.published[f"{size}M"])[None])[0]
    huber = np.where(
        np.abs(residuals) < 1e-3, residuals**2 / 2, 1e-3 * (np.abs(residuals) - 5e-4)
    ).sum()
    assert huber > 2.0 * found.objective
    assert errors(form, found.values, size, *HELD_OUT).mean() > 1.3e-3


@pytest.mark.parametrize(("size", "error"), [(25, 0.83e-3), (100, 0.84e-3), (400, 1.12e-3)])
def test_the_law_itself_can_follow_the_six_curves(size: int, error: float) -> None:
    """The three curves of at most 24,000 steps limit the error, not the search."""
    groups = np.array(rows(size, *HELD_OUT).groups)
    even = np.concatenate([np.flatnonzero(groups == name)[::3] for name in HELD_OUT])
    six = fit(MultiPower(), rows(size, *HELD_OUT).take(even), FitOptions(starts=8))
    three = fitted(MultiPower(), size, *TRAINED)
    mean = errors(MultiPower(), six.values, size, *HELD_OUT).mean()
    assert mean < error
    assert mean < 0.65 * errors(MultiPower(), three.values, size, *HELD_OUT).mean()
    # The three curves contradict this law: its error at the end of their cosine is 0.7 to 0.9 %.
    cosine = rows(size, "cosine_24000")
    late = cosine.take(cosine["step"] > 22_000)
    assert (predict(MultiPower(), six.values, late) / late["loss"] - 1.0).mean() > 5e-3


def test_held_out_training_curves_rank_the_laws() -> None:
    """Tissue predicts a left-out curve of the three better than Multi-Power (0.112, 0.130 %)."""
    found = {
        form.name: np.mean(
            [
                leave_one_group_out(form, rows(size, *TRAINED), FitOptions(starts=6)).mean
                for size in SIZES
            ]
        )
        for form in (Tissue(), MultiPower())
    }
    assert found["tissue"] < 1.2e-3 < found["multi_power"] < 1.4e-3


@pytest.mark.parametrize(
    ("form", "size"),
    [(form, size) for form in (Tissue(), MultiPower()) for size in SIZES],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_constant_and_cosine_predict_wsd(form: Form, size: int) -> None:
    found = fitted(form, size, "constant_24000", "cosine_24000")
    mean = errors(form, found.values, size, "wsd_20000_24000", "wsdld_20000_24000").mean()
    assert mean <= 1.5e-3


@pytest.mark.parametrize(
    ("seen", "least"), [(0.3, 0.92), (0.5, 0.95), (0.7, 0.92), (0.9, 0.92)], ids=str
)
def test_intervals_of_forecasts_cover_published_ends(seen: float, least: float) -> None:
    """Of 27 curves, each forecast from its own beginning, 26, 27, 25 and 26 are covered."""
    covered, widths = [], []
    for size in SIZES:
        for name in (*TRAINED, *HELD_OUT):
            table = rows(size, name)
            curve = table.curves[name]
            kept = table["step"] <= seen * len(curve.rates)
            steps = table["step"][kept].astype(np.int64)
            found = forecast([Curve(name, steps, table["loss"][kept], curve)], curve)
            covered.append(found.low <= table["loss"][-1] <= found.high)
            widths.append((found.high - found.low) / found.loss)
            assert abs(found.loss / table["loss"][-1] - 1.0) < 0.035
    assert np.mean(covered) >= least
    assert np.median(widths) < 0.17
