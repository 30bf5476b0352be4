"""``allometry mix pools`` and ``mix filter-rate``: choices with intervals, and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from allometry.configs.loader import load
from allometry.data.synthetic import write_sparse_store
from allometry.laws.fit.engine import predict
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named
from shell import Shell

QUICK = ("--starts", 24, "--bootstraps", 40, "--hold-out", "none")
TRUE = {"d": 0.1, "D0": 1e5, "b_good": 0.2, "tau_good": 3.0, "b_fair": 0.16, "tau_fair": 5.0}
LAWS = {
    "k03": {"E": 1.9, "A": 300.0, "B": 300.0, "alpha": 0.4, "beta": 0.4},
    "k10": {"E": 1.8, "A": 400.0, "B": 400.0, "alpha": 0.4, "beta": 0.4},
}
CROSSING = 6.0 * (2.0 * 100.0 / 0.1) ** 5.0


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def drawn(path: Path, law: str, values: dict[str, float], columns: dict[str, list[float]]) -> Path:
    """Write a table of a law's losses with noise of 0.1 %."""
    rows = Observations.of(columns)
    loss_n = predict(form_named(law), values, rows)
    loss_n = loss_n * (1 + 1e-3 * np.random.default_rng(0).standard_normal(len(loss_n)))
    lines = [",".join([*columns, "loss"])]
    for row, loss in enumerate(loss_n):
        lines.append(
            ",".join(f"{value:.10g}" for value in [*(rows[c][row] for c in columns), loss])
        )
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def pools(shell: Shell, tmp_path: Path) -> Path:
    sets = ((1e7, 0.0), (0.0, 1e7), (1e7, 1e7), (2e7, 1e7))
    points = [(sum(s) * epochs, *s) for s in sets for epochs in np.geomspace(0.5, 20, 10)]
    columns = dict(zip(("D", "good", "fair"), map(list, zip(*points, strict=True)), strict=True))
    table = drawn(tmp_path / "pools.csv", "quality_pools:good,fair", TRUE, columns)
    shell("fit", "quality_pools:good,fair", table, *QUICK, "--out", tmp_path / "q.json")
    return tmp_path / "q.json"


def test_pools_at_two_budgets(shell: Shell, pools: Path) -> None:
    sizes = ("--sizes", "good=1e7,fair=1e7")
    facts = shell.json("mix", "pools", pools, *sizes, "--tokens", "1e7,1e9")
    few, many = facts["choices"]
    assert few["pools"] == ["good"]
    assert set(many["pools"]) == {"good", "fair"}
    assert many["shares"] == {"good": 0.5, "fair": 0.5}
    assert (few["epochs"], many["epochs"]) == (1, 50)
    assert few["agree"] == 1.0
    assert many["agree"] > 0.9
    for one in (few, many):
        assert one["low"] < one["loss"] < one["high"]
        assert one["second"]["loss"] > one["loss"]
    (change,) = facts["changes"]
    assert 1e7 < change["tokens"] < 1e9
    assert "50 epochs at 1e+09 tokens are more than the 20 that were fitted" in facts["warnings"][0]
    text = shell("mix", "pools", pools, *sizes, "--tokens", "1e7,1e9")
    assert "the choice changes from good to good+fair" in text
    assert "good 50.0%, fair 50.0%" in text


def test_the_choice_as_sources_of_a_run(shell: Shell, pools: Path, tmp_path: Path) -> None:
    stores = []
    for name, tokens in (("good", 10**7), ("fair", 3 * 10**7)):
        write_sparse_store(tmp_path / name, tokens, 5)
        stores.append(f"{name}={tmp_path / name}")
    out = tmp_path / "sources.yaml"
    asked = ("mix", "pools", pools, "--sizes", stores[0], "--sizes", stores[1])
    facts = shell.json(*asked, "--tokens", "1e9", "--yaml", out)
    assert facts["sizes"] == {"good": 1e7, "fair": 3e7}
    run = tmp_path / "run.yaml"
    run.write_text(f"base: preset:demo\n{out.read_text()}")
    sources = load(run).data.sources
    assert {one.name: (one.train, one.weight) for one in sources} == {
        "good": (str(tmp_path / "good"), 0.25),
        "fair": (str(tmp_path / "fair"), 0.75),
    }
    said = shell.refusal(*asked, "--tokens", "1e9,2e9", "--yaml", out)
    assert "is of one budget" in said
    said = shell.refusal(
        *("mix", "pools", pools, "--sizes", "good=1e7,fair=3e7", "--tokens", 1e9, "--yaml", out)
    )
    assert "given by its size alone" in said


@pytest.fixture
def rates(shell: Shell, tmp_path: Path) -> dict[str, Path]:
    sizes, tokens = np.meshgrid(np.geomspace(2e7, 3e9, 6), np.geomspace(2e7, 1e10, 6))
    files = {}
    for name, values in LAWS.items():
        columns = {"N": sizes.ravel().tolist(), "D": tokens.ravel().tolist()}
        table = drawn(tmp_path / f"{name}.csv", "chinchilla", values, columns)
        files[name] = tmp_path / f"{name}.json"
        shell("fit", "chinchilla", table, *QUICK, "--out", files[name])
    return files


def test_how_much_to_keep(shell: Shell, rates: dict[str, Path]) -> None:
    budgets = f"{CROSSING / 30:g},{CROSSING * 30:g}"
    facts = shell.json("mix", "filter-rate", *rates.values(), "--flops", budgets)
    assert [one["best"] for one in facts["choices"]] == ["k03", "k10"]
    (change,) = facts["changes"]
    assert (change["before"], change["after"]) == ("k03", "k10")
    assert change["flops"] == pytest.approx(CROSSING, rel=0.6)
    for one in facts["choices"]:
        chances = {name: rate["chance"] for name, rate in one["rates"].items()}
        assert sum(chances.values()) == pytest.approx(1.0)
        assert chances[one["best"]] > 0.9
        assert all(rate["low"] < rate["loss"] < rate["high"] for rate in one["rates"].values())
    text = shell("mix", "filter-rate", *rates.values(), "--flops", "1e20,1e23")
    assert "Nemotron-CC 4.0% 22.5%, RefinedWeb 3.8% 10.0%" in text
    assert "k10 *" in text


def test_refusals(shell: Shell, pools: Path, rates: dict[str, Path]) -> None:
    one = rates["k03"]
    for arguments, words in (
        (("pools", one, "--sizes", "good=1", "--tokens", "1e9"), "which knows no pools"),
        (("pools", pools, "--sizes", "good=1e7", "--tokens", "1e9"), "one for each of its pools"),
        (("pools", pools, "--sizes", "good=x,fair=1e7", "--tokens", "1e9"), "good=x is no number"),
        (("pools", pools, "--sizes", "good=1,fair=1", "--tokens", "-1"), "positive number of tok"),
        (("filter-rate", one, "--flops", "1e21"), "one fit is no choice"),
        (("filter-rate", one, pools, "--flops", "1e21"), "not from N and D"),
        (("filter-rate", *rates.values(), "--flops", "x"), "is no number"),
    ):
        assert words in shell.refusal("mix", *arguments)
