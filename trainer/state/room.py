"""Determine the checkpoints that a run saves and keeps, and check the free disk space."""

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
_HEADERS = 3 << 10  # minimum per parameter and its states in torch's files (measured)
_log = logging.getLogger(__name__)


def due(config: CheckpointConfig, step: int) -> bool:
    """Return True if the config requests a checkpoint at ``step``, apart from the launch's last.

    For example, ``every_steps: 100`` requests checkpoints at steps 100, 200 and so on.
    """
    every = config.every_steps
    return step in config.keep_steps or (every is not None and step % every == 0)


def stays(config: CheckpointConfig, step: int) -> bool:
    """Return True if the checkpoint of ``step`` is kept when newer ones are saved.

    For example, ``keep_every_steps: 1000`` keeps the checkpoints of steps 1000, 2000 and so on.
    """
    every = config.keep_every_steps
    return step in config.keep_steps or (every is not None and step % every == 0)


def checkpoint_bytes(config: RunConfig) -> int:
    """Return the bytes of a checkpoint (parameters and optimizer states), in any layout."""
    total, states = 0, config.parallel.zero.optimizer_states
    values = 1 if states is None or states.update == "exact" else 2
    for spec in inventory(config.model):
        size = math.prod(spec.shape)
        total += values * _FP32 * size + state_bytes(spec, spec.shape, config.optimizer) + _HEADERS
    return total


def free_bytes(path: Path) -> int | None:
    """Return the free bytes of the file system of ``path``; None if unknown.

    Quotas are not taken into account.
    """
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def megabytes(size: int) -> str:
    """Format a size, such as "12.5 MB" or "3.2 GB"."""
    return f"{size / 1e6:,.3g} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"


def check_room(folder: Path, config: RunConfig, there: int, step: int, total_steps: int) -> None:
    """Check that a run at ``step`` with ``there`` checkpoints has disk space for its saves.

    Logs a warning if the next checkpoint fits but not all that will exist at the same time. Raises
    UserError if the next checkpoint does not fit.
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
    # The checkpoint being written needs space in addition to the kept ones.
    count = len(made) if wanted.every_minutes is None else total_steps - step
    most = min(count, kept + max(1, wanted.keep_last + 1 - there))
    if free < most * needed:
        _log.warning(
            "run.folder=%s has %s free, and %d more checkpoints of %s are to lie there at once "
            "(checkpoint.keep_last=%d and one that is being written, and those that stay): without "
            "more space some will fail",
            *(folder, megabytes(free), most, megabytes(needed), wanted.keep_last),
        )
