"""On CUDA, numbers of a step arrive before a later step has run, with the step's own seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allometry.configs.run import RunConfig
from allometry.trainer.record.timing import StepTimer, clock_of, to_host
from allometry.trainer.train import train
from run_folders import rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
CYCLES = 1_000_000_000
"""GPU clock cycles: a few tenths of a second."""


def test_reading_waits_for_its_own_step() -> None:
    timer = StepTimer(clock_of(CUDA))
    torch.cuda.synchronize()
    timer.start()
    numbers = to_host(torch.arange(1000.0, device=CUDA))
    spans = timer.lap()
    begun = time.perf_counter()
    torch.cuda._sleep(CYCLES)
    short = timer.seconds(spans)
    assert numbers.is_pinned()
    assert numbers.tolist() == list(range(1000))
    read = time.perf_counter() - begun
    long = timer.seconds(timer.lap())
    assert time.perf_counter() - begun > 5 * read, "the later work was still running"
    assert short < long / 5


def test_the_last_row_is_as_long_as_the_others(tiny: Callable[..., RunConfig]) -> None:
    config = tiny("training.total_steps=30", "evaluation.every_steps=8", "checkpoint.every_steps=6")
    train(config, device=CUDA, callbacks=[])
    seconds = [row["time_s"] for row in rows(Path(config.run.folder))]
    median = sorted(seconds[10:])[10]
    assert median / 3 < seconds[-1] < 3 * median
    assert all(median / 3 < each for each in seconds)
