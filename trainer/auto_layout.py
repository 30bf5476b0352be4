"""Choose the layout of a run with ``parallel: auto`` before any process group is created."""

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
    """Return the config with its layout, and the invocation with the choice to be recorded.

    All ranks make the same choice from the config, the world size and the choice recorded by the
    last launch. Raises UserError: see ``scaling.search.auto.settle``.
    """
    invocation = invocation or Invocation()
    if config.parallel.auto is None:
        return config, invocation
    here = device.type if device else "cuda" if torch.cuda.is_available() else "cpu"
    recorded = RunFolder(config.run.folder).recorded().get("layout_choice")
    config, choice = settle(config, launched_world_size(), here, recorded)
    return config, replace(invocation, layout_choice=choice)
