"""Laws of hyperparameters: published values, the underlying runs, ranges in words."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from allometry.configs.loader import load
from allometry.configs.model import DenseModel
from allometry.scaling import hyperlaws
from allometry.scaling.hyperlaws import Target, disagreements, suggest
from allometry.scaling.shapes import at_depth

# The runs of Step Law, if present next to the project; we may not distribute them.
RUNS = Path(__file__).resolve().parents[4] / "shared" / "data" / "laws" / "steplaw"
MODEL = DenseModel(vocab_size=1000, width=64, num_layers=4, num_heads=4, ffn_width=128)


def target(**changes: object) -> Target:
    facts = {
        "kind": "dense",
        "parameters": 10**9,
        "active": 10**9,
        "tokens": 2 * 10**10,
        "flops": 1.2e20,
        "num_layers": 20,
    }
    return Target(**{**facts, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "lr", "batch"),
    [((1e9, 1e11), 1.632499e-3, 1107714.89), ((6e7, 1.2e9), 3.121331e-3, 88642.19)],
)
def test_step_law_gives_its_published_values(
    size: tuple[float, float], lr: float, batch: float
) -> None:
    assert hyperlaws.step_law(*size) == (
        pytest.approx(lr, rel=1e-6),
        pytest.approx(batch, rel=1e-6),
    )


def test_hyperp_at_its_base_and_up_its_ladder() -> None:
    """The authors' code (microsoft/ArchScale, pretrain.py) gives each group
    η₀·√(B/B₀)·√(L₀/L)·(T/T₀)^−0.32 away from the base of 8 layers and 10.4e9 tokens."""
    # The authors' runs at the base used rates of .014 to .016.
    assert 0.014 < hyperlaws.hyperp_base_lr(10.4e9) < 0.016
    # Ladder and fit are the same power of the tokens.
    (fit,) = [s for s in suggest(target(tokens=10**11, num_layers=16)) if s.law == "hyperp"]
    ladder = hyperlaws.hyperp_base_lr(10.4e9) * math.sqrt(8 / 16) * (1e11 / 10.4e9) ** -0.32
    assert fit.lr == pytest.approx(ladder, rel=1e-6)


@pytest.mark.parametrize(
    ("flops", "lr", "sequences"), [(2e18, 1.52e-3, 98), (6e19, 9.5e-4, 342), (6e20, 7.0e-4, 795)]
)
def test_ling_law_is_near_the_rates_that_its_authors_ran(
    flops: float, lr: float, sequences: int
) -> None:
    """Table 7 of arXiv 2507.17702: rates and batches (of 4,096 tokens) by largest compute."""
    found_lr, found_batch = hyperlaws.ling_law(flops)
    assert abs(math.log2(found_lr / lr)) < 0.35
    assert abs(math.log2(found_batch / (sequences * 4096))) < 0.35


def test_minicpm_and_deepseek_laws() -> None:
    # MiniCPM's 2.4B model was trained with steps of 3.93M tokens.
    assert hyperlaws.minicpm_batch(2.5) == pytest.approx(3.98e6, rel=0.01)
    # DeepSeek 7B, 2T tokens: 2304 sequences of 4096 tokens at 4.2e-4.
    lr, batch = hyperlaws.deepseek_law(6 * 7e9 * 2e12)
    assert abs(math.log2(lr / 4.2e-4)) < 0.5
    assert abs(math.log2(batch / (2304 * 4096))) < 0.5


def cells(name: str, batches: int) -> dict[tuple[float, ...], tuple[float, float]]:
    """Return (learning rate, batch in tokens) of the lowest loss in each cell (N, active N, D)."""
    path = RUNS / name
    if not path.exists():
        pytest.skip(f"{path} is not here: the law is not held against the authors' runs")
    best: dict[tuple[float, ...], list[tuple[float, float, float]]] = defaultdict(list)
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            parameters = float(row["N"])
            key = (parameters, float(row.get("Na") or parameters), float(row["D"]))
            loss = float(row["smooth loss"])
            best[key].append((loss, float(row["lr"]), float(row["bs"]) * 2048))
    found = {key: min(rows)[1:] for key, rows in best.items()}
    assert len(found) == batches
    return found


def test_step_law_is_within_an_octave_of_the_best_dense_runs() -> None:
    octaves = []
    for (parameters, _, tokens), best in cells("dense_lr_bs_loss.csv", 17).items():
        said = hyperlaws.step_law(parameters, tokens)
        octaves.append([abs(math.log2(a / b)) for a, b in zip(said, best, strict=True)])
    lr, batch = np.array(octaves).T
    assert lr.max() <= 1.0
    assert batch.max() <= 1.0
    assert np.median(lr) <= 0.4
    assert np.median(batch) <= 0.4


def test_step_law_means_all_experts_of_a_mixture() -> None:
    found = cells("moe_lr_bs_loss.csv", 16)
    whole = [
        abs(math.log2(hyperlaws.step_law(n, d)[0] / lr)) for (n, _, d), (lr, _) in found.items()
    ]
    active = [
        abs(math.log2(hyperlaws.step_law(a, d)[0] / lr)) for (_, a, d), (lr, _) in found.items()
    ]
    assert np.median(whole) <= 0.4
    assert max(whole) <= 1.3
    assert max(active) >= 3.0


def test_what_lies_outside_is_said_in_words() -> None:
    inside = {s.law: s for s in suggest(target())}
    assert inside["step-law"].outside == ()
    far = {s.law: s for s in suggest(target(parameters=7 * 10**9, tokens=2 * 10**12, flops=1e23))}
    assert len(far["step-law"].outside) == 2
    assert "N 7e+09 is 6.54 x the largest" in far["step-law"].outside[0]
    assert "D 2e+12 is 20 x the largest" in far["step-law"].outside[1]
    assert len(far["deepseek"].outside) == 1
    small = {s.law: s for s in suggest(target(parameters=10**6, flops=1e15))}
    assert "59 x below" in small["step-law"].outside[0]


def test_laws_speak_only_of_what_they_were_fitted_on() -> None:
    dense = {s.law: s for s in suggest(target())}
    mixed = {s.law: s for s in suggest(target(kind="moe", active=10**8))}
    assert dense["ling"].refused == "fitted on moe models only, not on dense ones"
    assert mixed["deepseek"].refused is not None
    assert mixed["deepseek"].lr is None
    assert mixed["ling"].lr is not None
    assert dense["minicpm"].batch_tokens is None
    with_loss = {s.law: s for s in suggest(target(loss=2.5))}
    assert with_loss["minicpm"].batch_tokens == round(1.21e9 / 2.5**6.24)


def test_disagreements_compare_rates_of_one_setting_only() -> None:
    found = suggest(target(flops=1e24, tokens=10**9))
    said = disagreements(found)
    assert any("step-law and deepseek" in words and "batches" in words for words in said)
    assert not any("hyperp" in words for words in said), "another optimizer's rates"
    assert disagreements(found, octaves=20.0) == []


def test_a_target_counts_what_the_laws_count() -> None:
    made = Target.of(MODEL, 10**6, 128)
    block = 4 * 64 * 64 + 3 * 64 * 128
    assert made.parameters == made.active == 4 * block
    # Attention over the full square: 2 products of 2 x width per pair of tokens.
    assert made.flops == pytest.approx(1e6 * 3 * (2 * 4 * block + 4 * 4 * 64 * 129), rel=1e-9)
    deeper = Target.of(MODEL, 10**6, 128, parameters=8 * 4 * block)
    assert deeper.num_layers == 8
    assert deeper.flops == 6 * deeper.parameters * 1e6
    assert Target.of(at_depth(MODEL, 8), 10**6, 128).parameters == 8 * block


def test_a_mixture_counts_all_and_active_experts() -> None:
    run = load("preset:moe_demo")
    made = Target.of(run.model, 10**6, 128)
    assert made.kind == "moe"
    experts = 4 * 8 * 3 * 192 * 256
    assert made.parameters - made.active == experts * 6 // 8
