"""CUDA graphs of the forward and backward pass of a micro-batch: captured once, then replayed.

A step launches thousands of kernels. If the kernels are small, the host launches them more slowly
than the device runs them. A graph stores addresses, so it needs fixed shapes and fixed tensors, and
it must not contain synchronization or communication.
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
"""Eager steps before capture: compilers, libraries and allocators initialize in the first steps."""


@dataclass(frozen=True)
class GraphChoice:
    """Decision on CUDA graphs; ``reason`` explains why graphs are not used."""

    used: bool
    reason: str | None


def choose_graphs(config: RunConfig, mesh: Mesh) -> GraphChoice:
    """Resolve ``training.cuda_graphs`` for this run on these ranks.

    For example, ``auto`` on a CPU returns ``used=False`` with a reason.

    Raises:
        UserError: the value is on, and this run cannot use CUDA graphs.
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
    if config.model.multi_token is not None:
        yield "model.multi_token adds up its losses on the host's side of a micro-batch"
    if config.model.dropout > 0.0:
        yield f"model.dropout={config.model.dropout} is seeded anew for each micro-batch"


class Capture(Protocol):
    """Recorder of the device work of a function."""

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Capture ``function`` without running its kernels; return the replay function.

        Replay reads and writes the same tensors as the capture.
        """


class CudaCapture(Capture):
    """``torch.cuda.graph``; all graphs share a memory pool, so they run one after the other."""

    def __init__(self) -> None:
        self._pool: tuple[int, int] | None = None

    @override
    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may pin memory and write checkpoints during the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            function()
        self._pool = self._pool or graph.pool()
        return graph.replay


class _Recorded(NamedTuple):
    """A captured graph and its result tensors, which each replay overwrites."""

    replay: Callable[[], None]
    nll_BL: Tensor
    statistics: dict[int, RouterStatistics]


class MicroBatchGraphs:
    """CUDA graphs for micro-batches of one shape, used from the fourth step on.

    There are two graphs: the first micro-batch of a step creates gradients, the others accumulate.
    Documents are not supported. Losses and gradients are bit-identical to eager mode. ``required``:
    raise UserError if capture fails, instead of continuing in eager mode.
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
        """Number of captured graphs."""
        return len(self._recorded)

    def begin_step(self) -> None:
        """Start a step: the next ``run`` is the first micro-batch of the step."""
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
        """Capture the graph; on failure restore all state and return False."""
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
