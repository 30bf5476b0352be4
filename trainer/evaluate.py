"""Loss on held-out tokens, one number for each source."""

from __future__ import annotations

import torch

from allometry.data.batch import IGNORE, Batch
from allometry.models.transformer import Transformer
from allometry.parallel.mesh import Mesh
from allometry.trainer.step import DeviceBatch, source_sums


class Evaluator:
    """Evaluates a model on each source's validation split, the micro-batches shared over ranks.

    ``validation`` maps a source's name to its micro-batches; all ranks hold the same.
    """

    def __init__(self, validation: dict[str, list[Batch]], mesh: Mesh) -> None:
        self._names = list(validation)
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

    @torch.no_grad()
    def __call__(self, model: Transformer) -> dict[str, float]:
        """Mean loss in nats per token, by source; same on all ranks."""
        if not self._names:
            return {}
        total = torch.zeros(2, len(self._names), dtype=torch.float64, device=self._mesh.device)
        training = model.training
        model.eval()
        for batch in self._mine:
            losses = model(batch.tokens_BL, batch.targets_BL, batch.documents)
            total += source_sums(losses.nll_BL, batch.targets_BL, batch.source_B, len(self._names))
        model.train(training)
        self._mesh.all_reduce_sum(total, "hdp")
        loss, count = total.tolist()
        return {name: loss[i] / count[i] for i, name in enumerate(self._names) if count[i]}
