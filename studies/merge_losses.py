"""Held-out losses of merges of the last checkpoints of a run, and of branches with a decay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.configs.execution import ParallelConfig
from allometry.configs.loader import load
from allometry.configs.run import RunConfig
from allometry.data.documents import DocumentStream
from allometry.interop.huggingface.weights import CheckpointWeights
from allometry.parallel.apply import Parallel
from allometry.parallel.mesh import Mesh, open_mesh
from allometry.scaling.plan import RunPlan
from allometry.scaling.stages import place_of
from allometry.studies.merge import Merge, Window, open_window
from allometry.trainer.assemble import make_model
from allometry.trainer.evaluate import Evaluator, held_out_of
from allometry.trainer.feed import DocumentPlanner
from allometry.trainer.sources import open_sources
from allometry.trainer.state.checkpoint import step_of


@dataclass(frozen=True)
class Loss:
    """Held-out loss in nats per token: of each source, and averaged by shares of the mixture.

    ``number`` checkpoints of steps ``first`` to ``last`` are merged; 1: the last checkpoint itself.
    """

    number: int
    first: int
    last: int
    sources: dict[str, float]
    mixture: float


@dataclass(frozen=True)
class BranchLoss:
    """Loss of a decayed branch of the merged run; the branch leaves its trunk at step ``first``."""

    run: str
    first: int
    last: int
    sources: dict[str, float]
    mixture: float


class HeldOutLoss:
    """Losses of given weights on the held-out tokens of a run, on one process.

    The tokens are those of ``evaluation.sequences_per_source``; the computation is in the run's
    dtype.
    """

    def __init__(self, config: RunConfig, whole: RunConfig, number: int, mesh: Mesh) -> None:
        plan = RunPlan.of(config, 1)
        stream = open_sources(whole).in_stage(number - 1)
        planner = None
        if isinstance(stream, DocumentStream):
            planner = DocumentPlanner(config, plan.layout)
        self._parallel: Parallel = make_model(config, plan, mesh)
        held_out = held_out_of(config, stream, planner, mesh)
        if not held_out.names:
            raise UserError(
                f"{config.run.folder} has no held-out tokens to measure losses on; give its "
                "sources a validation prefix (data.sources), or leave --forecast out"
            )
        self._evaluate = Evaluator(held_out, self._parallel, mesh)
        shares = stream.mixture.shares(0)
        self._shares = {name: shares[name] for name in held_out.names if shares[name]}

    def __call__(self, read: Callable[[str], Tensor], there: Sequence[str]) -> dict[str, float]:
        """Return the loss of each source with weights from ``read(name)``."""
        with torch.no_grad():
            for name, parameter in self._parallel.named_parameters():
                parameter.copy_(read(name))
            for name, buffer in self._parallel.named_buffers():
                if name in there:
                    buffer.copy_(read(name))
        return self._evaluate()

    def mixture(self, losses: dict[str, float]) -> float:
        """Return the mean of the losses, weighted by the shares of the sources in training."""
        shares = self._shares or dict.fromkeys(losses, 1.0)
        return sum(share * losses[name] for name, share in shares.items()) / sum(shares.values())


@contextmanager
def held_out_loss(window: Window, device: torch.device | None = None) -> Iterator[HeldOutLoss]:
    """Open the data and the model of a window's run, for any layout of the run.

    ``device`` None: the GPU, or the CPU without a GPU. For example,
    ``with held_out_loss(window) as loss: ...``. Raises UserError if the run has no held-out tokens.
    """
    whole = load(window.folder.config, recorded=True)
    alone = ParallelConfig(context=window.config.parallel.context)
    config = window.config.model_copy(update={"parallel": alone})
    number = place_of(whole, window.steps[-1]).number
    with open_mesh(alone, device) as mesh:
        yield HeldOutLoss(config, whole, number, mesh)


def merged_losses(
    loss: HeldOutLoss, window: Window, decay: str, numbers: Sequence[int]
) -> Iterator[Loss]:
    """Yield the losses of the last checkpoint, and of merges of the last n, n in ``numbers``."""
    last = window.steps[-1]
    weights = CheckpointWeights(window.paths[-1])
    found = loss(weights.read, list(weights.shapes))
    yield Loss(1, last, last, found, loss.mixture(found))
    for number in numbers:
        part = window.last(number)
        merge = Merge(part, decay)
        found = loss(merge.read, list(merge.shapes))
        yield Loss(number, part.steps[0], last, found, loss.mixture(found))


def branch_loss(loss: HeldOutLoss, window: Window, branch: str | Path) -> BranchLoss:
    """Return the loss of a branch's last checkpoint on the same tokens.

    Raises:
        UserError: ``branch`` is not a branch of the window's run, or has another model.
    """
    there = open_window(branch, 1)
    parent = there.config.run.parent
    if parent is None or Path(parent.folder).resolve() != window.folder.path.resolve():
        raise UserError(
            f"--against={branch}: it does not branch from {window.folder.path} (run.parent); name "
            "a branch of that run"
        )
    weights = CheckpointWeights(there.paths[-1])
    own = CheckpointWeights(window.paths[-1])
    if weights.shapes != own.shapes:
        raise UserError(
            f"--against={branch}: its model is another one than that of {window.folder.path}"
        )
    found = loss(weights.read, list(weights.shapes))
    return BranchLoss(
        str(branch), parent.step, step_of(there.paths[-1]), found, loss.mixture(found)
    )
