"""Optimal transport: distances, slopes, shares of the least distance, GOT-D, their commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from allometry.data.select.kept import kept_documents
from allometry.data.select.scores import read_scores
from allometry.data.select.transport import (
    Floats,
    distance,
    documents_dual,
    screen,
    squared_distances,
)
from allometry.data.store import TokenStore
from allometry.data.synthetic import write_store
from shell import Shell

ot = pytest.importorskip("ot", reason="the extra 'select' is not installed")
CENTRES = (0.0, 0.0), (4.0, 0.0), (0.0, 4.0)


def around(rng: np.random.Generator, source: int, count: int) -> Floats:
    return np.asarray(rng.normal(size=(count, 2)) + CENTRES[source], np.float64)


def gaussians(counts: tuple[int, ...], each: int) -> tuple[list[Floats], Floats]:
    """Return points of A, B and C, and a target that is half A, half B."""
    rng = np.random.default_rng(0)
    points = [around(rng, source, count) for source, count in enumerate(counts)]
    return points, np.concatenate([around(rng, 0, each), around(rng, 1, each)])


def test_the_distance_is_that_of_the_linear_program() -> None:
    """The dual is feasible and has the value of the primal; Sinkhorn's value is above it."""
    from scipy.optimize import linprog

    (points, _, _), target = gaussians((7, 1, 1), 4)
    costs = squared_distances(points, target)
    np.testing.assert_allclose(costs[2, 5], ((points[2] - target[5]) ** 2).sum())
    weights = np.random.default_rng(1).dirichlet(np.ones(7))
    rows = np.kron(np.eye(7), np.ones(8)), np.kron(np.ones(7), np.eye(8))
    plain = linprog(costs.ravel(), A_eq=np.vstack(rows), b_eq=[*weights, *[1 / 8] * 8])
    value, dual = distance(costs, weights)
    assert value == pytest.approx(plain.fun, rel=1e-9)
    documents = documents_dual(costs, dual)
    assert weights @ documents + dual.mean() == pytest.approx(value, rel=1e-9)
    assert (documents[:, None] + dual <= costs + 1e-9).all()
    blurred = float(ot.sinkhorn2(weights, np.full(8, 1 / 8), costs, 0.05 * costs.max()))
    assert blurred > 1.03 * value


def test_slopes_are_finite_differences() -> None:
    points, target = gaussians((61, 47, 53), 35)
    costs = [squared_distances(one, target) for one in points]
    shares = np.array([0.3, 0.5, 0.2])
    found = screen(costs, shares, rounds=0)

    def at(moved: NDArray[np.float64]) -> float:
        sizes = [len(one) for one in costs]
        return distance(np.concatenate(costs), np.repeat(moved / sizes, sizes))[0]

    assert found.mixture == pytest.approx(at(shares))
    for source in range(3):
        assert found.alone[source] == pytest.approx(at(np.eye(3)[source]))
        by = 1e-5 * (np.eye(3)[source] - shares)
        expected = (at(shares + by) - at(shares - by)) / 2e-5
        assert found.slopes[source] == pytest.approx(expected, rel=0.01)
    assert found.slopes @ shares == pytest.approx(0.0, abs=1e-9)


def test_the_least_distance_mixes_the_sources_of_the_target() -> None:
    """Shares of A and B are near those of the target (.54, .46 for other draws), that of C is 0."""
    points, target = gaussians((100, 100, 100), 70)
    costs = [squared_distances(one, target) for one in points]
    found = screen(costs, np.full(3, 1 / 3))
    assert found.shares[0] == pytest.approx(0.5, abs=0.06)
    assert found.shares[2] < 0.01
    assert found.bound <= found.least <= found.bound * (1 + 1e-3)
    assert found.least < 0.2 * found.mixture
    assert found.slopes[2] > 0 > found.slopes[1]
    few = screen(costs, np.full(3, 1 / 3), rounds=1)
    assert few.least >= found.least * (1 - 1e-3)
    assert few.bound < found.least, "one round has no proof yet"


def test_documents_that_the_base_lacks_score_lowest() -> None:
    """The base is A, the target half A half B: 90 of B are taken, by nearness also those of A."""
    rng = np.random.default_rng(0)
    points, target = gaussians((100, 100, 100), 100)
    base = squared_distances(around(rng, 0, 100), target)
    _, dual = distance(base, np.full(100, 0.01))
    candidates = squared_distances(np.concatenate(points), target)
    ours, nearest = (
        np.bincount(np.argsort(documents_dual(candidates, g))[:90] // 100, minlength=3)
        for g in (dual, np.zeros(200))
    )
    assert ours.tolist() == [0, 90, 0]
    assert nearest[0] > 25
    assert nearest[2] < 10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of two sources, of which ``near`` has the ids of the target."""
    pytest.importorskip("sklearn", reason="the extra 'select' is not installed")
    rng = np.random.default_rng(0)
    for name, low in (("near.train", 100), ("near.validation", 100), ("far.train", 300)):
        documents = [rng.integers(low, low + 200, 40) for _ in range(60)]
        write_store(tmp_path / name, documents)
    both = [rng.integers(100 + 200 * (k % 2), 300 + 200 * (k % 2), 40) for k in range(40)]
    write_store(tmp_path / "both", [*both, both[0][:0]])
    sources = [
        {"name": "near", "train": "near.train", "validation": "near.validation", "weight": 1},
        {"name": "far", "train": "far.train", "weight": 3},
    ]
    for one in sources:
        one["train"] = str(tmp_path / str(one["train"]))
    sources[0]["validation"] = str(tmp_path / "near.validation")
    config = {"base": "preset:demo", "data": {"tokenizer": None, "sources": sources}}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    return tmp_path


def test_the_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shell = Shell(capsys)
    asked = "mix", "ot", folder / "run.yaml", "--samples", 40, "--seeds", 2, "--target"
    found = shell.json(*asked, "near")
    near, far = found["sources"]["near"], found["sources"]["far"]
    assert (near["share"], far["share"]) == (0.25, 0.75)
    assert near["distance"]["mean"] < found["mixture"]["mean"] < far["distance"]["mean"]
    assert near["slope"]["mean"] < 0 < far["slope"]["mean"]
    assert near["least"]["mean"] > 0.9
    assert near["distance"]["deviation"] > 0
    assert shell.json(*asked, "near") == {**found, "seconds": pytest.approx(0.0, abs=60)}
    table = shell(*asked, folder / "far.train")
    assert "share of the least distance" in table
    options = "--base", folder / "near.train", "--target", folder / "both", "--keep", 0.3
    done = shell.json("select", "ot", folder / "both", *options)
    store = TokenStore(str(folder / "both"))
    values = read_scores(done["scores"], store).values
    assert np.isnan(values).nonzero()[0].tolist() == [40]
    assert done["settings"]["distance"] > 0
    _, kept = kept_documents(values, store.lengths, 0.3, "bottom")
    assert (kept % 2 == 1).all(), "documents of ids that the base lacks"
    for name, says in (
        ("far", "--target=far is a source without held-out documents"),
        (folder / "none.jsonl", "none.jsonl cannot be read"),
    ):
        assert says in shell.refusal(*asked, name)
    one = "data.sources=[{name: near, train: " + str(folder / "near.train") + "}]"
    assert "has one source" in shell.refusal(*asked, folder / "both", one)


def test_a_missing_package_is_a_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ot", None)
    said = Shell(capsys).refusal("mix", "ot", folder / "run.yaml", "--target", "near")
    assert "needs POT, which cannot be imported" in said
