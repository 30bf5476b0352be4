"""From a model for one device to a distributed one: the recipe, in the only order that works.

tensor -> expert -> context -> activation checkpointing -> compile -> pipeline -> ZeRO: what cuts a
module's matrices comes before what wraps the module, compilation before what hooks into the
compiled call, and ZeRO last, as it shards whatever the others left on this rank.

How a model comes to be, none of it ever whole on one rank::

    with torch.device("meta"):
        model = build_model(...)
    specs = parameter_specs(model)
    sync = parallelize(model, config, mesh)
    materialize(model, mesh.device)
    initialize(model, parameterization, seed)   # or load a checkpoint
    optimizer = build_optimizer(model.named_parameters(), specs, ...)
"""

from __future__ import annotations

import torch
from torch import nn

from allometry.configs.execution import Zero
from allometry.configs.run import RunConfig
from allometry.models.build import torch_dtype
from allometry.models.transformer import Transformer
from allometry.parallel.mesh import Mesh
from allometry.parallel.zero import FlatReducer, FullyShardedSync, GradientSync


def parallelize(model: Transformer, config: RunConfig, mesh: Mesh) -> GradientSync:
    """Distribute ``model`` in place as ``config`` says; return what sums its gradients.

    ``model`` may be on the meta device, and should be where it is large. Every rank calls this
    alike. Afterwards its parameters are shards (DTensors) from ZeRO stage 1 on: build the
    optimizer then, not before.
    """
    if config.training.compile:
        compile_parts(model)
    return apply_zero(model, config.parallel.zero, torch_dtype(config.training.compute_dtype), mesh)


def compile_parts(model: Transformer) -> None:
    """Compile each block, and the softmax of the loss, each whole or not at all.

    All blocks share their code, so they are compiled once for all; as a unit the block keeps
    compile times short and leaves ZeRO room for its hooks between blocks. The number of documents
    is marked as varying by the model itself. Shapes that vary otherwise are generalised by torch
    at their second value.
    """
    for block in model.blocks.values():
        block.compile(fullgraph=True)
    model.head.compile(fullgraph=True)


def apply_zero(
    model: Transformer, zero: Zero, compute_dtype: torch.dtype, mesh: Mesh
) -> GradientSync:
    """Shard over the hdp axis what ``zero.stage`` says."""
    if zero.stage == 0:
        overlap = mesh.device.type == "cuda"
        return FlatReducer(model, mesh.hdp, zero.bucket_mib * 2**20, overlap)
    return FullyShardedSync(model, mesh.zero_mesh, zero.stage, compute_dtype)


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give a model from the meta device storage on ``device``, unset; move any other there."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        assert all(tensor.is_meta for tensor in tensors), "half of the model has values already"
        model.to_empty(device=device)
    else:
        model.to(device)
