"""Restore the tensors and the progress with which a launch begins."""

from __future__ import annotations

import torch

from allometry.configs.run import RunConfig
from allometry.laws.areas import LearningRateAreas
from allometry.optim.build import Elsewhere, begin_anew, init_states, settle
from allometry.optim.offload.swap import StatesLost
from allometry.parallel.agree import on_all_ranks
from allometry.parallel.apply import Parallel
from allometry.parallel.mesh import Mesh
from allometry.scaling.inventory import stream_names
from allometry.scaling.plan import RunPlan
from allometry.trainer.loop import Progress, state_tensors
from allometry.trainer.state import checkpoint
from allometry.trainer.state.finite import check_finite
from allometry.trainer.state.local import load_copy
from allometry.trainer.state.planners import State
from allometry.trainer.state.resume import Start
from allometry.trainer.state.same_files import rates_since
from allometry.trainer.state.states import load


def restore(
    config: RunConfig,
    plan: RunPlan,
    start: Start,
    parallel: Parallel,
    optimizer: torch.optim.Optimizer,
    mesh: Mesh,
) -> tuple[Progress, dict[str, int]]:
    """Load the launch's initial state; return its progress and the number of converted states."""
    begun = config.run.schedule_from
    # Any warm-up came before the first step of a schedule that begins in mid-run.
    areas = LearningRateAreas(0 if begun else plan.run.warmup_steps)
    progress, converted = Progress(start.step, areas, saved_step=start.saved_step), {}
    try:
        if start.checkpoint is not None and start.facts is not None:
            converted = _load(config, plan, start, progress, parallel, optimizer, mesh)
        if isinstance(optimizer, Elsewhere):
            init_states(optimizer)  # a lack of memory or disk is found before the first step
    except StatesLost as error:
        raise progress.lost(error) from None
    return progress, converted


def _added(config: RunConfig, start: Start) -> frozenset[str]:
    """Return the parameters that a branch adds to its parent's model, at the step of the branch."""
    parent = config.run.parent
    begins = parent is not None and parent.step == start.step and not start.weights_only
    return stream_names(config.model) if begins else frozenset()


def _load(
    config: RunConfig,
    plan: RunPlan,
    start: Start,
    progress: Progress,
    parallel: Parallel,
    optimizer: torch.optim.Optimizer,
    mesh: Mesh,
) -> dict[str, int]:
    assert start.checkpoint is not None
    assert start.facts is not None
    names = {parameter: name for name, parameter in parallel.named_parameters()}
    if start.weights_only:  # of another run or framework: training starts afresh
        if start.facts.get("optimizer", False):
            init_states(optimizer)
        there = checkpoint.names(start.checkpoint)
        state: State = {f"model.{name}": p.detach() for p, name in names.items()}
        buffers = {f"model.{name}": buffer for name, buffer in parallel.named_buffers()}
        state |= {name: buffer for name, buffer in buffers.items() if name in there}
        state |= checkpoint.optimizer_state(optimizer, names)
    else:
        init_states(optimizer)
        state = state_tensors(parallel, optimizer)
        stage = plan.stage
        if stage is not None and start.step == stage.steps_before and stage.states_anew:
            state = {key: value for key, value in state.items() if key.startswith("model.")}
        progress.areas.load_state_dict(start.facts["areas"])
        progress.flops = start.facts["flops"]
        progress.held_out_before.update(start.facts.get("held_out_before", {}))
        progress.rates_since = rates_since(config, start.facts)
        progress.skipped.update({int(k): why for k, why in start.facts.get("skipped", {}).items()})
    converted: dict[str, int] = {}
    anew: list[torch.Tensor] = []
    if start.offer is not None:
        own = start.checkpoint
        on_all_ranks(mesh, lambda: load_copy(own, state), "loading local copies")
    else:
        converted, anew = load(start.checkpoint, state, names, mesh, _added(config, start))
    settle(optimizer)
    if anew:
        begin_anew(optimizer, anew)
    check_finite(start.checkpoint, state, mesh)
    return converted
