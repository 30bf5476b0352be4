"""``optimizer.overrides``: what some parameters get instead of what their role gets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from allometry.configs.base import Section

OverrideRole = Literal["input", "hidden", "output", "vector", "router", "expert_up", "expert_down"]


def _listed(value: Any) -> Any:
    """Let one value stand where a list of them is meant."""
    return value if value is None or isinstance(value, (list, tuple)) else [value]


class ParameterOverride(Section):
    """Which parameters, and what they get; criteria are joined by AND, none names all parameters.

    Of several entries the last one that names a parameter decides all it gets, as in a .gitignore.
    """

    roles: Annotated[tuple[OverrideRole, ...] | None, BeforeValidator(_listed)] = Field(
        None, min_length=1, description="roles of the parameters (docs/parameterization.md)"
    )
    layers: Annotated[tuple[int | str, ...] | None, BeforeValidator(_listed)] = Field(
        None, min_length=1, description='layers from 0: 3, "0-3" (both ends in), or a list of these'
    )
    names: Annotated[tuple[str, ...] | None, BeforeValidator(_listed)] = Field(
        None,
        min_length=1,
        description='full names or patterns of them, * for anything: "*.wq.weight", or a list',
    )
    freeze: bool | None = Field(
        None,
        description="true: not trained, and its bits never change; false: trained although an "
        "earlier entry freezes it",
    )
    lr_multiplier: float | None = Field(
        None, gt=0.0, description="multiplies the learning rate, peak and schedule"
    )
    weight_decay_multiplier: float | None = Field(
        None, ge=0.0, description="multiplies the weight decay; a step takes lr x decay of a weight"
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
        """The keys of the multipliers that are given."""
        names = ("lr_multiplier", "weight_decay_multiplier")
        return tuple(name for name in names if getattr(self, name) is not None)

    def layer_ranges(self) -> Iterator[range]:
        """Yield the layers of each item of ``layers``, in order.

        Raises:
            ValueError: an item is neither a number nor two of them with a dash.
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
    """What every optimizer says of single parameters."""

    overrides: tuple[ParameterOverride, ...] = Field(
        (),
        description="freezing, and multipliers of rate and decay, by role, layer or name "
        "(docs/parameterization.md)",
    )
