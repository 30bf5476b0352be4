"""Making this rank's part of a model, and the states of its optimizer."""

from __future__ import annotations

from dataclasses import replace

import torch

from allometry.configs.run import RunConfig
from allometry.models.build import build_model
from allometry.models.init import initialize
from allometry.models.transformer import Part, Transformer
from allometry.parallel.apply import Parallel, materialize, parallelize
from allometry.parallel.measure import measure_costs
from allometry.parallel.mesh import Mesh
from allometry.scaling.layout import Layout
from allometry.scaling.plan import RunPlan


def build_part(config: RunConfig, plan: RunPlan, part: Part) -> Transformer:
    """A part of the model without storage."""
    with torch.device("meta"):
        return build_model(config.model, plan.parameterization, config.training.compute_dtype, part)


def make_model(config: RunConfig, plan: RunPlan, mesh: Mesh) -> Parallel:
    """This rank's part of the model, with its initial values.

    It is made without storage, sharded, and only then filled, so that no rank ever holds it whole.
    """
    parallel = parallelize(lambda part: build_part(config, plan, part), config, plan.layout, mesh)
    parallel.materialize(mesh.device)
    parallel.initialize(plan.parameterization, config.run.seed)
    return parallel


def with_measured_stages(config: RunConfig, plan: RunPlan, mesh: Mesh) -> RunPlan:
    """The plan with pipeline stages of equal time, where ``split: measured`` asks for them.

    The main rank measures, on its own device, and all ranks use what it found.
    """
    if mesh.pp.size == 1 or config.parallel.pipeline.split != "measured":
        return plan

    def build(part: Part) -> Transformer:
        made = build_part(config, plan, part)
        materialize(made, mesh.device)
        initialize(made, plan.parameterization, config.run.seed)
        return made

    costs = measure_costs(build, config, mesh.device) if mesh.is_main else None
    costs = mesh.broadcast_object(costs)
    return replace(plan, layout=Layout.of(config, plan.world_size, costs))


def make_states(optimizer: torch.optim.Optimizer) -> None:
    """Give a fresh optimizer its states, to be filled from a checkpoint, leaving parameters alone.

    Optimizers make their states in the first step; this is one with zero gradients and rate 0.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
