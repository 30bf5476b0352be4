"""Checks for silent corruption, and what is read of the cards: in the ``record`` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from allometry.configs.base import Count, Section


class ChecksConfig(Section):
    """What a machine that computes or remembers wrongly is found by."""

    replicas_every_steps: Count | None = Field(
        1000,
        gt=0,
        description="steps between comparisons of what several ranks hold alike (parameters, "
        "buffers, optimizer states), bit by bit; at each checkpoint, too; null: never",
    )
    twice_every_steps: Count | None = Field(
        None,
        gt=0,
        description="steps between steps whose gradients are computed twice more, in the same "
        "order, and compared bit by bit; null: never",
    )
    self_test: bool = Field(
        True, description="before the first step each rank checks matrix products of known sums"
    )
    on_failure: Literal["event", "stop", "refuse_saves"] = Field(
        "event",
        description="event: say so; stop: and end the run without another checkpoint; "
        "refuse_saves: and go on without another checkpoint",
    )


class CardsConfig(Section):
    """What NVML says of each rank's GPU (``pip install nvidia-ml-py``): ``cards/`` in rows."""

    every_steps: Count | None = Field(
        100, gt=0, description="steps between looks at temperature, clock, ECC errors; null: never"
    )
    slow_percent: Annotated[float, Field(gt=0.0, lt=100.0)] = Field(
        10.0, description="alarm where a card's clock is so far below the median of all cards"
    )
