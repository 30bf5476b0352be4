"""Which checkpoints of a run other runs refer to, so that its retention leaves them alone.

A pin is a small file in the trunk's ``pins/``, ``step-N.DIGEST.json``, that names the branch's
folder. It holds for as long as that folder is there, begun (config.yaml) or only described
(branch.yaml): whoever removes the branch lets go of the checkpoint. Loads nothing heavy.
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

    ``missing``: neither the branch nor the folder around it is there, as on a disk that is not
    mounted; such a pin holds.
    """

    step: int
    by: Path
    missing: bool = False


def pin(trunk: Path, step: int, by: Path) -> None:
    """Have the run in ``trunk`` keep its checkpoint of ``step`` for the branch in ``by``.

    Raises:
        OSError: the trunk's folder cannot be written.
    """
    place = by.resolve()
    digest = hashlib.sha256(str(place).encode()).hexdigest()[:12]
    (trunk / PINS).mkdir(exist_ok=True)
    content = {"step": step, "by": str(place)}
    write_atomically(trunk / PINS / f"step-{step}.{digest}.json", json.dumps(content) + "\n")


def pins(trunk: Path) -> list[Pin]:
    """Return the pins of a run that hold, by step; those of branches that are gone are not."""
    found = []
    for path in sorted((trunk / PINS).glob("step-*.json")):
        try:
            said = read_object(path)
            step, by = int(said["step"]), Path(said["by"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            continue  # removed meanwhile, or nobody's
        missing = not by.parent.is_dir()
        if missing or any((by / name).is_file() for name in ("config.yaml", DESCRIBED)):
            found.append(Pin(step, by, missing))
    return sorted(found, key=lambda one: (one.step, one.by))
