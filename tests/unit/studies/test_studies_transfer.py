"""Learning-rate transfer: the trials of a sweep, its optima, and resuming."""

from __future__ import annotations

import inspect
import json
import math
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from allometry.configs.errors import UserError
from allometry.configs.model import (
    AuxiliaryBalance,
    DenseModel,
    MoEModel,
    ParameterizationConfig,
    RouterConfig,
    StandardParameterization,
    SwiGLUExperts,
)
from allometry.configs.optimization import AdamW
from allometry.scaling.shapes import Axis, resize
from allometry.studies.sweeps.outcome import Trial
from allometry.studies.sweeps.probe import Probe, sample
from allometry.studies.sweeps.runner import Runner
from allometry.studies.sweeps.transfer import TransferSweep
from allometry.studies.sweeps.trials import TrialLog
from allometry.studies.sweeps.workers import Workers

MODEL = DenseModel(vocab_size=128, width=16, num_layers=1, num_heads=2, ffn_width=32, qk_norm=True)
MIXTURE = MoEModel(
    vocab_size=128,
    width=16,
    num_layers=1,
    num_heads=2,
    experts=SwiGLUExperts(num_experts=4, experts_per_token=2, width=16),
)
MUP = TypeAdapter(ParameterizationConfig).validate_python(
    {"kind": "mup", "embedding_std": 1.0, "base_width": 16}
)


def text(sequences: int, length: int = 16) -> NDArray[np.int64]:
    source = inspect.getsource(textwrap).encode("ascii")[: sequences * (length + 1)]
    return np.array(list(source), np.int64).reshape(sequences, length + 1)


def small(**changes: object) -> TransferSweep:
    pool = text(200)
    values = {
        "model": MODEL,
        "parameterization": MUP,
        "optimizer": AdamW(lr=1.0, weight_decay=0.0),
        "pool_PL": pool[:160],
        "held_out_HL": pool[160:],
        "axis": Axis.WIDTH,
        "steps": 8,
        "sequences": 4,
    }
    return TransferSweep(**{**values, **changes})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bowl(TransferSweep):
    """Sweep with known losses: parabolas whose vertex moves with the size."""

    shift: float = 0.0
    calls: list[Trial] = field(default_factory=list)

    def loss(self, trial: Trial) -> float:
        self.calls.append(trial)
        vertex = -4.3 + 0.1 * trial.seed + self.shift * math.log2(trial.size / 16)
        return math.inf if trial.log2_lr > 0 else 2.0 + (trial.log2_lr - vertex) ** 2


def bowl(shift: float) -> Bowl:
    base = small()
    names = (
        "model parameterization optimizer pool_PL held_out_HL axis steps sequences"  # of its parent
    )
    return Bowl(**{name: getattr(base, name) for name in names.split()}, shift=shift)


GRID = (-5.0, -4.5, -4.0)


def test_drift_is_what_the_losses_say() -> None:
    found = Runner(bowl(-0.6), GRID).run((16, 32, 64), (0, 1))
    assert found.drift() == pytest.approx(1.2, abs=1e-9)
    assert [round(o.log2_lr, 6) for o in found.optima().values()] == [-4.25, -4.85, -5.45]
    assert [round(r.nats, 6) for r in found.regrets().values()] == [0.36, 1.44]
    wrong = found.failures(percent=10.0, octaves=0.5)
    assert wrong == [
        "width 32: the rate of width 16 loses 17.98 % (95 % over seeds: 17.98 to 17.98 %), more "
        "than 10 %",
        "width 64: the rate of width 16 loses 71.91 % (95 % over seeds: 71.91 to 71.91 %), more "
        "than 10 %",
        "the best rate drifts by 1.20 octaves, more than 0.5",
    ]
    assert found.failures(percent=80.0, octaves=1.3) == []
    assert found.failures(percent=80.0) == found.undecided(percent=80.0) == []
    described = found.describe()
    assert described["sizes"][0]["regret"] is None
    assert described["sizes"][2]["regret"]["nats"] == pytest.approx(1.44)
    assert described["drift_interval_95"] == [pytest.approx(1.2), pytest.approx(1.2)]


def test_rates_are_added_until_the_best_is_inside() -> None:
    sweep = bowl(-2.0)
    found = Runner(sweep, GRID, step=0.5).run((16, 64), (0,))
    assert all(optimum.interior for optimum in found.optima().values())
    assert min(found.sweep(64).log2_lrs) == -9.0
    assert found.sweep(16).log2_lrs == GRID, "only where it is needed"
    assert len(sweep.calls) == len(set(sweep.calls)), "no trial is run twice"


def test_an_optimum_that_stays_at_an_edge_fails() -> None:
    found = Runner(bowl(-20.0), GRID, step=0.5).run((16, 64), (0,))
    assert math.isnan(found.drift())
    wrong = found.failures(percent=100.0, octaves=100.0)
    assert wrong[0] == "width 64: the best rate is the least that was tried"
    assert found.describe()["drift_octaves"] is None
    assert found.undecided(percent=100.0, octaves=100.0) == [], "it has failed"
    assert "the least that was tried" in found.describe()["sizes"][1]["regret"]["problem"]


GUESSING = math.log(128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken(Bowl):
    """Above 2^``limit`` runs diverge to finite weights, with at best random predictions."""

    limit: float = -5.0

    def loss(self, trial: Trial) -> float:
        if trial.log2_lr <= self.limit:
            return 2.0 + (trial.log2_lr - self.limit + 1.0) ** 2
        return GUESSING if trial.log2_lr >= -3.0 else 1e6


def broken(limit: float) -> Broken:
    return Broken(
        **{name: getattr(bowl(0.0), name) for name in Bowl.__dataclass_fields__}, limit=limit
    )


def test_rates_that_all_diverge_to_finite_weights_have_no_best_one() -> None:
    found = Runner(broken(-99.0), (-4.0, -3.0, -2.0)).run((16, 32), (0, 1))
    wrong = found.failures(percent=100.0, octaves=100.0)
    assert wrong == [
        f"width {size}: no rate does better than guessing, whose loss is 4.8520"
        for size in (16, 32)
    ]
    assert math.isnan(found.drift())
    described = found.describe()
    assert described["drift_octaves"] is None
    assert described["drift_interval_95"] == [None, None]
    assert described["sizes"][0]["loss"] == pytest.approx(GUESSING)


def test_lower_rates_are_tried_where_all_diverge() -> None:
    found = Runner(broken(-6.0), (-4.0, -3.0, -2.0)).run((16, 32), (0,))
    assert found.failures() == []
    assert found.optima()[16].log2_lr == pytest.approx(-7.0)


def test_a_sweep_goes_on_from_its_file(tmp_path: Path) -> None:
    first, settings = bowl(0.0), small().settings()
    log = TrialLog(tmp_path / "trials.jsonl", settings)
    Runner(first, GRID, done=log.add).run((16, 32), (0,))
    with log.path.open("a") as file:
        file.write('{"size": 16, "log2_')  # killed while writing
    again = TrialLog(log.path, settings)
    assert again.known == log.known
    second = bowl(0.0)
    Runner(second, GRID, known=again.known, done=again.add).run((16, 32, 64), (0,))
    assert {trial.size for trial in second.calls} == {64}
    assert TrialLog(log.path, settings).known == again.known
    with pytest.raises(UserError, match=r"other settings \(steps\)"):
        TrialLog(log.path, small(steps=9).settings())
    older = {
        key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()
    }
    del (
        older["optimizer"]["beta2"],
        older["model"]["dropout"],
        older["parameterization"]["zero_head"],
    )
    rows = log.path.read_text().split("\n", 1)[1]
    log.path.write_text(json.dumps(older) + "\n" + rows)
    assert TrialLog(log.path, settings).known == again.known, "of a version without these settings"
    with pytest.raises(UserError, match=r"other settings \(optimizer\)"):
        TrialLog(log.path, small(optimizer=AdamW(lr=1e-2, beta2=0.5)).settings())
    (tmp_path / "other").write_text("not json\n")
    with pytest.raises(UserError, match="no file of trials"):
        TrialLog(tmp_path / "other", settings)


@pytest.mark.parametrize(
    "content",
    [
        b"no line end",
        b"[]\n",
        b"\xff\xfe\n",
        b"3",
        b'{"other": 1}',
        b'{"a": 1}\n{"size": 16}\n',
        b'{"a": 1}\n{"size": 16, "log2_lr": [], "seed": 0, "loss": 1}\n',
        b'{"a": 2}\n',
    ],
)
def test_a_file_of_something_else_is_left_as_it_was(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "precious"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"no file of trials|trials of other settings"):
        TrialLog(path, {"a": 1})
    assert path.read_bytes() == content
    with pytest.raises(UserError, match="cannot be read and written"):
        TrialLog(tmp_path, {"a": 1})
    # A truncated first line is accepted, and so is an empty file.
    for torn in ('{"a"', ""):
        path.write_text(torn)
        assert TrialLog(path, {"a": 1}).known == {}
        assert path.read_text() == '{"a": 1}\n'


def test_a_diverged_trial_is_kept_as_such(tmp_path: Path) -> None:
    log = TrialLog(tmp_path / "trials.jsonl", {"a": 1})
    log.add(Trial(16, 1.0, 0), math.inf)
    assert TrialLog(log.path, {"a": 1}).known == {Trial(16, 1.0, 0): math.inf}


def test_processes_change_nothing() -> None:
    """Two spawned processes give the same bits as this one."""
    rates = (-6.0, -4.0, -2.0)
    here = Runner(small(), rates, step=2.0).run((16, 32), (0,))
    there = Runner(small(), rates, step=2.0, processes=2).run((16, 32), (0,))
    assert here.losses == there.losses
    assert len(set(here.losses.values())) == len(here.losses)


def interrupts(_: int) -> tuple[bool, bool]:
    """Return whether Ctrl-C ends this process without a traceback, and whether it is blocked."""
    held = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return signal.getsignal(signal.SIGINT) is signal.SIG_DFL, held


def test_ctrl_c_ends_workers_in_silence() -> None:
    with Workers(2) as workers:
        assert workers.run(interrupts, [0]) == [(True, False)]
    here = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert not here, "this process hears of it again"
    with Workers(1) as workers:
        assert workers.run(interrupts, [0]) == [(False, False)]


_SWEEP = """
import os, signal, sys, time
from pathlib import Path
from allometry.studies.sweeps.workers import Workers

def task(folder):
    Path(folder, str(os.getpid())).touch()
    time.sleep(3600)

if __name__ == "__main__":
    # A shell in the background, from which tests may run, has its children ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Workers(2) as workers:
        workers.run(task, [sys.argv[1]] * 4)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_process_that_has_them(tmp_path: Path, how: signal.Signals) -> None:
    """A signal to that process alone, as from a batch system, ends its tasks too."""
    script, started = tmp_path / "sweep.py", tmp_path / "started"
    script.write_text(_SWEEP)
    started.mkdir()
    command = [sys.executable, str(script), str(started)]
    main = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 300.0  # less than a task takes
    while len(pids := [int(file.name) for file in started.iterdir()]) < 2:
        assert time.monotonic() < until, "tasks have begun"
        time.sleep(0.05)
    main.send_signal(how)
    main.wait(120)
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < until, "no worker outlives it"
        time.sleep(0.05)


def test_a_failure_in_a_process_is_raised_here() -> None:
    wrong = pytest.raises(ValueError, match=r"math domain error|expected a nonnegative input")
    with wrong, Workers(2) as workers:
        workers.run(math.sqrt, [1.0, -1.0])


def test_trials_train_and_depend_on_seed_rate_and_size() -> None:
    sweep = small(steps=20)
    reference = sweep.loss(Trial(16, -6.0, 0))
    assert reference == sweep.loss(Trial(16, -6.0, 0))
    untrained = sweep.loss(Trial(16, -30.0, 0))
    assert reference < untrained - 0.3
    for other in (Trial(16, -6.0, 1), Trial(32, -6.0, 0), Trial(16, -7.0, 0)):
        assert sweep.loss(other) != reference


def test_a_trial_that_diverges_is_infinite() -> None:
    assert small(parameterization=StandardParameterization(), clip=None).loss(
        Trial(16, 60.0, 0)
    ) == pytest.approx(math.inf)


@pytest.mark.parametrize(
    ("axis", "sizes"),
    [
        (Axis.EXPERTS, (2, 8)),
        (Axis.REGIME_II, (4, 8)),
        (Axis.REGIME_III, (4, 8)),
        (Axis.HORIZON, (4, 8)),
        (Axis.DEPTH, (1, 2)),
    ],
)
def test_every_axis_can_be_swept(axis: Axis, sizes: tuple[int, int]) -> None:
    sweep = small(model=MIXTURE, axis=axis)
    losses = [sweep.loss(Trial(size, -6.0, 0)) for size in sizes]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[0] != losses[1]


def test_what_cannot_be_run_is_said_before_anything_runs() -> None:
    sweep = bowl(0.0)
    with pytest.raises(UserError, match="multiples of 8"):
        Runner(sweep, GRID).run((16, 20), (0,))
    with pytest.raises(UserError, match="three learning rates"):
        Runner(sweep, (-5.0, -4.0)).run((16, 32), (0,))
    with pytest.raises(UserError, match="800 sequences are needed and 160 are there"):
        Runner(small(steps=200), GRID).run((16, 32), (0,))
    mssp = TypeAdapter(ParameterizationConfig).validate_python(
        {"kind": "mssp", "regime": "I", "base_width": 16, "base_experts": 4}
        | {"base_experts_per_token": 2, "base_expert_width": 16}
    )
    sigmoid = MIXTURE.model_copy(update={"router": RouterConfig(gate="sigmoid")})
    with pytest.raises(UserError, match=r"num_experts=8 differs .* regime I of mssp holds fixed"):
        small(model=sigmoid, parameterization=mssp, axis=Axis.EXPERTS).check((4, 8), (0,))
    assert sweep.calls == []


def test_one_expert_that_every_token_visits_is_a_dense_feed_forward() -> None:
    """With top-1 the gates sum to 1, so that a mixture of one expert is the dense model."""
    experts = SwiGLUExperts(num_experts=4, experts_per_token=1, width=16)
    router = RouterConfig(gate="sqrt", balance=AuxiliaryBalance(coefficient=1e-2))
    mixture = MIXTURE.model_copy(update={"experts": experts, "router": router})
    one = Probe(resize(mixture, Axis.EXPERTS, 1), MUP, AdamW(lr=1e-2), 0).model
    dense = MODEL.model_copy(update={"ffn_width": 16, "qk_norm": False})
    twin = Probe(dense, MUP, AdamW(lr=1e-2), 0).model
    tokens = torch.from_numpy(text(2)[:, :-1])
    given = [p for name, p in one.named_parameters() if "router" not in name]
    with torch.no_grad():
        for mine, theirs in zip(twin.parameters(), given, strict=True):
            mine.copy_(theirs.reshape(mine.shape))
        assert torch.allclose(one(tokens), twin(tokens), atol=1e-6)


def test_samples_are_the_seeds_own_and_never_twice() -> None:
    pool = text(50)
    assert np.array_equal(sample(pool, 20, 1), sample(pool, 20, 1))
    assert not np.array_equal(sample(pool, 20, 1), sample(pool, 20, 2))
    whole = sample(pool, 50, 3)
    assert sorted(map(bytes, whole)) == sorted(map(bytes, pool))


def test_a_probe_balances_a_mixture_as_training_does() -> None:
    probe = Probe(MIXTURE, MUP, AdamW(lr=1e-2), 0)
    (router,) = [
        m for m in probe.model.modules() if hasattr(m, "num_experts") and hasattr(m, "load")
    ]
    before = router.load.clone()
    first = probe.step(text(4))
    assert not router.load.equal(before)
    loads = router.load.clone()
    probe.loss(text(8)[4:])
    assert router.load.equal(loads), "a loss without a step moves nothing"
    assert probe.step(text(4)) < first
