"""``allometry mix RUNS``: the ratio of replay from simulated runs with a known truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from allometry.configs.loader import load
from allometry.configs.run import RunConfig
from allometry.launch.laws.commands import MixReplay
from allometry.launch.laws.replay_mixture import of_sources
from allometry.launch.laws.replay_text import repetition_words
from allometry.laws.fit.engine import predict
from allometry.laws.frontier import GRID, fit_d_cpt
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named
from allometry.laws.replay import ReplayRows, replay_table
from allometry.trainer.train import train
from fake_runs import fake_run
from shell import Shell

DOMAIN = {
    **{"E": 1.1, "A": 60.0, "B": 40.0, "C": 0.05},
    **{"alpha": 0.36, "beta": 0.35, "eta": 0.2, "gamma": 0.7, "eps": 0.02},
}
GENERAL = {
    **{"E": 1.6, "A": 80.0, "B": 6.0, "C": 0.08},
    **{"alpha": 0.34, "beta": 0.4, "eta": 0.5, "gamma": 0.8, "eps": 0.1},
}
START = 0.05
"""Difference of the general loss before training and after it, with 50 % replay."""
SIZES, HORIZONS = (1e6, 4e6, 1.6e7), np.geomspace(2e6, 4e7, 8)
REPLAYS = (0.0, 0.1, 0.25, 0.5, 0.75)
TARGET = {"N": 1.6e7, "D": 4e7}


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def truth(values: dict[str, float], N: object, D: object, r: object) -> np.ndarray:
    N, D, r = np.broadcast_arrays(N, D, r)
    rows = Observations.of({"N": N.ravel(), "D": D.ravel(), "r": r.ravel()})
    return predict(form_named("d_cpt"), values, rows).reshape(N.shape)


def start_of(N: float) -> float:
    return float(truth(GENERAL, N, HORIZONS[-1], 0.5)) - START


def table(
    folder: Path, noise: float = 5e-4, seed: int = 0, *, sizes: tuple[float, ...] = SIZES,
    replays: tuple[float, ...] = REPLAYS, horizons: np.ndarray = HORIZONS,
) -> Path:  # fmt: skip
    """Write runs of simulated D-CPT losses; the noise of a run is the same at all horizons."""
    rng, lines = np.random.default_rng(seed), ["N,D,r,domain,general,start"]
    for N in sizes:
        for replay in replays:
            luck = np.exp(noise * rng.standard_normal(2))
            for D in horizons:
                one = np.exp(0.3 * noise * rng.standard_normal(2)) * luck
                domain = truth(DOMAIN, N, D, 1 - replay) * one[0]
                general = truth(GENERAL, N, D, replay) * one[1]
                lines.append(f"{N},{D},{1 - replay},{domain},{general},{start_of(N)}")
    path = folder / f"cpt-{seed}.csv"
    path.write_text("\n".join(lines))
    return path


def best(rise: float, N: float = TARGET["N"], D: float = TARGET["D"]) -> float:
    shares = np.linspace(0.25, 1.0, 3001)
    within = truth(GENERAL, N, D, 1 - shares) <= start_of(N) * (1 + rise / 100)
    domain = np.where(within, truth(DOMAIN, N, D, shares), np.inf)
    return float(shares[np.argmin(domain)])


def test_the_ratio_of_simulated_runs_is_found_with_both_losses(
    shell: Shell, tmp_path: Path
) -> None:
    picture = tmp_path / "frontier.png"
    asked = ("mix", table(tmp_path), "--rise", 4, "--bootstraps", 25)
    facts = shell.json(*asked, "--out", picture)
    exact = best(4)
    assert 0.3 < exact < 0.95  # the bound is active
    assert facts["share"]["value"] == pytest.approx(exact, abs=0.02)
    assert facts["share"]["low"] - 0.005 <= exact <= facts["share"]["high"] + 0.005
    assert facts["share"]["high"] - facts["share"]["low"] < 0.1
    share = facts["share"]["value"]
    for which, values, r in (("domain", DOMAIN, share), ("general", GENERAL, 1 - share)):
        true = float(truth(values, TARGET["N"], TARGET["D"], r))
        assert facts[which]["value"] == pytest.approx(true, rel=2e-3)
        assert facts["laws"][which]["r_squared"] > 0.99
    held = {one["what"]: one for one in facts["held_out"]}
    assert set(held) == {"r=0.5", "r=0.75", "r=0.9", "N=1.6e+07"}
    assert all(one[which] < 0.01 for one in held.values() for which in ("domain", "general"))
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_larger_and_longer_run_is_predicted(shell: Shell, tmp_path: Path) -> None:
    asked = ("mix", table(tmp_path), "--rise", 10, "--bootstraps", 0)
    facts = shell.json(*asked, "--with", "N=6.4e7", "--with", "D=1e8")
    for one in facts["frontier"][1:-1]:
        for which, values, r in (
            ("domain", DOMAIN, one["share"]), ("general", GENERAL, 1 - one["share"])
        ):  # fmt: skip
            true = float(truth(values, 6.4e7, 1e8, r))
            assert one[which]["value"] == pytest.approx(true, rel=0.01)
    assert facts["start"] == pytest.approx(start_of(6.4e7), rel=0.01)
    assert any("N=6.4e+07 is outside of the fitted range" in one for one in facts["warnings"])
    assert any("is from those of the sizes" in one for one in facts["warnings"])


@pytest.mark.slow
def test_intervals_hold_the_true_ratio_about_as_often_as_they_say(tmp_path: Path) -> None:
    """95 % intervals of 12 draws of the runs: fewer than 9 inside has probability 2e-4."""
    exact, inside = best(4), 0
    for seed in range(12):
        read = replay_table([table(tmp_path, seed=seed)])
        laws = fit_d_cpt(read.rows, bootstraps=40, seed=seed)
        frontier = laws.at(np.linspace(*laws.span, GRID), TARGET["N"], TARGET["D"])
        low, high = frontier.best_interval(1.04 * start_of(TARGET["N"])) or (0.0, 0.0)
        inside += low <= exact <= high
    assert inside >= 9


@pytest.mark.slow
def test_the_critical_ratio_by_both_laws(shell: Shell, tmp_path: Path) -> None:
    path = table(tmp_path, noise=1e-4)
    facts = shell.json("mix", path, "--bound", 0.08, "--rise", 5, "--bootstraps", 0)
    shares = np.linspace(0.25, 1.0, 3001)
    for one in facts["critical"]["cmr"]:
        rise = truth(GENERAL, one["N"], TARGET["D"], 1 - shares) - start_of(one["N"])
        exact = float(shares[rise <= 0.08].max())
        # CMR assumes a linear rise between the measured shares.
        assert one["ratio"] == pytest.approx(exact, abs=0.04), one
    assert facts["critical"]["d_cpt"]["bounded"]
    assert facts["critical"]["d_cpt"]["ratio"] == pytest.approx(exact, abs=0.02)


@pytest.mark.slow
def test_two_sizes_hold_the_exponent_and_say_so(shell: Shell, tmp_path: Path) -> None:
    path = table(tmp_path, sizes=SIZES[:2])
    facts = shell.json("mix", path, "--rise", 4, "--bootstraps", 0)
    assert facts["laws"]["domain"]["fixed"] == {"alpha": 0.34}
    assert facts["share"]["value"] == pytest.approx(best(4, 4e6), abs=0.02)
    assert any("held, as the runs cannot say: alpha = 0.34" in one for one in facts["warnings"])
    assert any("no size is held out" in one for one in facts["warnings"])


def test_repetition_says_when_more_epochs_stop_paying(shell: Shell, tmp_path: Path) -> None:
    path = table(tmp_path, sizes=SIZES[:1], replays=REPLAYS[1:4])
    asked = ("mix", path, "--rise", 50, "--bootstraps", 0)
    facts = shell.json(*asked, "--unique", 2e6)["repetition"]
    assert "more epochs stop paying" in "\n".join(repetition_words(facts))
    assert "give --unique TOKENS" in "\n".join(repetition_words(None))
    epochs = facts["tokens"] / 2e6
    assert facts["epochs"] == pytest.approx(epochs)
    # 2305.16264, D': unique + unique R_D (1 - exp(-(epochs - 1)/R_D)), R_D = 15.39 on C4
    R_D = 15.387756
    worth = 2e6 * (1 + R_D * (1 - np.exp(-(epochs - 1) / R_D)))
    assert facts["worth"] == pytest.approx(worth)
    assert facts["half_epochs"] == pytest.approx(11.666, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"replays": (0.0, 0.5)}, (), "domain shares 0.5, 1 alone"),
        ({}, ("--rise", -1), "give percent of at least 0"),
        ({}, ("--rise", 0, "--start", 1), "no share that was run keeps the general loss at 1.0000"),
        ({}, ("--with", "N=0"), "give N and D, each above 0"),
        ({}, ("--with", "r=0.5"), "give N and D, each above 0"),
        ({}, ("--map", "r=(1-r)*100"), "is no share; r is the new domain's"),
        ({}, ("--ends",), "--ends belongs to run folders"),
        ({}, ("--out", "picture.txt"), "a figure is written as"),
        ({"sizes": (1e6,)}, ("--with", "N=2e6"), "which says nothing of other sizes"),
    ],
)
def test_what_cannot_be_chosen_is_one_sentence(
    shell: Shell,
    tmp_path: Path,
    changes: dict[str, object],
    options: tuple[object, ...],
    words: str,
) -> None:
    path = table(tmp_path, **changes)  # type: ignore[arg-type]
    sentence = shell.refusal("mix", path, "--bootstraps", 0, *options)
    assert words in sentence, sentence


def test_what_is_no_run_is_one_sentence(shell: Shell, tmp_path: Path) -> None:
    path = table(tmp_path, sizes=SIZES[:1], replays=REPLAYS[1:4])
    assert "is not a folder" in shell.refusal("mix", tmp_path / "nothing")
    assert "not both" in shell.refusal("mix", path, tmp_path)
    path.write_text(path.read_text().replace("start", "before"))
    assert "start" in shell.refusal("mix", path)
    shell("mix", path, "--bootstraps", 0, "--rise", 50, "--start", 2)


def cpt(folder: Path, replay: float, width: int, *more: str, before: float | None = 2.5) -> None:
    """Write a continued run on web that replays code, with losses that follow the laws."""

    def law(N: float, D_T: np.ndarray) -> np.ndarray:
        return 2.0 + 3.0 / N**0.3 + 20.0 * (1.1 - replay) ** -0.2 / D_T**0.4

    section = {"ratio": replay, "sources": ["code"]}
    fake_run(
        folder, f"data.replay={json.dumps(section)}", "schedule.kind=constant",
        "schedule.warmup_steps=2", "evaluation.every_steps=5", *more, width=width, law=law,
    )  # fmt: skip
    if before is not None:
        event = {"event": "held_out_before", "step": 0, "losses": {"code": before, "web": 4.0}}
        with (folder / "events.jsonl").open("a") as file:
            file.write(json.dumps(event) + "\n")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for width in (16, 32):
        for replay in (0.0, 0.25, 0.5):
            cpt(tmp_path / "runs" / f"w{width}-{replay}", replay, width)
    return tmp_path / "runs"


def test_run_folders_say_what_they_are(shell: Shell, runs: Path) -> None:
    facts = shell.json("mix", runs, "--rise", 20, "--bootstraps", 0)
    assert (facts["new"], facts["old"]) == (["web"], ["code"])
    assert facts["start"] == 2.5
    assert [facts["frontier"][0]["share"], facts["frontier"][-1]["share"]] == [0.5, 1.0]
    assert facts["rows"] == 6 * 8
    assert any("D-CPT has no D" in one and "14 rows" in one for one in facts["warnings"])
    assert facts["repetition"]["unique"] == 5000
    assert not any("rate moves" in one for one in facts["warnings"])
    options = ("--bootstraps", 0, "--start", 2.4)
    assert shell.json("mix", runs, "--rise", 20, *options)["start"] == 2.4
    assert "at least 1.000 (" in shell("mix", runs, "--rise", 900, "--bound", 9, *options)


def test_what_runs_do_not_say_is_one_sentence(shell: Shell, runs: Path) -> None:
    assert "--domain books is no source of the runs" in shell.refusal(
        "mix", runs, "--domain", "books"
    )
    assert "no old source" in shell.refusal("mix", runs, "--domain", "web", "--domain", "code")
    assert "cannot read" in shell.refusal("mix", runs, "--repetition", runs / "none.json")
    cpt(runs / "later", 0.4, 32, before=None)
    assert "did not measure the loss of code" in shell.refusal("mix", runs)
    changed = json.dumps([{"after_tokens": 512, "ratio": 0.1}])
    cpt(runs / "later2", 0.4, 32, f"data.replay.changes={changed}")
    assert "changes its mixture on the way" in shell.refusal("mix", runs, "--start", 2.5)


def test_more_than_two_sources_have_the_shares_of_the_least_domain_loss() -> None:
    """Two new sources and an old one, whose losses are known exponentials of the shares."""
    names, rng = ("new", "chat", "web"), np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(3), 24)

    def losses(r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return 1.0 + np.exp(r @ [-2.0, -0.5, 0.3]), 1.5 + np.exp(r @ [0.4, 0.2, -1.5])

    domain, general = losses(shares)
    noise = np.exp(2e-4 * rng.standard_normal((2, 24)))
    columns = {f"r/{name}": share for name, share in zip(names, shares.T, strict=True)}
    columns |= {"domain": domain * noise[0], "general": general * noise[1]}
    full = np.ones(24)
    ends = Observations.of({**columns, "N": 1e6 * full, "D": 1e8 * full, "start": 2.2 * full})
    read = ReplayRows(ends, ends, {"new": 0.5, "chat": 0.5}, {"web": 1.0})
    found = of_sources(MixReplay(sources=(), rise=5.0, bootstraps=20), read)
    assert found is not None
    grid = rng.dirichlet(np.ones(3), 200_000)
    grid_domain, grid_general = losses(grid)
    inside = (grid_general <= 2.2 * 1.05) & (grid >= shares.min(0)).all(1)
    inside &= (grid <= shares.max(0)).all(1)
    exact = grid[np.argmin(np.where(inside, grid_domain, np.inf))]
    for name, share in zip(names, exact, strict=True):
        one = found["shares"][name]
        assert one["share"] == pytest.approx(share, abs=0.02)
        assert one["low"] - 0.02 <= share <= one["high"] + 0.02
    assert found["losses"]["general"] == pytest.approx(2.2 * 1.05, abs=1e-4)
    few = ReplayRows(ends.take(range(3)), ends.take(range(3)), read.new, read.old)
    refused = of_sources(MixReplay(sources=(), rise=5.0, bootstraps=0), few)
    assert refused is not None
    assert "add runs" in refused["why"]
    assert of_sources(MixReplay(sources=()), ReplayRows(ends)) is None


@pytest.mark.slow
def test_branches_of_a_real_trunk(
    shell: Shell, tiny: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Rows begin at the branch, and the trunk is omitted."""
    trunk, stable = tmp_path / "runs" / "trunk", "schedule={kind: constant, warmup_steps: 3}"
    config = tiny(stable, "checkpoint.keep_steps=[8]", "data.sources.0.weight=0",
                  "training.total_steps=8", folder=trunk)  # fmt: skip
    cpu = torch.device("cpu")
    train(config, device=cpu, callbacks=[])
    for ratio in (0.1, 0.5, 0.8):
        replay = json.dumps({"ratio": ratio, "sources": ["down"]})
        words = ("--set", "data.sources.0.weight=1", "--set", f"data.replay={replay}")
        words = (*words, "--set", "training.total_steps=16", "--set", "evaluation.every_steps=1")
        said = shell.json("branch", trunk, "--at", 8, "--run", f"b{ratio}", *words)
        train(load(said["config"]), device=cpu, callbacks=[])
    facts = shell.json("mix", tmp_path / "runs", "--rise", 80, "--bootstraps", 0)
    assert (facts["new"], facts["old"]) == (["up"], ["down"])
    assert [facts["frontier"][0]["share"], facts["frontier"][-1]["share"]] == [0.2, 0.9]
    assert facts["at"]["D"] == 8 * 256  # of the branch only
    assert facts["rows"] == 3 * 8
    events = (tmp_path / "runs" / "b0.5" / "events.jsonl").read_text().splitlines()
    (before,) = [e for e in map(json.loads, events) if e["event"] == "held_out_before"]
    assert facts["start"] == pytest.approx(before["losses"]["down"])
    assert any("others branch from there" in one for one in facts["warnings"])
