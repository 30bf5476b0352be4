"""One step and one evaluation against plain references, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from allometry.configs.optimization import ConstantSchedule
from allometry.configs.run import RunConfig
from allometry.data.batch import IGNORE, Batch
from allometry.data.stream import Stream
from allometry.models.head import Losses
from allometry.models.transformer import Transformer
from allometry.optim.schedule import Schedule
from allometry.parallel.apply import Parallel, parallelize
from allometry.parallel.mesh import Mesh, open_mesh
from allometry.scaling.plan import RunPlan
from allometry.trainer.assemble import build_part, make_optimizer
from allometry.trainer.evaluate import Evaluator, HeldOut
from allometry.trainer.feed import DeviceBatch
from allometry.trainer.step import TrainStep

Make = Callable[..., RunConfig]
CPU = torch.device("cpu")
LR, SEQUENCES = 0.5, 8
KEPT = (1, 30, 2, 17, 0, 32, 5, 3)
"""Number of targets to keep in each sequence."""


@pytest.fixture
def mesh(tiny: Make) -> Iterator[Mesh]:
    with open_mesh(tiny().parallel, CPU) as opened:
        yield opened


def made(config: RunConfig, mesh: Mesh) -> Parallel:
    """Return the model of a run in float64."""
    plan = RunPlan.of(config, 1)
    parallel = parallelize(
        lambda part: build_part(config, plan, part).double(), config, plan.layout, mesh
    )
    parallel.materialize(CPU)
    parallel.initialize(plan.parameterization, config.run.seed)
    return parallel


def micro_batches(config: RunConfig, count: int) -> list[DeviceBatch]:
    """Return the same eight sequences in ``count`` micro-batches, with uneven target counts."""
    assert config.data.kind == "sequences"
    whole = Stream(config.data, config.run.seed).batch(0, SEQUENCES)
    for row, kept in enumerate(KEPT):
        whole.targets_BL[row, kept:] = IGNORE
    size = SEQUENCES // count
    parts: list[Batch] = [whole.rows(at, at + size) for at in range(0, SEQUENCES, size)]
    return [DeviceBatch.of(part, CPU, size * index) for index, part in enumerate(parts)]


def plain_gradients(model: Transformer, batches: list[DeviceBatch], mean: str) -> dict[str, Tensor]:
    """Return gradients of the mean over all targets, or of the mean of micro-batch means."""
    sums, counts = [], []
    for batch in batches:
        losses = model(batch.tokens_BL, batch.targets_BL, batch.documents)
        assert isinstance(losses, Losses)
        sums.append(losses.total)
        counts.append(int((batch.targets_BL != IGNORE).sum()))
    if mean == "targets":
        loss = torch.stack(sums).sum() / sum(counts)
    else:
        loss = torch.stack([s / c for s, c in zip(sums, counts, strict=True)]).mean()
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_an_update_is_that_of_the_mean_over_all_targets(tiny: Make, mesh: Mesh, count: int) -> None:
    """Plain gradient descent without clipping: a wrong scale of the loss changes the update."""
    config = tiny("training.compute_dtype=fp64")
    parallel, batches = made(config, mesh), micro_batches(config, count)
    model = parallel.parts[0]
    wanted = plain_gradients(model, micro_batches(config, 1), "targets")
    wrong = plain_gradients(model, batches, "micro-batches") if count in (2, 4) else None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = make_optimizer(config, RunPlan.of(config, 1), parallel, mesh).param_groups
    kept = [{key: g[key] for key in ("params", "name", "peak_lr")} for g in groups]
    step = TrainStep(
        parallel,
        torch.optim.SGD([{**g, "peak_lr": LR} for g in kept], lr=LR),
        Schedule(ConstantSchedule(), 10, 0),
        mesh,
        peak_lr=LR,
        sources=2,
        clip_grad_norm=None,
        dropout_seed=None,
    )
    outcome = step(1, batches)
    updates = {n: (before[n] - p.detach()) / LR for n, p in model.named_parameters()}
    assert max(error(updates[name], wanted[name]) for name in wanted) < 1e-9
    if wrong is not None:
        assert max(error(updates[name], wrong[name]) for name in wanted) > 1e-2
    norm = torch.stack([g.square().sum() for g in wanted.values()]).sum().sqrt()
    assert float(outcome.grad_norm) == pytest.approx(float(norm), rel=1e-9)
    targets = sum(int((batch.targets_BL != IGNORE).sum()) for batch in batches)
    assert outcome.sums_2S[1].sum() == targets < sum(KEPT), "documents end within sequences"
    assert outcome.tokens == SEQUENCES * config.data.sequence_length
    assert outcome.squared_lengths == sum(batch.squared_lengths for batch in batches)


def error(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def test_evaluation_drops_nothing_and_training_does_afterwards(tiny: Make, mesh: Mesh) -> None:
    def losses(*settings: str) -> list[dict[str, float]]:
        config = tiny("training.compute_dtype=fp64", *settings)
        parallel, batches = made(config, mesh), micro_batches(config, 2)
        evaluate = Evaluator(HeldOut(("up", "down"), batches), parallel, mesh)
        parallel.parts[0].train()
        results = [evaluate(), evaluate()]
        assert parallel.parts[0].training
        assert (drawn(parallel, batches) == drawn(parallel, batches)) == (not settings)
        return results

    def drawn(parallel: Parallel, batches: Any) -> float:
        return float(parallel.parts[0](batches[0].tokens_BL, batches[0].targets_BL).total.detach())

    with_dropout, without = losses("model.dropout=0.5"), losses()
    assert with_dropout[0] == with_dropout[1] == without[0]
