"""The ``training.bad_steps`` section: which updates are rejected, how many may be, going back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from allometry.configs.base import Count, Section

Steps = Annotated[Count, Field(gt=0)]
StepRange = Steps | tuple[Steps, Steps]
"""A step, or the first and the last of some."""


class Rewind(Section):
    """Going back to a checkpoint when spikes keep coming, and on with other batches."""

    after_spikes: Count = Field(
        gt=0, description="bad steps within the last ``window_steps`` at which the run goes back"
    )
    skip_batches: Count = Field(
        gt=0,
        description="batches after the checkpoint that are passed over; those up to the last bad "
        "step always are",
    )
    most: Count = Field(3, gt=0, description="times that a run goes back, in all")


class BadSteps(Section):
    """Steps whose update is skipped: a loss or gradient norm that is not finite, or a spike."""

    spikes: Literal["mad", "sigma"] | None = Field(
        "mad",
        description="what a spike is: loss or norm above the median by so many median absolute "
        "deviations (scaled to a normal distribution's standard deviation), or above the mean by "
        "so many standard deviations, of the window; null: only what is not finite is skipped",
    )
    deviations: float = Field(6.0, gt=0.0, description="how many of them")
    window_steps: Count = Field(
        128,
        ge=8,
        description="accepted steps that a step is compared with; until there are as many nothing "
        "is a spike. A stage begins a new window",
    )
    most_in_row: Count = Field(5, gt=0, description="bad steps in a row; one more ends the run")
    most_in_window: Count = Field(
        10, gt=0, description="bad steps within ``window_steps`` steps; one more ends the run"
    )
    rewind: Rewind | None = Field(
        None, description="go back to a checkpoint when spikes keep coming; null: never"
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
    """Return whether ``ranges`` name a step."""
    pairs = ((each, each) if isinstance(each, int) else each for each in ranges)
    return any(first <= step <= last for first, last in pairs)
