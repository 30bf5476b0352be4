"""Runs in which the last rank's batch is bad at some steps: its loss is multiplied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from unittest import mock

import torch
import torch.distributed as dist

from allometry.configs.run import RunConfig
from allometry.trainer.feed import DeviceBatch
from allometry.trainer.step import StepOutcome, TrainStep
from allometry.trainer.train import train


def launch_with_faults(
    config: RunConfig,
    faults: Mapping[int, float],
    stop_at_step: int | None = None,
    device: torch.device | None = None,
) -> None:
    """Run one rank; the last rank multiplies the losses of step s by ``faults[s]``."""
    call = TrainStep.__call__
    last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1

    def faulty(self: TrainStep, step: int, batches: Sequence[DeviceBatch]) -> StepOutcome:
        execution = self.parallel.execution
        plain, factor = execution.train, faults.get(step, 1.0) if last else 1.0
        with mock.patch.object(
            execution, "train", lambda batches, scale, *rest: plain(batches, scale * factor, *rest)
        ):
            return call(self, step, batches)

    with mock.patch.object(TrainStep, "__call__", faulty):
        train(
            config,
            device=device or torch.device("cpu"),
            callbacks=[],
            stop_at_step=stop_at_step,
        )
