"""One training step, computed on one process and on any layout, and how far the two are apart.

What is compared are gradients, before any optimizer could hide a wrong scale: Adam's first step
does not depend on it.
"""

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
from allometry.models.build import build_model
from allometry.models.init import initialize
from allometry.models.moe import begin_step, routers
from allometry.models.transformer import Part, Transformer
from allometry.parallel.apply import Parallel, materialize, parallelize
from allometry.parallel.execution import MicroBatch
from allometry.parallel.mesh import Mesh
from allometry.scaling.layout import Layout
from allometry.scaling.parameterization import Parameterization


@dataclass(frozen=True)
class StepResult:
    """What one step computed: the mean loss of a target token and whole gradients by name.

    On a layout each rank has the gradients of its pipeline stages, and rank 0 has the loss.
    ``visits``: to each expert, by layer, over the whole batch (empty without experts).
    """

    loss: float
    gradients: dict[str, Tensor]
    visits: dict[int, Tensor]


def build(config: RunConfig, part: Part | None = None) -> Transformer:
    """The model or a part of it on the meta device, in fp64 where the run computes in fp64."""
    with torch.device("meta"):
        parameterization = Parameterization.of_run(config)
        dtype = config.training.compute_dtype
        model = build_model(config.model, parameterization, dtype, part)
        return model.double() if dtype == "fp64" else model


def reference_step(config: RunConfig, batches: Sequence[MicroBatch]) -> StepResult:
    """Compute the step on this process alone, with no part of ``parallel/`` in the way."""
    model = build(config)
    materialize(model, torch.device("cpu"))
    initialize(model, Parameterization.of_run(config), config.run.seed)
    _unbalance(config, [model], batches)
    count = targets(batches)
    total = 0.0
    for batch in batches:
        losses = model(batch.tokens_BL, batch.targets_BL, batch.documents)
        (losses.total / count).backward()
        total += float(losses.nll_BL.double().sum())
    return StepResult(
        loss=total / count,
        gradients={name: _whole(p.grad) for name, p in model.named_parameters()},
        visits={n: seen.counts_E for n, seen in model.take_statistics().items()},
    )


def layout_step(
    config: RunConfig,
    mesh: Mesh,
    batches: Sequence[MicroBatch],
    mine: Sequence[MicroBatch] | None = None,
) -> StepResult:
    """Compute the same step on the ranks of ``mesh``; every rank passes the whole batch.

    ``mine``: this rank's micro-batches, where they are not every hdp-th of the batch.
    """
    parallel = make_parallel(config, mesh)
    parts = list(parallel.parts.values())
    _unbalance(config, parts, batches)
    if mine is None:
        mine = batches[mesh.hdp.rank :: mesh.hdp.size]
    count = targets(batches)
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)

    def observe(_: int, nll_BL: Tensor) -> None:
        nonlocal total
        total += nll_BL.double().sum()

    scale = torch.tensor(1.0 / count, dtype=torch.float64, device=mesh.device)
    parallel.execution.train(mine, scale, observe)
    for axis in ("hdp", "pp"):
        mesh.all_reduce_sum(total, axis)
    visits = {}
    for part in parts:
        for layer, seen in part.take_statistics().items():
            for axis in ("hdp", "tp"):
                mesh.all_reduce_sum(seen.counts_E, axis)
            visits[layer] = seen.counts_E
    gradients = {name: _whole(p.grad) for name, p in parallel.named_parameters()}
    return StepResult(float(total) / count, gradients, visits)


def make_parallel(config: RunConfig, mesh: Mesh) -> Parallel:
    """This rank's part of the model, with its initial values."""
    layout = Layout.of(config, mesh.world_size)
    parallel = parallelize(lambda part: build(config, part), config, layout, mesh)
    parallel.materialize(mesh.device)
    parallel.initialize(Parameterization.of_run(config), config.run.seed)
    return parallel


def relative_errors(
    got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> Iterator[tuple[str, float]]:
    """Yield (name, max |got - wanted| / max |wanted|) for all in ``got``; not finite: inf."""
    for name, gradient in got.items():
        exact = wanted[name].double()
        error = float((gradient.double() - exact).abs().max())
        error /= max(float(exact.abs().max()), 1e-300)
        # A NaN compares as nothing, so the largest of some errors would hide it.
        yield name, error if math.isfinite(error) else math.inf


def targets(batches: Sequence[MicroBatch]) -> int:
    """Number of tokens that the loss counts."""
    return sum(int((batch.targets_BL != IGNORE).sum()) for batch in batches)


def _unbalance(
    config: RunConfig, parts: Sequence[Transformer], batches: Sequence[MicroBatch]
) -> None:
    """Bring the routers into the state of a step with uneven loads, where every term counts."""
    if not isinstance(config.model, MoEModel):
        return
    tokens = sum(batch.tokens_BL.numel() for batch in batches)
    for part in parts:
        begin_step(part, tokens)
        for layer, router in routers(part).items():
            uneven = torch.arange(1.0, router.num_experts + 1).roll(layer)
            router.load.copy_(uneven / uneven.sum())
            router.bias.copy_((uneven / uneven.sum() - 1 / router.num_experts) / 10)


def _whole(gradient: Tensor | None) -> Tensor:
    assert gradient is not None, "a parameter has no gradient"
    whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return whole.detach().cpu()
