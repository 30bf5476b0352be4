"""Supported settings and configuration of the DeepSpeed engine; pure, also used by dry runs.

Only this module creates DeepSpeed's configuration. Settings that define the *computation* (types,
clipping, gradient averaging, groups, accumulation) are derived from our own keys. Users may add
settings of speed and memory (``TUNABLE``); other keys are rejected, since DeepSpeed silently
ignores many unknown keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from allometry.configs.errors import UserError
from allometry.configs.execution import Zero
from allometry.configs.optimization import AdamW, Fp8StatesConfig
from allometry.configs.run import RunConfig
from allometry.scaling.degrees import Degrees
from allometry.scaling.inventory import inventory

STATE_BYTES = 8
"""Bytes of AdamW's states per parameter."""

NVME_LEAST_BYTES = 2**20
"""Size of a tensor on a rank in bytes below which DeepSpeed keeps it in memory in spite of NVMe."""

_ANY = "any"  # all keys below this key
TUNABLE: Mapping[str, Any] = {
    "aio": _ANY,
    "comms_logger": _ANY,
    "dump_state": None,
    "flops_profiler": _ANY,
    "memory_breakdown": None,
    "timers": _ANY,
    "wall_clock_breakdown": None,
    "zero_optimization": {
        "allgather_bucket_size": None,
        "contiguous_gradients": None,
        "log_trace_cache_warnings": None,
        "overlap_comm": None,
        "reduce_bucket_size": None,
        "stage3_max_live_parameters": None,
        "stage3_max_reuse_distance": None,
        "stage3_model_persistence_threshold": None,
        "stage3_param_persistence_threshold": None,
        "stage3_prefetch_bucket_size": None,
        "sub_group_size": None,
        "use_multi_rank_bucket_allreduce": None,
        "offload_optimizer": {
            "buffer_count": None,
            "pin_memory": None,
            "pipeline_read": None,
            "pipeline_write": None,
        },
        "offload_param": {
            "buffer_count": None,
            "buffer_size": None,
            "max_in_cpu": None,
            "pin_memory": None,
        },
    },
}
"""Allowed keys of ``zero.deepspeed_extra``."""

_SET_BY = {
    "train_batch_size": "batch.sequences",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_sequences",
    "gradient_accumulation_steps": "batch",
    "gradient_clipping": "training.clip_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "training.compute_dtype",
    "fp16": "training.compute_dtype",
    "zero_optimization.stage": "parallel.zero.stage",
    "zero_optimization.offload_optimizer.device": "parallel.zero.optimizer_states",
    "zero_optimization.offload_optimizer.nvme_path": "parallel.zero.optimizer_states.nvme",
    "zero_optimization.offload_param.device": "parallel.zero.offload",
    "zero_optimization.offload_param.nvme_path": "parallel.zero.optimizer_states.nvme",
}
"""DeepSpeed's keys with an equivalent key of ours."""

_UNTRIED = "activations on the host have not been tried with it"
_STATES = {
    "device": "it moves all states to one place",
    "cpu": "it moves all states to one place",
    "master_weights": "its fp32 parameters always go with the states, and no copy is made",
    "gradients": "its gradients always go with the states",
    "update": "its updates are exact",
}


def check_deepspeed(config: RunConfig, degrees: Degrees) -> None:
    """Raise UserError for settings unsupported by the DeepSpeed engine; skip other engines."""
    if config.parallel.zero.engine != "deepspeed":
        return
    for key, value, why in _refusals(config, degrees):
        raise UserError(
            f"{key}={value} with parallel.zero.engine=deepspeed: {why}; use parallel.zero.engine: "
            "fsdp2"
        )
    _check_extra(config.parallel.zero.deepspeed_extra, TUNABLE, "")
    for key, value, why, fix in _mistakes(config, degrees.hdp):
        raise UserError(f"{key}={value} with parallel.zero.engine=deepspeed: {why}; {fix}")


def check_other_engine(zero: Zero, what: str) -> None:
    """Raise UserError for the DeepSpeed engine if ``what`` supports only the other engine."""
    if zero.engine == "deepspeed":
        raise UserError(
            f"parallel.zero.engine=deepspeed: {what} knows the other engine alone; add "
            "parallel.zero.engine=fsdp2"
        )


def _refusals(config: RunConfig, degrees: Degrees) -> Iterator[tuple[str, Any, str]]:
    """Yield settings supported only by the other engine: key, value, reason."""
    zero, training, optimizer = config.parallel.zero, config.training, config.optimizer
    for axis in ("tp", "pp", "ep"):
        if getattr(degrees, axis) > 1:
            yield f"parallel.{axis}", getattr(degrees, axis), "it shards over hdp alone"
    if zero.replicas > 1:
        yield "parallel.zero.replicas", zero.replicas, "it keeps one copy"
    if zero.regather != "auto":
        yield "parallel.zero.regather", zero.regather, "it gathers as its stage says"
    if not isinstance(optimizer, AdamW):
        yield "optimizer.kind", optimizer.kind, "its parts are flat, so the rule must be AdamW"
    elif isinstance(optimizer.states, Fp8StatesConfig):
        yield "optimizer.states.kind", "fp8", "it keeps states in fp32"
    for number, entry in enumerate(optimizer.overrides):
        if entry.freeze:
            yield f"optimizer.overrides.{number}.freeze", "true", "it trains every parameter"
    if training.compile:
        yield "training.compile", "true", "its hooks cannot be compiled"
    if training.bad_steps is not None:
        yield "training.bad_steps", "{...}", "it updates before anything can reject that"
    if config.kernels.adamw == "apex":
        yield "kernels.adamw", "apex", "it updates with torch's fused kernel"
    if config.precision.gather != "compute":
        yield "precision.gather", config.precision.gather, "it gathers fp32"
    if config.model.streams is not None:
        yield "model.streams.count", config.model.num_streams, "streams have not been tried with it"
    if training.activation_offload > 0.0:
        yield "training.activation_offload", training.activation_offload, _UNTRIED
    if config.model.multi_token is not None:
        yield "model.multi_token.depth", config.model.num_depths, "it has not been tried with it"
    if config.data.kind == "documents" and config.parallel.context.offload != "none":
        yield "parallel.context.offload", config.parallel.context.offload, _UNTRIED
    states = zero.optimizer_states
    for key, why in _STATES.items():
        value = getattr(states, key, None)
        if value and value != "exact":
            shown = "true" if value is True else value
            yield f"parallel.zero.optimizer_states.{key}", shown, why
    if states is not None and states.nvme is not None and zero.stage < 3:
        # DeepSpeed silently accepts this setting and keeps the states in memory.
        yield "parallel.zero.optimizer_states.nvme", states.nvme, "it uses NVMe at stage 3 alone"


def _mistakes(config: RunConfig, hdp: int) -> Iterator[tuple[str, Any, str, str]]:
    """Yield settings that would not have the documented effect: key, value, reason, remedy."""
    zero = config.parallel.zero
    if zero.offload == "nvme" and zero.stage < 3:
        yield (
            *("parallel.zero.offload", "nvme"),
            f"parameters are sharded at stage 3 alone, and stage={zero.stage}",
            "set parallel.zero.stage: 3",
        )
    if zero.optimizer_states is None or zero.optimizer_states.nvme is None:
        return
    offload = settings(config, hdp)["zero_optimization"]["offload_optimizer"]
    pipelined = offload.get("pipeline_read") or offload.get("pipeline_write")
    least = 8 if pipelined else 4
    if offload["buffer_count"] < least:
        yield (
            "parallel.zero.deepspeed_extra.zero_optimization.offload_optimizer.buffer_count",
            offload["buffer_count"],
            f"AdamW needs {least} buffers" + " where transfers overlap" * bool(pipelined),
            "raise it or leave it out",
        )
    largest = max(math.prod(spec.shape) for spec in inventory(config.model)) * 4 // hdp
    bucket = zero.optimizer_states.bucket_mib * 2**20 * 4 / STATE_BYTES
    if max(largest, bucket) < NVME_LEAST_BYTES:
        yield (
            *("parallel.zero.optimizer_states.bucket_mib", zero.optimizer_states.bucket_mib),
            "DeepSpeed never writes what has less than 1 MiB in fp32 on a rank",
            "set at least 2, or keep a model this small in memory",
        )


def _check_extra(given: Mapping[str, Any], allowed: Mapping[str, Any], above: str) -> None:
    for key, value in given.items():
        path = f"{above}{key}"
        known = f"parallel.zero.deepspeed_extra.{path}"
        if path in _SET_BY:
            raise UserError(f"{known} is set by {_SET_BY[path]}; set that instead")
        if key not in allowed:
            names = ", ".join(sorted(allowed))
            raise UserError(
                f"{known} is not one of the keys that change speed and memory alone: {names}; "
                "leave it out"
            )
        below = allowed[key]
        if below is None or below == _ANY:
            continue
        if not isinstance(value, Mapping):
            raise UserError(f"{known}={value!r} must be a section of keys")
        _check_extra(value, below, f"{path}.")


def settings(config: RunConfig, hdp: int, *, cuda: bool = False, swap: str = "") -> dict[str, Any]:
    """Return DeepSpeed's configuration of a run on ``hdp`` ranks.

    ``cuda``: page-lock host memory for a GPU. ``swap``: folder of the NVMe files.
    """
    zero = config.parallel.zero
    told: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # only counts samples: we accumulate
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.training.clip_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": _zero(config, zero, hdp, cuda, swap),
    }
    if zero.stage < 3:
        told["gradient_allreduce_op"] = "sum"
    return _merged(told, zero.deepspeed_extra)


def _zero(config: RunConfig, zero: Zero, hdp: int, cuda: bool, swap: str) -> dict[str, Any]:
    bucket = zero.bucket_mib * 2**20 // 4
    told: dict[str, Any] = {
        "stage": zero.stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    states = zero.optimizer_states
    if states is not None:
        told["sub_group_size"] = max(1, int(states.bucket_mib * 2**20) // STATE_BYTES)
    if zero.offload != "none" or states is not None:
        on_nvme = states is not None and states.nvme is not None
        told["offload_optimizer"] = {
            "device": "nvme" if on_nvme else "cpu",
            "nvme_path": swap,
            "pin_memory": cuda,
            "buffer_count": 4,
        }
        extra = zero.deepspeed_extra.get("zero_optimization", {}).get("offload_optimizer", {})
        if extra.get("pipeline_read") or extra.get("pipeline_write"):
            told["offload_optimizer"]["buffer_count"] = 12
    if zero.stage == 3 and zero.offload != "none":
        told["offload_param"] = {"device": zero.offload, "pin_memory": cuda}
    if zero.offload == "nvme":
        sizes: dict[str, list[int]] = {}  # by block, such as "blocks.0"
        for spec in inventory(config.model):
            unit = ".".join(spec.name.split(".")[:2])
            sizes.setdefault(unit, []).append(-(-math.prod(spec.shape) // hdp))
        told["offload_param"] |= {
            "nvme_path": swap,
            "max_in_cpu": 0,
            # The parameters of a block are read together; sizes are rounded up for the disk.
            "buffer_count": 2 * max(map(len, sizes.values())),
            "buffer_size": -(-max(map(max, sizes.values())) // 2**18) * 2**18,
        }
        told["stage3_prefetch_bucket_size"] = 0  # otherwise a buffer is handed out twice
    return told


def nvme_bytes(config: RunConfig, hdp: int) -> int:
    """Return approximate NVMe bytes of a rank: masters, states, gradients, and parameters."""
    elements = sum(math.prod(spec.shape) for spec in inventory(config.model)) // hdp
    return elements * (4 + STATE_BYTES + 4 + (4 if config.parallel.zero.offload == "nvme" else 0))


def _merged(told: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``told`` overridden by ``extra``, section by section."""
    merged = dict(told)
    for key, value in extra.items():
        known = told.get(key)
        merged[key] = _merged(known, value) if isinstance(known, dict) else value
    return merged
