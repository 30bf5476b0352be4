"""Evaluation scores of a run's checkpoints: the rows of its scores.jsonl.

A row is one metric of one task at one checkpoint: ``task``, ``metric``, ``filter`` (how answers
were parsed), ``value``, ``stderr`` (or null), ``n`` documents, ``chance`` (score of guessing, if
known), ``higher_is_better``, ``fewshot``, ``limit``; ``run``, ``step``, ``tokens``, ``flops``,
``N`` (parameters without embedding and head), ``loss`` (held out, of the mixture, at that step, or
null); ``accuracy`` and ``error`` = 1 - accuracy if the metric is a share of right answers;
``task_version``, ``task_hash`` (of the task's content), ``checkpoint`` (its hash), ``harness`` and
``time``. The file is therefore a table that ``allometry fit downstream_error`` reads directly.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from allometry.configs.errors import UserError
from allometry.laws.runs import read_lines

SCORES = "scores.jsonl"
_ASKED = ("task", "metric", "filter", "fewshot", "limit")
"""Keys in which two rows of one step are equal if the later row replaces the earlier one."""

Row = dict[str, Any]


def read_scores(folder: Path) -> list[Row]:
    """Return the rows of a folder's scores.jsonl by step, the last one of equal rows.

    Raises:
        UserError: a line is damaged.
    """
    rows = read_lines(folder / SCORES)
    for row in rows:
        if not isinstance(row.get("step"), int | None):
            raise UserError(f"{folder / SCORES} has a row whose step is no number; remove that row")
    kept = {json.dumps([row.get(key) for key in (*_ASKED, "step")]): row for row in rows}
    return sorted(kept.values(), key=lambda row: row.get("step") or 0)


def with_rows(text: str, rows: Iterable[Row]) -> str:
    """Return the text of scores.jsonl with ``rows`` appended, without a torn last line."""
    whole = text[: text.rfind("\n") + 1]
    return whole + "".join(json.dumps(row) + "\n" for row in rows)
