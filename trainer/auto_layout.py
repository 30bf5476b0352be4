"""``parallel: auto`` when a run begins: the layout is chosen before any group starts."""

from __future__ import annotations

from dataclasses import replace

import torch

from allometry.configs.run import RunConfig
from allometry.parallel.rendezvous import launched_world_size
from allometry.scaling.search.auto import settle
from allometry.trainer.record.facts import Invocation
from allometry.trainer.state.folder import RunFolder


def settled(
    config: RunConfig, device: torch.device | None, invocation: Invocation | None
) -> tuple[RunConfig, Invocation]:
    """Return the run in its layout, and the launch with the choice for the record.

    All ranks choose alike, from the description, their number, and what the run's folder says of
    the launch before. Raises UserError, as ``settle``.
    """
    invocation = invocation or Invocation()
    if config.parallel.auto is None:
        return config, invocation
    here = device.type if device else "cuda" if torch.cuda.is_available() else "cpu"
    recorded = RunFolder(config.run.folder).recorded().get("layout_choice")
    config, choice = settle(config, launched_world_size(), here, recorded)
    return config, replace(invocation, layout_choice=choice)
