"""Loss on held-out tokens, one number for each source."""

from __future__ import annotations

import torch
from torch import Tensor

from allometry.data.batch import IGNORE, Batch
from allometry.parallel.apply import Parallel
from allometry.parallel.mesh import Mesh
from allometry.trainer.step import DeviceBatch, source_sums


class Evaluator:
    """Evaluates the model on each source's validation split, the micro-batches shared over ranks.

    ``validation`` maps a source's name to its micro-batches; all ranks hold the same.
    """

    def __init__(self, validation: dict[str, list[Batch]], parallel: Parallel, mesh: Mesh) -> None:
        self._names = list(validation)
        self._parallel = parallel
        self._mesh = mesh
        self._mine: list[DeviceBatch] = []
        for index, batches in enumerate(validation.values()):
            rounds = -(-len(batches) // mesh.hdp.size)
            for turn in range(rounds):
                place = turn * mesh.hdp.size + mesh.hdp.rank
                idle = place >= len(batches)
                # Sharded parameters are gathered by all ranks together: a rank without a
                # micro-batch runs one that counts nothing.
                batch = batches[0] if idle else batches[place]
                held = DeviceBatch.of(batch, mesh.device, position=place)
                if idle:
                    held.targets_BL.fill_(IGNORE)
                held.source_B.fill_(index)
                self._mine.append(held)

    @property
    def sources(self) -> list[str]:
        """Names of the sources that have held-out tokens."""
        return self._names

    def __call__(self) -> dict[str, float]:
        """Mean loss in nats per token, by source; same on all ranks."""
        if not self._names:
            return {}
        total = torch.zeros(2, len(self._names), dtype=torch.float64, device=self._mesh.device)

        def observe(index: int, nll_BL: Tensor) -> None:
            batch = self._mine[index]
            nonlocal total
            total += source_sums(nll_BL, batch.targets_BL, batch.source_B, len(self._names))

        parts = self._parallel.parts.values()
        training = [part.training for part in parts]
        for part in parts:
            part.eval()
        self._parallel.execution.evaluate(self._mine, observe)
        for part, mode in zip(parts, training, strict=True):
            part.train(mode)
        self._mesh.all_reduce_sum(total, "hdp")
        self._mesh.all_reduce_sum(total, "pp")
        loss, count = total.tolist()
        return {name: loss[i] / count[i] for i, name in enumerate(self._names) if count[i]}
