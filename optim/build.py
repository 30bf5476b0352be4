"""Build the optimizer and its states, and set its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim import AdamW as TorchAdamW
from torch.optim import Optimizer

from allometry.configs.execution import Zero
from allometry.configs.optimization import AdamW, Fp8StatesConfig, OptimizerConfig
from allometry.optim import adamw
from allometry.optim.clip import clip_by_global_norm
from allometry.optim.deepspeed import DeepSpeedOptimizer
from allometry.optim.delayed import DelayedOptimizer
from allometry.optim.exchange import ShardedMatrixOps
from allometry.optim.fp8_states import Fp8States
from allometry.optim.groups import parameter_groups
from allometry.optim.matrix_ops import LocalMatrixOps
from allometry.optim.offload.held import WorkingCopy
from allometry.optim.optimizer import RuleOptimizer
from allometry.optim.states import items_of
from allometry.optim.tiered import TieredOptimizer, gradient_of, values_of
from allometry.parallel.deepspeed.engine import DeepSpeedSync
from allometry.parallel.mesh import Mesh
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.roles import ParamSpec
from allometry.scaling.update_rules import state_bytes

Elsewhere = TieredOptimizer | DeepSpeedOptimizer | DelayedOptimizer
"""Optimizers with ``stored`` states: offloaded states, or states in another format."""


def build_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]],
    specs: Mapping[str, ParamSpec],
    parameterization: Parameterization,
    config: OptimizerConfig,
    mesh: Mesh | None = None,
    seed: int = 0,
    adamw_kernel: str = "torch",
    zero: Zero | None = None,
    timeout_s: float = 600.0,
    still: bool = False,
    working: Mapping[Tensor, WorkingCopy] | None = None,
    leaving: Iterable[Tensor] = (),
    engine: DeepSpeedSync | None = None,
) -> Optimizer:
    """Return the optimizer of a run, over unsharded or sharded parameters.

    Each group keeps its ``peak_lr``; ``lr`` equals the peak until ``set_lr`` is called. AdamW is
    torch's fused kernel on every device, for plain tensors and DTensors (the update is elementwise,
    so correct on shards). All other rules, and AdamW with FP8 states, are a ``RuleOptimizer``:
    ``mesh`` is the mesh of its sharded parameters (None: unsharded), and ``seed`` seeds the random
    numbers of the rules. ``adamw_kernel`` is a name in ``adamw.KERNELS``; any kernel except torch's
    also gives a ``RuleOptimizer``. With ``zero.optimizer_states`` the optimizer is a
    ``TieredOptimizer``, which documents the remaining arguments, or with ``update: delayed`` a
    ``DelayedOptimizer``; ``working``: compute copies of parameters that are offloaded by
    ``master_weights``; ``leaving``: parameters whose gradients may be offloaded to the host. With
    an ``engine`` that contains the model, the optimizer is a ``DeepSpeedOptimizer``. For example,
    ``build_optimizer(model.named_parameters(), specs, parameterization, config.optimizer)``.

    Raises:
        UserError: see ``parameter_groups``, ``RuleOptimizer``, ``TieredOptimizer`` and
            ``DeepSpeedOptimizer``.
    """
    tiered = zero is not None and zero.optimizer_states is not None
    named_parameters = list(named_parameters)
    groups = parameter_groups(named_parameters, specs, parameterization, config)
    if engine is not None:
        assert mesh is not None
        return DeepSpeedOptimizer(groups, engine, mesh)
    states = getattr(config, "states", None)
    fp8 = Fp8States(states.rounding, seed) if isinstance(states, Fp8StatesConfig) else None
    if isinstance(config, AdamW) and adamw_kernel == "torch" and not tiered and fp8 is None:
        return TorchAdamW(groups, betas=(config.beta1, config.beta2), fused=True)
    for group in groups:
        group["seed"], group["kernel"], group["fp8"] = seed, adamw_kernel, fp8
    ops = LocalMatrixOps() if mesh is None or mesh.world_size == 1 else ShardedMatrixOps(mesh)
    trained = any(group["params"] for group in groups)
    if zero is None or zero.optimizer_states is None or not trained:
        return RuleOptimizer(groups, ops)
    sizes = {
        name: state_bytes(specs[name], _shard(parameter), config)
        + (4 * math.prod(_shard(parameter)) if parameter in (working or {}) else 0)
        for name, parameter in named_parameters
    }
    if zero.optimizer_states.update == "delayed" and not still:
        return DelayedOptimizer(groups, zero, sizes, timeout_s)
    return TieredOptimizer(
        groups, ops, zero, sizes, timeout_s, working=working, leaving=leaving, still=still
    )


def _shard(parameter: Tensor) -> tuple[int, ...]:
    """Return the local shape of a parameter, rounded up so that it is equal on all ranks."""
    shape = list(parameter.shape)
    if isinstance(parameter, DTensor):
        for ranks, how in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
            if isinstance(how, Shard):
                shape[how.dim] = -(-shape[how.dim] // ranks)
    return tuple(shape)


@torch.no_grad()
def init_states(optimizer: Optimizer) -> None:
    """Create the states of a new optimizer without a step, to be filled by a checkpoint.

    Parameters do not change. Every rank of a pipeline stage calls this function.

    Raises:
        UserError: see ``RuleOptimizer.init_states``.
    """
    if isinstance(optimizer, RuleOptimizer | DeepSpeedOptimizer | DelayedOptimizer):
        optimizer.init_states()
    else:
        adamw.init_states(items_of(optimizer.param_groups), optimizer.state)


def begin_anew(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Recompute states that depend on initial values (radii) from the current parameter values.

    The other states of the parameters must be initial states. Every rank of a pipeline stage calls
    this function.

    Raises:
        UserError: a matrix of zeros on a sphere.
    """
    on_spheres = [p for p in parameters if "radius" in optimizer.state[p]]
    for parameter in on_spheres:
        del optimizer.state[parameter]["radius"]
    if on_spheres:
        init_states(optimizer)


def set_lr(optimizer: Optimizer, fraction: float) -> None:
    """Set the learning rate of every group to ``fraction`` of its peak.

    A step at 0 updates the states of every optimizer (moments, momenta, step counts), but no
    parameter. For example, ``set_lr(optimizer, schedule.fraction(step))``.
    """
    assert fraction >= 0.0, fraction
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * fraction


def take_step(
    optimizer: Optimizer,
    fraction: float,
    max_norm: float | None,
    mesh: Mesh | None = None,
    along: Sequence[Tensor] = (),
    is_bad: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Clip gradients and update at ``fraction`` of the peak rates; return the norm before clipping.

    ``max_norm`` is the limit of the run; see ``clip_by_global_norm`` for the other arguments.
    ``is_bad`` receives the norm after ``along`` is summed and returns (0-dim, 1 or 0, the same on
    all ranks) whether the update is skipped: parameters and states then keep their bits. torch's
    AdamW reads this flag on the device; all other optimizers count steps on the host, which waits
    for it. For example, ``take_step(optimizer, schedule.fraction(step), 1.0, mesh)``.
    """
    set_lr(optimizer, fraction)
    if isinstance(optimizer, DeepSpeedOptimizer):
        assert is_bad is None, "DeepSpeed updates by itself"
        return optimizer.take_step(along)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    away = optimizer.gradients if isinstance(optimizer, TieredOptimizer) else None
    norm = clip_by_global_norm(parameters, max_norm, mesh, along, away)
    if is_bad is None:
        optimizer.step()
    elif isinstance(optimizer, TorchAdamW):
        adamw.adamw_unless(is_bad(norm), optimizer.param_groups, optimizer.state)
    elif not is_bad(norm).item():
        optimizer.step()
    return norm


def settle(optimizer: Optimizer) -> None:
    """Make values loaded from a checkpoint visible to the model; every rank calls this."""
    if isinstance(optimizer, DeepSpeedOptimizer):
        optimizer.settle()


def groups_not_finite(optimizer: Optimizer) -> list[str]:
    """Return the names of the groups with gradients or values on this rank that are not finite."""
    if isinstance(optimizer, DeepSpeedOptimizer):
        return optimizer.groups_not_finite()
    return [
        str(group["name"])
        for group in optimizer.param_groups
        if any(
            not tensor.isfinite().all()
            for parameter in group["params"]
            for tensor in (gradient_of(optimizer, parameter), values_of(optimizer, parameter))
            if tensor is not None
        )
    ]
