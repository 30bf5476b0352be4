"""Pins: checkpoints of a run that its retention keeps because other runs branch from them.

A pin is a small file in the trunk's ``pins/``, ``step-N.DIGEST.json``, that names the branch's
folder. It is valid while that folder contains a run (config.yaml) or its description (branch.yaml):
removing the branch releases the checkpoint. This module imports no heavy packages.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from allometry.configs.json_file import read_object
from allometry.trainer.state.folder import write_atomically

PINS, DESCRIBED = "pins", "branch.yaml"


@dataclass(frozen=True)
class Pin:
    """A branch in the folder ``by`` that begins at ``step`` of a run.

    ``missing`` is True if the parent folder of ``by`` does not exist, for example because its disk
    is not mounted; such a pin stays valid.
    """

    step: int
    by: Path
    missing: bool = False


def pin(trunk: Path, step: int, by: Path) -> None:
    """Make the run in ``trunk`` keep its checkpoint of ``step`` for the branch in ``by``.

    Raises:
        OSError: the trunk's folder cannot be written.
    """
    place = by.resolve()
    digest = hashlib.sha256(str(place).encode()).hexdigest()[:12]
    (trunk / PINS).mkdir(exist_ok=True)
    content = {"step": step, "by": str(place)}
    write_atomically(trunk / PINS / f"step-{step}.{digest}.json", json.dumps(content) + "\n")


def pins(trunk: Path) -> list[Pin]:
    """Return the valid pins of a run, by step; pins of removed branches are omitted."""
    found = []
    for path in sorted((trunk / PINS).glob("step-*.json")):
        try:
            said = read_object(path)
            step, by = int(said["step"]), Path(said["by"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            continue  # removed meanwhile, or no pin
        missing = not by.parent.is_dir()
        if missing or any((by / name).is_file() for name in ("config.yaml", DESCRIBED)):
            found.append(Pin(step, by, missing))
    return sorted(found, key=lambda one: (one.step, one.by))
