"""Sum the routers' statistics over the global batch and update the routers after a step."""

# E experts, N layers

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from allometry.configs.model import MoEModel
from allometry.models.moe import balance_record, begin_step, end_step, routers, set_loads
from allometry.models.router import RouterStatistics
from allometry.models.transformer import Transformer
from allometry.parallel.mesh import Mesh
from allometry.scaling.loads import Loads
from allometry.trainer.record.writer import Row


class Balancer:
    """Collects the statistics of this rank's routers and applies their sums over all ranks.

    The caller adds the statistics to a reduction that is sent anyway. ``parts`` are this rank's
    pipeline stages; all ranks take part, including ranks without routers. ``loads`` selects the
    expert loads of the auxiliary loss: ``step_before`` or ``this_batch``. ``this_batch`` loads are
    exact in every layout: before the first micro-batch with a gradient, all micro-batches run an
    additional forward pass through the blocks, which is about a third of a step's arithmetic (a
    quarter with activation recomputation). With dropout the additional pass uses the masks of the
    step, except on a rank with several pipeline stages.
    """

    def __init__(
        self,
        model: MoEModel,
        parts: Sequence[Transformer],
        mesh: Mesh,
        loads: Loads = "step_before",
    ) -> None:
        self._model = model
        self._parts = parts
        self._mesh = mesh
        self._loads = loads
        self._before: dict[int, Tensor] = {}

    def count_visits(self, run: Callable[[], None]) -> Tensor | None:
        """Return this rank's visits [N, E] of the step (float64), None with ``step_before`` loads.

        ``run`` sends the step's micro-batches through the blocks (see ``Execution``).
        """
        for part in self._parts:
            for layer, router in routers(part).items():
                self._before[layer] = router.load.clone()
        if self._loads != "this_batch":
            return None
        run()
        return self.observed()[:, : self._model.experts.num_experts].contiguous()

    def begin_step(self, tokens: int | Tensor, visits_NE: Tensor | None) -> None:
        """Pass the global batch's token count and visits (None: unknown) to the routers."""
        for part in self._parts:
            begin_step(part, tokens)
            if visits_NE is not None:
                set_loads(part, {layer: visits_NE[layer] for layer in routers(part)})

    def end_step(self, sums: Tensor, bad: Tensor | None = None) -> None:
        """Update the routers from ``sums``, the ``observed`` statistics summed over all ranks.

        If ``bad`` (0-dim) is 1, loads and biases are restored to their values before the step.
        """
        experts = self._model.experts.num_experts
        for part in self._parts:
            mine = routers(part)
            biases = {} if bad is None else {n: router.bias.clone() for n, router in mine.items()}
            end_step(part, {layer: sums[layer, :experts] for layer in mine})
            for layer, bias_E in biases.items():
                assert bad is not None
                router, skipped = mine[layer], bad.to(bias_E.device) != 0
                router.load.copy_(torch.where(skipped, self._before[layer], router.load))
                router.bias.copy_(torch.where(skipped, bias_E, router.bias))

    def observed(self) -> Tensor:
        """Return this rank's router statistics since the last call, [N, 3E + 3] in float64.

        Rows of dense layers and of layers on other ranks are zero. A row contains: token counts of
        the experts, sums of their probabilities, their loads in the step before (on one rank of
        each stage), sums of the entropy and of squared log Z, and the number of tokens.
        """
        experts = self._model.experts.num_experts
        sums = torch.zeros(
            self._model.num_blocks, 3 * experts + 3, dtype=torch.float64, device=self._mesh.device
        )
        one_of_its_stage = self._mesh.stage.rank == 0
        for part in self._parts:
            for layer, seen in part.take_statistics().items():
                sums[layer] += torch.cat(
                    [
                        seen.counts_E.double(),
                        seen.probabilities_E.double(),
                        self._before[layer].double() * one_of_its_stage,
                        torch.stack([seen.entropy, seen.squared_log_z, seen.tokens]).double(),
                    ]
                )
        return sums


def routing_rows(model: MoEModel, sums: Tensor) -> tuple[Row, Mapping[str, list[float]]]:
    """Return the metrics of ``sums`` (see ``Balancer``) as a row, and the loads of the experts.

    The row contains ``router/LAYER/...`` for each layer and the mean over layers as ``router/...``;
    loads are fractions, by layer. ``load_correlation`` is omitted for layers where it is undefined.
    """
    experts = model.experts.num_experts
    row: Row = {}
    loads: dict[str, list[float]] = {}
    values: dict[str, list[float]] = {}
    host = sums.cpu()
    for layer in filter(model.has_experts, range(model.num_blocks)):
        counts_E, probabilities_E, before_E, scalars = host[layer].split([experts] * 3 + [3])
        record = balance_record(RouterStatistics(counts_E, probabilities_E, *scalars), model)
        loads[str(layer)] = record.pop("load")
        record["load_correlation"] = load_correlation(before_E, counts_E)
        for name, value in record.items():
            if value is not None:
                row[f"router/{layer}/{name}"] = value
                values.setdefault(name, []).append(value)
    row |= {f"router/{name}": sum(some) / len(some) for name, some in values.items()}
    return row, loads


def load_correlation(before_E: Tensor, load_E: Tensor) -> float | None:
    """Return Pearson's correlation over experts of two loads, in any unit; None if one is uniform.

    If the correlation between consecutive steps is near 0 or below, the auxiliary loss with
    ``loads: step_before`` pushes tokens away from random experts, or towards overloaded ones. For
    example, loads [1, 2, 3] and [2, 4, 6] have correlation 1.
    """
    apart, load = (x_E.double() / x_E.double().mean() - 1.0 for x_E in (before_E, load_E))
    spread = float(apart.norm()), float(load.norm())
    if min(spread) < 1e-6 * math.sqrt(len(load_E)):  # rounding error of fp32
        return None
    return float(apart @ load) / (spread[0] * spread[1])
