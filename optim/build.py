"""Making the optimizer and its states, and setting its learning rate."""

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
"""Optimizers that have ``stored`` states: not beside the parameters, or not as they are."""


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
    """Return the optimizer of a run, over whole parameters or shards of them.

    Each group keeps its ``peak_lr``; its ``lr`` is the peak until ``set_lr`` is called. AdamW is
    torch's fused kernel on every device, for plain tensors and DTensors alike: elementwise, so
    right on shards. All else, and AdamW with states in FP8, is a ``RuleOptimizer``: ``mesh`` is
    where its parameters are sharded (None: every one is whole), and ``seed`` is that of what rules
    draw. ``adamw_kernel``: a name in ``adamw.KERNELS``; with another one than torch's AdamW is a
    ``RuleOptimizer`` too. Where
    ``zero.optimizer_states`` says so, all is a ``TieredOptimizer``, which describes the rest, or
    with its ``update: delayed`` a ``DelayedOptimizer``;
    ``working``: what is computed with of parameters that its ``master_weights`` lets travel;
    ``leaving``: those whose gradients may wait in the host's memory. With an ``engine`` that has
    the model, all is a ``DeepSpeedOptimizer``.

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
    """Return the shape that a rank has of a parameter, rounded up: equal on all ranks."""
    shape = list(parameter.shape)
    if isinstance(parameter, DTensor):
        for ranks, how in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
            if isinstance(how, Shard):
                shape[how.dim] = -(-shape[how.dim] // ranks)
    return tuple(shape)


@torch.no_grad()
def init_states(optimizer: Optimizer) -> None:
    """Make the states of a fresh optimizer, as before its first step, for a checkpoint to fill.

    Parameters are left alone. Every rank of a pipeline stage must call this alike.

    Raises:
        UserError: see ``RuleOptimizer.init_states``.
    """
    if isinstance(optimizer, RuleOptimizer | DeepSpeedOptimizer | DelayedOptimizer):
        optimizer.init_states()
    else:
        adamw.init_states(items_of(optimizer.param_groups), optimizer.state)


def begin_anew(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Make again, of values that parameters have now, what states say of the initial ones (radii).

    For parameters whose other states are as before a first step. Every rank of a pipeline stage
    must call this alike.

    Raises:
        UserError: a matrix of zeros on a sphere.
    """
    on_spheres = [p for p in parameters if "radius" in optimizer.state[p]]
    for parameter in on_spheres:
        del optimizer.state[parameter]["radius"]
    if on_spheres:
        init_states(optimizer)


def set_lr(optimizer: Optimizer, fraction: float) -> None:
    """Set every group's learning rate to this fraction of its peak.

    At 0 a step updates an optimizer's states (moments, momenta, counts of steps), whichever it is,
    and no parameter.
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
    """Clip gradients and update at this fraction of the peak rates; return the norm before.

    ``max_norm`` is that of the run; see ``clip_by_global_norm`` for the rest. ``is_bad`` gets the
    norm when ``along`` is summed, and says (0-dim, 1 or 0, the same on all ranks) whether the
    update is left out: parameters and states then keep their bits. Torch's AdamW looks at that on
    the device; every other optimizer counts its steps on the host, which waits for it.
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
    """Let the model compute with what a checkpoint has filled; every rank calls this."""
    if isinstance(optimizer, DeepSpeedOptimizer):
        optimizer.settle()


def groups_not_finite(optimizer: Optimizer) -> list[str]:
    """Return the names of the groups with gradients or values on this rank not all finite."""
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
