"""Prepare a run's folder for a launch, after its checkpoint has been loaded."""

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
    """Prepare the folder for a launch whose checkpoint is loaded; every rank calls this.

    Later checkpoints are renamed, later rows removed, and ``config`` is stored. Raises UserError on
    all ranks if the folder cannot be written.
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
        saved = path if start.offer is None else start.saved  # ``latest`` never names local copies
        if saved is not None:
            write_atomically(folder.latest, saved.name + "\n")
        abandoned = checkpoint.abandon_after(folder, start.step)
        dropped = folder.forget_after(start.step)
        forget_after(folder, start.step)
        start = replace(start, abandoned=abandoned, dropped_rows=dropped)
    total = schedules_of(config)[-1].total_steps
    if start.step < total:  # otherwise the launch changes no file of the folder
        write_atomically(folder.config, dump(config))
    return start
