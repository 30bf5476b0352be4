"""Run the micro-batches of a step on one stage, in turn; ``pipeline.py`` runs several stages."""

# B sequences of a micro-batch, L tokens in a sequence

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from allometry.models.documents import Documents
from allometry.models.head import Losses
from allometry.models.products import cast_once
from allometry.models.transformer import Transformer
from allometry.parallel.graphs import MicroBatchGraphs
from allometry.parallel.reduce import GradientSync


class MicroBatch(Protocol):
    """Model inputs, the same on all ranks of a pipeline and of a tensor-parallel group."""

    @property
    def tokens_BL(self) -> Tensor:
        """Token ids."""

    @property
    def targets_BL(self) -> Tensor:
        """Target token id at each position, or IGNORE."""

    @property
    def documents(self) -> Documents | None:
        """Boundaries of the packed documents; None if sequences are not packed."""

    @property
    def ahead_MBL(self) -> Tensor | None:
        """Tokens ahead for multi-token prediction; None if they follow from the targets."""


@contextmanager
def cast_weights(parts: Iterable[Transformer], sync: GradientSync) -> Iterator[None]:
    """Cast replicated weights to the compute type once for all micro-batches in this context."""
    with ExitStack() as stack:
        for part in parts if sync.whole else ():
            stack.enter_context(cast_once(part, part.compute_dtype))
        yield


Observe = Callable[[int, Tensor], None]
"""Callback with a micro-batch's index and ``nll_BL``, on ranks that compute the loss."""


class Execution(Protocol):
    """Forward and backward passes over the micro-batches of a step.

    Every rank calls the same method with the same number of micro-batches, unless the execution was
    built for ``uneven`` numbers.
    """

    def train(
        self,
        batches: Sequence[MicroBatch],
        scale: Tensor,
        observe: Observe,
        before: Callable[[int], None] | None = None,
    ) -> None:
        """Accumulate gradients of ``scale`` x (sum of all losses) and reduce the gradients.

        ``scale`` is 0-dim: one over the global number of targets. ``before(i)`` runs before the
        forward pass of micro-batch i. Afterwards the ``.grad`` of each parameter is complete.
        """

    def evaluate(self, batches: Sequence[MicroBatch], observe: Observe) -> None:
        """Run forward passes only."""

    def count_visits(
        self, batches: Sequence[MicroBatch], before: Callable[[int], None] | None = None
    ) -> None:
        """Run only the blocks, without gradients, to accumulate the router statistics.

        ``batches`` and ``before`` are the arguments of the ``train`` call that follows.
        """


class Accumulation(Execution):
    """Execution of all layers on this rank, one micro-batch after the other.

    With ``filling``, a micro-batch without targets, ranks may train on different numbers of
    micro-batches (including zero) and wait for each other inside micro-batches (rings); gradients
    are then reduced once, after all micro-batches. ``graphs`` runs micro-batches as CUDA graphs.
    """

    def __init__(
        self,
        model: Transformer,
        sync: GradientSync,
        filling: MicroBatch | None = None,
        graphs: MicroBatchGraphs | None = None,
    ) -> None:
        self._model = model
        self._graphs = graphs
        self._sync = sync
        self._filling = filling

    @override
    def train(
        self,
        batches: Sequence[MicroBatch],
        scale: Tensor,
        observe: Observe,
        before: Callable[[int], None] | None = None,
    ) -> None:
        with cast_weights([self._model], self._sync):
            self._train(batches, scale, observe, before)

    def _train(
        self,
        batches: Sequence[MicroBatch],
        scale: Tensor,
        observe: Observe,
        before: Callable[[int], None] | None,
    ) -> None:
        uneven = self._filling is not None
        closing = self._sync.begin_uneven() if uneven else False
        if self._graphs is not None:
            self._graphs.begin_step()
        for index, batch in enumerate(batches):
            if not uneven:
                self._sync.micro_batch(last=index == len(batches) - 1)
            if before is not None:
                before(index)
            if self._graphs is not None:
                inputs = batch.tokens_BL, batch.targets_BL, scale
                observe(index, self._graphs.run(*inputs, first=index == 0))
                continue
            losses = self._losses(batch)
            self._sync.backward(losses.total * scale.to(losses.total.dtype))
            observe(index, losses.nll_BL)
        if closing and self._filling is not None:
            self._sync.micro_batch(last=True)
            self._sync.backward(self._losses(self._filling).total)
        self._sync.finish()

    @override
    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch], observe: Observe) -> None:
        with cast_weights([self._model], self._sync):
            for index, batch in enumerate(batches):
                observe(index, self._losses(batch).nll_BL)

    @torch.no_grad()
    def count_visits(
        self, batches: Sequence[MicroBatch], before: Callable[[int], None] | None = None
    ) -> None:
        """See ``Execution``."""
        gathered = self._sync.gathered() if self._filling is not None else nullcontext()
        with gathered, cast_weights([self._model], self._sync):
            for index, batch in enumerate(batches):
                if before is not None:
                    before(index)
                inputs = batch.tokens_BL, batch.targets_BL, batch.documents
                self._model(*inputs, ahead_MBL=batch.ahead_MBL, blocks_only=True)

    def _losses(self, batch: MicroBatch) -> Losses:
        inputs = batch.tokens_BL, batch.targets_BL, batch.documents
        losses = self._model(*inputs, ahead_MBL=batch.ahead_MBL)
        assert isinstance(losses, Losses)
        return losses
