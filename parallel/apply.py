"""From a model for one device to a distributed one: the recipe, in the only order that works.

tensor -> expert -> context -> activation checkpointing -> compile -> pipeline -> ZeRO: what cuts a
module's matrices comes before what wraps the module, compilation before what hooks into the
compiled call, and ZeRO last, as it shards whatever the others left on this rank.

How a model comes to be, none of it ever whole on one rank::

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
    """This rank's part of a distributed model.

    ``parts`` are its pipeline stages by number, one without a pipeline. ``mirrors`` are names of
    parameters that are copies of another rank's (a tied head away from its embedding): they are
    kept equal by ``execution`` and are neither trained, clipped nor saved here. ``stores``: what
    keeps activations on the host, one for each part that may.
    """

    parts: Mapping[int, Transformer]
    sync: GradientSync
    execution: Execution
    mirrors: frozenset[str] = frozenset()
    offloaded: bool = False
    graphs: MicroBatchGraphs | None = None
    stores: tuple[ActivationStore, ...] = ()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name in the whole model, parameter) for all of this rank, frozen ones too."""
        for part in self.parts.values():
            for name, _, _, parameter in named_parameters(part):
                if name not in self.mirrors:
                    yield name, parameter

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name in the whole model, tensor) for what is not trained but must be saved."""
        for part in self.parts.values():
            kept = part.state_dict().keys()
            for name, buffer in part.named_buffers():
                if name in kept:
                    yield name, buffer

    def specs(self) -> dict[str, ParamSpec]:
        """Return what each parameter of ``named_parameters`` is for."""
        return {
            name: spec
            for part in self.parts.values()
            for name, spec in parameter_specs(part).items()
            if name not in self.mirrors
        }

    def materialize(self, device: torch.device) -> None:
        """Give storage on ``device`` to parts from the meta device, unset; move any other there."""
        for part in self.parts.values():
            materialize(
                part, device, offload=self.offloaded, buffers_only=self.sync.makes_parameters
            )

    def initialize(self, parameterization: Parameterization, seed: int) -> None:
        """Fill all parameters and buffers: functions of (seed, name, row) alone."""
        for part in self.parts.values():
            initialize(part, parameterization, seed, self.sync.hold)


def parallelize(
    build: Callable[[Part], Transformer], config: RunConfig, layout: Layout, mesh: Mesh
) -> Parallel:
    """Make this rank's part of the model and distribute it as ``config`` says.

    ``build(part)`` makes a part of the model, on the meta device where the model is large. Every
    rank calls this alike. Afterwards parameters that are shared out are DTensors: build the
    optimizer then, not before.
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
    """Apply to one part of a model, in place, all that happens inside of its blocks.

    Returns what keeps activations on the host, if anything may.
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
        # What ZeRO hooks on to modules inside a block (``zero.shard_model``) cannot be traced, nor
        # can an exchange.
        half = config.training.compute_dtype == "bf16"
        nested = config.parallel.zero.stage > 0 and half and config.model.kind == "moe"
        options = symmetric_memory(mesh) if config.parallel.tp_overlap == "symmetric" else None
        exchanged = mesh.ep.size > 1 or (mesh.tp.size > 1 and config.parallel.expert_tp == 1)
        compile_parts(part, whole=not exchanged and not nested, options=options)
    return store


def symmetric_memory(mesh: Mesh) -> dict[str, Any] | None:
    """Return what lets torch's compiler fuse the tp group's messages with its products.

    In symmetric memory, a chunk of a gather is multiplied as it comes and a product's rows are
    scattered as they are made (torch's async tensor parallelism). None without a tp group. Raises
    UserError, on all ranks alike, where the device or torch has no such memory.
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
    """Compile each block, and the softmax of the loss; ``whole``: each without a break, or fail.

    All blocks share their code, so they are compiled once for all; as a unit the block keeps
    compile times short and leaves ZeRO room for its hooks between blocks. The number of documents
    is marked as varying by the model itself. Shapes that vary otherwise are generalised by torch
    at their second value. The exchange of expert parallelism, whose sizes are data, is a break.
    """
    for block in model.blocks.values():
        block.compile(fullgraph=whole, options=options)
    if model.head is not None:
        model.head.compile(fullgraph=True)


def materialize(
    model: nn.Module, device: torch.device, *, offload: bool = False, buffers_only: bool = False
) -> None:
    """Give a model from the meta device storage on ``device``, unset; move any other there.

    ``offload``: parameters stay on the CPU, buffers do not. ``buffers_only``: parameters get
    theirs later.
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
