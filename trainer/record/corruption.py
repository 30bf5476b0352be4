"""What is done where a machine computed or remembered wrongly (``record.checks.on_failure``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from allometry.configs.errors import UserError
from allometry.trainer.record.callbacks import Reporter

Action = Literal["event", "stop", "refuse_saves"]


class Response:
    """Reports what checks find and acts as ``action`` says; every rank has one and is told alike.

    ``refusal``: why no more checkpoint is made, None as long as they are.
    """

    def __init__(self, action: Action, report: Reporter) -> None:
        self._action, self._report = action, report
        self.refusal: str | None = None

    def found(self, kind: str, step: int, said: str, **details: Any) -> None:
        """Report an event of ``kind``; ``said`` is it in words.

        Raises:
            UserError: the run is to stop.
        """
        self._report(kind, step=step, said=said, **details)
        if self._action == "stop":
            raise UserError(
                f"step {step}: {said}; no checkpoint was made of it: take that machine out and run "
                "again, which goes on from the last one (record.checks.on_failure)"
            )
        if self._action == "refuse_saves":
            self.refusal = self.refusal or f"since step {step} {said}"


def names_of(ranks: Sequence[int]) -> str:
    """Ranks in words."""
    return f"rank{'s' if len(ranks) != 1 else ''} {', '.join(map(str, ranks))}"
