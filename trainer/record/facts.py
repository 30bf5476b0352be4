"""Facts about a run in run.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from allometry.configs.optimization import Fp32States
from allometry.configs.run import RunConfig
from allometry.data.sources import Sources
from allometry.parallel.graphs import choose_graphs
from allometry.parallel.mesh import Mesh
from allometry.scaling.inventory import inventory
from allometry.scaling.plan import RunPlan
from allometry.scaling.update_rules import state_bytes
from allometry.trainer.record import hardware, writer
from allometry.trainer.record.columns import conventions


@dataclass(frozen=True)
class Invocation:
    """Command line and allocator of the process, for the record.

    The library itself reads no environment. ``layout_choice``: the choice of ``parallel: auto``,
    with its reason.
    """

    allocator: str = "unknown"
    command: list[str] = field(default_factory=list)
    cuda_allocator: str | None = None
    layout_choice: dict[str, Any] | None = None


def run_facts(
    config: RunConfig,
    plan: RunPlan,
    stream: Sources,
    mesh: Mesh,
    peak: hardware.Peak,
    invocation: Invocation,
    kernels: dict[str, Any],
) -> dict[str, Any]:
    """Return the content of run.json without its launches (JSON)."""
    return {
        "versions": writer.versions(),
        "commit": writer.commit(),
        "command": invocation.command,
        "allocator": invocation.allocator,
        "cuda_allocator": invocation.cuda_allocator,
        "hardware": hardware.describe(mesh.device),
        "peak": {"flops_per_s": peak.flops_per_s, "source": peak.source},
        "kernels": kernels,
        "compute_dtype": config.training.compute_dtype,
        "parent": config.run.parent.model_dump() if config.run.parent else None,
        "layout": {
            "world_size": plan.world_size,
            **plan.layout.describe(),
            "zero_engine": config.parallel.zero.engine,
            "zero_stage": config.parallel.zero.stage,
            "offload": config.parallel.zero.offload,
            "activation_checkpointing": config.training.activation_checkpointing,
            "activation_offload": config.training.activation_offload,
            "compile": config.training.compile,
            "cuda_graphs": asdict(choose_graphs(config, mesh)),
            "micro_batch_sequences": config.batch.micro_batch_sequences,
        },
        "layout_choice": invocation.layout_choice,
        "plan": plan.describe(),
        "optimizer_states": _states(config),
        "data": stream.describe(),
        "conventions": conventions(),
    }


def _states(config: RunConfig) -> dict[str, Any]:
    """Return the format of the optimizer states: total bytes, and the bytes saved by FP8."""
    states = getattr(config.optimizer, "states", Fp32States())
    specs = inventory(config.model)
    held = sum(state_bytes(spec, spec.shape, config.optimizer) for spec in specs)
    saved = 0
    if states.kind != "fp32":
        plain = config.optimizer.model_copy(update={"states": Fp32States()})
        saved = sum(state_bytes(spec, spec.shape, plain) for spec in specs) - held
    return {**states.model_dump(), "bytes": held, "bytes_saved": saved}


def launch_facts(facts: dict[str, Any], first_step: int) -> dict[str, Any]:
    """Return the entry in run.json's list of launches for a launch with these ``run_facts``."""
    names = ("layout", "layout_choice", "commit", "allocator", "cuda_allocator", "kernels")
    kept = {key: facts[key] for key in names}
    return {"first_step": first_step, **kept}
