"""Work on one rank that exceeds the timeout: other ranks wait, and detect a rank that has left."""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from allometry.configs.execution import ParallelConfig
from allometry.configs.run import RunConfig
from allometry.parallel.agree import with_heartbeat
from allometry.parallel.mesh import open_mesh
from allometry.trainer.record.callbacks import Callback
from allometry.trainer.train import train

Ranks = Callable[..., list[Any]]
Make = Callable[..., RunConfig]


class SlowPage(Callback):
    """Service whose answer takes longer than the ranks' timeout."""

    def on_start(self, facts: dict[str, Any], first_step: int) -> None:
        time.sleep(6.0)


def launch_with_a_slow_page(config: RunConfig) -> int:
    return train(config, device=torch.device("cpu"), callbacks=[SlowPage()]).step


def test_a_slow_page_is_not_a_dead_rank(tiny: Make, run_ranks: Ranks) -> None:
    config = tiny("parallel.timeout_s=4", "training.compile=false", "training.total_steps=4")
    assert run_ranks(launch_with_a_slow_page, 2, config) == [4, 4]


def warned() -> list[str]:
    """Return this rank's log messages while rank 1 works for longer than the timeout."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("allometry.parallel.agree")
    logger.addHandler(handler)
    try:
        with open_mesh(ParallelConfig(timeout_s=2), torch.device("cpu")) as mesh:
            with_heartbeat(mesh, lambda: time.sleep(4.0 * mesh.rank), "reading")
    finally:
        logger.removeHandler(handler)
    return said


def test_the_main_rank_warns_of_slow_ranks(run_ranks: Ranks) -> None:
    main, other = run_ranks(warned, 2)
    assert main
    assert all(text.startswith("rank(s) [1]: reading has taken") for text in main)
    assert not other


def deserted() -> str:
    """Rank 1 leaves while rank 0 works for longer than the timeout."""
    with open_mesh(ParallelConfig(timeout_s=2), torch.device("cpu")) as mesh:
        if mesh.rank == 1:
            time.sleep(5)
            return ""
        begun = time.monotonic()
        try:
            with_heartbeat(mesh, lambda: time.sleep(20), "working")
        except RuntimeError as error:
            return f"{time.monotonic() - begun < 15} {error}"
    return "nobody was missed"


def test_a_rank_that_is_gone_is_found_within_the_timeout(run_ranks: Ranks) -> None:
    assert run_ranks(deserted, 2)[0].startswith("True ")
