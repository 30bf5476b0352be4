"""One optimizer for all the update rules of a run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.optim import Optimizer

from allometry.optim.matrix_ops import LocalMatrixOps, MatrixOps
from allometry.optim.sphere import check_sphere
from allometry.optim.states import Group, State
from allometry.scaling.update_rules import UPDATE_RULES, UpdateRule

UpdateFunction = Callable[[Sequence[Group], State, MatrixOps], None]
"""Takes a step with all groups of a rule; ``state`` are the optimizer's tensors.

It makes the states that are missing, and at rate 0 changes nothing else.
"""


def update_function(rule: UpdateRule) -> UpdateFunction:
    """Return the function of a rule: that which is named as its module of ``optim/``."""
    function: UpdateFunction = getattr(_module(rule), rule.module or rule.name)
    return function


def _module(rule: UpdateRule) -> ModuleType:
    return importlib.import_module(f"{__package__}.{rule.module or rule.name}")


class RuleOptimizer(Optimizer):
    """Updates each parameter by the rule of its group, over whole parameters or shards of them.

    ``groups`` are those of ``groups.parameter_groups`` with a ``seed``; ``ops`` knows
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
            rule = UPDATE_RULES[group["rule"]]
            if rule.on_sphere:
                check_sphere(group)
            prepare = getattr(_module(rule), "prepare_group", None)
            if prepare is not None:
                prepare(group)
        super().__init__(groups, {})
        self._ops = LocalMatrixOps() if ops is None else ops

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients that are there; return what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, rule in UPDATE_RULES.items():
            groups = [group for group in self.param_groups if group["rule"] == name]
            if groups:
                update_function(rule)(groups, self.state, self._ops)
        return loss
