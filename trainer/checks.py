"""Build the checks for silent data corruption that a run requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from allometry.configs.run import RunConfig
from allometry.models.build import torch_dtype
from allometry.optim.deepspeed import DeepSpeedOptimizer
from allometry.parallel.apply import Parallel
from allometry.parallel.mesh import Mesh
from allometry.trainer.feed import DeviceBatch, StepInput
from allometry.trainer.record.callbacks import Callback, Reporter
from allometry.trainer.record.cards import CardRows, open_card
from allometry.trainer.record.corruption import Response
from allometry.trainer.record.replicas import Replicas, held_alike
from allometry.trainer.record.timing import StepTimer
from allometry.trainer.record.twice import ComputedTwice, ProductTest
from allometry.trainer.step import TrainStep


class Current:
    """Iterates over step inputs and keeps the micro-batches of the current step."""

    def __init__(self) -> None:
        self.batches: Sequence[DeviceBatch] = ()

    def passing(self, inputs: Iterator[StepInput]) -> Iterator[StepInput]:
        """Yield ``inputs`` and record the micro-batches of each."""
        for given in inputs:
            self.batches = given.batches
            yield given


def checks(
    config: RunConfig,
    parallel: Parallel,
    optimizer: torch.optim.Optimizer,
    train_step: TrainStep,
    current: Current,
    mesh: Mesh,
    timer: StepTimer,
    report: Reporter,
    saving: Callable[[int], bool],
    *,
    first: bool,
) -> tuple[list[Callback], Response]:
    """Return each rank's callbacks, which must run before the saver, and the failure response.

    ``saving`` returns True if a checkpoint follows a step; ``first`` is True in the first training
    stage of a launch, where the self-test runs.
    """
    wanted, cards = config.record.checks, config.record.cards
    response = Response(wanted.on_failure, report)
    found: list[Callback] = []
    if wanted.self_test and first:
        found.append(ProductTest(torch_dtype(config.training.compute_dtype), mesh, response))
    if wanted.twice_every_steps is not None:
        compute = partial(_computed, train_step, current)
        found.append(ComputedTwice(wanted.twice_every_steps, parallel, compute, mesh, response))
    engine_keeps_them = isinstance(optimizer, DeepSpeedOptimizer)
    if wanted.replicas_every_steps is not None and mesh.world_size > 1 and not engine_keeps_them:
        held = partial(held_alike, parallel, optimizer, mesh)
        every = wanted.replicas_every_steps
        found.append(Replicas(every, held, saving, mesh, timer, response))
    if cards.every_steps is not None and mesh.device.type == "cuda":
        found.append(CardRows(cards, partial(open_card, mesh.device), mesh, report))
    return found, response


def _computed(train_step: TrainStep, current: Current) -> torch.Tensor:
    return train_step.compute(current.batches)
