"""docs/configuration.md contains every key of a run in its current form."""

from pathlib import Path

import pytest

from allometry.configs import reference
from allometry.configs.loader import _all_keys
from allometry.configs.run import RunConfig

PAGE = Path(__file__).resolve().parents[3] / "docs" / "configuration.md"


def row(key: str) -> str:
    """Return the row of a key on the page."""
    return next(line for line in reference.page().splitlines() if line.startswith(f"| `{key}` |"))


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference.page(), "run make reference"


def test_every_key_has_a_row() -> None:
    text = reference.page().replace(".NAME.", ".").replace(".N.", ".").replace("stages.N", "stages")
    elsewhere = ("schedule.before.", "schedule.after.", "stages.schedule.")
    for path in _all_keys(RunConfig, ()):
        key = ".".join(path)
        if len(path) > 1 and path[-1] != "kind" and not key.startswith(elsewhere):
            assert f"| `{key}` |" in text, key


@pytest.mark.parametrize(
    ("key", "cells"),
    [
        ("optimizer.eps", "number > 0 | `1e-08`"),
        ("model.num_kv_heads", "integer > 0 or null | `null`"),
        ("run.folder", "path | required"),
        ("parallel.zero.stage", "`0`, `1`, `2`, `3` | `0`"),
        ("data.sources.N.name", "text like `^[A-Za-z0-9][A-Za-z0-9._-]*$` | required"),
    ],
)
def test_types_bounds_and_defaults(key: str, cells: str) -> None:
    assert row(key).startswith(f"| `{key}` | {cells} |")
