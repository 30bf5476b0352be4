"""The ``checkpoint`` section."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from allometry.configs.base import Count, PathText, Section

Minutes = Annotated[float, Field(gt=0.0)] | Literal["auto"]
"""Minutes between saves, or ``auto``: from what a save costs and how often launches fail."""
MINUTES = (
    "minutes between them, on the main rank's clock; auto: what costs least, from the time that a "
    "save takes and the rate of failures"
)


class LocalCopies(Section):
    """Copies in the memory or on the disks of the nodes, for quick and frequent saves."""

    folder: PathText = Field(
        "/dev/shm",
        min_length=1,
        description="a folder of each node's own, that outlives a process: each rank makes one for "
        "its run there",
    )
    every_steps: Count | None = Field(None, gt=0, description="steps between copies")
    every_minutes: Minutes | None = Field(None, description=MINUTES)
    replicate: bool = Field(
        True, description="keep each rank's copy on the next node, too (on one node: the next rank)"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.every_steps is None and self.every_minutes is None:
            raise ValueError("says not when to copy; set every_steps or every_minutes")
        return self


class Upload(Section):
    """Where checkpoints are copied to when they are whole."""

    url: PathText = Field(
        min_length=1,
        description="the run's own folder in an object store, in the words of fsspec: s3://..., "
        "gs://..., file:///...",
    )
    keep_last: Count | None = Field(
        None, gt=0, description="newest uploads to keep; null: all stay"
    )


class CheckpointConfig(Section):
    """When to save and what to keep."""

    every_steps: Count | None = Field(
        None, gt=0, description="steps between checkpoints; null: only at the end"
    )
    every_minutes: Minutes | None = Field(None, description=MINUTES)
    keep_last: Count = Field(2, gt=0, description="newest checkpoints to keep")
    keep_every_steps: Count | None = Field(
        None, gt=0, description="also keep checkpoints whose step is a multiple of this"
    )
    keep_steps: tuple[Annotated[Count, Field(gt=0)], ...] = Field(
        (), description="also save at these steps, and keep them: other runs may branch there"
    )
    asynchronous: bool = Field(True, description="write while training goes on")
    local: LocalCopies | None = Field(
        None, description="more frequent copies on the nodes themselves; null: none"
    )
    upload: Upload | None = Field(None, description="copies in an object store; null: none")
