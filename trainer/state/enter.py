"""Bringing a run's folder to where a launch begins, once what it begins with is loaded."""

from __future__ import annotations

from dataclasses import replace

from allometry.configs.loader import dump
from allometry.configs.run import RunConfig
from allometry.data.run_tokenizer import RunTokenizer
from allometry.optim.schedule import schedules_of
from allometry.parallel.agree import from_main_rank
from allometry.parallel.mesh import Mesh
from allometry.trainer.state import checkpoint
from allometry.trainer.state.branch import keep, settle
from allometry.trainer.state.folder import RunFolder, write_atomically
from allometry.trainer.state.resume import Start, written
from allometry.trainer.state.rewinds import forget_after


def enter(folder: RunFolder, config: RunConfig, start: Start, mesh: Mesh) -> Start:
    """Bring the folder to where a launch begins, whose checkpoint was loaded; every rank calls it.

    Later checkpoints, and rows, go aside; ``config`` is kept. Raises UserError on all ranks where
    the folder cannot be written.
    """
    return from_main_rank(
        mesh,
        lambda: written(folder, lambda: _enter(folder, config, start)),
        "preparing the run's folder",
    )


def _enter(folder: RunFolder, config: RunConfig, start: Start) -> Start:
    path, parent = start.checkpoint, config.run.parent
    if start.new:
        if path is not None:
            path = keep(folder, parent, path) if parent is not None else settle(folder, path, 0)
        RunTokenizer(start.tokenizer).keep(folder.path)
        start = replace(start, checkpoint=path)
    else:
        saved = path if start.offer is None else start.saved  # local copies are nobody's latest
        if saved is not None:
            write_atomically(folder.latest, saved.name + "\n")
        abandoned = checkpoint.abandon_after(folder, start.step)
        dropped = folder.forget_after(start.step)
        forget_after(folder, start.step)
        start = replace(start, abandoned=abandoned, dropped_rows=dropped)
    total = schedules_of(config)[-1].total_steps
    if start.step < total:  # else the launch changes nothing that the folder says
        write_atomically(folder.config, dump(config))
    return start
