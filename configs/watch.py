"""The ``parallel.watch`` section."""

from __future__ import annotations

from pydantic import Field

from allometry.configs.base import Count, Section


class Watch(Section):
    """How long ranks may stay where they are; ``parallel.timeout_s`` is the limit of a step."""

    start_s: Count = Field(
        1800, gt=0, description="seconds that a rank may be at one thing before its first step"
    )
    first_step_s: Count = Field(
        1800,
        gt=0,
        description="the same in the first step and the first evaluation of a launch, and while "
        "code is compiled (timeout_s, if that is longer)",
    )
    checkpoint_s: Count = Field(
        3600,
        gt=0,
        description="seconds without a byte or an instruction in which a save or a load may stay: "
        "a slow one is not a hang",
    )
    straggler_percent: Count | None = Field(
        20,
        gt=0,
        description="a rank that computes so much longer than others with the same work is a "
        "straggler; null: none is looked for",
    )

    def patience_s(self, timeout_s: int) -> int:
        """Return when messages may give up by themselves: a minute after the longest limit."""
        return max(timeout_s, self.start_s, self.first_step_s, self.checkpoint_s) + 60
