"""One optimizer for all the update rules of a run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.optim import Optimizer

from allometry.optim.matrix_ops import LocalMatrixOps, MatrixOps
from allometry.optim.sphere import check_sphere
from allometry.optim.states import Group, Item, State, items_of
from allometry.scaling.update_rules import UPDATE_RULES, UpdateRule

UpdateFunction = Callable[[Sequence[Item], State, MatrixOps], None]
"""Of all parameters of a rule; ``state`` are the optimizer's tensors, which it changes in place."""


def rule_module(rule: UpdateRule) -> ModuleType:
    """Return the module of ``optim/`` with a rule's functions.

    Named as the module is: what takes a step (``UpdateFunction``). It updates states at any rate,
    and at rate 0 no parameter. ``init_states`` (``UpdateFunction``): makes the states that are
    missing. ``prepare_group(group)``, if there is one: checks or completes a new group.
    """
    return importlib.import_module(f"{__package__}.{rule.module or rule.name}")


class RuleOptimizer(Optimizer):
    """Updates each parameter by the rule of its group, over whole parameters or shards of them.

    ``groups`` are those of ``groups.parameter_groups`` with a ``seed``; ``ops`` knows how they are
    sharded (``LocalMatrixOps`` if nothing is). Every rank of a stage must call ``step`` alike. A
    step at rate 0 updates states, not parameters.

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
            prepare = getattr(rule_module(rule), "prepare_group", None)
            if prepare is not None:
                prepare(group)
        super().__init__(groups, {})
        self._ops = LocalMatrixOps() if ops is None else ops

    @torch.no_grad()
    def init_states(self) -> None:
        """Make the states that are missing, as before a first step, for a checkpoint to fill.

        Every rank of a stage must call it alike.

        Raises:
            UserError: a matrix of zeros on a sphere.
        """
        for rule, items in self._by_rule():
            rule_module(rule).init_states(items, self.state, self._ops)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients that are there; return what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for rule, items in self._by_rule():
            # All ranks that hold parts of a matrix must take part, so none may be passed over.
            for item in items:
                if item.parameter.grad is None:
                    raise RuntimeError(f"parameter {item.name!r} has no gradient")
            module = rule_module(rule)
            module.init_states(items, self.state, self._ops)
            getattr(module, rule.module or rule.name)(items, self.state, self._ops)
        return loss

    def _by_rule(self) -> Iterator[tuple[UpdateRule, list[Item]]]:
        for name, rule in UPDATE_RULES.items():
            items = items_of(group for group in self.param_groups if group["rule"] == name)
            if items:
                yield rule, items
