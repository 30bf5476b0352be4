"""``optimizer.overrides``: settings of selected parameters in place of those of their role."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from allometry.configs.base import Section

OverrideRole = Literal["input", "hidden", "output", "vector", "router", "expert_up", "expert_down"]


def _listed(value: Any) -> Any:
    """Wrap a single value into a list."""
    return value if value is None or isinstance(value, (list, tuple)) else [value]


class ParameterOverride(Section):
    """Settings of the parameters that match all given criteria; without criteria, of all.

    If several entries match a parameter, only the last one applies, as in a .gitignore.
    """

    roles: Annotated[tuple[OverrideRole, ...] | None, BeforeValidator(_listed)] = Field(
        None,
        min_length=1,
        description="roles of the parameters (docs/parameterization.md); null: all roles",
    )
    layers: Annotated[tuple[int | str, ...] | None, BeforeValidator(_listed)] = Field(
        None,
        min_length=1,
        description='layers, counted from 0: 3, "0-3" (inclusive), or a list of these; null: all '
        "parameters",
    )
    names: Annotated[tuple[str, ...] | None, BeforeValidator(_listed)] = Field(
        None,
        min_length=1,
        description='full names or patterns with * as wildcard: "*.wq.weight", or a list; null: '
        "all names",
    )
    freeze: bool | None = Field(
        None,
        description="true: the parameters are not trained and keep their exact bits; false or "
        "null: they are trained, although an earlier entry freezes them",
    )
    lr_multiplier: float | None = Field(
        None, gt=0.0, description="factor of the learning rate, in all steps; null: 1"
    )
    weight_decay_multiplier: float | None = Field(
        None,
        ge=0.0,
        description="factor of the weight decay; a step decays a weight by lr x decay; null: 1",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        multiplied = self.multipliers_given
        if self.freeze is None and not multiplied:
            raise ValueError(
                "the entry says nothing of its parameters; give freeze, lr_multiplier or "
                "weight_decay_multiplier"
            )
        if self.freeze and multiplied:
            raise ValueError(
                f"freeze=true and {multiplied[0]} contradict one another: a frozen parameter is "
                "not updated at any rate; leave one of them out"
            )
        list(self.layer_ranges())
        return self

    @property
    def multipliers_given(self) -> tuple[str, ...]:
        """Names of the multipliers that are set."""
        names = ("lr_multiplier", "weight_decay_multiplier")
        return tuple(name for name in names if getattr(self, name) is not None)

    def layer_ranges(self) -> Iterator[range]:
        """Yield the layers of each item of ``layers``, in order.

        Raises:
            ValueError: an item is neither a number nor two numbers with a dash.
        """
        for item in self.layers or ():
            found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(item))
            first, last = (found[1], found[2] or found[1]) if found else (1, 0)
            if int(last) < int(first):
                raise ValueError(
                    f'layers={item!r} is neither a layer, counted from 0, nor a range "first-last" '
                    "with both ends in it"
                )
            yield range(int(first), int(last) + 1)


class HasOverrides(Section):
    """Base class of optimizers: settings of selected parameters."""

    overrides: tuple[ParameterOverride, ...] = Field(
        (),
        description="freezing, and factors of learning rate and weight decay, by role, layer or "
        "name (docs/parameterization.md); the last entry that matches a parameter applies",
    )
