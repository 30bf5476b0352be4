"""ScaleBiO: the published quadratic cases, a planted noise source, and ``mix bilevel``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.configs.loader import load
from allometry.data.stream import open_stream
from allometry.data.synthetic import write_store
from allometry.studies.bilevel import (
    BilevelStep,
    SourceWeights,
    bilevel,
    capped,
    learn,
    plan_bilevel,
)
from shell import Shell

CENTRES = np.array([(0.0, 0.0), (4.0, 0.0), (0.0, 4.0)])
CPU = torch.device("cpu")
VOCAB = 32


class Quadratic:
    """Player of losses |x - c|^2 / 2 with three sources and a target, by gradient descent."""

    def __init__(self, target: Sequence[float]) -> None:
        self.at = np.zeros(2)
        self._points = np.vstack([CENTRES, target])

    def step(self, batch: None, weights: Sequence[float], fraction: float) -> NDArray[np.float64]:
        away = self.at - self._points
        losses: NDArray[np.float64] = 0.5 * (away**2).sum(1)
        self.at = self.at - 0.3 * fraction * (np.array(weights) @ away) / sum(weights)
        return losses


def solved(target: Sequence[float], alpha: float, rate: float) -> tuple[Any, Any]:
    outer, inner = Quadratic(target), Quadratic(target)
    weights = SourceWeights(3, rate, 500)
    for _ in bilevel(outer, inner, weights, alpha, iter([None] * 500)):
        pass
    return weights.shares, outer.at


@pytest.mark.parametrize("alpha", [1.0, 10.0, 100.0])
def test_shares_are_the_coordinates_of_a_target_between_the_sources(alpha: float) -> None:
    """For every alpha: w = u = the target, and p its barycentric coordinates."""
    shares, at = solved((2.0, 0.5), alpha, 0.1)
    np.testing.assert_allclose(shares, (0.375, 0.5, 0.125), atol=1e-3)
    np.testing.assert_allclose(at, (2.0, 0.5), atol=1e-3)


def test_a_target_outside_takes_the_nearest_source() -> None:
    for alpha in (1.0, 10.0):
        shares, at = solved((-1.0, -1.0), alpha, 0.3)
        assert shares[0] > 0.999
        np.testing.assert_allclose(at, [-1.0 / (1.0 + alpha)] * 2, atol=1e-3)


def test_the_derivative_of_the_weights() -> None:
    """One step has the sign of the finite difference of alpha sum_i p_i d_i by lambda_i."""
    gaps, alpha = np.array([0.3, -0.2, 0.1]), 7.0
    weights = SourceWeights(3, 0.01, 10)
    weights.step(1, gaps, alpha)
    moved = np.log(weights.shares) - np.log(weights.shares).mean()
    zero = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (alpha * zero.softmax(0) @ torch.from_numpy(gaps)).backward()
    assert zero.grad is not None
    assert weights._lambda_S.grad is not None
    torch.testing.assert_close(weights._lambda_S.grad, zero.grad)
    assert (np.sign(moved) == -np.sign(zero.grad.numpy())).all()


def test_shares_within_the_epochs_that_data_allow() -> None:
    np.testing.assert_allclose(
        capped(np.array([0.8, 0.1, 0.1]), np.array([0.5, 1, 1])), (0.5, 0.25, 0.25)
    )
    made = capped(np.array([0.7, 0.25, 0.05]), np.array([0.3, 0.35, 9]))
    np.testing.assert_allclose(made, (0.3, 0.35, 0.35))
    np.testing.assert_allclose(capped(np.array([1.0, 0, 0]), np.array([0.4, 0.3, 0.3])).sum(), 1)
    with pytest.raises(UserError, match=r"tokens for 0\.9 of the run within --max-epochs"):
        capped(np.array([0.5, 0.5]), np.array([0.5, 0.4]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of a run: ``good`` and ``target`` follow one rule, ``noise`` is random."""
    rng = np.random.default_rng(0)
    for name in ("good", "noise", "target"):
        documents = []
        for _ in range(120):
            ids = rng.integers(0, VOCAB, 40)
            if name != "noise":
                for at in range(1, 40):
                    ids[at] = (3 * ids[at - 1] + 1) % VOCAB if rng.random() < 0.9 else ids[at]
            documents.append(ids)
        write_store(tmp_path / name, documents)
    (tmp_path / "run.yaml").write_text(json.dumps(config_of(tmp_path)))
    return tmp_path


def config_of(folder: Path) -> dict[str, Any]:
    weights = {"good": 1, "noise": 1, "target": 0}
    return {
        "run": {"folder": str(folder / "run")},
        "model": {
            **{"kind": "dense", "vocab_size": VOCAB, "width": 16, "num_layers": 1},
            **{"num_heads": 2, "ffn_width": 32},
        },
        "data": {
            "sequence_length": 20,
            "sources": [
                {"name": name, "train": str(folder / name), "weight": weight}
                for name, weight in weights.items()
            ],
        },
        "batch": {"sequences": 9, "micro_batch_sequences": 3},
        "training": {"total_steps": 40, "compute_dtype": "fp32"},
        "optimizer": {"kind": "adamw", "lr": 1e-2},
        "schedule": {"kind": "cosine", "warmup_steps": 3},
    }


def test_each_batch_has_the_same_samples_of_each_source_as_runs_read(folder: Path) -> None:
    """The target gives its own samples, and those of L1 are no samples of its own weight."""
    more = ["data.sources.2.weight=1", "batch.sequences=8", "batch.micro_batch_sequences=2"]
    config = load(folder / "run.yaml", more)
    plan = plan_bilevel(config, "target", seed=3, device=CPU)
    assert plan.sources == ("good", "noise", "target")
    batches = list(plan.batches())
    assert [[sum(len(b.tokens_BL) for b in part) for part in batch] for batch in batches] == [
        [2, 2, 2, 2]
    ] * 40
    alone = config.data.model_copy(update={"sources": (config.data.sources[2],)})
    read = open_stream(alone, 3).batch(0, 160).tokens_BL
    found = [torch.cat([b.tokens_BL for b in part]) for batch in batches for part in batch[2:]]
    np.testing.assert_array_equal(torch.cat(found).numpy(), read)
    assert plan.ledger() == {"good": 1600, "noise": 1600, "target": 3200}
    assert plan.epochs()["target"] == pytest.approx(2 / 3)


def last_step(folder: Path, target: str) -> BilevelStep:
    plan = plan_bilevel(load(folder / "run.yaml"), target, seed=0, device=CPU)
    *_, last = learn(plan, alpha=10.0, rate=0.3, seed=0)
    return last


def test_noise_loses_its_weight(folder: Path) -> None:
    last = last_step(folder, "target")
    assert last.shares[1] < 0.05
    assert last.losses[0] < last.losses[1] - 0.4


@pytest.mark.slow
def test_noise_keeps_its_weight_as_the_target_and_repeats_are_equal(folder: Path) -> None:
    last, again = (last_step(folder, "target") for _ in range(2))
    np.testing.assert_array_equal(again.shares, last.shares)
    assert again.target == last.target
    assert last_step(folder, "noise").shares[1] > 0.5


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shell = Shell(capsys)
    asked = "mix", "bilevel", folder / "run.yaml", "--target"
    quick = "training.total_steps=6", "batch.sequences=6", "batch.micro_batch_sequences=2"
    out = folder / "sources.yaml"
    options = "--seeds", 2, "--max-epochs", 2, "--tokens", 12000, "--yaml", out
    facts = shell.json(*asked, "target", *quick, "--weight-lr", 0.5, *options)
    assert facts["tokens"] == dict.fromkeys(("good", "noise", "target"), 6 * 2 * 20)
    assert list(facts["sources"]) == ["good", "noise"]
    weights = {name: one["weight"] for name, one in facts["sources"].items()}
    assert sum(weights.values()) == pytest.approx(1.0)
    assert max(weights.values()) <= 0.8
    assert len(facts["course"]) == 6
    assert facts["course"][0]["shares"] == [0.5, 0.5]
    run = folder / "weighted.yaml"
    run.write_text(f"base: run.yaml\n{out.read_text()}")
    made = {one.name: one.weight for one in load(run).data.sources}
    assert made == pytest.approx({**weights, "target": 0.0})
    assert "loss of the target" in shell(*asked, "target", *quick)


def test_refusals(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shell = Shell(capsys)
    asked = "mix", "bilevel", folder / "run.yaml", "--target"
    for more, says in (
        (("web",), "--target=web is none of data.sources; name good or noise or target"),
        (("target", "--alpha", 0), "--alpha=0 must be a number above 0"),
        (("target", "--device", "tpu"), "--device=tpu is not known; use cpu or cuda"),
        (("target", "run.initial={folder: other}"), "run.initial names other weights"),
        (("target", "--weight-lr", "nan"), "--weight-lr=nan must be a number above 0"),
        (("target", "batch.sequences=2", "batch.micro_batch_sequences=1"), "gives no sequence to"),
        (("target", "data.sources.1.weight=0"), "good alone has a weight above 0"),
        (("target", "--tokens", 1e6), "within --max-epochs"),
        (("target", "optimizer.lr=1e9", "training.total_steps=20"), "are not finite"),
        (("target", "data.replay={ratio: 0.5, sources: [good]}"), "give a configuration without"),
    ):
        assert says in shell.refusal(*asked, *more)
    with pytest.raises(UserError, match=r"learn the weights with model\.kind=dense"):
        plan_bilevel(load("preset:moe_demo"), "python-code", seed=0, device=CPU)
