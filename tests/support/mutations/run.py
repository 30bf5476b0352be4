"""Plant one-line faults in the hot path, one at a time, and count the faults that tests detect.

    PYTHONPATH=tests/support python -m mutations.run --count 100 --jobs 2 --out mutations.json

Each fault is planted in a copy of the tree; the tests that cover its file run in stages, fastest
first, until one fails. A fault with a stored result (by file, function and line) runs again only
when its line changes. ``--list`` prints the faults, ``--files`` selects by pattern, ``--report``
prints the stored results. Faults of ``equivalent.py`` have no observable effect, and count neither
as killed nor as survived.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mutations.choose import Mutant, sampled, written
from mutations.covering import Stage, hot_files, stages_of
from mutations.equivalent import reason_of

ROOT = Path(__file__).resolve().parents[3]
ORDER = ("data", "scaling", "optim", "models", "trainer", "parallel")  # fastest tests first
LEAST_LIMIT_S = 120.0
TIMES_BASELINE = 8.0
TRUSTED_S = 100.0


def main() -> None:
    asked = _arguments()
    files = [f for f in hot_files(ROOT) if not asked.files or fnmatch(f, asked.files)]
    by_hand, stale = written(ROOT)
    by_hand = [mutant for mutant in by_hand if mutant.file in files]
    mutants = by_hand + sampled(ROOT, asked.count, asked.seed, files)
    mutants.sort(key=lambda mutant: ORDER.index(mutant.file.partition("/")[0]))
    for words in stale:
        print(f"fits no more: {words}", file=sys.stderr)
    if asked.list:
        for mutant in mutants:
            print(f"{mutant.key} {mutant.file}:{mutant.line} [{mutant.operator}] {mutant.after}")
        return
    book = Book(asked.out)
    if not asked.report:
        until = time.monotonic() + asked.budget_s
        Runner(book, asked.jobs, until, asked.stages, trust=asked.trust).run(mutants)
    print(book.summary(mutants))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="faults besides those by hand")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    parser.add_argument("--files", help="only files of this pattern, such as 'optim/*'")
    parser.add_argument("--out", type=Path, required=True, help="results, read and added to")
    parser.add_argument("--budget-s", type=float, default=1e9, help="start none after this")
    parser.add_argument(
        "--trust", action="store_true", help="take it that all tests pass without a fault"
    )
    parser.add_argument(
        "--stages", type=int, default=99, help="run that many; what passes them is not judged"
    )
    parser.add_argument("--list", action="store_true", help="show the faults and run nothing")
    parser.add_argument("--report", action="store_true", help="print what is known, run nothing")
    return parser.parse_args()


class Book:
    """Results by key of a fault, and seconds of each stage without a fault; a JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        held = json.loads(path.read_text()) if path.exists() else {}
        self.results: dict[str, dict[str, Any]] = held.get("results", {})
        self.baseline: dict[str, float | None] = held.get("baseline", {})

    def save(self) -> None:
        fresh = self._path.with_suffix(".part")
        content = {"baseline": self.baseline, "results": self.results}
        fresh.write_text(json.dumps(content, indent=1) + "\n")
        fresh.replace(self._path)

    def summary(self, mutants: list[Mutant]) -> str:
        """Summarize the results of these faults, with the survivors by name."""
        fates: Counter[str] = Counter()
        lines = []
        for mutant in mutants:
            result = self.results.get(mutant.key)
            reason = reason_of(mutant)
            fate = "equivalent" if reason else result["fate"] if result else "not run"
            fates[fate] += 1
            if fate == "survived":
                lines += [
                    f"{mutant.file}:{mutant.line} [{mutant.operator}] {mutant.key}",
                    f"    - {mutant.before}",
                    f"    + {mutant.after}",
                ]
        judged = fates["killed"] + fates["survived"]
        lines.append(", ".join(f"{count} {fate}" for fate, count in sorted(fates.items())))
        if judged:
            lines.append(f"killed: {fates['killed']} of {judged}, {fates['killed'] / judged:.1%}")
        return "\n".join(lines)


@dataclass
class Task:
    """Fault and its remaining stages, in a tree of its own."""

    mutant: Mutant
    tree: Path
    stages: list[Stage]
    begun: float
    planned: int
    child: int = 0
    deadline: float = 0.0
    log: Path = Path()
    retried: bool = False


class Runner:
    """Run faults in ``jobs`` trees; a stage is a fork of a process that has imported torch."""

    def __init__(self, book: Book, jobs: int, until: float, most: int, *, trust: bool) -> None:
        self._book, self._jobs, self._until, self._trust = book, jobs, until, trust
        self._most = most

    def run(self, mutants: list[Mutant]) -> None:
        """Run all faults without a stored result."""
        import hypothesis  # noqa: F401  (imported once, before the forks)
        import pydantic  # noqa: F401
        import pytest  # noqa: F401
        import torch.distributed  # noqa: F401

        waiting = [
            mutant
            for mutant in mutants
            if mutant.key not in self._book.results and reason_of(mutant) is None
        ]
        with tempfile.TemporaryDirectory(prefix="mutations-") as scratch:
            self._clean = _copy_tree(Path(scratch) / "clean")
            trees = [_copy_tree(Path(scratch) / f"tree-{job}") for job in range(self._jobs)]
            running: list[Task] = []
            while waiting or running:
                while waiting and trees and time.monotonic() < self._until:
                    task = self._begin(waiting.pop(0), trees.pop())
                    running.append(task)
                if not running:
                    break
                time.sleep(0.2)
                for task in list(running):
                    fate = self._look(task)
                    if fate is not None:
                        running.remove(task)
                        trees.append(task.tree)
                        self._finish(task, *fate)

    def _begin(self, mutant: Mutant, tree: Path) -> Task:
        (tree / mutant.file).write_text(mutant.text, encoding="utf-8")
        stages = stages_of(ROOT, mutant.file)
        task = Task(mutant, tree, stages[: self._most], time.monotonic(), len(stages))
        self._next(task)
        return task

    def _measure(self, stage: Stage) -> float | None:
        """Return the seconds of a stage without a fault, measured once; None if the stage fails."""
        name = " ".join(stage.arguments(self._clean))
        if name in self._book.baseline:
            return self._book.baseline[name]
        if self._trust:
            return TRUSTED_S
        begun = time.monotonic()
        log = self._clean.with_suffix(".log")
        child = _fork(stage, self._clean, log)
        _, status = os.waitpid(child, 0)
        seconds = round(time.monotonic() - begun, 1)
        passed = os.waitstatus_to_exitcode(status) == 0
        self._book.baseline[name] = seconds if passed else None
        self._book.save()
        print(f"without a fault: {name}: {seconds if passed else 'FAILS'}", flush=True)
        if not passed:
            print(log.read_text()[-2000:], flush=True)
        return self._book.baseline[name]

    def _next(self, task: Task) -> bool:
        """Start the next stage of a fault; return False if there is none."""
        while task.stages:
            seconds = self._measure(task.stages[0])
            if seconds is None:
                task.stages.pop(0)
                continue
            task.log = task.tree.with_suffix(".log")
            task.child = _fork(task.stages[0], task.tree, task.log)
            task.deadline = time.monotonic() + max(LEAST_LIMIT_S, TIMES_BASELINE * seconds)
            return True
        return False

    def _look(self, task: Task) -> tuple[str, str] | None:
        """Return the result of a fault once it is known."""
        done, status = os.waitpid(task.child, os.WNOHANG)
        late = not done and time.monotonic() > task.deadline
        if late:
            os.killpg(task.child, signal.SIGKILL)
            os.waitpid(task.child, 0)
        elif not done:
            return None
        elif os.waitstatus_to_exitcode(status) == 0:
            task.stages.pop(0)
            task.retried = False
            passed = "survived" if task.planned <= self._most else "not judged"
            return None if self._next(task) else (passed, "")
        text = task.log.read_text(errors="replace")
        if (late or "imed out" in text) and not task.retried:  # the machine may have been busy
            task.retried = True
            self._next(task)
            return None
        return ("killed", "time" if late else _first_failure(text))

    def _finish(self, task: Task, fate: str, by: str) -> None:
        mutant = task.mutant
        (task.tree / mutant.file).write_text(
            (self._clean / mutant.file).read_text(encoding="utf-8"), encoding="utf-8"
        )
        print(f"{fate}: {mutant.file}:{mutant.line} {mutant.after}  ({by})", flush=True)
        if fate == "not judged":
            return
        self._book.results[mutant.key] = {
            "fate": fate,
            "by": by,
            "seconds": round(time.monotonic() - task.begun, 1),
            "file": mutant.file,
            "operator": mutant.operator,
            "place": mutant.place,
            "before": mutant.before,
            "after": mutant.after,
        }
        self._book.save()


def _copy_tree(target: Path) -> Path:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_symlink() or (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


def _fork(stage: Stage, tree: Path, log: Path) -> int:
    """Run pytest in a child that leads a process group; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: children end with the script
        with log.open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.chdir(tree)
        os.environ |= {
            "PYTHONPATH": str(tree / ".typing"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "CI": "1",  # makes hypothesis deterministic
        }
        sys.dont_write_bytecode = True
        ours = {str(ROOT), str(ROOT / ".typing"), str(ROOT / "tests/support")}
        paths = [path for path in sys.path if path and str(Path(path).resolve()) not in ours]
        sys.path[:] = [str(tree), str(tree / ".typing"), *paths]  # as in python -m pytest
        for name in [n for n in sys.modules if n == "mutations" or n.startswith("mutations.")]:
            del sys.modules[name]
        # Processes spawned by tests import the main module, which is not the tests' own.
        sys.modules["__main__"] = ModuleType("__main__")
        words = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--tb=short"]
        code = int(pytest.main([*words, *stage.arguments(tree)]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def _first_failure(text: str) -> str:
    named = [line for line in text.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return named[0].split(" ")[1] if named else "the tests could not run"


if __name__ == "__main__":
    main()
