"""Tiny model and batches for ranks: uneven dimensions, a different loss count on every rank."""

# B sequences, L tokens in a sequence

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from allometry.configs.execution import ParallelConfig
from allometry.configs.run import RunConfig
from allometry.models.build import build_model
from allometry.models.documents import Documents
from allometry.models.head import Losses
from allometry.models.init import initialize
from allometry.models.loss import IGNORE
from allometry.models.transformer import Part, Transformer
from allometry.parallel.apply import Parallel, materialize, parallelize
from allometry.parallel.mesh import Mesh, open_mesh
from allometry.parallel.offload.store import ActivationStore
from allometry.parallel.reduce import GradientSync
from allometry.scaling.layout import Layout
from allometry.scaling.parameterization import Parameterization
from allometry.trainer.feed import DeviceBatch

VOCAB, LENGTH, SEED = 61, 16, 5


@dataclass(frozen=True)
class MicroBatch:
    tokens_BL: Tensor
    targets_BL: Tensor
    documents: Documents
    ahead_MBL: Tensor | None = None


def config(
    stage: int,
    dtype: str,
    tied: bool = False,
    compiled: bool = False,
    zero: dict[str, Any] | None = None,
) -> RunConfig:
    """Return a run with rows of 61, 22, 18, 6 and 26: no number of ranks divides them all."""
    source = {"name": "none", "train": "none"}
    return RunConfig.model_validate(
        {
            "run": {"folder": "none"},
            "model": {
                "kind": "dense",
                "vocab_size": VOCAB,
                "width": 22,
                "num_layers": 3,
                "num_heads": 3,
                "num_kv_heads": 1,
                "head_dim": 6,
                "ffn_width": 26,
                "tied_embeddings": tied,
                "z_loss": 1e-3,
            },
            "data": {"sequence_length": LENGTH, "sources": [source]},
            "batch": {"sequences": 12, "micro_batch_sequences": 1},
            "training": {"total_steps": 3, "compute_dtype": dtype, "compile": compiled},
            "optimizer": {"lr": 1e-2},
            "schedule": {"kind": "constant"},
            "parallel": {"zero": {"stage": stage, **(zero or {})}},
        }
    )


def micro_batches(count: int, seed: int = 0, device: str = "cpu") -> list[MicroBatch]:
    """Return ``count`` sequences of packed documents; 1, 6, 11 ... of 16 targets count, or none."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        stream = torch.randint(VOCAB, (1, LENGTH + 1), generator=generator)
        targets_BL = stream[:, 1:].clone()
        targets_BL[:, : (15 - 5 * i) % LENGTH] = IGNORE
        if i == 1:
            targets_BL[:] = IGNORE
        cuts = [0, *sorted({3 + 2 * i % 11, 9}), LENGTH]
        lengths = [b - a for a, b in pairwise(cuts)]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        documents = Documents(
            torch.tensor(cuts, dtype=torch.int32, device=device),
            max(lengths),
            positions.to(device),
        )
        made.append(MicroBatch(stream[:, :-1].to(device), targets_BL.to(device), documents))
    return made


def device_batches(count: int, seed: int = 0) -> list[DeviceBatch]:
    """Return the same batches in the trainer's form, alternating between two sources."""
    return [
        DeviceBatch(
            batch.tokens_BL, batch.targets_BL, torch.tensor([place % 2]), batch.documents, place
        )
        for place, batch in enumerate(micro_batches(count, seed))
    ]


def build(run: RunConfig, part: Part | None = None) -> Transformer:
    """Build the model or a part of it without storage, in the run's compute dtype."""
    parameterization = Parameterization(run.parameterization, run.model)
    with torch.device("meta"):
        model = build_model(run.model, parameterization, run.training.compute_dtype, part)
    return model.double() if run.training.compute_dtype == "fp64" else model


def initialized(run: RunConfig, device: torch.device) -> Transformer:
    """Return the initialized model on one process."""
    model = build(run)
    materialize(model, device)
    initialize(model, Parameterization(run.parameterization, run.model), SEED)
    return model


def parallel(run: RunConfig, mesh: Mesh) -> Parallel:
    """Return this rank's part of the model over ``mesh``, built as in the trainer."""
    made = parallelize(lambda part: build(run, part), run, Layout.of(run, mesh.world_size), mesh)
    made.materialize(mesh.device)
    made.initialize(Parameterization(run.parameterization, run.model), SEED)
    return made


def distributed(run: RunConfig, mesh: Mesh) -> tuple[Transformer, GradientSync]:
    """Return the model over a mesh without a pipeline, and its gradient sync."""
    made = parallel(run, mesh)
    return made.parts[0], made.sync


def mesh(run: RunConfig | None = None) -> Mesh:
    """Open the mesh of ``run`` on the CPU; without a run, all ranks are on the hdp axis."""
    degrees = run.parallel if run is not None else ParallelConfig()
    return open_mesh(degrees.model_copy(update={"timeout_s": 80}), torch.device("cpu"))


def global_count(batches: Sequence[MicroBatch | DeviceBatch]) -> int:
    return sum(int((batch.targets_BL != IGNORE).sum()) for batch in batches)


def forward_loss(model: nn.Module, batch: MicroBatch) -> Tensor:
    losses = model(batch.tokens_BL, batch.targets_BL, batch.documents)
    assert isinstance(losses, Losses)
    return losses.total


def backward_alone(model: nn.Module, batches: Sequence[MicroBatch]) -> None:
    """Compute the gradients of one process with the full batch."""
    for batch in batches:
        (forward_loss(model, batch) / global_count(batches)).backward()


def backward_shared(
    model: nn.Module, sync: GradientSync, batches: Sequence[MicroBatch], mesh: Mesh
) -> None:
    """Compute and reduce the gradients of this rank's share of the batch."""
    mine = batches[mesh.hdp.rank :: mesh.hdp.size]
    for i, batch in enumerate(mine):
        sync.micro_batch(last=i == len(mine) - 1)
        (forward_loss(model, batch) / global_count(batches)).backward()
    sync.finish()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def small_activations_go() -> Iterator[list[int]]:
    """Let offload move a tiny model's activations; yields the bytes of each offloaded tensor."""
    defaults, send = ActivationStore.__init__.__kwdefaults__, ActivationStore.send
    usual, moved = dict(defaults), []

    def counted(store: ActivationStore, source: Tensor) -> Any:
        moved.append(source.numel())
        return send(store, source)

    defaults["smallest_bytes"] = 400
    ActivationStore.send = counted
    try:
        yield moved
    finally:
        defaults.update(usual)
        ActivationStore.send = send


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return full gradients by name; every parameter must have one."""
    whole_gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        whole_gradients[name] = whole(parameter.grad)
    return whole_gradients


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


def worst_error(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the largest |got - wanted| / max |wanted| over all tensors."""
    assert got.keys() == wanted.keys(), set(got) ^ set(wanted)
    errors = [
        float((got[name].double() - wanted[name].double()).abs().max())
        / float(wanted[name].double().abs().max())
        for name in wanted
    ]
    # max() would ignore a NaN, which compares as false.
    return max(errors) if all(map(math.isfinite, errors)) else math.inf
