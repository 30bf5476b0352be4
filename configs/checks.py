"""The ``record.checks`` and ``record.cards`` sections: data corruption and GPU sensors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from allometry.configs.base import Count, Section


class ChecksConfig(Section):
    """Checks for silent corruption of computations and of memory."""

    replicas_every_steps: Count | None = Field(
        1000,
        gt=0,
        description="steps between bitwise comparisons of replicated tensors (parameters, buffers, "
        "optimizer states) across ranks; each checkpoint also compares them; null: never",
    )
    twice_every_steps: Count | None = Field(
        None,
        gt=0,
        description="steps between steps whose gradients are computed twice more, in the same "
        "order, and compared bitwise; requires training.deterministic; null: never",
    )
    self_test: bool = Field(
        True, description="check matrix products with known sums on each rank before the first step"
    )
    on_failure: Literal["event", "stop", "refuse_saves"] = Field(
        "event",
        description="reaction to a failed check. event: record an event; stop: also end the run "
        "without another checkpoint; refuse_saves: record an event and continue without further "
        "checkpoints",
    )


class CardsConfig(Section):
    """NVML readings of each rank's GPU (``pip install nvidia-ml-py``): ``cards/`` columns."""

    every_steps: Count | None = Field(
        100,
        gt=0,
        description="steps between readings of temperature, clock and ECC errors; null: never",
    )
    slow_percent: Annotated[float, Field(gt=0.0, lt=100.0)] = Field(
        10.0, description="alarm if a GPU's clock is this percentage below the median of all GPUs"
    )
