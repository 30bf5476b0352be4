"""On CUDA, runs trained as one model equal the same runs on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from allometry.configs.model import DenseModel, ParameterizationConfig
from allometry.configs.optimization import AdamH, AdamW, Muon, MuonH, OptimizerConfig
from allometry.studies.sweeps.stacked import StackedProbe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODEL = DenseModel(
    vocab_size=64, width=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_width=64, qk_norm=True
)
STEPS, RATES, SEEDS = 10, (0.5, 1.0, 2.0), (0, 1, 0)


def trained(optimizer: OptimizerConfig, device: str) -> tuple[list[list[float]], StackedProbe]:
    sphere = optimizer.kind in ("muonh", "adamh")
    settings = {"embedding_std": 0.5, "base_width": 32, "kind": "hyperp" if sphere else "mup"}
    how: ParameterizationConfig = TypeAdapter(ParameterizationConfig).validate_python(
        {**settings, "base_layers": 2} if sphere else settings
    )
    optimizers = [optimizer.model_copy(update={"lr": optimizer.lr * rate}) for rate in RATES]
    probe = StackedProbe(MODEL, how, optimizers, SEEDS, device=device, compute_dtype="fp64")
    tokens = np.random.default_rng(0).integers(0, 64, (STEPS, len(SEEDS), 4, 17))
    losses = [probe.step(torch.from_numpy(batch).to(device), clip=0.5).tolist() for batch in tokens]
    return losses, probe


@pytest.mark.parametrize(
    "optimizer",
    [
        AdamW(lr=2.0**-7),
        Muon(lr=2.0**-7, adamw_lr=2.0**-8),
        MuonH(lr=2.0**-5, weight_decay=0.0),
        AdamH(lr=2.0**-5, weight_decay=0.0),
    ],
    ids=lambda optimizer: optimizer.kind,
)
def test_stacked_runs_are_those_of_a_cpu(optimizer: OptimizerConfig) -> None:
    here, there = (trained(optimizer, device) for device in ("cuda", "cpu"))
    for mine, theirs in zip(here[0], there[0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12, abs=0)
    for name, values in here[1].model.parameters.items():
        expected = there[1].model.parameters[name]
        torch.testing.assert_close(values.cpu(), expected, rtol=1e-12, atol=1e-12, msg=name)


def test_a_step_does_not_wait_for_the_device() -> None:
    _, probe = trained(AdamW(lr=2.0**-7), "cuda")
    tokens = torch.zeros(len(SEEDS), 4, 17, dtype=torch.int64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        probe.step(tokens, clip=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
