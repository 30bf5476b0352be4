"""``torchrun -m allometry.launch.train CONFIG [section.key=value ...]``: one rank of a run."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

from allometry.configs.errors import UserError
from allometry.launch.start import settle_allocator


def run(
    config_path: str,
    overrides: list[str],
    allocator: str = "auto",
    stop_at_step: int | None = None,
) -> None:
    """Train in this process, which is a rank of a torchrun or the only one."""
    from allometry.configs.loader import load  # the command line's help comes by here, and is quick

    config = load(config_path, overrides)
    name = settle_allocator(allocator)
    # All ranks would say the same; the main one says it.
    main_rank = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.WARNING if main_rank else logging.ERROR, format="%(levelname)s: %(message)s"
    )

    from allometry.trainer.record.facts import Invocation
    from allometry.trainer.train import train

    invocation = Invocation(allocator=name, command=sys.orig_argv)
    train(config, invocation=invocation, stop_at_step=stop_at_step)


def fail(error: UserError) -> NoReturn:
    """Print the error once, on the main rank, and end with code 2."""
    if os.environ.get("RANK", "0") == "0":
        print(f"allometry: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def main() -> None:
    """Entry point of the module; the same as ``allometry train``."""
    from allometry.launch.cli import main as command_line

    sys.argv = ["allometry", "train", *sys.argv[1:]]
    command_line()


if __name__ == "__main__":
    main()
