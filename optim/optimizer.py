"""One optimizer for all update rules of a run."""

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
"""Update of all parameters of a rule; the optimizer's ``state`` is changed in place."""


def rule_module(rule: UpdateRule) -> ModuleType:
    """Return the module of ``optim/`` with the functions of a rule.

    The function with the module's name runs a step (``UpdateFunction``): it updates states at any
    learning rate, and parameters unless the rate is 0. ``init_states`` (``UpdateFunction``) creates
    missing states. ``prepare_group(group)`` (optional) checks or completes a new group. For
    example, ``rule_module(UPDATE_RULES["muon"])`` is ``optim/muon.py``.
    """
    return importlib.import_module(f"{__package__}.{rule.module or rule.name}")


class RuleOptimizer(Optimizer):
    """Optimizer that updates each parameter by the rule of its group, with or without sharding.

    ``groups`` are the groups of ``groups.parameter_groups`` with a ``seed``; ``ops`` defines the
    sharding (``LocalMatrixOps`` without sharding). Every rank of a stage must call ``step``. A step
    at learning rate 0 updates states but not parameters.

    States are tensors in ``state[parameter]``: sharded like the parameter, or [M] for its M logical
    matrices and equal on all ranks, or, with the index of a logical matrix in the name, on its
    owner only (``MatrixOps.owned``).

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
        """Create missing states without a step, to be filled by a checkpoint.

        Every rank of a stage must call this method.

        Raises:
            UserError: a matrix of zeros on a sphere.
        """
        for rule, items in self._by_rule():
            rule_module(rule).init_states(items, self.state, self._ops)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run one step with the current gradients; return the result of ``closure``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for rule, items in self._by_rule():
            # All ranks with parts of a matrix must participate, so no parameter may be skipped.
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
