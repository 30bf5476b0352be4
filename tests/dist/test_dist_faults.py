"""The certificate detects planted faults of the trainer, in the right quantity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from allometry.configs.run import RunConfig
from allometry.data.batch import IGNORE
from allometry.parallel.execution import Accumulation
from allometry.trainer.balance import Balancer
from allometry.trainer.feed import DeviceBatch
from test_dist_layouts import MOE, errors, run

RunRanks = Callable[..., list[Any]]


@contextmanager
def gradients_averaged_over_hdp() -> Iterator[None]:
    """Average gradients over ranks, as some data parallelism does, instead of summing them."""
    whole = Accumulation.train

    def train(self: Accumulation, batches: Any, scale: torch.Tensor, *more: Any) -> None:
        whole(self, batches, scale / dist.get_world_size(), *more)

    with patch.object(Accumulation, "train", train):
        yield


@contextmanager
def loads_not_summed_over_tp() -> Iterator[None]:
    """Balance with one tp rank's tokens only."""
    everywhere = Balancer.observed

    def observed(self: Balancer) -> torch.Tensor:
        return everywhere(self) * (self._mesh.tp.rank == 0)

    with patch.object(Balancer, "observed", observed):
        yield


@contextmanager
def targets_for_tokens() -> Iterator[None]:
    """Pass the number of targets to the routers instead of the number of tokens."""
    targets = property(lambda batch: int((batch.targets_BL != IGNORE).sum()))
    with patch.object(DeviceBatch, "num_tokens", targets):
        yield


FAULTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "gradients_averaged_over_hdp": gradients_averaged_over_hdp,
    "loads_not_summed_over_tp": loads_not_summed_over_tp,
    "targets_for_tokens": targets_for_tokens,
}


def errors_with(fault: str, config: RunConfig) -> dict[str, tuple[str, float]]:
    """(On each rank) errors of faulty steps against those of an intact process."""
    with FAULTS[fault]():
        return errors(MOE, config)


@pytest.mark.parametrize(
    ("fault", "settings", "seen"),
    [
        ("gradients_averaged_over_hdp", {}, {"grad_norm"}),
        ("loads_not_summed_over_tp", {"tp": 2}, {"routing", "routers", "parameters"}),
        ("targets_for_tokens", {}, {"grad_norm", "gradients", "parameters"}),
    ],
)
def test_a_fault_of_the_trainer_is_seen(
    run_ranks: RunRanks, fault: str, settings: dict[str, Any], seen: set[str]
) -> None:
    for worst in run_ranks(errors_with, 2, fault, run(MOE, "fp64", **settings)):
        failing = {kind for kind, (_, error) in worst.items() if error > 1e-4}
        assert seen <= failing, worst
