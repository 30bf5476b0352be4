"""Optimizer steps for comparison: by the trainer in any layout, and by a plain twin.

``layout_steps`` calls the trainer's own ``TrainStep`` and ``Balancer``; ``reference_steps`` has its
own loops and sums on one process, without any part of ``parallel/``. ``differences`` returns the
largest differences. Gradients are compared in addition to parameters, because Adam's first step
does not depend on their scale.
"""

# S sources, N layers, E experts

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from allometry.configs.model import MoEModel
from allometry.configs.run import RunConfig
from allometry.data.batch import IGNORE
from allometry.models.build import build_model, parameter_specs
from allometry.models.init import initialize
from allometry.models.moe import begin_step, end_step, routers, set_loads
from allometry.models.precision import use_precision
from allometry.models.transformer import Part, Transformer
from allometry.optim.build import build_optimizer, set_lr
from allometry.optim.schedule import resolve_schedule
from allometry.parallel.apply import Parallel, parallelize
from allometry.parallel.mesh import Mesh
from allometry.scaling.batch import BatchPlan
from allometry.scaling.layout import Layout
from allometry.scaling.loads import BalanceLoads
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.plan import RunPlan
from allometry.trainer.assemble import make_optimizer, make_train_step
from allometry.trainer.feed import DeviceBatch
from allometry.trainer.step import seed_dropout


@dataclass(frozen=True)
class StepsResult:
    """Results of some optimizer steps, equal on one process and in any layout.

    By step: ``sums`` [2, S] (sums of losses and target tokens by source), ``grad_norm`` (0-dim,
    before clipping) and ``routing`` [N, 2E + 3] (see ``Balancer.observed``; empty without experts).
    ``gradients``: of the first update, after clipping; ``parameters`` and ``routers`` (loads and
    biases): after the last step. These three are full tensors by name, in a layout of the rank's
    pipeline stages. All tensors are on the CPU.
    """

    sums: list[Tensor]
    grad_norm: list[Tensor]
    routing: list[Tensor]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    routers: dict[str, Tensor]

    def loss(self, step: int) -> float:
        """Return the mean loss of a target token in step 1, 2, ..."""
        losses, targets = self.sums[step - 1].sum(1).tolist()
        return float(losses / targets)


def reference_steps(config: RunConfig, steps: Sequence[Sequence[DeviceBatch]]) -> StepsResult:
    """Take steps on this process alone; ``steps`` are the full global batches."""
    parameterization = Parameterization.of_run(config)
    model = build(config).to_empty(device="cpu")
    initialize(model, parameterization, config.run.seed)
    _unbalance([model])
    named = dict(model.named_parameters())
    frozen = [parameter for parameter in named.values() if not parameter.requires_grad]
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    optimizer = build_optimizer(
        named.items(),
        parameter_specs(model),
        parameterization,
        config.optimizer,
        seed=config.run.seed,
    )
    schedule = resolve_schedule(config, BatchPlan(config.batch, config.data.sequence_length))
    result = StepsResult([], [], [], {}, {}, {})
    loads = BalanceLoads.of(config)
    for step, batches in enumerate(steps, 1):
        optimizer.zero_grad()
        begin_step(model, sum(batch.tokens_BL.numel() for batch in batches))
        if model.mtp is not None:
            main = [(batch.targets_BL != IGNORE).sum() for batch in batches]
            ahead = [batch.targets_ahead(model.mtp.number) for batch in batches]
            targets_K = torch.cat([torch.stack(main).sum()[None], torch.stack(ahead).sum(0)])
            model.mtp.set_targets(targets_K)
        before = {layer: router.load.clone() for layer, router in routers(model).items()}
        if loads is not None and loads.loads == "this_batch":
            set_loads(model, _counted_visits(config, model, batches))
        _differentiate(frozen, True)  # here only the optimizer leaves frozen ones out
        result.sums.append(_accumulate(config, model, batches))
        _differentiate(frozen, False)
        result.grad_norm.append(_clip(list(trained.values()), config.training.clip_grad_norm))
        if step == 1:
            result.gradients.update((name, _whole(p.grad)) for name, p in trained.items())
        set_lr(optimizer, schedule.fraction(step))
        optimizer.step()
        if isinstance(config.model, MoEModel):
            result.routing.append(_end_step(config.model, model, before))
    result.parameters.update((name, _whole(p)) for name, p in named.items())
    result.routers.update(_router_state(model))
    return result


def _differentiate(parameters: Sequence[Tensor], wanted: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(wanted)
        parameter.grad = None


def _counted_visits(
    config: RunConfig, model: Transformer, batches: Sequence[DeviceBatch]
) -> dict[int, Tensor]:
    """Return the visits [E] to each layer's experts in the step's batch, from forward passes."""
    for batch in batches:
        if config.model.dropout:
            seed_dropout(config.run.seed, batch)
        model(batch.tokens_BL, batch.targets_BL, batch.documents)
    return {layer: seen.counts_E for layer, seen in model.take_statistics().items()}


def _accumulate(config: RunConfig, model: Transformer, batches: Sequence[DeviceBatch]) -> Tensor:
    """Add the gradients of a step's mean loss to the parameters'; return the sums by source."""
    sums_2S = torch.zeros(2, len(config.data.sources), dtype=torch.float64)
    targets = sum(int((batch.targets_BL != IGNORE).sum()) for batch in batches)
    for batch in batches:
        if config.model.dropout:
            seed_dropout(config.run.seed, batch)
        losses = model(batch.tokens_BL, batch.targets_BL, batch.documents)
        (losses.total / targets).backward()
        sources = batch.sources if batch.sources.dim() == 2 else batch.sources[:, None]
        for source in range(sums_2S.shape[1]):
            mine_BL = (sources == source) & (batch.targets_BL != IGNORE)
            sums_2S[0, source] += losses.nll_BL[mine_BL].double().sum()
            sums_2S[1, source] += mine_BL.sum()
    return sums_2S


def _clip(parameters: Sequence[Tensor], max_norm: float | None) -> Tensor:
    gradients = [p.grad for p in parameters if p.grad is not None]
    assert len(gradients) == len(parameters), "a parameter has no gradient"
    norm = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt()
    if max_norm is not None and norm > max_norm:
        for gradient in gradients:
            gradient *= float(max_norm / (norm + 1e-6))
    return norm


def _end_step(config: MoEModel, model: Transformer, before: Mapping[int, Tensor]) -> Tensor:
    """Update the routers by their statistics; return these in the form of ``Balancer.observed``.

    ``before``: the loads [E] of the previous step, by layer.
    """
    observed = model.take_statistics()
    end_step(model, {layer: seen.counts_E for layer, seen in observed.items()})
    rows = torch.zeros(config.num_blocks, 3 * config.experts.num_experts + 3, dtype=torch.float64)
    for layer, seen in observed.items():
        scalars = torch.stack([seen.entropy, seen.squared_log_z, seen.tokens])
        parts = (seen.counts_E, seen.probabilities_E, before[layer], scalars)
        rows[layer] = torch.cat([part.double() for part in parts])
    return rows


def layout_steps(
    config: RunConfig, mesh: Mesh, steps: Sequence[Sequence[DeviceBatch]]
) -> StepsResult:
    """Take the same steps with the trainer's code; ``steps`` are this rank's micro-batches."""
    plan = RunPlan.of(config, mesh.world_size)
    parallel = make_parallel(config, mesh)
    _unbalance(list(parallel.parts.values()))
    optimizer = make_optimizer(config, plan, parallel, mesh)
    schedule = resolve_schedule(config, plan.batch)
    train_step = make_train_step(config, plan, parallel, optimizer, schedule, mesh)
    result = StepsResult([], [], [], {}, {}, {})

    def keep_gradients(*_: object) -> None:
        trained = ((name, p) for name, p in parallel.named_parameters() if p.requires_grad)
        result.gradients.update((name, _whole(p.grad)) for name, p in trained)

    hook = optimizer.register_step_pre_hook(keep_gradients)
    for step, batches in enumerate(steps, 1):
        outcome = train_step(step, batches)
        hook.remove()
        result.sums.append(outcome.sums_2S.cpu())
        result.grad_norm.append(outcome.grad_norm.cpu())
        if outcome.routing is not None:
            result.routing.append(outcome.routing.cpu())
    result.parameters.update((name, _whole(p)) for name, p in parallel.named_parameters())
    for part in parallel.parts.values():
        result.routers.update(_router_state(part))
    return result


def build(config: RunConfig, part: Part | None = None) -> Transformer:
    """Return the model or a part of it on the meta device, in fp64 if the run computes in fp64."""
    with torch.device("meta"):
        parameterization = Parameterization.of_run(config)
        dtype = config.training.compute_dtype
        model = build_model(config.model, parameterization, dtype, part)
        use_precision(model, config.precision)
        return model.double() if dtype == "fp64" else model


def make_parallel(config: RunConfig, mesh: Mesh) -> Parallel:
    """Return this rank's part of the model, with its initial values."""
    layout = Layout.of(config, mesh.world_size)
    parallel = parallelize(lambda part: build(config, part), config, layout, mesh)
    parallel.materialize(mesh.device)
    parallel.initialize(Parameterization.of_run(config), config.run.seed)
    return parallel


def differences(got: StepsResult, wanted: StepsResult) -> dict[str, tuple[str, float]]:
    """Return (location, error) of the largest error of each kind, by the names of the fields.

    Tensors by name: max |got - wanted| / max |wanted|. Numbers by step: the largest
    got - wanted| / |wanted|. inf if not finite.
    """
    worst = {}
    for kind in ("sums", "grad_norm", "routing"):
        ours, theirs = getattr(got, kind), getattr(wanted, kind)
        assert len(ours) == len(theirs), (kind, len(ours), len(theirs))
        errors = [
            # Zeros must be exactly zero.
            (f"step {step}", _finite(float(((a - b).abs() / b.abs().clamp(min=1e-300)).max())))
            for step, (a, b) in enumerate(zip(ours, theirs, strict=True), 1)
        ]
        worst[kind] = max(errors, key=lambda pair: pair[1], default=("", 0.0))
    for kind in ("gradients", "parameters", "routers"):
        pairs = relative_errors(getattr(got, kind), getattr(wanted, kind))
        worst[kind] = max(pairs, key=lambda pair: pair[1], default=("", 0.0))
    return worst


def relative_errors(
    got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> Iterator[tuple[str, float]]:
    """Yield (name, max |got - wanted| / max |wanted|) for all in ``got``; inf if not finite."""
    for name, tensor in got.items():
        exact = wanted[name].double()
        error = float((tensor.double() - exact).abs().max())
        yield name, _finite(error / max(float(exact.abs().max()), 1e-300))


def _finite(error: float) -> float:
    # Comparisons with NaN are false, so max() could hide a NaN.
    return error if math.isfinite(error) else math.inf


def _unbalance(parts: Sequence[Transformer]) -> None:
    """Set the routers to the state after a step with uneven loads, where every term matters."""
    for part in parts:
        for layer, router in routers(part).items():
            uneven = torch.arange(1.0, router.num_experts + 1).roll(layer)
            router.load.copy_(uneven / uneven.sum())
            router.bias.copy_((uneven / uneven.sum() - 1 / router.num_experts) / 10)


def _router_state(part: Transformer) -> Iterator[tuple[str, Tensor]]:
    for layer, router in routers(part).items():
        yield f"{layer}.load", router.load.detach().cpu().clone()
        yield f"{layer}.bias", router.bias.detach().cpu().clone()


def _whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "a parameter has no gradient"
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().clone()
