"""Running the micro-batches of a step: in turn on one stage; ``pipeline.py`` has the other way."""

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
    """What a model reads; all ranks of a pipeline and of a tensor group hold the same."""

    @property
    def tokens_BL(self) -> Tensor:
        """Token ids."""

    @property
    def targets_BL(self) -> Tensor:
        """The token to predict at each place, or IGNORE."""

    @property
    def documents(self) -> Documents | None:
        """Where documents begin and end."""


@contextmanager
def cast_weights(parts: Iterable[Transformer], sync: GradientSync) -> Iterator[None]:
    """Cast what is not sharded once, for all micro-batches that run inside."""
    with ExitStack() as stack:
        for part in parts if sync.whole else ():
            stack.enter_context(cast_once(part, part.compute_dtype))
        yield


Observe = Callable[[int, Tensor], None]
"""Called with the index of a micro-batch and its ``nll_BL`` wherever a rank has the loss."""


class Execution(Protocol):
    """Forward and backward over the micro-batches of a step.

    Every rank calls the same method, with as many micro-batches unless it was made for ``uneven``
    numbers of them.
    """

    def train(
        self,
        batches: Sequence[MicroBatch],
        scale: Tensor,
        observe: Observe,
        before: Callable[[int], None] | None = None,
    ) -> None:
        """Add up gradients of ``scale`` x the sum of all losses and reduce them.

        ``scale`` is 0-dim: one over the global number of targets. ``before(i)`` runs before the
        forward of micro-batch i. Afterwards each parameter's ``.grad`` is complete.
        """

    def evaluate(self, batches: Sequence[MicroBatch], observe: Observe) -> None:
        """Run forward passes only."""

    def count_visits(
        self, batches: Sequence[MicroBatch], before: Callable[[int], None] | None = None
    ) -> None:
        """Run the blocks alone, without gradients: what their routers see is added up.

        ``batches`` and ``before`` are those of the ``train`` that follows.
        """


class Accumulation(Execution):
    """The whole model on this rank (or its shards): one micro-batch after the other.

    With ``filling``, a micro-batch without targets, ranks may train on different numbers of
    micro-batches, none included, and wait for one another within them (rings). Gradients are then
    reduced once, after all of them. ``graphs``: what runs micro-batches instead of this class.
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
                self._model(batch.tokens_BL, None, batch.documents, blocks_only=True)

    def _losses(self, batch: MicroBatch) -> Losses:
        losses = self._model(batch.tokens_BL, batch.targets_BL, batch.documents)
        assert isinstance(losses, Losses)
        return losses
