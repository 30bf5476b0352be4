"""Advice on valid but inefficient combinations of config keys, with better settings.

Each rule is a function of a run's config and plan that returns a sentence or None. The plan's
memory estimate is compared with ``DEVICE_BYTES`` to judge whether memory is ample or short.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from allometry.configs.model import MoEModel
from allometry.configs.run import RunConfig
from allometry.scaling.layout import SPLIT_BACKWARD
from allometry.scaling.offload import STAYING
from allometry.scaling.plan import RunPlan, memory_of, traffic_of

DEVICE_BYTES = 80 * 10**9
"""Assumed device memory: an A100 or H100 of 80 GB, less some GB for memory that the estimate does
not include (see ``MemoryEstimate``).
"""
NODE_RANKS = 8
"""Default number of ranks per node if the launcher does not define it."""

Rule = Callable[[RunConfig, RunPlan, int], str | None]


def advice(config: RunConfig, plan: RunPlan, node_ranks: int = NODE_RANKS) -> dict[str, str]:
    """Return advice by name of the rule; ``node_ranks``: ranks of one machine.

    For example, full checkpointing of a small model returns ``{"recomputes_though_memory_is_ample":
    "..."}``.
    """
    found = ((rule.__name__, rule(config, plan, node_ranks)) for rule in RULES)
    return {name: text for name, text in found if text is not None}


def stage_higher_than_needed(config: RunConfig, plan: RunPlan, _: int) -> str | None:
    """Advise a lower ZeRO stage: stages 2 and 3 communicate in every micro-batch."""
    zero, count = config.parallel.zero, plan.micro_batches(plan.total_steps)
    if plan.hdp == 1 or plan.layout.pp > 1 or count == 1 or zero.stage < 2:
        return None
    for stage in range(1, zero.stage):
        lower = zero.model_copy(update={"stage": stage, "regather": "auto"})
        need = _needs(config, plan, parallel={"zero": lower})
        if need <= DEVICE_BYTES:
            sends = "gathers parameters and reduces gradients" if zero.frees(1) else "reduces"
            return (
                f"parallel.zero.stage={zero.stage} {sends} in each of {count} micro-batches; stage "
                f"{stage} does so once a step and needs {_gb(need)}"
            )
    return None


def regathers_in_a_pipeline(config: RunConfig, plan: RunPlan, _: int) -> str | None:
    """Advise ``regather: step``: every micro-batch gathers all parameters twice."""
    zero, pp = config.parallel.zero, plan.layout.pp
    if pp == 1 or plan.hdp == 1 or not zero.frees(pp):
        return None
    kept = zero.model_copy(update={"regather": "step"})
    need = _needs(config, plan, parallel={"zero": kept})
    if need > DEVICE_BYTES:
        return None
    return (
        "parallel.zero.regather=micro_batch gathers each block up to "
        f"{2 * plan.micro_batches(plan.total_steps)} times a step; step does so once and needs "
        f"{_gb(need)}"
    )


def does_not_fit(config: RunConfig, plan: RunPlan, _: int) -> str | None:
    """Advise settings that fit: the first step would run out of memory."""
    if plan.memory.total <= DEVICE_BYTES:
        return None
    zero = config.parallel.zero
    for stage in range(zero.stage + 1, 4) if plan.hdp > 1 else ():
        need = _needs(config, plan, parallel={"zero": zero.model_copy(update={"stage": stage})})
        if need <= DEVICE_BYTES:
            fits = f"parallel.zero.stage={stage} needs {_gb(need)}"
            return f"{_gb(plan.memory.total)} do not fit; {fits}"
    kinds: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
    for kind in kinds[kinds.index(config.training.activation_checkpointing) + 1 :]:
        need = _needs(config, plan, training={"activation_checkpointing": kind})
        if need <= DEVICE_BYTES and not (kind == "selective" and _splits(config)):
            return (
                f"{_gb(plan.memory.total)} do not fit; training.activation_checkpointing={kind} "
                f"needs {_gb(need)}"
            )
    full = {"activation_checkpointing": "full", "activation_offload": 1.0}
    alone = config.parallel.context.offload == "none" and zero.engine == "fsdp2"
    if min(map(len, plan.layout.stages)) > STAYING and alone:
        need = _needs(config, plan, training=full)
        if need <= DEVICE_BYTES:
            return (
                f"{_gb(plan.memory.total)} do not fit; training.activation_checkpointing=full with "
                f"training.activation_offload=1.0 needs {_gb(need)}"
            )
    return None


def recomputes_though_memory_is_ample(config: RunConfig, plan: RunPlan, _: int) -> str | None:
    """Advise milder checkpointing: 'full' computes each forward twice, a third more FLOPs."""
    kind, share = config.training.activation_checkpointing, config.training.activation_offload
    if kind != "full":
        return None
    for milder in ("none", "selective"):
        if milder == "selective" and _splits(config):
            continue
        changes = {"activation_checkpointing": milder, "activation_offload": 0.0}
        need = _needs(config, plan, training=changes)
        if need <= DEVICE_BYTES:
            alone = " with training.activation_offload=0" if share else ""
            return (
                f"training.activation_checkpointing=full computes every forward twice; {milder}"
                f"{alone} needs {_gb(need)}"
            )
    return None


def offloads_though_memory_is_ample(config: RunConfig, plan: RunPlan, _: int) -> str | None:
    """Advise no offload: parameters and gradients move, and the host runs the optimizer step."""
    zero = config.parallel.zero
    if zero.offload == "none":
        return None
    need = _needs(config, plan, parallel={"zero": zero.model_copy(update={"offload": "none"})})
    if need > DEVICE_BYTES:
        return None
    return (
        f"parallel.zero.offload={zero.offload} moves all states over the host; none needs "
        f"{_gb(need)}"
    )


def activations_leave_though_memory_is_ample(
    config: RunConfig, plan: RunPlan, _: int
) -> str | None:
    """Advise no offload: transfers use memory bandwidth and pinned host memory."""
    if plan.activation_traffic is None:
        return None
    need = _needs(config, plan, training={"activation_offload": 0.0})
    if need > DEVICE_BYTES:
        return None
    share = config.training.activation_offload
    return f"training.activation_offload={share} moves activations to the host; 0 needs {_gb(need)}"


def copies_of_activations_do_not_hide(config: RunConfig, plan: RunPlan, _: int) -> str | None:
    """Advise smaller transfers: a copy slower than a layer's forward stalls the device.

    A layer's memory is released after the next layer has run. Each offloaded layer costs the
    difference between copy and forward.
    """
    traffic = plan.activation_traffic
    if traffic is None or traffic.hides:
        return None
    costs = config.parallel.context.costs
    text = (
        f"training.activation_offload sends {traffic.layer_bytes / 1e6:.0f} MB of a layer to the "
        f"host, {1e3 * traffic.copy_s:.1f} ms at {costs.host_bandwidth_gb_per_s:g} GB/s, and its "
        f"forward takes {1e3 * traffic.forward_s:.1f} ms at {costs.tflops:g} TFLOP/s "
        "(parallel.context.costs), so the device waits; "
    )
    kind = config.training.activation_checkpointing
    full = config.training.model_copy(update={"activation_checkpointing": "full"})
    less = traffic_of(config.model_copy(update={"training": full}), plan.layout, plan.batch)
    if kind == "full" or less is None or not less.hides:
        return text + "longer sequences hide more"
    return (
        f"{text}training.activation_checkpointing=full sends {less.layer_bytes / 1e6:.0f} MB, "
        "which hides"
    )


def tp_across_nodes(config: RunConfig, plan: RunPlan, node_ranks: int) -> str | None:
    """Advise tp within a node: each block waits for eight messages of all its tokens."""
    tp = plan.layout.degrees.tp
    if tp == 1 or node_ranks % tp == 0 or plan.world_size <= node_ranks:
        return None
    fits = max(d for d in range(1, min(tp, node_ranks) + 1) if node_ranks % d == 0 and tp % d == 0)
    return (
        f"parallel.tp={tp} does not divide the {node_ranks} ranks of a node, so its messages cross "
        f"nodes in every block; use parallel.tp={fits} and more pp or zero"
    )


def pipeline_mostly_waits(config: RunConfig, plan: RunPlan, _: int) -> str | None:
    """Advise a fuller pipeline: ranks idle at its ends (arXiv 2104.04473, section 2.2)."""
    layout, count = plan.layout, plan.micro_batches(plan.total_steps)
    if layout.pp == 1 or _splits(config):
        return None
    each = len(layout.stages) // layout.pp
    idle = (layout.pp - 1) / (count * each + layout.pp - 1)
    if idle <= 1 / 4:
        return None
    return (
        f"{count} micro-batches on parallel.pp={layout.pp} leave ranks idle for {idle:.0%} of a "
        "step; use smaller micro-batches, fewer pipeline ranks or a schedule with more stages"
    )


def experts_cut_too_thin(config: RunConfig, plan: RunPlan, _: int) -> str | None:
    """Advise ``expert_tp: 1``: products of few columns use part of a tile and gather tokens."""
    model, degrees = config.model, plan.layout.degrees
    if not isinstance(model, MoEModel) or degrees.tp == 1 or degrees.whole_experts:
        return None
    width, experts = model.experts.width // degrees.tp, model.experts.num_experts
    if width >= 256 or experts % (degrees.ep * degrees.tp):
        return None
    return (
        f"parallel.tp={degrees.tp} cuts experts of model.experts.width={model.experts.width} to "
        f"{width} columns; parallel.expert_tp: 1 keeps them whole, at the same memory"
    )


RULES: tuple[Rule, ...] = (
    does_not_fit,
    stage_higher_than_needed,
    regathers_in_a_pipeline,
    recomputes_though_memory_is_ample,
    offloads_though_memory_is_ample,
    activations_leave_though_memory_is_ample,
    copies_of_activations_do_not_hide,
    tp_across_nodes,
    pipeline_mostly_waits,
    experts_cut_too_thin,
)
"""All rules, in the order of their output."""


def _needs(config: RunConfig, plan: RunPlan, **sections: dict[str, Any]) -> int:
    """Return the memory in bytes that the run would need with changed keys of ``sections``."""
    changed = {
        name: getattr(config, name).model_copy(update=keys) for name, keys in sections.items()
    }
    return memory_of(config.model_copy(update=changed), plan.layout, plan.batch).total


def _splits(config: RunConfig) -> bool:
    return config.parallel.pipeline.schedule in SPLIT_BACKWARD


def _gb(number: int) -> str:
    return f"{number / 1e9:.1f} GB"
