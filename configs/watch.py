"""The ``parallel.watch`` section."""

from __future__ import annotations

from pydantic import Field

from allometry.configs.base import Count, Section


class Watch(Section):
    """Time limits of ranks outside of steps; ``parallel.timeout_s`` is the limit of a step."""

    start_s: Count = Field(
        1800, gt=0, description="maximum seconds in one activity of a rank before its first step"
    )
    first_step_s: Count = Field(
        1800,
        gt=0,
        description="maximum seconds in the first step and in the first evaluation of a launch, "
        "and during compilation (timeout_s if that is longer)",
    )
    checkpoint_s: Count = Field(
        3600,
        gt=0,
        description="maximum seconds of a save or load without progress (no byte written or read, "
        "no instruction executed); a slow save is not a hang",
    )
    straggler_percent: Count | None = Field(
        20,
        gt=0,
        description="a rank is a straggler if it computes longer than ranks with the same work by "
        "this percentage; null: stragglers are not detected",
    )

    def patience_s(self, timeout_s: int) -> int:
        """Return the timeout of process groups in seconds: one minute above the longest limit."""
        return max(timeout_s, self.start_s, self.first_step_s, self.checkpoint_s) + 60
