"""All ranks use the kernels chosen by the main rank, or no rank starts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.run import RunConfig
from run_folders import rows

Ranks = Callable[..., list[Any]]
Make = Callable[..., RunConfig]


def launch(config: RunConfig, lacking: int | None = None) -> tuple[set[str], str | None]:
    """Train on this rank; return its back ends and the refusal. Rank ``lacking`` has no kernel."""
    import torch

    from allometry.configs.errors import UserError
    from allometry.models.attention import RUN
    from allometry.trainer import kernels
    from allometry.trainer.train import train

    ran: set[str] = set()
    rank = int(os.environ["RANK"])

    def watched(name: str, run: Any) -> Any:
        return lambda *args: ran.add(name) or run(*args)

    with pytest.MonkeyPatch.context() as patch:
        for name, run in list(RUN.items()):
            patch.setitem(RUN, name, watched(name, run))
        if rank == lacking:
            patch.setattr(kernels, "refusal", lambda *_: "is not installed; install it")
        try:
            train(config, device=torch.device("cpu"), callbacks=[])
        except UserError as error:
            return ran, str(error)
    return ran, None


def test_ranks_agree_on_a_named_kernel(tiny: Make, run_ranks: Ranks) -> None:
    config = tiny("training.total_steps=4", "kernels.attention=masked", "parallel.zero.stage=2")
    assert run_ranks(launch, 2, config) == [({"masked"}, None)] * 2
    record = json.loads((Path(config.run.folder) / "run.json").read_text())
    assert record["kernels"]["attention"]["name"] == "masked"
    assert len(rows(Path(config.run.folder))) == 4


def test_a_rank_that_lacks_it_stops_all(tiny: Make, run_ranks: Ranks) -> None:
    config = tiny("kernels.attention=masked")
    said = run_ranks(launch, 2, config, 1)
    assert said[0] == said[1]
    assert said[0] == (
        set(),
        "kernels.attention=masked on rank 1: is not installed; install it",
    )


def test_whole_documents_too(tiny: Make, run_ranks: Ranks) -> None:
    config = tiny(
        *("training.total_steps=4", "data.kind=documents", "data.max_document_tokens=56"),
        *("batch.micro_batch_sequences=1", "parallel.context.capacity_tokens=64"),
        "kernels.attention=masked",
    )
    found = run_ranks(launch, 2, config)
    assert [refused for _, refused in found] == [None, None]
    assert set().union(*(ran for ran, _ in found)) == {"masked"}, "rings aside"
