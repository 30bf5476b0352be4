"""The cheapest size, tokens and layout for a target loss, by an exactly known law."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from allometry.configs.errors import UserError
from allometry.configs.loader import load
from allometry.configs.machine import load_hardware
from allometry.launch.cli import app
from allometry.launch.studies import plan_target
from allometry.laws.collect import COUNT_MEANING
from allometry.laws.fit.engine import Fit, fit
from allometry.laws.fit.store import save_fit
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named
from allometry.scaling.count import count_parameters
from allometry.scaling.search.search import Asked

TRUE = {"E": 1.7, "A": 400.0, "alpha": 0.34, "B": 400.0, "beta": 0.28}
SMALL = ("batch.ramp=null", "model.num_layers=4", "batch.sequences=64")


@pytest.fixture(scope="module")
def law() -> Fit:
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e10, 6), np.geomspace(1e9, 1e12, 6)))
    loss = TRUE["E"] + TRUE["A"] / n ** TRUE["alpha"] + TRUE["B"] / d ** TRUE["beta"]
    rows = Observations.of({"N": n, "D": d, "loss": loss})
    told = Observations(rows.columns, rows.groups, {}, {"N": COUNT_MEANING["non_embedding"]})
    return fit(form_named("chinchilla"), told)


def test_tokens_reach_the_loss_exactly(law: Fit) -> None:
    tokens = plan_target.tokens_for(law, 1e9, 2.4)
    assert tokens is not None
    by_hand = (TRUE["B"] / (2.4 - TRUE["E"] - TRUE["A"] / 1e9 ** TRUE["alpha"])) ** (
        1 / TRUE["beta"]
    )
    assert tokens == pytest.approx(by_hand, rel=1e-3)
    assert plan_target.tokens_for(law, 1e7, 2.4) is None  # too small at any number of tokens


def test_sizes_are_ordered_by_gpu_hours_and_count_as_the_law_does(law: Fit) -> None:
    config = load("preset:dense_7b", list(SMALL))
    asked = Asked(load_hardware("h100"), "h100")
    found, notes = plan_target.sizes(config, law, 2.4, asked, (8, 64))
    hours = [one.best.gpu_hours for one in found]
    assert hours == sorted(hours)
    own = next(one for one in found if one.width == config.model.width)
    assert own.parameters == count_parameters(config.model).non_embedding
    assert own.best.tokens == pytest.approx(own.tokens, rel=0.01)
    assert any(COUNT_MEANING["non_embedding"] in note for note in notes)
    with pytest.raises(UserError, match=r"--loss=1\.5: no size reaches it"):
        plan_target.sizes(config, law, 1.5, asked, (8,))


def test_the_command_answers(law: Fit, tmp_path: Path) -> None:
    file = tmp_path / "law.json"
    save_fit(file, law)
    where = ("plan", "preset:dense_7b", "--cluster", "h100", "--gpus", "8,64", *SMALL)
    asked = (*where, "--fit", str(file), "--loss", "2.4", "--price", "2")
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    assert "fewest FLOPs: width" in shown.output
    facts = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    costs = [one["best"]["cost"] for one in facts["sizes"]]
    assert costs == sorted(costs)
    assert costs[0] > 0
