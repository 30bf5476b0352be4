"""Run the study of ``benchmarks/transfer.py``: text, resumable sweeps, rows with regrets."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.configs.data import SequenceData
from allometry.configs.optimization import WSDSchedule
from allometry.data.manifest import read_manifest
from allometry.data.prepare import PrepareRequest, prepare
from allometry.laws.optimum import Sweep, drift, drift_interval
from allometry.laws.regret import PERCENT, Regret, Verdict, against
from allometry.scaling.shapes import Axis
from allometry.studies.sweeps.outcome import Transfer
from allometry.studies.sweeps.probe import read_pools
from allometry.studies.sweeps.runner import Runner
from allometry.studies.sweeps.transfer import TransferSweep
from allometry.studies.sweeps.trials import TrialLog
from contenders.families import optimizer
from contenders.study_families import Cut, Entry

OVER = 8
"""Factor of an axis up to which the gate applies; beyond it, regrets are only reported."""
SCHEDULE = WSDSchedule(decay_fraction=0.2)
BUILTIN = ("python-code", "python-prose")
SPARE = 1.25
"""Size of a text pool relative to the tokens of its longest run, if enough text is available, so
that the order of each seed selects different text."""


@dataclass(frozen=True)
class Text:
    """Token files of the built-in corpora in a folder, and their number of tokens."""

    data: SequenceData
    tokens: int

    @classmethod
    def prepared(cls, folder: Path, cut: Cut) -> Text:
        """Return the text of a cut, and prepare missing files."""
        if read_manifest(folder) is None:
            inputs = tuple(f"builtin:{name}" for name in BUILTIN)
            prepare(
                PrepareRequest(
                    inputs, str(folder), vocab_size=cut.vocabulary, max_bytes=cut.max_bytes
                )
            )
        manifest = read_manifest(folder)
        assert manifest is not None, folder
        counts = {name: manifest.sources[name].splits["train"].tokens for name in BUILTIN}
        sources = [
            {"name": name, "train": str(folder / f"{name}.train"), "weight": tokens}
            for name, tokens in counts.items()
        ]
        data = SequenceData.model_validate(
            {
                "sequence_length": cut.length,
                "packing": "concatenated",
                "tokenizer": str(folder / "tokenizer.json"),
                "sources": sources,
            }
        )
        return cls(data, sum(counts.values()))

    def pools(self, entry: Entry) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return training and held-out sequences; no sequence is in both."""
        cut = entry.cut
        longest = max(entry.sizes) if entry.axis == Axis.HORIZON else entry.steps
        needed = longest * cut.sequences
        held_out = cut.held_out
        there = int(0.99 * self.tokens / cut.length) - held_out  # each source is read once
        wanted = min(math.ceil(SPARE * needed), max(needed, there))
        pool_PL, held_out_HL = read_pools(self.data, 0, cut.length, [wanted, held_out])
        return pool_PL, held_out_HL


def sweep_of(entry: Entry, text: Text) -> TransferSweep:
    """Return the sweep that trains the runs of a row."""
    pool_PL, held_out_HL = text.pools(entry)
    return TransferSweep(
        model=entry.model,
        parameterization=entry.config,
        optimizer=optimizer(entry.kind, 1.0),
        pool_PL=pool_PL,
        held_out_HL=held_out_HL,
        axis=entry.axis,
        steps=entry.steps,
        sequences=entry.cut.sequences,
        warmup_steps=entry.warmup_steps,
        schedule=SCHEDULE,
    )


def run_entry(
    entry: Entry, sizes: Sequence[int], text: Text, given: argparse.Namespace
) -> Transfer:
    """Train the missing runs of a row at the given sizes; each run is stored when it ends."""
    sweep = sweep_of(entry, text)
    log = TrialLog(given.work / f"{entry.slug}.jsonl", sweep.settings())
    runner = Runner(
        sweep,
        entry.log2_lrs,
        0.5,
        given.processes,
        known=log.known,
        done=log.add,
        engine=given.engine,
        device=given.device,
        place_first=True,
    )
    return runner.run(sizes, tuple(range(entry.cut.seeds)))


def row_of(entry: Entry, found: Transfer, compared: Transfer | None) -> dict[str, Any]:
    """Return the report of a row as JSON values."""
    sweeps = {size: found.sweep(size) for size in found.sizes}
    base = min(found.sizes)
    regrets = found.regrets()
    return {
        "part": entry.part,
        "name": entry.name,
        "axis": entry.axis.value,
        "parameterization": entry.config.model_dump(mode="json"),
        "optimizer": optimizer(entry.kind, 1.0).model_dump(mode="json"),
        "model": entry.model.model_dump(mode="json"),
        "steps": entry.steps,
        "batch_tokens": entry.cut.sequences * entry.cut.length,
        "compared": entry.compared,
        "gate": gate(regrets, base),
        "drift_octaves": _finite(drift(sweeps)),
        "drift_interval_95": [_finite(end) for end in _drift_interval(found, sweeps)],
        "by_size": {
            str(size): regret.describe()
            | {"verdict": regret.verdict(), "fifth": _fifth(found, compared, size)}
            for size, regret in regrets.items()
        },
        "found": found.describe(),
        "losses": [
            [trial.size, trial.log2_lr, trial.seed, _finite(loss)]
            for trial, loss in sorted(found.losses.items())
        ],
    }


def gate(regrets: Mapping[int, Regret], base: int) -> Verdict:
    """Return whether the regrets up to ``OVER`` times the base are within bounds."""
    verdicts = {regret.verdict() for size, regret in regrets.items() if size <= OVER * base}
    for verdict in ("missed", "undecided"):
        if verdict in verdicts:
            return verdict
    return "met" if verdicts else "undecided"


def _fifth(found: Transfer, compared: Transfer | None, size: int) -> Verdict | None:
    """Test if a size's regret is at most a fifth of the compared row's; None without one."""
    if compared is None or size not in compared.sizes:
        return None
    base = min(found.sizes)
    ours, theirs = ((some.sweep(base), some.sweep(size)) for some in (found, compared))
    return against(ours, theirs)


def _drift_interval(found: Transfer, sweeps: Mapping[int, Sweep]) -> tuple[float, float]:
    return (math.nan, math.nan) if math.isnan(found.drift()) else drift_interval(sweeps)


HEADER = (
    "| | best rates, log2 | drift (95 %) | regret at each size, % of the loss (95 %) "
    "| ≤ a fifth of sp's | gate |\n|---|---|---|---|---|---|"
)


def line(row: Mapping[str, Any]) -> str:
    """Format a row as a line of a table; ? marks an optimum at an edge."""
    sizes = row["found"]["sizes"]
    rates = " / ".join(f"{one['log2_lr']:.2f}{'?' if one['problem'] else ''}" for one in sizes)
    low, high = row["drift_interval_95"]
    octaves = f"{_number(row['drift_octaves'])} ({_number(low)} to {_number(high)})"
    costs = " / ".join(f"{size}: {_cost(one)}" for size, one in row["by_size"].items())
    fifths = " / ".join(one["fifth"] or "-" for one in row["by_size"].values())
    gate = f"{row['gate']} at {PERCENT:g} %"
    return f"| {row['name']} | {rates} | {octaves} | {costs} | {fifths} | {gate} |"


def _cost(one: Mapping[str, Any]) -> str:
    if one["diverged"]:
        return "diverges"
    low, high = one["percent_interval"]
    return f"{_number(one['percent'])} ({_number(low)} to {_number(high)})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")
