"""One optimizer for all the update rules of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from allometry.optim.adamh import adamh
from allometry.optim.adamw import adamw
from allometry.optim.apollo import apollo, check_rank
from allometry.optim.matrix_ops import LocalMatrixOps, MatrixOps
from allometry.optim.muon import muon
from allometry.optim.muonh import muonh
from allometry.optim.sgd_sai import sgd_sai
from allometry.optim.sphere import check_sphere
from allometry.optim.states import Group, State
from allometry.scaling.roles import Rule

UpdateRule = Callable[[Sequence[Group], State, MatrixOps], None]
"""Takes a step with all groups of a rule; ``state`` are the optimizer's tensors.

It makes the states that are missing, and at rate 0 changes nothing else.
"""

RULES: Mapping[Rule, UpdateRule] = {
    Rule.MUON: muon,
    Rule.MUONH: muonh,
    Rule.ADAMH: adamh,
    Rule.SGD_SAI: sgd_sai,
    Rule.APOLLO: apollo,
    Rule.APOLLO_MINI: apollo,
    Rule.ADAMW: adamw,
}

_CHECKS: Mapping[Rule, Callable[[Group], None]] = {
    Rule.MUONH: check_sphere,
    Rule.ADAMH: check_sphere,
    Rule.APOLLO: check_rank,
}


class RuleOptimizer(Optimizer):
    """Updates each parameter by the rule of its group, over whole parameters or shards of them.

    ``groups`` are those of ``groups.parameter_groups`` (of APOLLO with a ``seed``); ``ops`` knows
    how parameters are sharded (``LocalMatrixOps`` if nothing is). Every rank of a stage must call
    ``step`` alike. A step in which every rate is 0 makes the states that are missing, which a
    checkpoint may then fill, and changes nothing else.

    States are tensors in ``state[parameter]``: laid out as the parameter, or [M] for its M logical
    matrices and equal on all ranks, or, named by the number of a logical matrix, on its owner alone
    (``MatrixOps.owned``).

    Raises:
        UserError: weight decay on a sphere; a projection larger than a matrix.
    """

    def __init__(self, groups: Sequence[Group], ops: MatrixOps | None = None) -> None:
        for group in groups:
            check = _CHECKS.get(Rule(group["rule"]))
            if check is not None:
                check(group)
            if group["rule"] == Rule.ADAMW:
                group["fused"] = True  # load_state_dict then leaves ``step`` on the device
        super().__init__(groups, {})
        self._ops = LocalMatrixOps() if ops is None else ops

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients that are there; return what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for rule, update in RULES.items():
            groups = [group for group in self.param_groups if group["rule"] == rule]
            if groups:
                update(groups, self.state, self._ops)
        return loss
