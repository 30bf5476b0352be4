"""Compute the best interval between saves from their cost and the rate of failures."""

from __future__ import annotations

import math
from dataclasses import dataclass

from allometry.laws.runs import read_lines
from allometry.trainer.state.folder import RunFolder

LLAMA3_DEVICE_HOURS = 54 * 24 * 16384 / 419
"""Device-hours between interruptions of Llama 3's training, about 50,700.

arXiv 2407.21783, section 3.3.4: 419 unexpected interruptions in 54 days on 16,384 GPUs.
"""
_BEGINS = ("started", "resumed", "branched")
_ENDS = ("stopped", "finished")


def best_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Return the seconds of training between two saves that minimize the lost time.

    A save costs C = ``cost_s``; a failure, every M = ``mtbf_s`` on average, costs half an interval.
    Young (1974, CACM 17(9)): sqrt(2 C M). Daly (2006, FGCS 22(3), equation 37) for C < 2M: sqrt(2 C
    M) (1 + sqrt(C / 2M) / 3 + C / 18M) - C, else M. For example, saves of 30 s and one failure a
    day (``best_interval_s(30.0, 86400.0)``) give 2257 s.
    """
    if cost_s >= 2.0 * mtbf_s:
        return mtbf_s
    ratio = cost_s / (2.0 * mtbf_s)
    return math.sqrt(2.0 * cost_s * mtbf_s) * (1.0 + math.sqrt(ratio) / 3.0 + ratio / 9.0) - cost_s


@dataclass(frozen=True)
class Uptime:
    """Training time of a run's launches, and the number of launches that failed."""

    seconds: float = 0.0
    failures: int = 0

    @classmethod
    def of(cls, folder: RunFolder) -> Uptime:
        """Read the uptime from a run's events.jsonl.

        A launch has failed if another launch followed and its last event is neither ``stopped`` nor
        ``finished``; its duration is measured up to its last event.
        """
        seconds, failures = 0.0, 0
        begun = newest = None
        for event in read_lines(folder.events):
            kind, time = event.get("event"), event.get("time")
            if not isinstance(time, int | float):
                continue
            if kind in _BEGINS:
                if begun is not None and newest is not None:
                    failures, seconds = failures + 1, seconds + max(0.0, newest - begun)
                begun = time
            elif kind in _ENDS and begun is not None:
                seconds, begun = seconds + max(0.0, time - begun), None
            newest = time
        return cls(seconds, failures)

    def mtbf_s(self, world_size: int) -> float:
        """Return the mean time between failures.

        One failure at the rate of Llama 3's devices is counted in addition to the run's own, so
        that the estimate is finite without failures, and dominated by the run's own rate after many
        failures. For example, a new run on 1024 GPUs has 49 hours.
        """
        before = LLAMA3_DEVICE_HOURS * 3600.0 / world_size
        return (before + self.seconds) / (1 + self.failures)
