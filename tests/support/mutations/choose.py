"""Selection of faults to plant: hand-written ones, and a sample of the operators' faults."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mutations.covering import hot_files
from mutations.operators import Fault, apply, changed_line, faults_of
from mutations.planted import PLANTED


@dataclass(frozen=True)
class Mutant:
    """File with one fault; ``before`` and ``after`` are the changed line, stripped."""

    file: str
    operator: str
    place: str
    line: int
    before: str
    after: str
    text: str

    @property
    def key(self) -> str:
        """Return a name that is stable while the line is unchanged."""
        parts = (self.file, self.place, self.before, self.after)
        return hashlib.sha256("|".join(parts).encode()).hexdigest()[:12]


def written(root: Path) -> tuple[list[Mutant], list[str]]:
    """Return the hand-written faults, and messages for those that no longer match the sources."""
    made, stale = [], []
    for plant in PLANTED:
        path = root / plant.file
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text.count(plant.old) != 1:
            stale.append(f"{plant.file}: {plant.name}: {text.count(plant.old)} places")
            continue
        start = len(text[: text.index(plant.old)].encode())
        fault = Fault("written", start, start + len(plant.old.encode()), plant.new, plant.name)
        made.append(_mutant(plant.file, text, fault))
    return made, stale


def sampled(root: Path, count: int, seed: int, files: list[str] | None = None) -> list[Mutant]:
    """Return ``count`` faults of the hot path, balanced over files and operators.

    The order is that of hashes of (seed, file, fault), so that an edit of one file does not change
    the selection in other files.
    """
    piles: dict[str, list[Mutant]] = {}
    for file in files if files is not None else hot_files(root):
        text = (root / file).read_text(encoding="utf-8")
        pile = {m.key: m for m in (_mutant(file, text, fault) for fault in faults_of(text))}
        piles[file] = sorted(pile.values(), key=lambda m: _hash(seed, m.key))
    order = sorted(piles, key=lambda file: _hash(seed, file))
    chosen: list[Mutant] = []
    used: Counter[str] = Counter()
    while len(chosen) < count and any(piles.values()):
        for file in order:
            if piles[file] and len(chosen) < count:
                rarest = min(piles[file], key=lambda m: used[m.operator])
                piles[file].remove(rarest)
                used[rarest.operator] += 1
                chosen.append(rarest)
    return chosen


def _hash(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}|{name}".encode()).hexdigest()


def _mutant(file: str, text: str, fault: Fault) -> Mutant:
    line, before, after = changed_line(text, fault)
    return Mutant(file, fault.operator, fault.place, line, before, after, apply(text, fault))
