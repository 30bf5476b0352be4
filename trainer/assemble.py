"""Build a rank's part of the model, its optimizer and its training step."""

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
    """Return a part of the model on the meta device; ``kernels`` None: the preferred kernels."""
    with torch.device("meta"):
        made = build_model(config.model, plan.parameterization, config.training.compute_dtype, part)
    if kernels is not None:
        use_kernels(made, kernels.core, kernels.norm.name, kernels.quantize.name)
    use_precision(made, config.precision, None if kernels is None else kernels.linears.name)
    return made


def make_model(
    config: RunConfig, plan: RunPlan, mesh: Mesh, kernels: Kernels | None = None
) -> Parallel:
    """Return this rank's part of the model with initial values.

    The part is built on the meta device and sharded before memory is allocated and initialized, so
    no rank ever allocates the unsharded model.
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
    """Return the optimizer of this rank's part of the model, which is sharded over ``mesh``.

    If ``still`` is True, optimizer states stay on the device where they are created, even if the
    run would offload them (used by rehearsals). Raises UserError: see ``build_optimizer``.
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
    """Return the object that takes optimizer steps; ``judge`` decides which updates are skipped."""
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
        depths=config.model.num_depths,
    )


def with_measured_stages(
    run: RunConfig, plans: tuple[RunPlan, ...], mesh: Mesh
) -> tuple[RunPlan, ...]:
    """Return the plans with pipeline stages of equal measured time if ``split: measured`` is set.

    All training stages of the run use the pipeline stages of the first training stage.

    The main rank times full layers in eager mode on its own device and broadcasts the result. A run
    that continues in the layout of its last launch keeps the pipeline stages of that launch, so
    that resume is bit-exact. Raises UserError on all ranks if a layer does not fit into the
    device's memory.
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
    """Return the pipeline stages of the last launch if its layout was the same, else None.

    Before the run's first launch, the record of the parent run is read.
    """
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
