"""Training in this process, as the only rank or as one of torchrun: ``allometry train``."""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module

from allometry.configs.errors import UserError
from allometry.configs.loader import dump
from allometry.configs.run import RunConfig
from allometry.data.processes import name_rank
from allometry.launch.command import Report
from allometry.launch.fork_server import become_rank, is_server
from allometry.launch.runs.commands import Train
from allometry.launch.start import settle_allocator, settle_cuda_allocator
from allometry.trainer.stop import StopSignals


def _stage(config: RunConfig, name: str) -> RunConfig:
    """Return the configuration of the run in the stage of this name."""
    names = [stage.name for stage in config.stages or ()]
    if name not in names:
        raise UserError(
            f"--stage={name} is none of the run's stages, which are {', '.join(names) or 'none'}"
        )
    return config.of_stages()[names.index(name)]


def _imports() -> None:
    """Import the modules of a run, in the fork server."""
    import_module("allometry.trainer.train")


def trained(asked: Train) -> Report:
    """Train, or print the configuration or the plan."""
    if is_server():
        settle_allocator(asked.allocator)
        settle_cuda_allocator()
        become_rank(_imports)
    if "RANK" in os.environ:
        name_rank(os.environ["RANK"])
    if asked.dry_run and asked.print_config:
        raise UserError("--dry-run and --print-config are two commands; give one of them")
    for flag, given in (("--world-size", asked.world_size is not None), ("--json", asked.json)):
        if given and not asked.dry_run:
            raise UserError(f"{flag} goes with --dry-run; add it or leave {flag} out")
    if asked.stage is not None and not asked.print_config:
        raise UserError("--stage goes with --print-config; add it or leave --stage out")
    config = asked.load(stages=True)
    if asked.print_config:
        shown = config if asked.stage is None else _stage(config, asked.stage)
        return Report(None, dump(shown).removesuffix("\n"))
    if asked.dry_run:
        from allometry.launch.runs.dry_run import planned

        return planned(config, asked.world_size or 1)
    allocator = settle_allocator(asked.allocator)  # may replace the process: before torch
    cuda_allocator = settle_cuda_allocator()
    # Only the main rank prints warnings, which are the same on all ranks.
    main_rank = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.WARNING if main_rank else logging.ERROR, format="%(levelname)s: %(message)s"
    )

    with StopSignals(to_the_end=True) as signals:
        from allometry.trainer.record.facts import Invocation
        from allometry.trainer.train import train

        importer = None
        if config.run.initial is not None and config.run.initial.hf is not None:
            from allometry.interop.huggingface.model import import_model as importer

        invocation = Invocation(allocator, sys.orig_argv, cuda_allocator)
        train(
            config,
            invocation=invocation,
            stop_at_step=asked.stop_at_step,
            signals=signals,
            importer=importer,
        )
    return Report(None, "")
