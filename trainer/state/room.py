"""Which checkpoints a run makes and keeps, and whether its disk has room for them."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

from allometry.configs.checkpoints import CheckpointConfig
from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.scaling.inventory import inventory
from allometry.scaling.update_rules import state_bytes

_FP32 = 4
_HEADERS = 3 << 10  # of a parameter and its states in torch's files, at least (measured)
_log = logging.getLogger(__name__)


def due(config: CheckpointConfig, step: int) -> bool:
    """Whether a checkpoint is made at ``step``, though it is not the launch's last."""
    every = config.every_steps
    return step in config.keep_steps or (every is not None and step % every == 0)


def stays(config: CheckpointConfig, step: int) -> bool:
    """Whether the checkpoint of ``step`` is kept when newer ones are made."""
    every = config.keep_every_steps
    return step in config.keep_steps or (every is not None and step % every == 0)


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of a checkpoint: parameters and what the optimizer keeps of each, in any layout."""
    total, states = 0, config.parallel.zero.optimizer_states
    values = 1 if states is None or states.update == "exact" else 2
    for spec in inventory(config.model):
        size = math.prod(spec.shape)
        total += values * _FP32 * size + state_bytes(spec, spec.shape, config.optimizer) + _HEADERS
    return total


def free_bytes(path: Path) -> int | None:
    """Bytes that the file system of ``path`` has left; None where it does not say.

    A quota is not seen.
    """
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def megabytes(size: int) -> str:
    """A size as people read it."""
    return f"{size / 1e6:,.3g} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"


def check_room(folder: Path, config: RunConfig, there: int, step: int, total_steps: int) -> None:
    """See that the run, which stands at ``step`` with ``there`` checkpoints, can save.

    Warns where the next one fits, but not all that are to lie there at once. Raises UserError: not
    even that one fits.
    """
    needed, free = checkpoint_bytes(config), free_bytes(folder)
    if free is None:
        return
    if free < needed:
        raise UserError(
            f"run.folder={folder} has {megabytes(free)} free, and a checkpoint takes "
            f"{megabytes(needed)}; free space there or choose another run.folder"
        )
    wanted = config.checkpoint
    made = [s for s in range(step + 1, total_steps + 1) if due(wanted, s) or s == total_steps]
    kept = sum(stays(wanted, s) for s in made)
    # One more than are kept, while it is being written.
    count = len(made) if wanted.every_minutes is None else total_steps - step
    most = min(count, kept + max(1, wanted.keep_last + 1 - there))
    if free < most * needed:
        _log.warning(
            "run.folder=%s has %s free, and %d more checkpoints of %s are to lie there at once "
            "(checkpoint.keep_last=%d and one that is being written, and those that stay): without "
            "more space some will fail",
            *(folder, megabytes(free), most, megabytes(needed), wanted.keep_last),
        )
