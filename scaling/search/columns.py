"""Columns of ``Cases`` for techniques of a run: ZeRO, tiers, FP8, attention kernel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from allometry.configs.execution import OptimizerStates, bytes_of
from allometry.configs.model import ModelConfig
from allometry.configs.optimization import OptimizerConfig
from allometry.configs.run import RunConfig
from allometry.scaling.context import mode_of
from allometry.scaling.count import count_parameters
from allometry.scaling.hdp.cost import CostModel
from allometry.scaling.hdp.plan import make_plan
from allometry.scaling.hdp.stretch import document_columns
from allometry.scaling.inventory import inventory
from allometry.scaling.layout import INTERLEAVED_ROUNDS, Layout, least_micro_batches
from allometry.scaling.memory import COMPUTE_BYTES
from allometry.scaling.offload import offloaded_layers
from allometry.scaling.planner.operators import QUANTIZE_BYTES
from allometry.scaling.update_rules import state_bytes

KERNEL_RATES = {"flash": 0.6, "flash2": 0.6, "varlen": 0.6}
"""Attention rate relative to cuDNN's: FlashAttention-2 on an H200, forward and backward of 4,096
tokens, 288 of 477 TFLOP/s (measured); other kernels are assumed as fast as cuDNN's. For a CPU,
``doctor --measure`` measures the rate of its own kernel.
"""
CHUNKS = 4  # of parallel.tp_overlap=chunked


def technique_columns(
    config: RunConfig, layout: Layout, backend: str, device: str = "cuda"
) -> dict[str, Any]:
    """Return the columns of ``Cases`` other than model, batch and degrees."""
    zero, precision, training = config.parallel.zero, config.precision, config.training
    layers, tp = config.model.num_layers, layout.degrees.tp
    compute = COMPUTE_BYTES[training.compute_dtype]
    chunks = {"off": 1, "chunked": CHUNKS, "symmetric": tp}[config.parallel.tp_overlap]
    linears = "fp8_rowwise" if precision.linears == "auto" else precision.linears
    states, parameters = _whole(config.model, config.optimizer)
    smallest = min(len(stage) for stage in layout.stages)
    return {
        "replicas": zero.replicas,
        "gather_bytes": 1 if precision.gather == "fp8" else compute,
        "tensor_chunks": chunks,
        "deduplicated": 0,
        "attention_rate": KERNEL_RATES.get(backend, 1) if device == "cuda" else 1,
        "narrow_share": 1 - len(precision.compute_layers) / layers,
        "quantize_bytes": QUANTIZE_BYTES.get(linears, 0),
        "saved_fp8": float(precision.saved_activations == "fp8"),
        "state_bytes": states / parameters,
        **_states(config, layout, states),
        "activations_host": offloaded_layers(training.activation_offload, smallest) / smallest,
        "kept_bytes": _kept(config, layout),
    }


@lru_cache(maxsize=8)
def _whole(model: ModelConfig, optimizer: OptimizerConfig) -> tuple[int, int]:
    """Return the bytes of all optimizer states and the number of parameters."""
    states = sum(state_bytes(spec, spec.shape, optimizer) for spec in inventory(model))
    return states, count_parameters(model).total


def _states(config: RunConfig, layout: Layout, whole: float) -> dict[str, float]:
    """Return the shares of optimizer states (``whole`` bytes in total) on the host and on disk."""
    zero = config.parallel.zero
    states = zero.optimizer_states or OptimizerStates(device=0.0)
    if zero.optimizer_states is None and zero.offload == "none":
        return {}
    shards = layout.degrees.hdp / zero.replicas if zero.stage else 1
    total = whole / (layout.degrees.tp * layout.degrees.pp * shards)
    device = min(bytes_of(states.device, int(total)) / total, 1.0)
    left = 1 - device
    cpu = left if states.nvme is None else 0.0
    if states.cpu is not None:
        cpu = min(bytes_of(states.cpu, int(total)) / total, left)
    updates = zero.offload != "none" or zero.engine == "deepspeed"
    return {
        "states_host": 0.0 if updates else cpu,
        "states_disk": left - cpu,
        "host_update": float(updates),
    }


def _cost(config: RunConfig, layout: Layout) -> CostModel:
    return CostModel.of(
        config.model,
        config.parallel.context.costs,
        compute_bytes=COMPUTE_BYTES[config.training.compute_dtype],
        tp=layout.degrees.tp,
        checkpointing=config.training.activation_checkpointing,
        precision=config.precision,
    )


def _kept(config: RunConfig, layout: Layout) -> float:
    """Return activation bytes per token and layer, if any are offloaded; else 0."""
    if config.training.activation_offload == 0.0:
        return 0.0
    return _cost(config, layout).activation_bytes


def columns_of_documents(
    config: RunConfig, layout: Layout, lengths: Sequence[int]
) -> dict[str, float]:
    """Return the columns of a step with documents of these lengths, from its own plan.

    Raises UserError for a document that does not fit the ranks.
    """
    degrees, schedule, pp = layout.degrees, layout.schedule, layout.pp
    cost = _cost(config, layout)
    plan = make_plan(
        lengths,
        degrees.hdp,
        config.parallel.context,
        cost,
        mode_of(config, degrees),
        layers=min(len(stage) for stage in layout.stages),
        multiple=degrees.tp,
        round_count=pp if pp > 1 and schedule in INTERLEAVED_ROUNDS else 1,
        least=least_micro_batches(schedule, pp) if pp > 1 else 1,
        pp=pp,
    )
    return document_columns(plan, cost)
