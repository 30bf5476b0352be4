"""Public measurements for tests of laws, which are not part of the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "../shared/data/laws"


def law_data(name: str) -> Path:
    """Return the folder of a data set; skip the test with a message if it is missing."""
    folder = FOLDER / name
    if not folder.is_dir():
        pytest.skip(f"the data set {name} is not on this machine ({folder.resolve()})")
    return folder
