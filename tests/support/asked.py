"""Commands on a config made by a test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from allometry.configs.loader import dump
from allometry.configs.run import RunConfig
from allometry.launch.command import ConfigCommand
from allometry.launch.studies.commands import Transfer

C = TypeVar("C", bound=ConfigCommand)


def about(config: RunConfig, command: C) -> C:
    """Return the command with the config, written next to its run folder, as its CONFIG."""
    path = Path(config.run.folder).with_suffix(".yaml")
    path.write_text(dump(config), encoding="utf-8")
    return replace(command, config=str(path))


def small_transfer(trials: Path, **options: Any) -> Transfer:
    """Return a sweep over two widths with ten steps; its figure is written next to ``trials``."""
    return Transfer(
        config="",
        sizes="16,32",
        steps=10,
        sequences=4,
        length=16,
        step=1.0,
        regret_bound=50.0,
        processes=1,
        trials=trials,
        out=trials.with_name("t.png"),
        **options,
    )
