"""Comparisons between contenders and the goal of each ratio."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from contenders.race import Entry, Run

PACKAGES = ("jemalloc", "tcmalloc")
DISTURBED = 0.1
"""Largest share of the cores that other processes may use during an undisturbed run."""


@dataclass(frozen=True)
class Comparison:
    """Ratio of tokens/s of the best of ``ours`` to ``rival``, round by round."""

    setting: str
    ours: tuple[Entry, ...]
    rival: Entry
    goal: float | None

    @property
    def entries(self) -> tuple[Entry, ...]:
        return (self.rival, *self.ours)


@dataclass(frozen=True)
class Verdict:
    """Ratios of a comparison, one per undisturbed round; ``ours`` is the fastest entry."""

    setting: str
    ours: str
    rival: str
    ratios: list[float]
    disturbed_rounds: int
    median: float
    goal: float | None
    met: bool | None


def bf16(allocators: Sequence[str], *, rivals_alike: bool = True) -> list[Comparison]:
    """Return comparisons on one process in bf16, as shipped and with equal allocators."""
    shipped = {"glibc-tuned": (1.2, 1.6), "jemalloc": (1.3, 1.8), "tcmalloc": (1.3, 1.8)}
    equal = (1.03, 1.35)
    eager, compiled = Entry("plain"), Entry("plain", compile=True)
    trainer = Entry("trainer")
    found = []
    for allocator in allocators:
        us = (Entry("ours", compile=True, allocator=allocator),)
        if allocator in shipped:
            with_compiled, with_trainer = shipped[allocator]
            label = f"as shipped, {allocator if allocator in PACKAGES else 'no package'}"
            found += [
                Comparison(label, us, eager, None),
                Comparison(label, us, compiled, with_compiled),
                Comparison(label, us, trainer, with_trainer),
            ]
        if rivals_alike:
            label = f"equal allocators, {allocator}"
            alike = Entry("plain", compile=True, allocator=allocator)
            found += [
                Comparison(label, us, alike, equal[0]),
                Comparison(label, us, Entry("trainer", allocator=allocator), equal[1]),
            ]
    return found


def fp32(allocators: Sequence[str]) -> list[Comparison]:
    """Return comparisons in fp32 with the compiled loop, as shipped and with equal allocators."""
    best = allocators[-1]
    us = (Entry("ours", "fp32", compile=True, allocator=best),)
    return [
        Comparison(f"as shipped, {best}", us, Entry("plain", "fp32", compile=True), 1.0),
        Comparison(
            f"equal allocators, {best}",
            us,
            Entry("plain", "fp32", compile=True, allocator=best),
            1.0,
        ),
    ]


def two(allocators: Sequence[str], stages: Iterable[int] = (0, 1, 2, 3)) -> list[Comparison]:
    """Return the comparison on two processes: our best ZeRO stage against uncompiled FSDP2."""
    best = allocators[-1]
    us = tuple(
        Entry("ours", compile=True, allocator=best, processes=2, stage=stage) for stage in stages
    )
    rival = Entry("fsdp2", allocator=best, processes=2)
    return [Comparison(f"two processes, equal allocators, {best}", us, rival, 1.45)]


def judge(comparison: Comparison, runs: Sequence[Run]) -> Verdict:
    """Return the ratios within rounds, and whether their median reaches the goal.

    Rounds in which other processes disturbed either run count only if all rounds were disturbed.
    """

    def rates(entry: Entry) -> list[float]:
        return [run.tokens_per_s for run in runs if run.entry == entry]

    # Choose the best of ours over all rounds: a choice in each round would favour noise.
    best = max(comparison.ours, key=lambda entry: statistics.median(rates(entry)))
    pairs = [
        (mine, other)
        for mine in runs
        for other in runs
        if (mine.entry, other.entry) == (best, comparison.rival) and mine.round == other.round
    ]
    quiet = [pair for pair in pairs if max(run.others_share for run in pair) <= DISTURBED]
    ratios = [mine.tokens_per_s / other.tokens_per_s for mine, other in quiet or pairs]
    median = statistics.median(ratios)
    goal = comparison.goal
    return Verdict(
        setting=comparison.setting,
        ours=best.name,
        rival=comparison.rival.name,
        ratios=ratios,
        disturbed_rounds=len(pairs) - len(quiet),
        median=median,
        goal=goal,
        met=None if goal is None else median >= goal,
    )
