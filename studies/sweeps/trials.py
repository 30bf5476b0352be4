"""File of trials that grows as trials end, so that an interrupted sweep can continue."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from allometry.configs import json_file
from allometry.configs.errors import UserError
from allometry.configs.model import ModelConfig, ParameterizationConfig
from allometry.configs.optimization import OptimizerConfig
from allometry.studies.sweeps.outcome import Trial
from allometry.studies.sweeps.transfer import SCHEDULE

_SECTIONS: dict[str, TypeAdapter[Any]] = {
    "model": TypeAdapter(ModelConfig),
    "parameterization": TypeAdapter(ParameterizationConfig),
    "optimizer": TypeAdapter(OptimizerConfig),
}


class TrialLog:
    """JSON lines: a sweep's settings, then ``size``, ``log2_lr``, ``seed``, ``loss`` of each trial.

    A loss that is not finite is null. An incomplete last line is dropped and overwritten. Settings
    that a file of an earlier version lacks have their defaults. Raises UserError: the file has
    trials of other settings, or other content, and is not changed; or it cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.known: dict[Trial, float] = {}
        head = json.dumps(dict(settings)) + "\n"
        try:
            lines = self._lines(head)
            if lines:
                self._check(lines[0], settings)
                self.known = dict(map(self._trial, lines[1:]))
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [json.dumps(row) + "\n" for row in lines] or [head]
            path.write_text("".join(kept), encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--trials={path} cannot be read and written ({error.strerror}); name another file"
            ) from None

    def add(self, trial: Trial, loss: float) -> None:
        """Write one trial; it is in the file when this returns."""
        self.known[trial] = loss
        row = {**asdict(trial), "loss": loss if math.isfinite(loss) else None}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _lines(self, head: str) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        try:
            *whole, torn = self.path.read_text(encoding="utf-8").split("\n")
            rows = [json_file.parse(line) for line in whole]
        except ValueError:  # also for text in another encoding
            raise self._another() from None
        begun = rows or head.startswith(torn)  # else not a first line that was cut off
        if not (begun and all(isinstance(row, dict) for row in rows)):
            raise self._another()
        return rows

    def _another(self) -> UserError:
        return UserError(f"{self.path} is no file of trials; name another")

    def _trial(self, row: Mapping[str, Any]) -> tuple[Trial, float]:
        try:
            loss = math.inf if row["loss"] is None else float(row["loss"])
            return Trial(int(row["size"]), float(row["log2_lr"]), int(row["seed"])), loss
        except (KeyError, TypeError, ValueError, OverflowError):
            raise self._another() from None

    def _check(self, head: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        plain = json.loads(json.dumps(dict(settings)))
        kept = _completed(head)
        different = sorted(key for key in plain if kept.get(key) != plain[key])
        if different:
            raise UserError(
                f"{self.path} holds trials of other settings ({', '.join(different)}); name "
                "another file or remove this one"
            )


def _completed(head: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with defaults for missing keys and missing keys of sections."""
    completed = {"schedule": SCHEDULE.model_dump(mode="json"), **head}
    for key, adapter in _SECTIONS.items():
        section = head.get(key)
        if not isinstance(section, dict):
            continue
        # A sweep's optimizer section has no rate; any number will do.
        given = {**section, "lr": 1.0} if key == "optimizer" else section
        try:
            full = adapter.validate_python(given).model_dump(mode="json")
        except ValidationError:  # another version with other keys: compared unchanged
            continue
        completed[key] = {k: v for k, v in full.items() if k in section or k not in given}
    return completed
