"""A command about a configuration that a test has made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from allometry.configs.loader import dump
from allometry.configs.run import RunConfig
from allometry.launch.command import ConfigCommand

C = TypeVar("C", bound=ConfigCommand)


def about(config: RunConfig, command: C) -> C:
    """The command with this configuration, written beside its run's folder, for its CONFIG."""
    path = Path(config.run.folder).with_suffix(".yaml")
    path.write_text(dump(config), encoding="utf-8")
    return replace(command, config=str(path))
