"""Runs trained as one model are the runs that they are alone."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from allometry.configs.model import (
    DenseModel,
    ModelConfig,
    ParameterizationConfig,
)
from allometry.configs.optimization import AdamH, AdamW, Muon, MuonH, OptimizerConfig
from allometry.studies.sweeps.probe import Probe, order
from allometry.studies.sweeps.stacked import StackedProbe

DENSE: dict[str, Any] = {
    "vocab_size": 128,
    "width": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_width": 32,
}
MODEL = DenseModel(**DENSE, qk_norm=True, z_loss=1e-3)
TIED = DenseModel(**DENSE, tied_embeddings=True)


def rules(kind: str, **more: object) -> ParameterizationConfig:
    settings = {"kind": kind, "embedding_std": 0.5, "base_width": 8, **more}
    made: ParameterizationConfig = TypeAdapter(ParameterizationConfig).validate_python(settings)
    return made


MUP = rules("mup")
SP: ParameterizationConfig = TypeAdapter(ParameterizationConfig).validate_python(
    {"kind": "sp", "embedding_std": 0.5}
)
HYPERP = rules("hyperp", base_layers=1)
STEPS, SEQUENCES, LENGTH = 20, 2, 12
SEEDS = (0, 1)


def pool() -> NDArray[np.int64]:
    text = inspect.getsource(textwrap).encode("ascii")[: 80 * (LENGTH + 1)]
    return np.array(list(text), np.int64).reshape(80, LENGTH + 1)


POOL = pool()


def with_rate(optimizer: OptimizerConfig, lr: float) -> OptimizerConfig:
    return optimizer.model_copy(update={"lr": lr})


Runs = list[tuple[float, int]]
"""(rate, seed) of each."""


def fraction(step: int) -> float:
    return min(1.0, (step + 1) / 4) * (1.0 - step / STEPS)


def alone(
    model: ModelConfig,
    how: ParameterizationConfig,
    optimizer: OptimizerConfig,
    lr: float,
    seed: int,
) -> tuple[list[float], dict[str, Tensor], float]:
    """Losses of each step, final parameters and the held-out loss of one run."""
    probe = Probe(model, how, with_rate(optimizer, lr), seed, compute_dtype="fp64")
    mine = POOL[order(POOL, STEPS * SEQUENCES, seed)].reshape(STEPS, SEQUENCES, -1)
    losses = [probe.step(mine[step], fraction=fraction(step), clip=0.5) for step in range(STEPS)]
    values = {name: p.detach() for name, p in probe.model.named_parameters()}
    return losses, values, probe.loss(POOL[:8])


def together(
    model: ModelConfig,
    how: ParameterizationConfig,
    optimizer: OptimizerConfig,
    runs: Runs,
    orders: tuple[int, ...] | None = None,
) -> tuple[StackedProbe, Tensor]:
    """The runs after their steps, and losses of each step [steps, R]; ``orders``: seeds of data."""
    optimizers = [with_rate(optimizer, lr) for lr, _ in runs]
    seeds = [seed for _, seed in runs]
    probe = StackedProbe(model, how, optimizers, seeds, compute_dtype="fp64")
    places = np.stack([order(POOL, STEPS * SEQUENCES, seed) for seed in orders or seeds])
    mine = torch.from_numpy(POOL[places]).unflatten(1, (STEPS, SEQUENCES))
    losses = [probe.step(mine[:, s], fraction=fraction(s), clip=0.5) for s in range(STEPS)]
    return probe, torch.stack(losses)


CASES = {
    "adamw": (MODEL, MUP, AdamW(lr=1.0, weight_decay=0.1), 2.0**-7),
    "adamw, tied": (TIED, SP, AdamW(lr=1.0, weight_decay=0.1), 2.0**-7),
    "muon": (MODEL, MUP, Muon(lr=1.0, adamw_lr=2.0**-8, weight_decay=0.1), 2.0**-7),
    "muonh": (MODEL, HYPERP, MuonH(lr=1.0, weight_decay=0.0), 2.0**-5),
    "muonh, spectral": (
        *(MODEL, HYPERP),
        *(MuonH(lr=1.0, weight_decay=0.0, step_norm="spectral"), 2.0**-5),
    ),
    "adamh": (MODEL, HYPERP, AdamH(lr=1.0, weight_decay=0.0), 2.0**-5),
}


@pytest.mark.parametrize("case", CASES)
def test_stacked_runs_are_the_runs_alone(case: str) -> None:
    model, how, optimizer, lr = CASES[case]
    runs: Runs = [(lr * factor, seed) for factor in (0.5, 1.0, 2.0) for seed in SEEDS]
    probe, losses_SR = together(model, how, optimizer, runs)
    held_out_R = probe.losses(torch.from_numpy(POOL[:8]), 3)
    for run, (rate, seed) in enumerate(runs):
        losses, values, held_out = alone(model, how, optimizer, rate, seed)
        assert losses_SR[:, run].tolist() == pytest.approx(losses, rel=1e-12, abs=0)
        assert float(held_out_R[run]) == pytest.approx(held_out, rel=1e-12, abs=0)
        for name, stacked in probe.model.values(run).items():
            torch.testing.assert_close(stacked, values[name], rtol=1e-12, atol=1e-12, msg=name)
    assert losses_SR[-1].unique().numel() == len(runs), "every run is another one"
    swapped, _ = together(model, how, optimizer, runs, (1, 0, 1, 0, 1, 0))
    values = alone(model, how, optimizer, *runs[0])[1]
    apart = max(float((v - values[n]).abs().max()) for n, v in swapped.model.values(0).items())
    assert apart > 1e-6, "another order of data is another run"
