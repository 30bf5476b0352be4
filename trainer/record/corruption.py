"""Respond to a detected computation or memory fault (``record.checks.on_failure``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from allometry.configs.errors import UserError
from allometry.trainer.record.callbacks import Reporter

Action = Literal["event", "stop", "refuse_saves"]


class Response:
    """Reports findings of the checks and applies ``action``, on every rank with the same calls.

    ``refusal``: why no more checkpoints are made; None while checkpoints are made.
    """

    def __init__(self, action: Action, report: Reporter) -> None:
        self._action, self._report = action, report
        self.refusal: str | None = None

    def found(self, kind: str, step: int, said: str, **details: Any) -> None:
        """Report an event of ``kind``; ``said`` describes it in words.

        Raises:
            UserError: the action is to stop the run.
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
    """Name ranks in words, such as "rank 3" or "ranks 1, 2"."""
    return f"rank{'s' if len(ranks) != 1 else ''} {', '.join(map(str, ranks))}"
