"""Laws by width and depth: by hand, against Chinchilla's, from run folders, the best shape."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.fit.engine import FitOptions, fit, predict, require_identified
from allometry.laws.fit.validate import hold_out_largest
from allometry.laws.forms.dense import Chinchilla
from allometry.laws.forms.shape import AspectRatio, WidthDepth
from allometry.laws.observations import Observations
from fake_runs import fake_run
from law_checks import noisy
from shell import Shell

RATIO = {
    "E": 1.8, "A": 400.0, "B": 1500.0, "alpha": 0.34, "beta": 0.33, "eps": 2e-3, "gamma": 0.6,
}  # fmt: skip
DEPTH = {"E": 1.7, "A": 30.0, "G": 1.2, "B": 1500.0, "alpha": 0.7, "gamma": 1.0, "beta": 0.33}


def shapes(layers: tuple[int, ...] = (4, 8, 16, 32)) -> Observations:
    """Return every width at every depth, at three horizons; N = 12 width² layers."""
    grid = np.meshgrid((256, 512, 1024, 2048), layers, (2e9, 1e10, 6e10))
    width, depth, tokens = (axis.ravel().astype(float) for axis in grid)
    columns = {"width": width, "layers": depth, "D": tokens, "N": 12 * width**2 * depth}
    return Observations.of(columns)


def test_by_hand() -> None:
    row = Observations.of({"N": [1e9], "D": [2e10], "width": [2048.0], "layers": [16.0]})
    dense = 1.8 + 400 / 1e9**0.34 + 1500 / 2e10**0.33
    expected = dense * (1 + 2e-3 * 128**0.6)
    assert predict(AspectRatio(), RATIO, row)[0] == pytest.approx(expected, rel=1e-14)
    expected = 1.7 + 30 / 2048**0.7 + 1.2 / 16 + 1500 / 2e10**0.33
    assert predict(WidthDepth(), DEPTH, row)[0] == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("form", "values"), [(AspectRatio(), RATIO), (WidthDepth(), DEPTH)], ids=["ratio", "depth"]
)
def test_depths_that_were_not_run_are_predicted(
    form: AspectRatio | WidthDepth, values: dict[str, float]
) -> None:
    """From up to 16 layers to 32, with noise of 0.1 %: better than by N and D alone."""
    rows = noisy(form, values, shapes(), 1e-3)
    errors = [
        hold_out_largest(one, rows, "layers", FitOptions(starts=64)).mean
        for one in (form, Chinchilla())
    ]
    assert errors[0] < 3e-3
    assert errors[0] < 0.3 * errors[1]


def test_a_shape_that_follows_the_size_is_not_identified() -> None:
    rows = shapes()
    same = rows.take(np.isclose(rows["width"] / rows["layers"], 64))
    assert len(np.unique(same["N"])) == 4
    exact = Observations.of({**same.columns, "loss": predict(AspectRatio(), RATIO, same)})
    with pytest.raises(UserError, match=r"cannot identify .*eps.* of aspect_ratio"):
        require_identified(fit(AspectRatio(), exact, FitOptions(starts=32)))


@pytest.mark.parametrize("size", [1e8, 1e10])
def test_the_best_width_is_where_the_law_is_least(size: float) -> None:
    power = WidthDepth().restated(DEPTH)
    width = power["best width coefficient"] * size ** power["best width exponent of N"]
    assert power["best width exponent of N"] == pytest.approx(1.0 / 2.7)
    around = width * np.array([0.9, 1.0, 1.1])
    rows = {"width": around, "layers": size / (12 * around**2), "D": np.full(3, 1e10)}
    below, at, above = predict(WidthDepth(), DEPTH, Observations.of(rows))
    assert at < below
    assert at < above
    assert WidthDepth().restated({**DEPTH, "G": 0.0}) == {}


def test_runs_say_their_width_and_depth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for width in (16, 32, 48, 64):
        for layers in (1, 2, 4, 8):
            for steps in (40, 80, 160):

                def law(N: float, D_T: np.ndarray, ratio: float = width / layers) -> np.ndarray:
                    return (1.5 + 60 / N**0.4 + 90 / D_T**0.4) * (1 + 0.01 * math.sqrt(ratio))

                changes = (f"model.num_layers={layers}", f"training.total_steps={steps}")
                fake_run(tmp_path / f"w{width}-{layers}-{steps}", *changes, width=width, law=law)
    last = ("--loss", "train", "--last", 0.001)
    quick = ("--starts", 64, "--bootstraps", 20, "--hold-out", "largest:layers")
    facts = Shell(capsys).json("fit", "aspect_ratio", tmp_path, *last, *quick)
    assert facts["rows"] == 48
    assert facts["parameters"]["gamma"]["value"] == pytest.approx(0.5, abs=0.05)
    assert facts["held_out"]["max"] < 0.01
