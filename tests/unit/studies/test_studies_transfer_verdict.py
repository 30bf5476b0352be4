"""Verdicts of a sweep on a transferred rate, and the runs that they need."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.configs.model import DenseModel, HyperP, StandardParameterization
from allometry.configs.optimization import AdamW, MuonH, WSDSchedule
from allometry.optim.schedule import Schedule
from allometry.scaling.shapes import Axis, resize
from allometry.studies.sweeps.outcome import Transfer, Trial
from allometry.studies.sweeps.runner import Runner
from allometry.studies.sweeps.transfer import RunShape, TransferSweep

MODEL = DenseModel(vocab_size=64, width=16, num_layers=1, num_heads=2, ffn_width=32, qk_norm=True)
POOL = np.random.default_rng(0).integers(0, 64, (192, 9))


def made(depth: float, seeds: int, shift: float, luck: float = 0.0) -> Transfer:
    """Return bowls whose vertices move by ``shift`` octaves per doubling and ``luck`` per seed."""
    sizes, rates = (16, 32, 64), np.arange(-7.0, -2.0, 0.5)
    found = {
        Trial(size, rate, seed): 2.0
        + depth * (rate + 4.3 - shift * doublings - luck * (seed - 1) * doublings) ** 2
        for doublings, size in enumerate(sizes)
        for rate in rates.tolist()
        for seed in range(seeds)
    }
    return Transfer(Axis.WIDTH, tuple(range(seeds)), found)


@pytest.mark.parametrize("shift", [0.0, -0.6])
def test_one_seed_decides_nothing(shift: float) -> None:
    """In both directions: an observed regret may be noise, and so may its absence."""
    found = made(0.2, 1, shift)
    assert found.failures() == []
    assert [reason.split(":")[0] for reason in found.undecided()] == ["width 32", "width 64"]
    assert "one seed does not say what is luck" in found.undecided()[0]
    assert found.undecided(octaves=0.5)[2].endswith("one seed does not say what is luck")
    assert found.failures(octaves=0.5) == []


def test_seeds_that_agree_decide_and_others_do_not() -> None:
    assert made(0.2, 3, 0.0).failures() == made(0.2, 3, 0.0).undecided() == []
    moved = made(0.2, 3, -0.6)
    assert len(moved.failures()) == 2
    assert moved.undecided() == []
    unsure = made(0.2, 3, -0.2, luck=0.15)
    assert unsure.failures() == []
    assert unsure.undecided()[-1].startswith("width 64: the rate of width 16 loses 1.59 %")
    assert unsure.undecided()[-1].endswith("%): 0.5 % is inside")


def test_a_flat_basin_fails_by_octaves_alone_if_they_are_asked_for() -> None:
    flat = made(0.001, 3, -0.6)
    assert flat.drift() == pytest.approx(1.2)
    assert flat.failures() == flat.undecided() == []
    assert flat.failures(octaves=0.5) == ["the best rate drifts by 1.20 octaves, more than 0.5"], (
        "with several seeds, too"
    )
    between = made(0.001, 3, -0.2, luck=0.15).undecided(octaves=0.5)
    assert len(between) == 1
    assert between[0].startswith("the best rate drifts by 0.40 octaves, 0.5 are asked, and over")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bowl(TransferSweep):
    """Sweep whose vertices move by ``shift`` octaves per doubling and ``luck`` per seed."""

    shift: float = 0.0
    luck: float = 0.0
    calls: list[Trial] = field(default_factory=list)

    def loss(self, trial: Trial) -> float:
        self.calls.append(trial)
        vertex = -4.6 + self.shift * math.log2(trial.size / 16) + self.luck * trial.seed
        return 2.0 + 0.05 * (trial.log2_lr - vertex) ** 2


def bowl(shift: float, luck: float = 0.0, **changes: object) -> Bowl:
    values = {
        "model": MODEL,
        "parameterization": StandardParameterization(),
        "optimizer": AdamW(lr=1.0),
        "pool_PL": POOL,
        "held_out_HL": POOL[:4],
        "axis": Axis.WIDTH,
        "steps": 12,
        "sequences": 2,
    }
    return Bowl(**{**values, **changes}, shift=shift, luck=luck)  # type: ignore[arg-type]


GRID = (-5.0, -4.5, -4.0)


def test_sizes_get_the_rates_around_the_one_that_is_carried_over() -> None:
    """Three octaves away, only the rates for the parabola there are run."""
    found = Runner(bowl(-1.0), GRID).run((16, 128), (0, 1, 2))
    rates = found.sweep(128).log2_lrs
    assert found.regrets()[128].nats == pytest.approx(0.05 * 9.0)
    assert {-5.0, -4.5} <= set(rates), "around -4.6"
    assert min(rates) < -7.6 + 0.5
    above = bowl(1.5)
    found = Runner(above, (-3.0, -2.5, -2.0)).run((16, 64), (0,))
    assert {-5.0, -4.5, -4.0} <= set(found.sweep(64).log2_lrs)
    assert found.regrets()[64].nats == pytest.approx(0.05 * 9.0)


def test_one_seed_places_the_rates_and_the_others_train_around_them() -> None:
    whole, saving = bowl(-1.0, 0.1), bowl(-1.0, 0.1)
    sizes, seeds = (16, 32, 128), (0, 1, 2)
    wide = (-7.0, -6.5, -6.0, -5.5, *GRID)
    plain = Runner(whole, wide).run(sizes, seeds)
    placed = Runner(saving, wide, place_first=True).run(sizes, seeds)
    assert len(saving.calls) < 0.75 * len(whole.calls)
    assert len(saving.calls) == len(set(saving.calls))
    for size, regret in placed.regrets().items():
        theirs = plain.regrets()[size]
        assert regret.nats == pytest.approx(theirs.nats, abs=1e-9)
        assert regret.nats_interval == pytest.approx(theirs.nats_interval, abs=1e-9)
    assert placed.optima() == plain.optima()


def test_rates_are_placed_again_where_one_seed_misled() -> None:
    """The mean's best rate is one octave above that of the first seed."""
    far = Runner(bowl(0.0, 1.0), GRID, place_first=True).run((16, 32), (0, 1, 2))
    assert far.optima()[16].log2_lr == pytest.approx(-3.6)
    assert far.regrets()[32].nats == pytest.approx(0.0, abs=1e-9)


def test_a_batch_keeps_the_tokens_and_the_steps_follow() -> None:
    sweep = bowl(0.0, axis=Axis.BATCH, steps=12, sequences=2, warmup_steps=4)
    assert sweep.run_of(2) == RunShape(12, 2, 4)
    assert sweep.run_of(8) == RunShape(3, 8, 1)
    scale = sweep._scale(sweep.run_of(8))
    assert scale is not None
    assert (scale.batch_tokens, scale.total_tokens) == (64, 192)
    with pytest.raises(UserError, match=r"--sizes=5 sequences of a batch do not divide the 24"):
        sweep.check((2, 5), (0,))
    with pytest.raises(UserError, match=r"--steps=2 in batches of 12 sequences is too short"):
        bowl(0.0, axis=Axis.BATCH, warmup_steps=6).check((2, 12), (0,))


def test_the_batch_of_a_run_and_its_rule_are_what_is_trained() -> None:
    """HyperP's √(B/B0) on the axis batch shifts the rate by half an octave per doubling."""
    rule = {"base_width": 16, "base_layers": 1, "base_batch_tokens": 16}
    plain = {**rule, "batch_exponent": 0.0}
    how = {"axis": Axis.BATCH, "optimizer": MuonH(lr=1.0), "steps": 8}

    def loss(config: HyperP, trial: Trial) -> float:
        return TransferSweep.loss(bowl(0.0, parameterization=config, **how), trial)

    ruled = loss(HyperP(**rule), Trial(8, -5.0, 0))
    assert ruled == pytest.approx(loss(HyperP(**plain), Trial(8, -4.0, 0)), abs=1e-5)
    assert abs(ruled - loss(HyperP(**plain), Trial(8, -5.0, 0))) > 1e-4
    stacked = bowl(0.0, parameterization=HyperP(**rule), **how)
    assert stacked.losses([Trial(8, -5.0, 0)]) == pytest.approx([ruled], abs=1e-4)


def test_the_schedule_of_a_sweep_is_what_its_runs_follow() -> None:
    wsd = WSDSchedule(decay_fraction=0.25)
    sweep = bowl(0.0, schedule=wsd, warmup_steps=2)
    expected = Schedule(wsd, 12, 2)
    assert sweep._fractions(sweep.run_of(16)) == [expected.fraction(s) for s in range(1, 13)]
    assert sweep.settings()["schedule"]["kind"] == "wsd"
    trial = Trial(16, -4.0, 0)
    straight = TransferSweep.loss(bowl(0.0, warmup_steps=2), trial)
    assert TransferSweep.loss(sweep, trial) != straight
    assert sweep.losses([trial]) == pytest.approx([TransferSweep.loss(sweep, trial)], abs=1e-4)


def test_width_and_depth_grow_together() -> None:
    grown = resize(MODEL, Axis.WIDTH_AND_DEPTH, 32)
    assert (grown.width, grown.num_layers, grown.num_heads) == (32, 2, 4)
    with pytest.raises(UserError, match=r"num_layers=1 cannot be scaled .* multiples of 16"):
        resize(MODEL, Axis.WIDTH_AND_DEPTH, 24)


def test_a_loss_that_rises_with_width_fails() -> None:
    losses = {
        Trial(size, rate, 0): 2.0 + size / 1000 + (rate + 4.5) ** 2
        for size in (16, 64)
        for rate in GRID
    }
    found = Transfer(Axis.WIDTH, (0,), losses)
    assert found.failures() == ["the best loss rises from 2.016 at width 16 to 2.064 at 64"]
    assert Transfer(Axis.DEPTH, (0,), losses).failures() == []
