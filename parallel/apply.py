"""Turn a single-device model into a distributed model, in the only order of steps that works.

tensor -> expert -> context -> activation checkpointing -> compile -> pipeline -> ZeRO. Steps that
split the weight matrices of a module come before steps that wrap the module, compilation comes
before the steps that add hooks to the compiled call, and ZeRO comes last because it shards the
parameters that the other steps leave on this rank.

A model is built as follows; no rank allocates the full model::

    parallel = parallelize(build, config, layout, mesh)   # build(part) on the meta device
    parallel.materialize(mesh.device)
    parallel.initialize(parameterization, seed)           # or load a checkpoint
    optimizer = build_optimizer(parallel.named_parameters(), parallel.specs(), ...)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.models.build import named_parameters, parameter_specs, torch_dtype
from allometry.models.init import initialize
from allometry.models.transformer import Part, Transformer
from allometry.parallel.checkpointing import apply_checkpointing, hide_fsdp_hooks
from allometry.parallel.context import apply_context
from allometry.parallel.deepspeed.engine import DeepSpeedSync
from allometry.parallel.execution import Accumulation, Execution
from allometry.parallel.expert import apply_expert
from allometry.parallel.graphs import CudaCapture, MicroBatchGraphs, choose_graphs
from allometry.parallel.hdp.filling import Filling
from allometry.parallel.mesh import Mesh
from allometry.parallel.offload.store import ActivationStore, apply_offload
from allometry.parallel.pipeline import PipelineExecution
from allometry.parallel.reduce import GradientSync
from allometry.parallel.tensor import apply_tensor
from allometry.parallel.zero import apply_zero
from allometry.scaling.context import mode_of
from allometry.scaling.layout import Layout
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.roles import ParamSpec


@dataclass(frozen=True)
class Parallel:
    """Part of a distributed model that runs on this rank.

    ``parts`` maps stage numbers to pipeline stages; without a pipeline there is one stage.
    ``mirrors`` are names of parameters that are copies of another rank's parameter (a tied head on
    a different stage than its embedding): ``execution`` keeps the copies equal, and this rank does
    not train, clip or save them. ``stores`` are the stores that offload activations to the host, at
    most one for each part.
    """

    parts: Mapping[int, Transformer]
    sync: GradientSync
    execution: Execution
    mirrors: frozenset[str] = frozenset()
    offloaded: bool = False
    graphs: MicroBatchGraphs | None = None
    stores: tuple[ActivationStore, ...] = ()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (global name, parameter) for all parameters of this rank, including frozen ones."""
        for part in self.parts.values():
            for name, _, _, parameter in named_parameters(part):
                if name not in self.mirrors:
                    yield name, parameter

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (global name, tensor) for the buffers that a checkpoint saves."""
        for part in self.parts.values():
            kept = part.state_dict().keys()
            for name, buffer in part.named_buffers():
                if name in kept:
                    yield name, buffer

    def specs(self) -> dict[str, ParamSpec]:
        """Return the specification (role, shape) of each parameter of ``named_parameters``."""
        return {
            name: spec
            for part in self.parts.values()
            for name, spec in parameter_specs(part).items()
            if name not in self.mirrors
        }

    def materialize(self, device: torch.device) -> None:
        """Allocate meta tensors on ``device``, uninitialized; move other tensors there."""
        for part in self.parts.values():
            materialize(
                part, device, offload=self.offloaded, buffers_only=self.sync.makes_parameters
            )

    def initialize(self, parameterization: Parameterization, seed: int) -> None:
        """Initialize all parameters and buffers; each value depends only on (seed, name, row)."""
        for part in self.parts.values():
            initialize(part, parameterization, seed, self.sync.hold)


def parallelize(
    build: Callable[[Part], Transformer], config: RunConfig, layout: Layout, mesh: Mesh
) -> Parallel:
    """Build this rank's part of the model and distribute the part according to ``config``.

    ``build(part)`` builds one part of the model, on the meta device if the model is large. Every
    rank calls this function. Afterwards sharded parameters are DTensors, so build the optimizer
    after this call. See the module's docstring for an example.
    """
    last = len(layout.stages) - 1
    parts = {
        stage: build(Part(layout.stages[stage], first=stage == 0, last=stage == last))
        for stage in layout.stages_of(mesh.pp.rank)
    }
    made = [distribute(part, config, mesh) for part in parts.values()]
    stores = tuple(store for store in made if store is not None)
    dtype = torch_dtype(config.training.compute_dtype)
    zero = config.parallel.zero
    offloaded = zero.offload == "cpu" and zero.engine == "fsdp2"
    sync: GradientSync
    if zero.engine == "deepspeed":
        sync = DeepSpeedSync(parts[0], config, mesh)
    else:
        in_fp8 = config.precision.gather == "fp8"
        sync = apply_zero(list(parts.values()), zero, dtype, mesh, in_fp8)
    if config.training.activation_checkpointing == "selective":
        for part in parts.values():
            hide_fsdp_hooks(part)
    mode = mode_of(config, layout.degrees) if config.data.kind == "documents" else None
    if mesh.pp.size == 1:
        filling = Filling.of(mesh.device, mesh.tp.size) if mode == "free" else None
        used = choose_graphs(config, mesh).used
        required = config.training.cuda_graphs is True
        graphs = MicroBatchGraphs(parts[0], CudaCapture(), required=required) if used else None
        accumulation = Accumulation(parts[0], sync, filling, graphs)
        return Parallel(
            parts, sync, accumulation, offloaded=offloaded, graphs=graphs, stores=stores
        )
    execution = PipelineExecution(
        parts, config.model, layout, mesh, sync, dtype, uneven=mode == "aligned"
    )
    return Parallel(parts, sync, execution, execution.mirrors, offloaded, stores=stores)


def distribute(part: Transformer, config: RunConfig, mesh: Mesh) -> ActivationStore | None:
    """Apply to one part, in place, the steps inside blocks: tensor parallelism to compilation.

    Returns the store that offloads activations to the host; None if offloading is off.
    """
    chunked = config.parallel.tp_overlap == "chunked"
    if mesh.tp.size > 1 or mesh.ep.size > 1:
        whole = config.parallel.expert_tp == 1 and mesh.tp.size > 1
        apply_tensor(part, mesh, whole_experts=whole, chunked=chunked)
        apply_expert(part, mesh, whole_experts=whole)
    if config.data.kind == "documents":
        apply_context(part, mesh)
    share, store = config.training.activation_offload, None
    if share > 0.0 or config.parallel.context.offload == "selective":
        store = apply_offload(part, mesh.device, share)
    kind = config.training.activation_checkpointing
    if kind != "none":
        apply_checkpointing(part, kind, dropout=config.model.dropout > 0, to_the_end=chunked)
    if config.training.compile:
        # The compiler cannot trace the hooks of ZeRO on modules inside a block
        # (``zero.shard_model``) or the all-to-all of expert parallelism.
        half = config.training.compute_dtype == "bf16"
        nested = config.parallel.zero.stage > 0 and half and config.model.kind == "moe"
        options = symmetric_memory(mesh) if config.parallel.tp_overlap == "symmetric" else None
        exchanged = mesh.ep.size > 1 or (mesh.tp.size > 1 and config.parallel.expert_tp == 1)
        compile_parts(part, whole=not exchanged and not nested, options=options)
    return store


def symmetric_memory(mesh: Mesh) -> dict[str, Any] | None:
    """Return compiler options that overlap the collectives of the tp group with matrix products.

    With symmetric memory, a product consumes each chunk of an all-gather as the chunk arrives, and
    rows of a product are scattered as soon as they are computed (torch's async tensor parallelism).
    Returns None if tp = 1. Raises UserError, on all ranks, if the device or torch has no symmetric
    memory.
    """
    if mesh.tp.size == 1:
        return None
    try:
        if mesh.device.type != "cuda":
            raise RuntimeError(f"the device is {mesh.device.type}")
        from torch.distributed._symmetric_memory import enable_symm_mem_for_group

        enable_symm_mem_for_group(mesh.tp.group.group_name)
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"parallel.tp_overlap=symmetric needs CUDA with symmetric memory ({error}); use off"
        ) from None
    return {"_micro_pipeline_tp": True}


def compile_parts(
    model: Transformer, *, whole: bool = True, options: dict[str, Any] | None = None
) -> None:
    """Compile each block and the softmax of the loss; ``whole`` requires a graph without breaks.

    All blocks share their code, so the compiler runs once for all blocks. Compiling single blocks
    keeps compile times short and leaves the calls between blocks to the hooks of ZeRO. The model
    itself marks the number of documents as a dynamic dimension. Other shapes that vary become
    dynamic when torch sees a second value. The all-to-all of expert parallelism, whose sizes depend
    on data, is a graph break.
    """
    for block in model.blocks.values():
        block.compile(fullgraph=whole, options=options)
    if model.head is not None:
        model.head.compile(fullgraph=True)


def materialize(
    model: nn.Module, device: torch.device, *, offload: bool = False, buffers_only: bool = False
) -> None:
    """Allocate storage of a meta model on ``device``, uninitialized; move other models there.

    ``offload``: parameters are allocated on the CPU, buffers on ``device``. ``buffers_only``: only
    buffers are allocated; parameters are allocated later.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        assert all(tensor.is_meta for tensor in tensors), "half of the model has values already"
        if not buffers_only:
            model.to_empty(device=torch.device("cpu") if offload else device)
        for module in model.modules() if offload or buffers_only else ():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer, device=device))
    else:
        model.to(device)
