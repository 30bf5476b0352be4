"""Measure the rounding of FP8 optimizer states at the steps of the monitors.

The optimizer accumulates statistics while rounding (``optim/fp8_states.py``); this module sums them
over ranks, each state counted once in any layout. It does not change a bit of training.
"""

# R roles, K states, S sums

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from allometry.configs.execution import MonitorConfig
from allometry.optim.exchange import ShardedMatrixOps
from allometry.optim.fp8_states import KEYS, SEEN, Fp8States
from allometry.parallel.mesh import Mesh, local
from allometry.scaling.roles import Role
from allometry.trainer.record.alarms import Alarms, Findings
from allometry.trainer.record.callbacks import Callback, Reporter
from allometry.trainer.record.columns import FinishedStep
from allometry.trainer.record.timing import to_host
from allometry.trainer.record.writer import Row

MOST_UNDERFLOW_PERCENT = 1.0
"""Alarm limit in percent of values; the format covers a group's values up to 10^38 apart."""

_ROLES = tuple(role.value for role in Role)


class CompressedStates(Callback):
    """Measures at the configured steps, on every rank of a run with FP8 states."""

    def __init__(
        self,
        config: MonitorConfig,
        optimizer: torch.optim.Optimizer,
        fp8: Fp8States,
        mesh: Mesh,
        report: Reporter,
    ) -> None:
        self._every, self._fp8, self._mesh, self._report = config.every_steps, fp8, mesh, report
        self._ops = ShardedMatrixOps(mesh)
        self._role = {p: group["role"] for group in optimizer.param_groups for p in group["params"]}
        self._seen: dict[int, Tensor] = {}
        self._alarms = Alarms()

    def _due(self, step: int) -> bool:
        return self._every is not None and step % self._every == 0

    @override
    def before_step(self, step: int) -> None:
        self._fp8.watched = {} if self._due(step) else None

    @override
    def after_step(self, step: int) -> None:
        watched, self._fp8.watched = self._fp8.watched, None
        if watched is not None:
            self._seen[step] = to_host(self._mesh.all_reduce_sum(self._sums(watched), "pp"))

    def _sums(self, watched: Mapping[tuple[Tensor, str], Tensor]) -> Tensor:
        """Return sums over this stage, [R, K, S], with the number of elements last."""
        parameters: list[Tensor] = []
        partials: list[Tensor] = []
        for (parameter, _), sums_S in watched.items():
            part = local(parameter.detach())
            # All sums of a stack of matrices are stored with its first local matrix.
            partial_mS = sums_S.new_zeros(len(part) if part.dim() == 3 else 1, len(SEEN))
            partial_mS[:1] = sums_S
            parameters += [parameter] * len(SEEN)
            partials += partial_mS.unbind(1)
        totals = iter(self._ops.sums(parameters, partials))
        result = torch.zeros(len(_ROLES), len(KEYS), len(SEEN) + 1, dtype=torch.float64)
        result = result.to(self._mesh.device)
        for parameter, key in watched:
            of = result[_ROLES.index(self._role[parameter]), KEYS.index(key)]
            for place in range(len(SEEN)):
                of[place] += next(totals).sum().to(of.device)
            of[-1] += parameter.numel()
        return result

    @override
    def additions(self, finished: FinishedStep) -> Row:
        """Add the measurements, and report their alarms."""
        seen = self._seen.pop(finished.step, None)
        if seen is None:
            return {}
        row: Row = {}
        lost, bad = {}, {}
        for role, states in zip(_ROLES, seen.tolist(), strict=True):
            for key, sums in zip(KEYS, states, strict=True):
                of = dict(zip((*SEEN, "elements"), sums, strict=True))
                if not of["elements"]:
                    continue
                name, percent = f"{role}/{key}", 100.0 / of["elements"]
                error = math.sqrt(of["relative_squares"] / max(1.0, of["groups"]))
                row[f"monitors/state_error/{name}"] = error
                row[f"monitors/state_underflow_percent/{name}"] = percent * of["underflowed"]
                row[f"monitors/state_saturated_percent/{name}"] = percent * of["saturated"]
                lost[name] = percent * of["underflowed"]
                bad[name] = int(of["not_finite"])
        for kind, details in self._alarms.new(_findings(lost, bad)).items():
            self._report("alarm", step=finished.step, alarm=kind, **details)
        return row


def _findings(lost: Mapping[str, float], bad: Mapping[str, int]) -> Findings:
    found: dict[str, dict[str, Any]] = {}
    if much := {name: share for name, share in lost.items() if share > MOST_UNDERFLOW_PERCENT}:
        found["state_underflow"] = {"percent": much}
    if groups := {name: number for name, number in bad.items() if number}:
        found["state_not_finite"] = {"groups": groups}
    return found
