"""What a run loses by a fault: launches that are disturbed, beside one that is not.

    python benchmarks/faults.py --work DIR [--fault kill ...] [--setting zero0 ...] [--ranks 2 4]
                                [--count 20] [--times 1] [--seconds 240] [--out FILE] [--plain]

A case is a fault, a setting (fault_settings.py), a number of ranks and a number, from which all
that is random is drawn: the rank, and the moment, in the launch's start or after a step; with
``--times`` it strikes so often in one launch, some of them while ranks are started again. It trains
through the launcher that users have (``--plain``: torch's own), strikes, waits for the end, and
compares every row and every tensor of the last checkpoint, to the bit, with those of a run that
nobody disturbed. The cases done are in DIR/cases.jsonl, so the same command goes on with what is
left; ``--seconds`` begins no case after that time. ``--out`` writes the counts and all cases.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
from fault_compare import clear, differing, differing_tensors, events, newest, read, rows
from fault_settings import SAVE_EVERY, SETTINGS, STEPS, described, write_data

from allometry.configs.loader import dump

HERE = Path(__file__).parent
LIMIT_S = 120.0  # of a start and what follows it; a launch that takes longer hangs
ORPHANS_S = 5.0  # after which ranks without their launcher must be gone
NOBODY = "nobody: the run had ended"
AT_START = 0.25  # of the strikes
COUNTED = ("restarts", "rows", "rows_differ", "tensors_differ", "steps_lost", "orphans")


@dataclass(frozen=True)
class Case:
    """One launch to be disturbed."""

    fault: str
    setting: str
    ranks: int
    number: int
    plain: bool = False
    times: int = 1

    @property
    def name(self) -> str:
        """The case's key, and its folder's name."""
        more = "-plain" * self.plain + f"-x{self.times}" * (self.times > 1)
        return f"{self.fault}-{self.setting}-{self.ranks}{more}-{self.number}"


def rank_of(process: psutil.Process) -> int | None:
    """The rank that a process is: by its name, or, while it is starting, by its environment."""
    named = process.name().split(" ")
    number = named[1] if named[0] == "rank" else process.environ().get("RANK")
    return None if number is None else int(number)


class Launch:
    """A launch in progress, seen from outside."""

    def __init__(self, case: Case, folder: Path, data: Path, fault: dict[str, str]) -> None:
        self.folder, self.begun = folder, time.time()
        self._limit_s = LIMIT_S * (1 + case.times)
        config = folder.with_suffix(".yaml")
        config.write_text(dump(described(case.setting, folder, data)))
        module = "torch.distributed.run" if case.plain else "allometry.launch.torchrun"
        words = [sys.executable, "-m", module, "--nproc-per-node", str(case.ranks)]
        words += [
            "--max-restarts",
            str(2 * case.times + 1),
            "-m",
            "allometry.launch.train",
            str(config),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | fault
        with open(folder.with_suffix(".log"), "ab") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
        self.seen: dict[int, psutil.Process] = {}

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks that are alive, by their number."""
        found = {}
        try:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self.seen[child.pid] = child
                rank = rank_of(child)
                if rank is not None and child.parent() == psutil.Process(self.process.pid):
                    found[rank] = child
        except psutil.Error:  # it has ended since
            pass
        return found

    def wait(self, until: Callable[[], bool] = lambda: False) -> None:
        """Return once ``until`` is true or the launcher has ended; end it after LIMIT_S."""
        looked = 0.0
        while self.process.poll() is None and not until():
            if time.time() - looked > 0.3:
                self.ranks()
                looked = time.time()
            if time.time() - self.begun > self._limit_s:
                self.process.kill()
            time.sleep(0.01)

    def alive(self) -> int:
        """How many of all processes that were seen are still there."""

        def lives(process: psutil.Process) -> bool:
            try:
                return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
            except psutil.Error:
                return False

        return sum(map(lives, self.seen.values()))

    @cached_property
    def orphans(self) -> int:
        """How many are there ORPHANS_S after the launcher's end, which this waits for."""
        self.process.wait()
        until = time.time() + ORPHANS_S
        while self.alive() and time.time() < until:
            time.sleep(0.05)
        left = self.alive()
        for process in self.seen.values():
            if left and process.is_running():
                process.kill()
        return left


# A fault strikes once its moment has come, and returns whom.


def kill(launch: Launch, draw: random.Random, ranks: int) -> str:
    """SIGKILL to one rank: the launcher starts all again."""
    wanted = draw.randrange(ranks)
    launch.wait(lambda: wanted in launch.ranks())
    victim = launch.ranks().get(wanted)
    if victim is None:
        return NOBODY
    victim.kill()
    return f"rank {wanted}"


def launcher(launch: Launch, draw: random.Random, ranks: int) -> str:
    """SIGKILL to the launcher: its ranks end with it."""
    launch.ranks()
    launch.process.kill()
    return "the launcher"


def everything(launch: Launch, draw: random.Random, ranks: int) -> str:
    """SIGKILL to the launcher and all ranks, as a node that goes down."""
    there = launch.ranks()
    launch.process.kill()
    for process in there.values():
        process.kill()
    return "the launcher and all ranks"


def nothing(launch: Launch, draw: random.Random, ranks: int) -> str:
    """What a rank does to itself (fault_hook): nothing from outside."""
    return "a rank, by itself"


@dataclass(frozen=True)
class Fault:
    """How it strikes; ``inside``: what fault_hook does; ``again``: the command is given again."""

    strike: Callable[[Launch, random.Random, int], str]
    inside: str | None = None
    again: bool = False


FAULTS = {
    "kill": Fault(kill),
    "memory": Fault(nothing, inside="exit137"),
    "hang": Fault(nothing, inside="hang"),
    "launcher": Fault(launcher, again=True),
    "everything": Fault(everything, again=True),
}


@dataclass(frozen=True)
class Struck:
    """A moment: the newest checkpoint, how many events there were, the time."""

    saved: int
    events: int
    at: float

    @classmethod
    def now(cls, folder: Path) -> Struck:
        """This one."""
        return cls(newest(folder), len(events(folder)), time.time())


def disturbed(case: Case, work: Path) -> dict[str, Any]:
    """Do a case; what came of it."""
    straight = undisturbed(case, work)
    folder = work / "runs" / case.name
    clear(folder)
    draw, fault = random.Random(case.name), FAULTS[case.fault]
    steps = sorted(draw.randrange(1, STEPS - 1) for _ in range(case.times))
    environment = {}
    struck = folder.with_suffix(".struck")
    if fault.inside:
        hook = os.pathsep.join(filter(None, [str(HERE / "fault_hook"), os.environ["PYTHONPATH"]]))
        told = [fault.inside, draw.randrange(case.ranks), steps[0], str(struck)]
        environment = {"PYTHONPATH": hook, "FAULT": json.dumps(told)}
    launch = Launch(case, folder, work / "data", environment)
    done: dict[str, Any] = {"strikes": [], "back_s": [], "steps_lost": 0, "orphans": 0}
    last: Struck | None = None
    for step in steps:
        seconds = draw.uniform(0.2, straight["start_s"])
        if not fault.inside and draw.random() < AT_START:
            until = (last.at if last else launch.begun) + seconds
            launch.wait(lambda until=until: time.time() > until)
            moment = f"{seconds:.1f} s of a start"
        else:
            if last:
                _recovered(launch, done, last)
            launch.wait(
                struck.exists if fault.inside else lambda step=step: len(rows(folder)) >= step
            )
            time.sleep(draw.uniform(0.0, 0.1))  # anywhere within a step, or a save
            moment = f"after step {step}"
        last = Struck.now(folder)
        done["strikes"].append([moment, fault.strike(launch, draw, case.ranks)])
        if fault.again:
            done["orphans"] += launch.orphans
            launch = Launch(case, folder, work / "data", {})
    assert last is not None
    _recovered(launch, done, last)
    launch.wait()
    restarts = [event for event in events(folder) if event["event"] == "restarted"]
    return {
        **asdict(case),
        **done,
        "code": launch.process.returncode,
        "restarts": max((event["count"] for event in restarts), default=0),
        "reasons": [event["reason"] for event in restarts],
        "orphans": done["orphans"] + launch.orphans,
        "rows": len(rows(folder)),
        "rows_differ": differing(rows(folder), straight["rows"]),
        "tensors_differ": differing_tensors(folder, work / "runs" / straight["name"]),
    }


def _recovered(launch: Launch, done: dict[str, Any], struck: Struck) -> None:
    """Wait for the next step after a fault; add what it took, and which steps were lost."""

    def begun() -> list[int]:
        new = events(launch.folder)[struck.events :]
        return [event["step"] for event in new if event["event"] in ("started", "resumed")]

    launch.wait(lambda: bool(begun()) and len(rows(launch.folder)) > begun()[-1])
    if begun():
        done["back_s"].append(round(time.time() - struck.at, 2))
        done["steps_lost"] += max(0, struck.saved - begun()[0])


def undisturbed(case: Case, work: Path) -> dict[str, Any]:
    """The same run without a fault: made once, with the launcher of the first case."""
    name = f"straight-{case.setting}-{case.ranks}"
    folder, known = work / "runs" / name, work / "runs" / f"{name}.done"
    if not known.exists():
        clear(folder)
        launch = Launch(case, folder, work / "data", {})
        launch.wait(lambda: bool(rows(folder)))
        start_s = time.time() - launch.begun
        launch.wait()
        if launch.process.returncode or len(rows(folder)) != STEPS:
            sys.exit(f"{name} did not train: {folder.with_suffix('.log')}")
        known.write_text(json.dumps(start_s))
    return {"name": name, "rows": rows(folder), "start_s": json.loads(known.read_text())}


def passed(done: dict[str, Any]) -> bool:
    """Whether nothing was lost, and no second command was needed where none should be."""
    clean = not any(
        done[key] for key in ("code", "orphans", "steps_lost", "rows_differ", "tensors_differ")
    )
    return clean and (FAULTS[done["fault"]].again or bool(done["restarts"]))


def summary(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Counts by fault, setting, ranks and launcher."""
    keys = ("fault", "setting", "ranks", "plain")
    found = []
    for group in dict.fromkeys(tuple(case[key] for key in keys) for case in cases):
        of = [case for case in cases if tuple(case[key] for key in keys) == group]
        back = sorted(seconds for case in of for seconds in case["back_s"])
        found.append(
            {
                **dict(zip(keys, group, strict=True)),
                "cases": len(of),
                "passed": sum(map(passed, of)),
                "strikes": sum(whom != NOBODY for case in of for _, whom in case["strikes"]),
                **{key: sum(case[key] for case in of) for key in COUNTED},
                "back_s_median": round(statistics.median(back), 1) if back else None,
                "back_s_largest": back[-1] if back else None,
            }
        )
    return found


def table(counts: list[dict[str, Any]]) -> str:
    """The counts as lines of text."""
    lines = ["  ".join(f"{key:>14}" for key in counts[0])] if counts else []
    lines += ["  ".join(f"{value!s:>14}" for value in count.values()) for count in counts]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--fault", nargs="+", choices=FAULTS, default=["kill"])
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=["zero0"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2])
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--times", type=int, default=1, help="strikes in one launch")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--plain", action="store_true", help="torch's torchrun, not ours")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    begun = time.time()
    write_data(given.work / "data")
    file = given.work / "cases.jsonl"
    done = {case["name"]: case for case in read(file)}
    wanted = [
        Case(fault, setting, ranks, number, given.plain, given.times)
        for fault in given.fault
        for setting in given.setting
        for ranks in given.ranks
        for number in range(given.count)
    ]
    for case in wanted:
        if case.name in done or time.time() - begun > given.seconds:
            continue
        found = {"name": case.name, **disturbed(case, given.work)}
        done[case.name] = found
        with open(file, "a") as out:
            out.write(json.dumps(found) + "\n")
        if passed(found):
            clear(given.work / "runs" / case.name)
        moments = ", ".join(moment for moment, _ in found["strikes"])
        print(f"{case.name}: {'passed' if passed(found) else 'FAILED'}, {moments}", flush=True)
    counts = summary(list(done.values()))
    print(table(counts))
    left = sum(case.name not in done for case in wanted)
    print(f"{left} cases are left" if left else "all cases are done")
    if given.out is not None:
        write(given.out, counts, list(done.values()))


def write(out: Path, counts: list[dict[str, Any]], cases: list[dict[str, Any]]) -> None:
    """Write the counts, all cases and where they were counted."""
    from allometry.trainer.record.writer import commit, versions

    facts = {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores of {platform.machine()}",
        "versions": versions(),
        "steps": STEPS,
        "save_every_steps": SAVE_EVERY,
    }
    out.write_text(json.dumps(facts | {"counts": counts, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
