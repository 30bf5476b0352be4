"""Every file of tests is run: a folder that pytest passes over would pass unseen."""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def test_pytest_finds_every_file_of_tests() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for path in sorted(TESTS.rglob("test_*.py")):
        assert f"{path.relative_to(TESTS.parent)}::" in done.stdout, path
