"""Every test file is collected: pytest would silently skip an uncollected folder."""

import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
# Files are found as in a run, but not imported, because running their tests does that.
LISTING = """
import pytest

class File(pytest.Module):
    def collect(self):
        return []

class Files:
    def pytest_pycollect_makemodule(self, module_path, parent):
        print("found", module_path)
        return File.from_parent(parent, path=module_path)

pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider"], plugins=[Files()])
"""


def test_pytest_finds_every_file_of_tests() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LISTING], cwd=TESTS.parent, capture_output=True, text=True
    )
    found = re.findall(r"^found (.*)$", done.stdout, re.MULTILINE)
    assert sorted(found) == sorted(map(str, TESTS.rglob("test_*.py"))), done.stdout + done.stderr


def test_every_file_of_tests_has_one() -> None:
    for path in TESTS.rglob("test_*.py"):
        assert re.search(r"^(    )?def test_", path.read_text(), re.MULTILINE), path
