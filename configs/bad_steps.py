"""The ``training.bad_steps`` section: rejected updates, their limits, and rewinds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from allometry.configs.base import Count, Section

Steps = Annotated[Count, Field(gt=0)]
StepRange = Steps | tuple[Steps, Steps]
"""One step, or the first and the last step of a range."""


class Rewind(Section):
    """Return to a checkpoint after repeated bad steps and continue with later batches."""

    after_spikes: Count = Field(
        gt=0,
        description="number of bad steps within the last ``window_steps`` steps that causes a "
        "rewind",
    )
    skip_batches: Count = Field(
        gt=0,
        description="number of batches to skip after the checkpoint; batches up to the last bad "
        "step are always skipped",
    )
    most: Count = Field(3, gt=0, description="maximum number of rewinds in the run")


class BadSteps(Section):
    """Skip updates whose loss or gradient norm is not finite or is a spike."""

    spikes: Literal["mad", "sigma"] | None = Field(
        "mad",
        description="test for spikes of the loss and the gradient norm. mad: above the window's "
        "median by ``deviations`` median absolute deviations, scaled to the standard deviation of "
        "a normal distribution; sigma: above the mean by ``deviations`` standard deviations; "
        "null: only values that are not finite are skipped",
    )
    deviations: float = Field(
        6.0,
        gt=0.0,
        description="threshold of a spike, in the units that ``spikes`` selects; lower it to skip "
        "more steps",
    )
    window_steps: Count = Field(
        128,
        ge=8,
        description="number of accepted steps that each step is compared with; no spike is "
        "detected before the window is full. The window is cleared at the start of a stage",
    )
    most_in_row: Count = Field(
        5, gt=0, description="maximum number of consecutive bad steps; one more ends the run"
    )
    most_in_window: Count = Field(
        10,
        gt=0,
        description="maximum number of bad steps within ``window_steps`` steps; one more ends the "
        "run",
    )
    rewind: Rewind | None = Field(
        None, description="rewind to a checkpoint after repeated bad steps; null: never rewind"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.most_in_window >= self.window_steps:
            raise ValueError(
                f"most_in_window={self.most_in_window} never ends a run with window_steps="
                f"{self.window_steps}; lower it"
            )
        if self.rewind is not None and self.rewind.after_spikes > self.most_in_window + 1:
            raise ValueError(
                f"rewind.after_spikes={self.rewind.after_spikes} never comes, as more than "
                f"most_in_window={self.most_in_window} bad steps end the run; lower it or raise "
                "most_in_window"
            )
        return self


def names_step(ranges: Iterable[StepRange], step: int) -> bool:
    """Return True if ``ranges`` contain ``step``; ``names_step([3, (5, 7)], 6)`` is True."""
    pairs = ((each, each) if isinstance(each, int) else each for each in ranges)
    return any(first <= step <= last for first, last in pairs)
