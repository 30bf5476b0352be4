"""Activations in pinned host memory: bitwise equal, less GPU memory, no host synchronization."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from allometry.configs.model import DenseModel, StandardParameterization
from allometry.configs.run import RunConfig
from allometry.models.build import build_model
from allometry.models.init import initialize
from allometry.models.transformer import Transformer
from allometry.parallel.checkpointing import apply_checkpointing
from allometry.parallel.offload.lanes import lanes_of
from allometry.parallel.offload.pool import HostPool
from allometry.parallel.offload.store import apply_offload
from allometry.scaling.parameterization import Parameterization
from allometry.trainer.deterministic import algorithms
from allometry.trainer.loop import Loop
from allometry.trainer.train import train
from run_folders import rows
from small_experts import experts_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Make = Callable[..., RunConfig]
CUDA = torch.device("cuda")
WIDTH, LAYERS, L = 512, 8, 2048
SETTINGS = (
    "data.packing=concatenated",
    "training.compute_dtype=bf16",
    "training.total_steps=10",
    "training.deterministic=true",
    "record.monitors.every_steps=null",
    "record.monitors.singular_values_every_steps=null",
    "batch.micro_batch_sequences=4",
    "data.sequence_length=128",
)
SHAPE = ("model.width=256", "model.ffn_width=512", "model.num_layers=5", "model.num_heads=4")
MODELS = {
    "dense": SHAPE,
    "experts": (f"model={json.dumps(experts_model(width=256, num_layers=5))}",),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def strictly(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make host synchronization an error from the sixth step on; return these steps."""
    take, strict = Loop._take, []

    def taken(self: Loop, step: int, given: Any) -> None:
        if step > 5:
            torch.cuda.set_sync_debug_mode("error")
            strict.append(step)
        try:
            take(self, step, given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Loop, "_take", taken)
    return strict


@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("how", ["none", "selective", "full", "fp8"])
@pytest.mark.parametrize("model", MODELS)
def test_runs_have_the_bits_of_the_gpu_and_wait_for_nothing(
    tiny: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    how: str,
    compiled: str,
) -> None:
    kept = "precision.saved_activations=fp8"
    if how != "fp8":
        kept = f"training.activation_checkpointing={how}"
    settings = (*SETTINGS, *MODELS[model], kept, f"training.compile={compiled}")
    found = {}
    for share in (0.0, 1.0):
        torch._dynamo.reset()
        strict = strictly(monkeypatch) if share else []
        folder = tmp_path / str(share)
        offload = f"training.activation_offload={share}"
        off = "training.cuda_graphs=off"
        train(tiny(*settings, offload, off, folder=folder), device=CUDA, callbacks=[])
        found[share] = rows(folder)
    assert strict == [6, 7, 8, 9, 10]
    assert [r["loss"] for r in found[1.0]] == [r["loss"] for r in found[0.0]]
    moved = [row["offload/bytes_out"] for row in found[1.0]]
    assert moved[-1] > 0
    assert len({row["offload/host_bytes"] for row in found[1.0]}) == 1


def make(checkpointing: Any) -> Transformer:
    shape = {"width": WIDTH, "num_layers": LAYERS, "num_heads": 8, "ffn_width": 4 * WIDTH}
    config = DenseModel.model_validate({"kind": "dense", "vocab_size": 256, **shape})
    parameterization = Parameterization(StandardParameterization(), config)
    with torch.device(CUDA):
        model = build_model(config, parameterization, "bf16")
    initialize(model, parameterization, seed=1)
    if checkpointing != "none":
        apply_checkpointing(model, checkpointing, dropout=False)
    return model


def step(model: Transformer) -> tuple[dict[str, Tensor], int]:
    """Return gradients of two micro-batches in flight at once, and their additional peak memory."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        tokens_BL = torch.randint(256, (4, L), generator=generator).to(CUDA)
        losses.append(model(tokens_BL, tokens_BL.roll(-1, 1)).total)
    for loss in losses:
        loss.backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found, peak


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_peak_falls_and_the_host_is_asked_once(checkpointing: str) -> None:
    model, held = make(checkpointing), []
    with algorithms(deterministic=True):
        step(model)  # allocates workspaces of libraries
        wanted, whole = step(model)
        store = apply_offload(model, CUDA, share=1.0)
        for _ in range(4):
            found, peak = step(model)
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
            held.append((store.pool.held_bytes, store.pool.allocations))
    assert len(set(held)) == 1
    assert store.pool.used_bytes == 0
    assert store.bytes_in == store.bytes_out
    away = store.bytes_out / 4
    # Minus the two layers of a micro-batch that return while another one is offloaded.
    assert whole - peak > away * (1 - 2 / (LAYERS - 2)) * 0.8, (whole, peak, away)


def test_memory_is_pinned_and_copies_have_streams_of_their_own() -> None:
    pool = HostPool(CUDA, slab_bytes=2**20)
    region = pool.take(300_000)
    assert region.memory.is_pinned()
    out, back = lanes_of(CUDA)
    source = torch.arange(300_000, device=CUDA).to(torch.uint8)
    target = torch.zeros_like(source)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lane, pair in ((out, (source, region.memory)), (back, (region.memory, target))):
            ticket = lane(*pair)
            assert ticket is not None
            ticket.wait()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(source, target)


def test_copies_run_beside_the_computation() -> None:
    """The current stream does not wait for a copy unless requested."""
    pool = HostPool(CUDA)
    region = pool.take(2**28)
    source = torch.zeros(2**28, dtype=torch.uint8, device=CUDA)
    out, _ = lanes_of(CUDA)
    out(source, region.memory)  # first touches of memory are slow
    torch.cuda.synchronize()
    ticket = out(source, region.memory)
    begun = torch.cuda.current_stream().record_event()
    assert begun is not None
    begun.synchronize()
    assert ticket is not None
    assert not ticket._done.query()  # 256 MB take milliseconds
    ticket.wait()
    torch.cuda.current_stream().synchronize()
    assert ticket._done.query()
