"""Public measurements that some tests of laws need, which are not part of the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "../shared/data/laws"


def law_data(name: str) -> Path:
    """Return the folder of a data set; the test skips, and says so, where it is absent."""
    folder = FOLDER / name
    if not folder.is_dir():
        pytest.skip(f"the data set {name} is not on this machine ({folder.resolve()})")
    return folder
