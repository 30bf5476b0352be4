"""Ladders described by a test, planned without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from allometry.configs.ladder import load_ladder
from allometry.configs.run import RunConfig
from allometry.data.stream import open_stream
from allometry.scaling.count import DocumentFlops
from allometry.studies.ladder.plan import LadderPlan, plan_ladder


def ladder_file(base: Path, /, **keys: Any) -> Path:
    described = {
        "kind": "ladder",
        "base": base.name,
        "folder": str(base.parent / "ladder"),
        "widths": [16, 32],
        "tokens": [2048, 5120, 10240],
        "seeds": [0, 1],
        "target": {"size": {"width": 64}, "tokens": 20480},
    }
    path = base.parent / "ladder.yaml"
    path.write_text(json.dumps({k: v for k, v in (described | keys).items() if v is not None}))
    return path


def planned(base: Path, /, **keys: Any) -> LadderPlan:
    return plan_ladder(*load_ladder(ladder_file(base, **keys)))


def per_token(config: RunConfig) -> float:
    """Return the model FLOPs of a token of the run's documents."""
    squares = open_stream(config.data, 0).squared_lengths_per_token()
    return DocumentFlops.of(config.model).expected(squares)
