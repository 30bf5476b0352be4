"""Mutate configs of runs and ladders; each must give a plan or an error of one sentence.

    python benchmarks/fuzz.py [--count 10000] [--first 0] [--seconds 240] [--out FILE]
    python benchmarks/fuzz.py --show N

Case N is generated from the seed N alone: the text or the tree of a preset (keys removed,
duplicated, renamed or moved, values of other types, hostile YAML), with or without overrides. Each
case passes through the loader, the plan and the checks of ``--dry-run``, or through the ladder's
plan. The script prints one example of each kind of failure: a traceback, a hang longer than
``LIMIT_S``, or a message that is not a sentence. It exits with code 1 if there is any. ``--first``
continues where an earlier call ended: for example, ``--first 10000 --count 500`` runs the cases
10000 to 10499. ``--show N`` prints case N and raises its error.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from allometry.configs.errors import UserError
from allometry.configs.ladder import LadderConfig, load_ladder
from allometry.configs.loader import dump, ladder_presets, load, presets, yaml_text
from allometry.configs.run import RunConfig
from allometry.data.synthetic import write_random_store
from allometry.launch.runs.dry_run import data_here, learning_rates
from allometry.optim.schedule import schedules_of
from allometry.scaling.advice import advice
from allometry.scaling.plan import RunPlan
from allometry.scaling.search.auto import settle
from allometry.studies.ladder.plan import plan_ladder

LIMIT_S = 20  # of processor time
WAIT_S = 300  # of elapsed time, for a case that waits
MEMORY_BYTES = 6 << 30
LONGEST = 1000  # characters of an error sentence
WORLD_SIZES = (1, 1, 1, 2, 3, 4, 8, 64)
NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 1 << 31, 1 << 63, 10**12, 10**30, 0.0, -0.5, 0.5, 1.5, 1e-320, 1e308),
    *(float("inf"), float("nan")),
)
WORDS = ("", " ", "auto", "null", "none", "1e9", "1_000", "~", "$HOME/x", "$NOT_THERE", "~nobody/x")
WORDS = (*WORDS, "preset:demo", "../..", "a/b", "\u0000", "\u202e", "é" * 300, "x" * 5000, "1,2")
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [{}], [None], {"kind": None}, {"": ""})
TEXTS = (
    *("&a [*a]", "*nowhere", "!!python/object/apply:os.system [id]", "!!bool x", "!foo bar"),
    *("2001-01-01", "!!binary aGk=", "!!set {x}", "0x", "[", "}", "'", '"', "|", ">", "- ", "? "),
    *(": ", "#", "%YAML 9.9", "---", "\t", "\x07", "<<: 5", "<<: *a", "9" * 5000, "[" * 500),
)


class Hang(BaseException):
    """Raised when a case takes longer than ``LIMIT_S`` or ``WAIT_S``."""


def hostile(rng: random.Random) -> Any:
    """Return a value of an unexpected kind for a config key."""
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(NUMBERS)
    return rng.choice(WORDS) if kind < 0.75 else copy.deepcopy(rng.choice(OTHERS))


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all nodes of a tree except its root."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in pairs:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from paths(value, (*path, key))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def changed(tree: dict[str, Any], keys: list[tuple[str, ...]], rng: random.Random) -> None:
    """Change one node of a tree in place."""
    places = list(paths(tree))
    if not places or rng.random() < 0.35:  # set a key of the schema
        path = rng.choice(keys)
        holder: Any = tree
        for key in path[:-1]:
            if not isinstance(holder.get(key), dict):
                holder[key] = {}
            holder = holder[key]
        holder[path[-1]] = hostile(rng)
        return
    path = rng.choice(places)
    holder, key = at(tree, path[:-1]), path[-1]
    kind = rng.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(["x", str(key) + "s", "kind", ""])] = holder.pop(key)
    elif kind == 2:
        holder[key] = copy.deepcopy(at(tree, rng.choice(places)))
    elif kind == 3:
        holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
    elif kind == 4 and isinstance(holder[key], int | float):
        holder[key] = holder[key] * rng.choice([-1, 0, 2, 1000, 10**6, 10**15, 0.1, 1.5])
    elif kind == 5 and isinstance(holder[key], list) and holder[key]:
        holder[key] = holder[key] * rng.choice([0, 2, 20])
    else:
        holder[key] = hostile(rng)


def scrambled(text: str, rng: random.Random) -> str:
    """Change a few characters or lines of a text."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = rng.randrange(len(text) + 1)
        lines = text.split("\n")
        line = rng.randrange(len(lines))
        kind = rng.randrange(7)
        if kind == 0:
            text = text[:place] + text[place + rng.choice([1, 1, 3, 40]) :]
        elif kind == 1:
            text = text[:place] + rng.choice(TEXTS) + text[place:]
        elif kind == 2:
            text = text[:place] + rng.choice("[]{}:,#&*!|>'\"%@`-?~ \n\t0x") + text[place:]
        elif kind == 3:
            lines.insert(line, rng.choice(lines))
            text = "\n".join(lines)
        elif kind == 4:
            lines[line] = rng.choice(["  ", " ", "\t", ""]) + lines[line].lstrip()
            text = "\n".join(lines)
        elif kind == 5:
            text = text[:place]
        else:
            key, colon, _ = lines[line].partition(":")
            lines[line] = f"{key}{colon} {rng.choice(TEXTS)}"
            text = "\n".join(lines)
    return text


def keys_of(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the paths of all keys of a config, for all variants of each section."""
    for key, field in model.model_fields.items():
        yield (*path, key)
        for section in sections(field.annotation):
            if len(path) < 4:
                yield from keys_of(section, (*path, key))


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from sections(inner)


class Fuzzer:
    """Generate and run cases; ``folder`` is scratch space."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_random_store(folder / "tokens", 60_000, 1000, mean_length=100)
        # Presets as written, and with existing data files, so that the data are checked as well.
        self.runs = [path.read_text() for path in presets().values()]
        self.ladders = [path.read_text() for path in ladder_presets().values()]
        self.trees = [load(f"preset:{name}").model_dump(mode="json") for name in presets()]
        for tree in self.trees:
            names = [source["name"] for source in tree["data"]["sources"]]
            tree["data"]["tokenizer"] = None
            tree["data"]["sources"] = [
                {"name": name, "train": str(folder / "tokens"), "weight": 1.0} for name in names
            ]
        self.plain = [self.read(text) for text in self.ladders]
        self.keys = list(dict.fromkeys(keys_of(RunConfig)))
        self.ladder_keys = list(dict.fromkeys(keys_of(LadderConfig)))

    @staticmethod
    def read(text: str) -> dict[str, Any]:
        from ruamel.yaml import YAML

        plain: dict[str, Any] = json.loads(json.dumps(YAML(typ="safe", pure=True).load(text)))
        return plain

    def case(self, number: int) -> tuple[str, str, list[str], int]:
        """Return the kind, text, overrides and number of ranks of a case."""
        rng = random.Random(number)
        kind = "ladder" if rng.random() < 0.2 else "run"
        overrides: list[str] = []
        if rng.random() < 0.4:
            text = scrambled(rng.choice(self.runs if kind == "run" else self.ladders), rng)
        else:
            tree = copy.deepcopy(rng.choice(self.trees if kind == "run" else self.plain))
            for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
                changed(tree, self.keys if kind == "run" else self.ladder_keys, rng)
            text = yaml_text(tree)
        for _ in range(rng.choice([0, 0, 1, 3]) if kind == "run" else 0):
            key = ".".join(rng.choice(self.keys))
            value = rng.choice(TEXTS) if rng.random() < 0.2 else hostile(rng)
            overrides.append(f"{key}={value}" if rng.random() < 0.95 else rng.choice(WORDS))
        return kind, text, overrides, rng.choice(WORLD_SIZES)

    def run(self, number: int) -> None:
        """Run a case; errors are raised to the caller."""
        kind, text, overrides, ranks = self.case(number)
        path = self.folder / "case.yaml"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        if kind == "ladder":
            plan_ladder(*load_ladder(path))
            return
        config = load(path, overrides)
        if number % 4 == 0:  # parsing YAML takes most of a case's time
            path.write_text(dump(config))
            assert load(path) == config, "what is written is read otherwise"
        config, _ = settle(config, ranks, "cuda")
        plans = RunPlan.of_stages(config, ranks)
        for one, plan, schedule in zip(
            config.of_stages(), plans, schedules_of(config), strict=True
        ):
            plan.describe()
            learning_rates(one, plan, schedule)
            advice(one, plan)
        data_here(config, plans[-1])


def tried(fuzzer: Fuzzer, number: int) -> str | None:
    """Run a case; return the kind of its failure, or None for a plan or an error sentence."""

    def late(*_: Any) -> None:
        raise Hang

    clocks = {signal.ITIMER_PROF: LIMIT_S, signal.ITIMER_REAL: WAIT_S}
    signal.signal(signal.SIGPROF, late)
    signal.signal(signal.SIGALRM, late)
    for clock, limit in clocks.items():
        signal.setitimer(clock, limit)
    try:
        fuzzer.run(number)
    except UserError as error:
        said = str(error)
        if "\n" in said or not said or len(said) > LONGEST:
            kind = "several lines" if "\n" in said else "too long" if said else "empty"
            return f"no sentence ({kind}): {said[:60]!r}"
    except Hang:
        places = traceback.extract_tb(sys.exc_info()[2])
        ours = [f"{Path(p.filename).name}:{p.lineno} {p.name}" for p in places][-12:-1]
        return f"hang: {' < '.join(reversed(ours))[:300]}"
    except BaseException as error:  # users would see a traceback
        places = traceback.extract_tb(error.__traceback__)
        ours = [p for p in places if "site-packages" not in p.filename][-1]
        place = f"{Path(ours.filename).name}:{ours.lineno} {ours.name}"
        return f"traceback: {type(error).__name__} at {place}: {str(error)[:150]!r}"
    finally:
        for clock in clocks:
            signal.setitimer(clock, 0)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=int, help="print one case and what it raises")
    asked = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    kinds: Counter[str] = Counter()
    example: dict[str, int] = {}
    begun, number = time.monotonic(), asked.first
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        fuzzer = Fuzzer(Path(scratch))
        if asked.show is not None:
            kind, text, overrides, ranks = fuzzer.case(asked.show)
            print(text, f"# {kind}, {ranks} rank(s), overrides {overrides}", sep="\n")
            fuzzer.run(asked.show)
            return 0
        while number < asked.first + asked.count and time.monotonic() - begun < asked.seconds:
            failure = tried(fuzzer, number)
            if failure is not None:
                if failure not in kinds:
                    print(f"case {number}: {failure}", flush=True)
                example.setdefault(failure, number)
                kinds[failure] += 1
            number += 1
    tried_cases = number - asked.first
    print(f"cases {asked.first} to {number - 1}: {tried_cases - sum(kinds.values())} fine")
    for failure, count in kinds.most_common():
        print(f"{count:5}  case {example[failure]}: {failure}")
    facts = {"first": asked.first, "cases": tried_cases, "failures": kinds}
    if asked.out is not None:
        asked.out.write_text(json.dumps(facts, indent=1) + "\n")
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
