"""The ``checkpoint`` section."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from allometry.configs.base import Count, PathText, Section

Minutes = Annotated[float, Field(gt=0.0)] | Literal["auto"]
"""Minutes between saves; ``auto`` computes them from the cost of a save and the failure rate."""
MINUTES = (
    "minutes between saves on the main rank's clock; null: no saves by time; auto: the interval of "
    "least cost, from the duration of a save and the rate of failures"
)


class LocalCopies(Section):
    """Copies of checkpoints in the memory or on the disks of the nodes, for frequent saves."""

    folder: PathText = Field(
        "/dev/shm",
        min_length=1,
        description="folder that each node has of its own and that outlives a process; each rank "
        "creates a subfolder for the run",
    )
    every_steps: Count | None = Field(
        None, gt=0, description="steps between local copies; null: save by every_minutes alone"
    )
    every_minutes: Minutes | None = Field(None, description=MINUTES)
    replicate: bool = Field(
        True,
        description="store each rank's copy on the next node as well (on one node: by the next "
        "rank)",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.every_steps is None and self.every_minutes is None:
            raise ValueError("says not when to copy; set every_steps or every_minutes")
        return self


class Upload(Section):
    """Object store to which complete checkpoints are copied."""

    url: PathText = Field(
        min_length=1,
        description="URL of the run's own folder in an object store, as fsspec reads it: s3://..., "
        "gs://..., file:///...",
    )
    keep_last: Count | None = Field(
        None, gt=0, description="number of newest uploads to keep; null: keep all uploads"
    )


class CheckpointConfig(Section):
    """When checkpoints are saved, and which are kept."""

    every_steps: Count | None = Field(
        None,
        gt=0,
        description="steps between checkpoints; null: save only at the end, or as every_minutes "
        "and keep_steps request",
    )
    every_minutes: Minutes | None = Field(None, description=MINUTES)
    keep_last: Count = Field(2, gt=0, description="number of newest checkpoints to keep")
    keep_every_steps: Count | None = Field(
        None,
        gt=0,
        description="also keep checkpoints whose step is a multiple of this number; null: no "
        "further ones",
    )
    keep_steps: tuple[Annotated[Count, Field(gt=0)], ...] = Field(
        (),
        description="steps at which to save and keep a checkpoint in addition; other runs may "
        "branch from these",
    )
    asynchronous: bool = Field(
        True,
        description="write checkpoints while training continues; false: training waits for each "
        "write",
    )
    local: LocalCopies | None = Field(
        None, description="more frequent copies on the nodes; null: no local copies"
    )
    upload: Upload | None = Field(None, description="copies in an object store; null: no uploads")
