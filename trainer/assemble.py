"""Making this rank's part of a model, and the states of its optimizer."""

from __future__ import annotations

from dataclasses import replace

import torch

from allometry.configs.errors import UserError
from allometry.configs.json_file import read_object
from allometry.configs.model import MoEModel
from allometry.configs.run import RunConfig
from allometry.models.build import build_model
from allometry.models.init import initialize
from allometry.models.kernels import use_kernels
from allometry.models.precision import use_precision
from allometry.models.transformer import Part, Transformer
from allometry.optim.build import build_optimizer
from allometry.optim.schedule import Schedule
from allometry.parallel.agree import from_main_rank
from allometry.parallel.apply import Parallel, materialize, parallelize
from allometry.parallel.deepspeed.engine import DeepSpeedSync
from allometry.parallel.measure import measure_costs
from allometry.parallel.mesh import Mesh
from allometry.parallel.working import reduced_alone, working_copies
from allometry.scaling.layout import Layout
from allometry.scaling.plan import RunPlan
from allometry.trainer.bad_steps import Judge
from allometry.trainer.balance import Balancer
from allometry.trainer.kernels import Kernels
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.step import TrainStep


def build_part(
    config: RunConfig, plan: RunPlan, part: Part, kernels: Kernels | None = None
) -> Transformer:
    """A part of the model without storage; ``kernels`` None: those that the table prefers."""
    with torch.device("meta"):
        made = build_model(config.model, plan.parameterization, config.training.compute_dtype, part)
    if kernels is not None:
        use_kernels(made, kernels.core, kernels.norm.name, kernels.quantise.name)
    use_precision(made, config.precision, None if kernels is None else kernels.linears.name)
    return made


def make_model(
    config: RunConfig, plan: RunPlan, mesh: Mesh, kernels: Kernels | None = None
) -> Parallel:
    """This rank's part of the model, with its initial values.

    It is made without storage, sharded, and only then filled, so that no rank ever holds it whole.
    """
    parallel = parallelize(
        lambda part: build_part(config, plan, part, kernels), config, plan.layout, mesh
    )
    parallel.materialize(mesh.device)
    parallel.initialize(plan.parameterization, config.run.seed)
    return parallel


def make_optimizer(
    config: RunConfig,
    plan: RunPlan,
    parallel: Parallel,
    mesh: Mesh,
    kernels: Kernels | None = None,
    *,
    still: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer of this rank's part of the model, which is sharded over ``mesh``.

    ``still``: its states stay where they are made, though the run's would travel (a rehearsal).
    Raises UserError: see ``build_optimizer``.
    """
    states = config.parallel.zero.optimizer_states
    travel = states is not None and states.master_weights and not still
    leave = states is not None and states.gradients and not still
    return build_optimizer(
        parallel.named_parameters(),
        parallel.specs(),
        plan.parameterization,
        config.optimizer,
        mesh,
        config.run.seed,
        "torch" if kernels is None else kernels.adamw.name,
        config.parallel.zero,
        config.parallel.timeout_s,
        still,
        working_copies(parallel.parts.values()) if travel else None,
        reduced_alone(parallel.parts.values(), mesh, tied=config.model.tied_embeddings)
        if leave
        else (),
        parallel.sync if isinstance(parallel.sync, DeepSpeedSync) else None,
    )


def make_train_step(
    config: RunConfig,
    plan: RunPlan,
    parallel: Parallel,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    mesh: Mesh,
    judge: Judge | None = None,
) -> TrainStep:
    """What takes the steps of a run; ``judge`` says which updates are skipped."""
    balancer = None
    if isinstance(config.model, MoEModel):
        loads = "step_before" if plan.balance_loads is None else plan.balance_loads.loads
        balancer = Balancer(config.model, list(parallel.parts.values()), mesh, loads)
    return TrainStep(
        parallel,
        optimizer,
        schedule,
        mesh,
        peak_lr=config.optimizer.lr,
        sources=len(config.data.sources),
        clip_grad_norm=config.training.clip_grad_norm,
        dropout_seed=config.run.seed if config.model.dropout else None,
        balancer=balancer,
        judge=judge,
    )


def with_measured_stages(
    run: RunConfig, plans: tuple[RunPlan, ...], mesh: Mesh
) -> tuple[RunPlan, ...]:
    """The plans with pipeline stages of equal time, where ``split: measured`` asks for them.

    Those of the run's first stage are those of all.

    The main rank measures on its own device, whole layers in eager code, and all ranks use what it
    found. A run that continues in the layout of its last launch keeps that one's stages, so that
    it resumes to the bit. Raises UserError on all ranks where a layer does not fit the device.
    """
    config, plan = run.of_stages()[0], plans[0]
    if mesh.pp.size == 1 or config.parallel.pipeline.split != "measured":
        return plans
    earlier = mesh.broadcast_object(_stages_before(config, plan) if mesh.is_main else None)
    if earlier is not None:
        layout = replace(plan.layout, stages=earlier)
        return tuple(replace(one, layout=layout) for one in plans)

    def build(part: Part) -> Transformer:
        made = build_part(config, plan, part)
        materialize(made, mesh.device)
        initialize(made, plan.parameterization, config.run.seed)
        return made

    def measure() -> list[float]:
        try:
            return measure_costs(build, config, mesh.device)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise UserError(
                "parallel.pipeline.split=measured: a whole layer does not fit this device "
                f"({str(error).splitlines()[0]}); use split: flops"
            ) from None

    costs = from_main_rank(mesh, measure, "measuring stages")
    layout = Layout.of(config, plan.world_size, costs)
    return tuple(replace(one, layout=layout) for one in plans)


def _stages_before(config: RunConfig, plan: RunPlan) -> tuple[range, ...] | None:
    """The stages of the run's last launch (of its parent's, before the first) in this layout."""
    record = RunFolder(config.run.folder).run
    if not record.exists() and config.run.parent is not None:
        record = RunFolder(config.run.parent.folder).run
    try:
        facts = read_object(record)
        before, now = facts["layout"], plan.layout.describe()
        if all(before[key] == value for key, value in now.items() if key != "stages"):
            stages = tuple(range(start, stop) for start, stop in before["stages"])
            return stages if len(stages) == len(plan.layout.stages) else None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
