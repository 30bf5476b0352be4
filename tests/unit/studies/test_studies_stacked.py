"""Runs trained as one model equal the same runs trained alone."""

from __future__ import annotations

import inspect
import math
import textwrap
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.configs.model import (
    DenseModel,
    ModelConfig,
    MoEModel,
    ParameterizationConfig,
    RouterConfig,
    SwiGLUExperts,
)
from allometry.configs.optimization import AdamH, AdamW, Lion, Muon, MuonH, OptimizerConfig
from allometry.models.stacked import full_logits
from allometry.scaling.shapes import Axis
from allometry.studies.sweeps.outcome import Trial
from allometry.studies.sweeps.probe import Probe, order
from allometry.studies.sweeps.runner import Runner
from allometry.studies.sweeps.stacked import StackedProbe
from allometry.studies.sweeps.transfer import TransferSweep

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
AFTER = {"qkv_bias": True, "qk_norm": True, "qk_norm_over": "width", "norms": "after"}
YARN = {"kind": "yarn", "factor": 2.0, "original_length": 6}
LATENTS = {
    **{"q_lora_rank": 8, "kv_lora_rank": 6, "v_head_dim": 4},
    **{"qk_nope_head_dim": 4, "qk_rope_head_dim": 2},
}
BOTH = {
    "norms": "both",
    "activation": "gelu_tanh",
    "embedding_scale": 3.0,
    "window": {"tokens": 5, "global_every": 2, "rope_theta": 100.0},
}

MIXTURE = MoEModel(
    **{key: value for key, value in DENSE.items() if key != "ffn_width"},
    experts=SwiGLUExperts(num_experts=4, experts_per_token=2, width=16),
)


def mixture(**router: object) -> MoEModel:
    return MIXTURE.model_copy(update={"router": RouterConfig.model_validate(router)})


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
"""(rate, seed) of each run."""


def fraction(step: int) -> float:
    return min(1.0, (step + 1) / 4) * (1.0 - step / STEPS)


def alone(
    model: ModelConfig,
    how: ParameterizationConfig,
    optimizer: OptimizerConfig,
    lr: float,
    seed: int,
) -> tuple[list[float], dict[str, Tensor], float]:
    """Return the losses of each step, final parameters and held-out loss of one run."""
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
    """Return the runs after their steps, and losses [steps, R]; ``orders``: seeds of data."""
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
    "mixture, bias": (
        *(mixture(gate="sigmoid", balance={"kind": "bias", "rate": 0.01, "centered": True}), MUP),
        *(AdamW(lr=1.0, weight_decay=0.1), 2.0**-7),
    ),
    "mixture, muonh": (
        *(mixture(balance={"kind": "auxiliary", "coefficient": 0.1}, z_loss=0.01), HYPERP),
        *(MuonH(lr=1.0, weight_decay=0.0), 2.0**-5),
    ),
    "mixture, these loads": (
        mixture(balance={"kind": "auxiliary", "coefficient": 0.1, "loads": "this_batch"}),
        *(MUP, Muon(lr=1.0, adamw_lr=2.0**-8, weight_decay=0.1), 2.0**-7),
    ),
    "families": (
        DenseModel.model_validate({**DENSE, **AFTER, "rope_scaling": YARN}),
        *(MUP, AdamW(lr=1.0, weight_decay=0.1), 2.0**-7),
    ),
    "latent attention": (
        DenseModel.model_validate({**DENSE, "num_kv_heads": None, "latent_attention": LATENTS}),
        *(HYPERP, MuonH(lr=1.0, weight_decay=0.0), 2.0**-5),
    ),
    "mixture, families": (
        MoEModel.model_validate(MIXTURE.model_dump() | BOTH),
        *(MUP, AdamW(lr=1.0, weight_decay=0.1), 2.0**-7),
    ),
    "adamh": (MODEL, HYPERP, AdamH(lr=1.0, weight_decay=0.0), 2.0**-5),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if case == "latent attention" else ())
        for case in CASES
    ],
)
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


@pytest.mark.parametrize("case", ["adamw", "muonh", "mixture, bias"])
def test_a_run_that_diverges_leaves_the_others_their_bits(case: str) -> None:
    model, how, kind, lr = CASES[case]
    calm: Runs = [(lr, 0), (lr, 1), (lr, 2)]
    wild: Runs = [(lr, 0), (1e200 if kind.kind == "adamw" else math.inf, 1), (lr, 2)]
    undisturbed, losses_SR = together(model, how, kind, calm)
    probe, wild_SR = together(model, how, kind, wild)
    assert probe.alive_R.tolist() == [True, False, True]
    assert undisturbed.alive_R.all()
    for run in (0, 2):
        assert torch.equal(wild_SR[:, run], losses_SR[:, run])
        for name, values in probe.model.values(run).items():
            assert torch.equal(values, undisturbed.model.values(run)[name]), name
    assert not wild_SR[-1, 1].isfinite()
    frozen = {name: values.clone() for name, values in probe.model.values(1).items()}
    tokens = torch.from_numpy(POOL[:SEQUENCES]).expand(3, -1, -1)
    probe.step(tokens)
    for name, values in probe.model.values(1).items():
        torch.testing.assert_close(values, frozen[name], rtol=0, atol=0, equal_nan=True)
    held_out = probe.final_losses(POOL[:8], 4)
    assert [math.isfinite(loss) for loss in held_out] == [True, False, True]


def test_a_run_whose_loss_alone_is_not_finite_keeps_finite_values() -> None:
    """Its non-finite gradients must not be applied."""
    model, how, optimizer, lr = CASES["adamw"]
    probe, _ = together(model, how, optimizer, [(lr, 0), (lr, 1)])
    with torch.no_grad():
        probe.model.values(1)["head.weight"].fill_(1e308)
    before = {name: values.clone() for name, values in probe.model.values(1).items()}
    probe.step(torch.from_numpy(POOL[:SEQUENCES]).expand(2, -1, -1), clip=0.5)
    assert probe.alive_R.tolist() == [True, False]
    for name, values in probe.model.values(1).items():
        assert torch.equal(values, before[name]), name


def sweep(**changes: Any) -> TransferSweep:
    values = {
        "model": MODEL,
        "parameterization": MUP,
        "optimizer": AdamW(lr=1.0, weight_decay=0.0),
        "pool_PL": POOL[:60],
        "held_out_HL": POOL[60:],
        "axis": Axis.WIDTH,
        "steps": 6,
        "sequences": 4,
    }
    return TransferSweep(**{**values, **changes})


def test_a_sweep_finds_the_same_by_either_engine() -> None:
    rates, sizes = (-9.0, -7.0, -5.0), (8, 16)
    heard: dict[Trial, float] = {}
    plain = Runner(sweep(), rates, step=2.0).run(sizes, SEEDS)
    how: Any = {"step": 2.0, "engine": "stacked", "done": heard.__setitem__}
    stacked = Runner(sweep(), rates, **how).run(sizes, SEEDS)
    assert stacked.losses.keys() == plain.losses.keys()
    calm = [trial for trial in plain.losses if trial.log2_lr <= -5.0]  # others amplify rounding
    assert len(calm) == 12
    for trial in calm:
        assert stacked.losses[trial] == pytest.approx(plain.losses[trial], abs=1e-4), trial
    assert heard == stacked.losses
    assert len({heard[trial] for trial in calm}) == len(calm)
    by_four = Runner(sweep(), rates, **how, runs_at_once=4).run(sizes, SEEDS)
    for trial in calm:
        assert by_four.losses[trial] == pytest.approx(plain.losses[trial], abs=1e-4), trial
    horizon = sweep(axis=Axis.HORIZON)
    trials = [Trial(5, rate, seed) for rate in (-9.0, -6.0) for seed in SEEDS]
    assert horizon.losses(trials) == pytest.approx([*map(horizon.loss, trials)], abs=1e-4)


def test_a_stack_of_runs_that_all_diverged_ends() -> None:
    steps: list[int] = []

    class Counting(StackedProbe):
        def step(self, *args: Any, **kwargs: Any) -> Tensor:
            steps.append(1)
            return super().step(*args, **kwargs)

    probe = Counting(MODEL, MUP, [AdamW(lr=1e38), AdamW(lr=1e38)], SEEDS)
    places = np.stack([np.arange(64) % 60] * 2)
    probe.train(POOL, places, [1.0] * 64, None)
    assert 1 <= len(steps) <= 16
    assert probe.final_losses(POOL[:4], 4) == [math.inf, math.inf]


@pytest.mark.parametrize(
    ("model", "optimizer", "said"),
    [
        (MODEL.model_copy(update={"dropout": 0.1}), AdamW(lr=1.0), "model.dropout=0.1 draws"),
        (MODEL, Lion(lr=1.0), "optimizer.kind=lion has no stacked form.*adamw, muon"),
        (
            MODEL,
            AdamW.model_validate({"lr": 1.0, "states": {"kind": "fp8"}}),
            "optimizer.states.kind=fp8 has no stacked form",
        ),
    ],
)
def test_what_cannot_be_stacked_is_refused(
    model: ModelConfig, optimizer: OptimizerConfig, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        StackedProbe(model, MUP, [optimizer], [0])


def test_what_a_gpu_computes_the_loss_with_is_the_same() -> None:
    """Full logits of all runs, which CUDA uses instead of one run after another."""
    model, how, optimizer, lr = CASES["adamw"]
    probes = [together(model, how, optimizer, [(lr, 0), (lr, 1)])[0] for _ in range(2)]
    head = probes[1].model.model.head
    assert head is not None
    head.cross_entropy = full_logits
    tokens = torch.from_numpy(np.stack([POOL[:SEQUENCES], POOL[2 : 2 + SEQUENCES]]))
    one, other = (probe.step(tokens) for probe in probes)
    torch.testing.assert_close(other, one, rtol=1e-13, atol=0)
    for name, values in probes[0].model.parameters.items():
        torch.testing.assert_close(
            probes[1].model.parameters[name], values, rtol=1e-12, atol=1e-12, msg=name
        )
