"""Files have at most 400 lines and functions at most 60."""

import ast
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def sources() -> list[Path]:
    rooms = [link.name for link in (ROOT / ".typing" / "allometry").iterdir() if link.is_dir()]
    folders = [*rooms, "tests", "benchmarks"]
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def too_long(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    found = []
    if (lines := len(text.splitlines())) > MAX_FILE_LINES:
        found.append(f"{path}: {lines} lines")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            if size > MAX_FUNCTION_LINES:
                found.append(f"{path}:{node.lineno}: {node.name} has {size} lines")
    return found


def test_files_and_functions_are_short() -> None:
    wrong = [line for path in sources() for line in too_long(path)]
    assert not wrong, "\n".join(wrong)


def test_the_check_itself_finds_long_ones(tmp_path: Path) -> None:
    path = tmp_path / "long.py"
    path.write_text("def f():\n" + "    pass\n" * 400, encoding="utf-8")
    assert len(too_long(path)) == 2


def test_root_shows_the_house() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    if not tracked:  # an unpacked archive has no git
        tracked = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]
    top = {Path(name).parts[0] for name in tracked}
    assert {"trainer", "parallel", "optim", "launch", "configs", "tests", "setup.py"} <= top
