"""Documents on one CUDA device: a CPU's losses, offloaded activations, resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allometry.configs.run import RunConfig
from allometry.trainer.train import train
from run_folders import rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Make = Callable[..., RunConfig]
DOCUMENTS = (
    "model.width=128",
    "model.ffn_width=256",
    "model.num_layers=4",
    "data.kind=documents",
    "data.max_document_tokens=56",
    "batch.micro_batch_sequences=1",
    "parallel.context.capacity_tokens=64",
    "optimizer.lr=1e-3",
)


def losses(config: RunConfig, device: str, stop: int | None = None) -> list[float]:
    train(config, device=torch.device(device), callbacks=[], stop_at_step=stop)
    return [row["loss"] for row in rows(Path(config.run.folder))]


@pytest.mark.parametrize("more", [(), ("parallel.context.offload=selective",)])
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_documents_learn_as_on_a_cpu(
    tiny: Make, tmp_path: Path, compiled: str, more: tuple[str, ...]
) -> None:
    torch._dynamo.reset()
    there = losses(tiny(*DOCUMENTS, folder=tmp_path / "cpu"), "cpu")
    settings = (*DOCUMENTS, *more, f"training.compile={compiled}")
    here = losses(tiny(*settings, folder=tmp_path / "cuda"), "cuda")
    assert here == pytest.approx(there, rel=1e-3)
    assert here[-1] < 0.95 * here[0]


def test_documents_in_bf16_resume_to_the_bit(tiny: Make, tmp_path: Path) -> None:
    exact = "training.deterministic=true"
    settings = (*DOCUMENTS, "training.compute_dtype=bf16", exact)
    straight = losses(tiny(*settings, folder=tmp_path / "straight"), "cuda")
    parts = tiny(*settings, folder=tmp_path / "parts")
    for stop in (7, 12, None):
        found = losses(parts, "cuda", stop)
    assert found == straight
