"""Inject faults into real launches and compare each run bitwise with an undisturbed one.

    python benchmarks/faults.py --work DIR [--fault kill ...] [--setting zero0 ...] [--ranks 2 4]
                                [--count 20] [--times 1] [--seconds 240] [--out FILE] [--plain]

A case is a fault, a setting (fault_settings.py), a number of ranks and a seed. The seed determines
the affected rank and the moment, which is during startup or after a step. With ``--times N`` the
fault occurs N times in one launch, some of them during a restart. The script trains through
``allometry.launch`` (``--plain``: through torch's torchrun), injects the fault, waits for the end,
and compares every row of metrics and every tensor of the last checkpoint bitwise with an
undisturbed run. Finished cases are stored in DIR/cases.jsonl, so that the same command continues
with the remaining ones. No case starts after ``--seconds``. ``--out`` writes counts and all cases.

For example, ``--work /tmp/faults --fault kill stop --ranks 2 --count 3`` runs six cases.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fault_compare import clear, differing, differing_tensors, events, newest, read, rows
from fault_kinds import FAULTS, NOBODY, Fault, mounted, unmounted
from fault_launch import Case, Launch
from fault_settings import SAVE_EVERY, SETTINGS, STEPS, write_data

AT_START = 0.25  # share of faults injected during startup
REFUSED = 2  # exit code of a launch that ends with an error sentence
COUNTED = (
    *("restarts", "rows", "rows_differ", "tensors_differ", "steps_lost", "orphans"),
    *("felt", "healed", "refused"),
)


@dataclass(frozen=True)
class Struck:
    """Moment of a fault: step of the newest checkpoint, number of events, time."""

    saved: int
    events: int
    at: float

    @classmethod
    def now(cls, folder: Path) -> Struck:
        """Return the current moment."""
        return cls(newest(folder), len(events(folder)), time.time())


def disturbed(case: Case, work: Path) -> dict[str, Any]:
    """Run a case; return its outcome."""
    folder = work / "runs" / case.name
    draw, fault = random.Random(case.name), FAULTS[case.fault]
    first_step = SAVE_EVERY + 2 if fault.files == "FAULT_READS" else 1  # after a checkpoint
    steps = sorted(draw.randrange(first_step, fault.last) for _ in range(case.times))
    overrides, others = fault.overrides(steps[0])
    straight = undisturbed(case, work, others)
    unmounted(folder)
    clear(folder)
    if fault.full:
        mounted(folder)
    struck = folder.with_suffix(".struck")
    environment = fault.environment(case, draw, steps[0], work)
    launch = Launch(case, folder, work / "data", environment, overrides)
    done: dict[str, Any] = {"strikes": [], "back_s": [], "steps_lost": 0, "orphans": 0}
    last: Struck | None = None
    for step in steps:
        seconds = draw.uniform(0.2, straight["start_s"])
        if fault.anywhere and draw.random() < AT_START:
            until = (last.at if last else launch.begun) + seconds
            launch.wait(lambda until=until: time.time() > until)
            moment = f"{seconds:.1f} s of a start"
        else:
            if last:
                _recovered(launch, done, last)
            launch.wait(
                struck.exists if fault.inside else lambda step=step: len(rows(folder)) >= step
            )
            time.sleep(draw.uniform(0.0, 0.1))  # any time within a step or a save
            moment = f"after step {step}"
        last = Struck.now(folder)
        done["strikes"].append([moment, fault.strike(launch, draw, case.ranks)])
        if fault.again:
            done["orphans"] += launch.orphans
            launch = Launch(case, folder, work / "data", {}, overrides)
    assert last is not None
    if fault.restarts:
        _recovered(launch, done, last)
    launch.wait()
    refused = fault.files == "FAULT_READS" and launch.process.returncode == REFUSED
    if refused:  # the disk reads correctly now; run the command again
        done["orphans"] += launch.orphans
        launch = Launch(case, folder, work / "data", {}, overrides)
        _recovered(launch, done, last)
        launch.wait()
    done["orphans"] += launch.orphans
    return {
        **asdict(case),
        **done,
        "code": launch.process.returncode,
        "refused": int(refused),
        **_left(folder, fault, straight["rows"], work / "runs" / straight["name"]),
    }


def _left(
    folder: Path, fault: Fault, straight: list[dict[str, Any]], other: Path
) -> dict[str, Any]:
    """Return the outcome in the run folder, compared with the undisturbed run."""
    said = folder.with_suffix(".log").read_text(errors="replace")
    restarts = [event for event in events(folder) if event["event"] == "restarted"]
    return {
        "restarts": max((event["count"] for event in restarts), default=0),
        "reasons": [event["reason"] for event in restarts],
        "felt": fault.felt(folder),
        "healed": said.count("was read wrongly at first"),
        "rows": len(rows(folder)),
        "rows_differ": differing(rows(folder), straight, fault.but),
        "tensors_differ": differing_tensors(folder, other),
    }


def _recovered(launch: Launch, done: dict[str, Any], struck: Struck) -> None:
    """Wait for the next step after a fault; add recovery time and lost steps to ``done``."""

    def begun() -> list[int]:
        new = events(launch.folder)[struck.events :]
        return [event["step"] for event in new if event["event"] in ("started", "resumed")]

    launch.wait(lambda: bool(begun()) and len(rows(launch.folder)) > begun()[-1])
    if begun():
        done["back_s"].append(round(time.time() - struck.at, 2))
        done["steps_lost"] += max(0, struck.saved - begun()[0])


def undisturbed(case: Case, work: Path, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the reference run without a fault, made once with the launcher of the first case."""
    more = "".join(f"-{each}" for each in overrides)
    name = f"straight-{case.setting}-{case.ranks}{more}"
    folder, known = work / "runs" / name, work / "runs" / f"{name}.done"
    if not known.exists():
        clear(folder)
        launch = Launch(case, folder, work / "data", {}, overrides)
        launch.wait(lambda: bool(rows(folder)))
        start_s = time.time() - launch.begun
        launch.wait()
        if launch.process.returncode or len(rows(folder)) != STEPS:
            sys.exit(f"{name} did not train: {folder.with_suffix('.log')}")
        known.write_text(json.dumps(start_s))
    return {"name": name, "rows": rows(folder), "start_s": json.loads(known.read_text())}


def passed(done: dict[str, Any]) -> bool:
    """True if the run lost nothing and was started again only where the fault requires it."""
    clean = not any(
        done[key] for key in ("code", "orphans", "steps_lost", "rows_differ", "tensors_differ")
    )
    fault = FAULTS[done["fault"]]
    if fault.files == "FAULT_READS" and not (done["healed"] or done["refused"]):
        return False  # the wrong read was not reported, or did not occur
    if not fault.restarts:
        return clean and bool(done["felt"]) and not done["restarts"]
    return clean and (fault.again or bool(done["restarts"] or done["refused"]))


def summary(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return counts by fault, setting, number of ranks and launcher."""
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
                **{key: sum(case.get(key, 0) for case in of) for key in COUNTED},
                "back_s_median": round(statistics.median(back), 1) if back else None,
                "back_s_largest": back[-1] if back else None,
            }
        )
    return found


def table(counts: list[dict[str, Any]]) -> str:
    """Format the counts as lines of text."""
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
    for name in given.fault:
        lacks = FAULTS[name].lacking()
        if lacks is not None:
            print(f"{name} is left out: this machine lacks {lacks}", flush=True)
            wanted = [case for case in wanted if case.fault != name]
    for case in wanted:
        if case.name in done or time.time() - begun > given.seconds:
            continue
        found = {"name": case.name, **disturbed(case, given.work)}
        done[case.name] = found
        with open(file, "a") as out:
            out.write(json.dumps(found) + "\n")
        if passed(found):
            unmounted(given.work / "runs" / case.name)
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
    """Write the counts, all cases and the facts of the machine and code."""
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
