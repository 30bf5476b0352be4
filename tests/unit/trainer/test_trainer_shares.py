"""Sequences of each hdp rank and their order: the documented interleave."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from allometry.data.batch import IGNORE, Batch
from allometry.trainer.evaluate import held_out_sequences
from allometry.trainer.feed import sequence_steps

LENGTH = 3


class Numbered:
    """Stream in which the sequence at a position contains that position."""

    def batch(self, position: int, count: int) -> Batch:
        rows = np.arange(position, position + count)
        tokens = np.repeat(rows[:, None], LENGTH, 1)
        return Batch(tokens, tokens, np.zeros(count, np.int64), None)


def mesh(rank: int, size: int) -> Any:
    hdp = SimpleNamespace(rank=rank, size=size)
    return SimpleNamespace(hdp=hdp, device=torch.device("cpu"))


def plan(sizes: Sequence[int], ranks: int, micro: int) -> Any:
    """Return a plan with a growing batch: ``sizes`` are the sequences of each step."""
    batch = SimpleNamespace(sequences_before=lambda step: sum(sizes[: step - 1]))
    return SimpleNamespace(
        batch=batch,
        micro_batch_sequences=micro,
        total_steps=len(sizes),
        micro_batches=lambda step: sizes[step - 1] // (ranks * micro),
    )


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_sequences_of_a_step_are_dealt_to_ranks_in_turn(ranks: int) -> None:
    micro, sizes = 2, [6 * 2, 12 * 2, 6 * 2]
    for taken in (0, 1):  # from the start, and resumed after a step
        for rank in range(ranks):
            steps = sequence_steps(Numbered(), plan(sizes, ranks, micro), mesh(rank, ranks), taken)
            for step, got in enumerate(steps, taken + 1):
                first = sum(sizes[: step - 1])
                turns = sizes[step - 1] // (ranks * micro)
                starts = [first + (turn * ranks + rank) * micro for turn in range(turns)]
                assert [batch.position for batch in got.batches] == starts
                for batch, start in zip(got.batches, starts, strict=True):
                    assert batch.tokens_BL[:, 0].tolist() == list(range(start, start + micro))
            assert step == len(sizes)


def test_held_out_micro_batches_are_dealt_to_ranks_in_turn() -> None:
    sources = {name: [Numbered().batch(place, 1) for place in range(5)] for name in "ab"}
    for rank in range(2):
        held_out = held_out_sequences(sources, mesh(rank, 2))
        assert held_out.names == ("a", "b")
        for source in range(2):
            mine = held_out.batches[3 * source : 3 * source + 3]
            assert [int(batch.sources) for batch in mine] == [source] * 3
            counted = [batch for batch in mine if bool((batch.targets_BL >= 0).all())]
            assert [int(batch.tokens_BL[0, 0]) for batch in counted] == list(range(rank, 5, 2))
            idle = [batch for batch in mine if bool((batch.targets_BL == IGNORE).all())]
            assert len(idle) == rank, "5 micro-batches on 2 ranks leave one turn idle"
