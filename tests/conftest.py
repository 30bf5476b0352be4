"""Tiny runs that all rooms' tests share."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from allometry.configs.run import RunConfig
from allometry.data.synthetic import write_store

VOCAB = 64
SLOW_CASES = Path(__file__).with_name("slow_cases.txt")
# A busy machine is no fault of an example. A change is judged on the same examples each time; new
# ones are tried wherever people work.
settings.register_profile("people", deadline=None)
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "people")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the cases of ``slow_cases.txt`` as slow; a line that matches no case is an error.

    A line names a case (``tests/dist/test_dist_ring.py::test_rings[4]``) or a function, for all of
    its cases. A line is checked only if its function is among ``items``.
    """
    lines = (line.partition("#")[0].strip() for line in SLOW_CASES.read_text().splitlines())
    named = {line for line in lines if line}
    functions = {item.nodeid.partition("[")[0] for item in items}
    cases = {item.nodeid for item in items} | functions
    # With a selection on the command line (``file.py::test[case]``) other cases are not collected.
    whole = not any("::" in argument for argument in config.args)
    stale = sorted(n for n in named if n.partition("[")[0] in functions and n not in cases)
    if stale and whole:
        raise pytest.UsageError(f"{SLOW_CASES} names {stale[0]}, which is not a case of that test")
    for item in items:
        if item.nodeid in named or item.nodeid.partition("[")[0] in named:
            item.add_marker(pytest.mark.slow)


def write_tiny_store(folder: Path) -> None:
    """Two sources of short documents that a tiny model can learn: counting up and counting down."""
    rng = np.random.default_rng(0)
    for name, direction in (("up", 1), ("down", -1)):
        for split, documents in (("train", 400), ("validation", 40)):
            lengths = rng.integers(5, 60, documents)
            starts = rng.integers(1, VOCAB, documents)
            write_store(
                folder / f"{name}.{split}",
                [
                    np.append((s + direction * np.arange(n)) % (VOCAB - 1) + 1, 0)
                    for s, n in zip(starts, lengths, strict=True)
                ],
            )


def tiny_description(store: Path, run: Path) -> dict[str, Any]:
    """A run of 20 steps that takes a second, as plain data to change and validate."""
    return {
        "run": {"folder": str(run), "seed": 3},
        "model": {
            "kind": "dense",
            "vocab_size": VOCAB,
            "width": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_width": 64,
            "qk_norm": True,
        },
        "parameterization": {"kind": "sp"},
        "data": {
            "sequence_length": 32,
            "sources": [
                {
                    "name": name,
                    "train": str(store / f"{name}.train"),
                    "validation": str(store / f"{name}.validation"),
                    "weight": weight,
                }
                for name, weight in (("up", 0.7), ("down", 0.3))
            ],
        },
        "batch": {"sequences": 8, "micro_batch_sequences": 2},
        "training": {"total_steps": 20, "compute_dtype": "fp32"},
        "optimizer": {"lr": 1e-2},
        "schedule": {"kind": "wsd", "warmup_steps": 3, "decay_fraction": 0.3},
        "evaluation": {"sequences_per_source": 4},
        "checkpoint": {"every_steps": 5},
        "record": {"tensorboard": False, "display_every_steps": 100},
    }


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_tiny_store(folder)
    return folder


@pytest.fixture
def tiny(tiny_store: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """``tiny("section.key=value", ...)``: a validated tiny run in a fresh folder."""
    from allometry.configs.loader import load

    def make(*overrides: str, folder: Path | None = None) -> RunConfig:
        path = tmp_path / "tiny.yaml"
        path.write_text(json.dumps(tiny_description(tiny_store, folder or tmp_path / "run")))
        return load(path, overrides)

    return make


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="record golden losses anew")


def pytest_collection_finish() -> None:
    """Collections, of which each run makes one, pass over what all test files have imported."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Objects that Python tears down at its end must be known to its collector (nanobind's are)."""
    gc.unfreeze()
