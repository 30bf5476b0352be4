"""Simulate effective training time at Llama 3's failure rate from measured restarts and saves.

    python benchmarks/effective_time.py [--restart-s S] [--checkpoints FILE] [--json OUT]

Simulates 54 days of a run on 16,384 GPUs. Failures occur at random at the rate reported in the
Llama 3 paper (section 3.3.4). Each failure ends the launch; the restart takes a fixed time, and the
steps after the newest usable save are recomputed. Failures can also occur during a restart or
before a save has been written. The save interval is Daly's for the stall of a save, but at least
the time to write one. Effective time is the share of time spent in steps that are not recomputed.

With local copies, each rank's state is kept in the memory of its node and of a neighbouring node; a
failure that loses both copies resumes from the newest checkpoint on the file system. Without local
copies, every failure does. A restart as measured by ``faults.py`` (from the kill to the next step)
includes loading its small state, so load time is added only for the additional bytes of a rank of
the large run.

Each number of the result is marked as measured here or assumed, with its source. For example,
``--restart-s 60`` replaces the measured restart by one of a minute.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
RESTARTS = RESULTS / "faults-cpu-2026-11-29.json"
COPIES = RESULTS / "local-copies-cpu-2026-11-29.json"
LOADS = RESULTS / "checkpoints-cpu-2026-11-28.json"
GPUS, DAYS, INTERRUPTIONS = 16384, 54, 419
PARAMETERS, BYTES_EACH = 405e9, 12  # fp32 parameter and two moments
RESTARTS_S = (5.0, 11.0, 30.0, 60.0, 120.0, 180.0, 300.0, 600.0)
GOAL = 0.99


class Given(NamedTuple):
    """Input number with its unit and source."""

    value: float
    unit: str
    measured: bool
    source: str


@dataclass(frozen=True)
class Way:
    """Method of saving; all fields in seconds.

    ``stall_s``: time that training waits for a save; ``write_s``: time until the save is usable;
    ``load_s``: time that loading adds to a restart; ``every_s``: training time between two saves.
    """

    stall_s: float
    write_s: float
    load_s: float
    every_s: float


def mtbf_s() -> float:
    """Return the mean seconds between unexpected interruptions of Llama 3's training."""
    return DAYS * 86400 / INTERRUPTIONS


def way(stall_s: float, write_s: float, load_s: float) -> Way:
    """Return a method with Daly's interval, or with ``write_s`` if writing takes longer."""
    from allometry.trainer.state.interval import best_interval_s

    every_s = max(best_interval_s(stall_s, mtbf_s()), write_s)
    return Way(stall_s, write_s, load_s, every_s)


def ways(given: dict[str, Given]) -> dict[str, Way]:
    """Return the methods with and without local copies for the given numbers."""
    total = PARAMETERS * BYTES_EACH
    each = total / GPUS
    stall_s = each / given["copy_bytes_per_s"].value
    near_load_s = each / given["load_bytes_per_s"].value
    shared_s = total / given["file_system_bytes_per_s"].value
    return {
        "local copies": way(stall_s, each / given["local_write_bytes_per_s"].value, near_load_s),
        "checkpoints alone": way(stall_s, shared_s, max(shared_s, near_load_s)),
    }


def played(
    near: Way, far: Way | None, restart_s: float, both_lost: float, draw: random.Random
) -> float:
    """Simulate one run of DAYS; return the share of its time in steps that count.

    ``far``: the file-system checkpoints to resume from when both local copies are lost, which is a
    share ``both_lost`` of failures; None if ``near`` itself is on the file system.
    """
    whole_s, mean_s = DAYS * 86400.0, mtbf_s()
    passed_s = kept_s = 0.0  # elapsed time, and time in steps covered by a save
    load_s = 0.0  # the first start loads no checkpoint
    begin_s = restart_s
    while True:
        until_s = min(draw.expovariate(1.0 / mean_s), whole_s - passed_s)
        passed_s += until_s
        trained_s = until_s - begin_s - load_s
        if passed_s >= whole_s:  # the end is no failure: unsaved steps count
            return (kept_s + steps_s(near, max(0.0, trained_s))) / whole_s
        kept_s += saved_s(near, trained_s)
        begin_s, load_s = restart_s, near.load_s if trained_s > 0 else load_s
        if far is not None and draw.random() < both_lost:
            kept_s = max(0.0, kept_s - far.write_s) // far.every_s * far.every_s
            load_s = far.load_s


def steps_s(one: Way, seconds: float) -> float:
    """Return the seconds in steps among ``seconds`` of steps and stalls."""
    cycles, rest = divmod(seconds, one.every_s + one.stall_s)
    return cycles * one.every_s + min(rest, one.every_s)


def saved_s(one: Way, seconds: float) -> float:
    """Return the seconds in steps covered by a usable save if training ends after ``seconds``."""
    usable = math.floor((seconds - one.write_s) / (one.every_s + one.stall_s))
    return max(0, usable) * one.every_s


def effective(
    near: Way, far: Way | None, restart_s: float, both_lost: float, runs: int
) -> dict[str, float]:
    """Return the mean, 5th and 95th percentile of the effective share over ``runs`` simulations."""
    draws = [random.Random(number) for number in range(runs)]
    shares = sorted(played(near, far, restart_s, both_lost, draw) for draw in draws)
    return {
        "mean": round(statistics.fmean(shares), 5),
        "p5": round(shares[runs // 20], 5),
        "p95": round(shares[-1 - runs // 20], 5),
    }


def restart_for(goal: float, near: Way, far: Way | None, both_lost: float, runs: int) -> float:
    """Return the longest restart for which the mean reaches ``goal``, to 0.1 s; 0 if none does."""
    low, high = 0.0, 3600.0
    while high - low > 0.05:
        middle = (low + high) / 2
        if effective(near, far, middle, both_lost, runs)["mean"] >= goal:
            low = middle
        else:
            high = middle
    return round(low, 1)


def restart_measured() -> Given:
    """Return the median restart time of two-rank launches after one rank was killed."""
    cases = json.loads(RESTARTS.read_text())["cases"]
    back = [s for case in cases for s in case["back_s"] if _is_kill(case)]
    told = f"{RESTARTS.name}: median of {len(back)}, 2 ranks, kill to next step with its loading"
    return Given(statistics.median(back), "s", measured=True, source=told)


def _is_kill(case: dict[str, Any]) -> bool:
    return case["fault"] == "kill" and case["ranks"] == 2 and not case["plain"]


def inputs(given: argparse.Namespace) -> dict[str, Given]:
    """Return all input numbers of the simulation by name."""
    copies = json.loads(COPIES.read_text())
    loads = json.loads(Path(given.checkpoints).read_text())
    load_s = loads["1 rank(s)"]["medians"]["resume, load alone, s"]
    loaded = loads["gigabytes"] * 1e9
    restart = restart_measured()
    if given.restart_s is not None:
        restart = Given(given.restart_s, "s", measured=False, source="--restart-s")
    here = "one rank on a CPU here"
    return {
        "restart_s": restart,
        "copy_bytes_per_s": Given(
            copies["gb_per_s"] * 1e9,
            *("bytes/s", True, f"{COPIES.name}: what training waits for, {here}"),
        ),
        "local_write_bytes_per_s": Given(
            copies["bytes"] / statistics.median(copies["written_s"]),
            *("bytes/s", True, f"{COPIES.name}: to /dev/shm, {here}"),
        ),
        "load_bytes_per_s": Given(
            loaded / load_s,
            *("bytes/s", True, f"{Path(given.checkpoints).name}: load alone, {here}, busy"),
        ),
        "file_system_bytes_per_s": Given(
            *(given.file_system * 1e9, "bytes/s", False, "assumed, for all ranks together"),
        ),
        "both_lost": Given(
            *(given.both_lost, "of failures", False, "assumed: take a copy and its replica"),
        ),
        "bytes_of_a_rank": Given(
            PARAMETERS * BYTES_EACH / GPUS,
            *("bytes", False, "405B in fp32 with two moments, sharded"),
        ),
        "mtbf_s": Given(
            mtbf_s(),
            *("s", False, "published: 419 in 54 days on 16,384 GPUs (arXiv 2407.21783)"),
        ),
    }


def result(numbers: dict[str, Given], runs: int) -> dict[str, Any]:
    """Return shares for the measured restart and for others, and the longest restart for GOAL."""
    both = numbers["both_lost"].value
    found: dict[str, Any] = {}
    all_ways = ways(numbers)
    for name, near in all_ways.items():
        far = all_ways["checkpoints alone"] if name == "local copies" else None
        found[name] = {
            **{key: round(value, 3) for key, value in asdict(near).items()},
            "effective": effective(near, far, numbers["restart_s"].value, both, runs),
            "by_restart_s": {str(s): effective(near, far, s, both, runs) for s in RESTARTS_S},
            f"restart_s_for_{GOAL}": restart_for(GOAL, near, far, both, runs),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--restart-s", type=float, help="instead of the measured one")
    parser.add_argument("--checkpoints", default=str(LOADS))
    parser.add_argument("--file-system", type=float, default=100.0, help="GB/s of all ranks")
    parser.add_argument("--both-lost", type=float, default=0.02)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    numbers = inputs(given)
    found = result(numbers, given.runs)
    for name, number in numbers.items():
        kind = "measured" if number.measured else "not measured"
        print(f"{name:26} {number.value:14.5g} {number.unit:12} {kind}: {number.source}")
    for name, one in found.items():
        print(f"{name:26} {one['effective']}, 99 % up to {one[f'restart_s_for_{GOAL}']} s")
    if given.json is not None:
        from contenders.machine import facts

        content = {**facts(), "runs": given.runs} | {
            "inputs": {k: v._asdict() for k, v in numbers.items()},
            "found": found,
        }
        given.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
