"""Forward and backward of a micro-batch as CUDA graphs: recorded once, then started as a whole.

What a step launches is some thousands of kernels; where they are small, the host that launches
them one by one is slower than the device. A graph holds their addresses, so it needs fixed shapes,
tensors that stay where they are, and nothing in it that waits or communicates.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import override

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.models.head import Losses
from allometry.models.router import RouterStatistics
from allometry.models.transformer import Transformer
from allometry.parallel.mesh import Mesh

_log = logging.getLogger(__name__)

EAGER_STEPS = 3
"""Before anything is recorded: compilers, libraries and allocators settle in the first ones."""


@dataclass(frozen=True)
class GraphChoice:
    """Whether a run records graphs, and if not, why."""

    used: bool
    reason: str | None


def choose_graphs(config: RunConfig, mesh: Mesh) -> GraphChoice:
    """Return what ``training.cuda_graphs`` means for this run on these ranks.

    Raises:
        UserError: it is on, and this run cannot.
    """
    asked = config.training.cuda_graphs
    if asked is False:
        return GraphChoice(False, "training.cuda_graphs is off")
    reason = next(_obstacles(config, mesh), None)
    if reason is not None and asked is True:
        raise UserError(
            f"training.cuda_graphs=on cannot be: {reason}; use training.cuda_graphs=auto, which "
            "records graphs where they can be, or off"
        )
    return GraphChoice(reason is None, reason)


def _obstacles(config: RunConfig, mesh: Mesh) -> Iterator[str]:
    if mesh.device.type != "cuda":
        yield f"the run is on {mesh.device.type}, which has none"
    if config.data.kind == "documents":
        yield "data.kind=documents has micro-batches of many shapes"
    elif config.data.packing == "per_document":
        yield (
            "data.packing=per_document has another number of documents in each micro-batch "
            "(data.packing=concatenated has not)"
        )
    for name in ("pp", "tp", "ep", "hdp"):
        size = getattr(mesh, name).size
        if size > 1:
            yield f"ranks communicate in forward or backward with {name}={size}"
    if config.parallel.zero.stage > 0:
        yield (
            f"parallel.zero.stage={config.parallel.zero.stage} gathers parameters in forward and "
            "backward"
        )
    if config.training.activation_offload > 0.0:
        yield (
            f"training.activation_offload={config.training.activation_offload} copies to the "
            "host's memory beside forward and backward"
        )
    if config.model.dropout > 0.0:
        yield f"model.dropout={config.model.dropout} is seeded anew for each micro-batch"


class Capture(Protocol):
    """Records what a function asks of the device."""

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Return what does the same again, with tensors where they were; nothing is done yet."""


class CudaCapture(Capture):
    """``torch.cuda.graph``; all graphs share their memory, so they run one after the other."""

    def __init__(self) -> None:
        self._pool: tuple[int, int] | None = None

    @override
    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads pin memory and write checkpoints meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            function()
        self._pool = self._pool or graph.pool()
        return graph.replay


class _Recorded(NamedTuple):
    """A graph and where its results are. They are overwritten when it runs again."""

    replay: Callable[[], None]
    nll_BL: Tensor
    statistics: dict[int, RouterStatistics]


class MicroBatchGraphs:
    """Runs micro-batches of one shape, without documents, from the fourth step on by two graphs.

    The first micro-batch of a step makes gradients, the others add to them: two graphs. Results
    and gradients have the bits that they have without. ``required``: say so if recording fails,
    rather than go on without.
    """

    def __init__(self, model: Transformer, capture: Capture, *, required: bool) -> None:
        self._model, self._capture, self._required = model, capture, required
        self._steps = 0
        self._inputs: tuple[Tensor, Tensor, Tensor] | None = None
        self._recorded: dict[bool, _Recorded] = {}
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        self.failure: str | None = None

    @property
    def recorded(self) -> int:
        """How many graphs there are."""
        return len(self._recorded)

    def begin_step(self) -> None:
        """Announce a step: what runs next is its first micro-batch."""
        self._steps += 1

    def run(self, tokens_BL: Tensor, targets_BL: Tensor, scale: Tensor, *, first: bool) -> Tensor:
        """Add the gradients of ``scale`` x the loss to ``.grad``; return nll [B, L].

        ``first``: no parameter has a gradient yet.
        """
        if self._steps <= EAGER_STEPS or self.failure is not None:
            return self._forward_backward(tokens_BL, targets_BL, scale)
        given = (tokens_BL, targets_BL, scale)
        if self._inputs is None:
            self._inputs = (tokens_BL.clone(), targets_BL.clone(), scale.clone())
        for here, new in zip(self._inputs, given, strict=True):
            assert here.shape == new.shape, ("micro-batches of one shape", here.shape, new.shape)
            here.copy_(new)
        if first not in self._recorded and not self._record(first):
            return self._forward_backward(*given)
        recorded = self._recorded[first]
        recorded.replay()
        if first:
            for parameter, gradient in self._gradients:
                parameter.grad = gradient
        for layer, seen in recorded.statistics.items():
            self._model.add_statistics(layer, RouterStatistics(*(x.clone() for x in seen)))
        return recorded.nll_BL.clone()

    def _forward_backward(self, tokens_BL: Tensor, targets_BL: Tensor, scale: Tensor) -> Tensor:
        losses = self._model(tokens_BL, targets_BL)
        assert isinstance(losses, Losses)
        (losses.total * scale.to(losses.total.dtype)).backward()
        return losses.nll_BL

    def _record(self, first: bool) -> bool:
        """Record the graph; False: it cannot be, and everything is as before."""
        assert self._inputs is not None
        inputs, results = self._inputs, []
        parameters = list(self._model.parameters())
        before = [parameter.grad for parameter in parameters]
        seen = self._model.take_statistics()
        try:
            replay = self._capture(lambda: results.append(self._forward_backward(*inputs)))
        except RuntimeError as error:
            self._model.take_statistics()
            self._give_up(error, parameters, before)
            return False
        finally:
            made = self._model.take_statistics()
            for layer, statistics in seen.items():
                self._model.add_statistics(layer, statistics)
        if first:
            self._gradients = [(p, p.grad) for p in parameters if p.grad is not None]
        self._recorded[first] = _Recorded(replay, results[0].detach(), made)
        return True

    def _give_up(
        self, error: RuntimeError, parameters: Sequence[nn.Parameter], before: Sequence[Tensor]
    ) -> None:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        if self._required:
            raise UserError(
                f"training.cuda_graphs=on: a micro-batch cannot be recorded ({reason}); use "
                "training.cuda_graphs=off"
            ) from error
        self.failure = reason
        _log.warning("training.cuda_graphs=auto: not recorded (%s); going on without", reason)
