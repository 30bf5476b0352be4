"""The routers' part of a step: what they saw over the whole batch, and what they learn from it."""

# E experts, N layers

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from allometry.configs.model import MoEModel
from allometry.models.moe import balance_record, begin_step, end_step
from allometry.models.router import RouterStatistics
from allometry.models.transformer import Transformer
from allometry.parallel.mesh import Mesh
from allometry.trainer.record.writer import Row


class Balancer:
    """Sums the routers' observations over ranks and hands the sums back to them.

    ``parts`` are this rank's stages of the model; all ranks take part, whether they hold routers
    or not.
    """

    def __init__(self, model: MoEModel, parts: Sequence[Transformer], mesh: Mesh) -> None:
        self._model = model
        self._parts = parts
        self._mesh = mesh

    def begin_step(self, tokens: int | Tensor) -> None:
        """Announce the number of tokens in the step's global batch."""
        for part in self._parts:
            begin_step(part, tokens)

    def end_step(self) -> Tensor:
        """Return what all routers observed, [N, 2E + 3] in float64, after telling the routers.

        Dense layers have zeros. A row: counts of the experts, sums of their probabilities, of
        entropy, of squared log Z, and the number of tokens.
        """
        experts = self._model.experts.num_experts
        sums = torch.zeros(
            self._model.num_layers, 2 * experts + 3, dtype=torch.float64, device=self._mesh.device
        )
        for part in self._parts:
            for layer, seen in part.take_statistics().items():
                sums[layer] += _pack(seen)
        for axis in ("hdp", "tp", "pp"):
            self._mesh.all_reduce_sum(sums, axis)
        for part in self._parts:
            mine = [int(layer) for layer in part.blocks if self._model.has_experts(int(layer))]
            end_step(part, {layer: sums[layer, :experts] for layer in mine})
        return sums


def _pack(seen: RouterStatistics) -> Tensor:
    parts = (
        seen.counts_E,
        seen.probabilities_E,
        seen.entropy.view(1),
        seen.squared_log_z.view(1),
        seen.tokens.view(1),
    )
    return torch.cat([part.double() for part in parts])


def routing_rows(model: MoEModel, sums: Tensor) -> tuple[Row, Mapping[str, list[float]]]:
    """Return what a row of metrics says of ``sums`` (see ``Balancer``), and the experts' loads.

    The row has each layer's ``router/LAYER/...`` and the mean over layers as ``router/...``; loads
    are fractions by layer.
    """
    experts = model.experts.num_experts
    row: Row = {}
    loads: dict[str, list[float]] = {}
    layers = [layer for layer in range(model.num_layers) if model.has_experts(layer)]
    host = sums.cpu()
    for layer in layers:
        line = host[layer]
        seen = RouterStatistics(
            counts_E=line[:experts],
            probabilities_E=line[experts : 2 * experts],
            entropy=line[-3],
            squared_log_z=line[-2],
            tokens=line[-1],
        )
        found = balance_record(seen, model)
        loads[str(layer)] = found.pop("load")
        for name, value in found.items():
            row[f"router/{layer}/{name}"] = value
            row[f"router/{name}"] = row.get(f"router/{name}", 0.0) + value / len(layers)
    return row, loads
