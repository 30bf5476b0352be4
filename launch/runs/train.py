"""``allometry train``: train in this process, one rank of a torchrun or the only one."""

from __future__ import annotations

import logging
import os
import sys

from allometry.configs.run import RunConfig
from allometry.launch.start import settle_allocator


def train_here(config: RunConfig, allocator: str, stop_at_step: int | None) -> None:
    """Train; the allocator, which may replace the process, comes before torch."""
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
