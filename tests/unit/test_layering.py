"""Who may import whom: the table of docs/architecture.md, enforced."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

MAY_IMPORT = {
    "configs": set(),
    "scaling": {"configs"},
    "laws": {"configs", "scaling"},
    "data": {"configs"},
    "models": {"configs", "scaling"},
    "parallel": {"configs", "scaling", "models"},
    "optim": {"configs", "scaling", "parallel.mesh"},
    "trainer": {"configs", "scaling", "laws", "data", "models", "parallel", "optim"},
}
MAY_IMPORT["interop"] = {*MAY_IMPORT["trainer"], "trainer"}
MAY_IMPORT["studies"] = {*MAY_IMPORT["interop"], "interop"}
MAY_IMPORT["launch"] = {*MAY_IMPORT["studies"], "studies"}
WITHOUT_TORCH = ("configs", "scaling", "laws", "data")


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
    return names


def violations(room: str, path: Path, names: list[str]) -> list[str]:
    found = []
    for name in names:
        top, *rest = name.split(".")
        if top in MAY_IMPORT:
            found.append(f"{path}: bare import of {name} makes a second copy of its classes")
        if top != "allometry" or not rest or rest[0] == room:
            continue
        allowed = MAY_IMPORT[room]
        if rest[0] not in allowed and ".".join(rest) not in allowed:
            found.append(f"{path}: {room} may not import {name}")
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_room_imports_only_what_it_may(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    wrong = [line for path in files for line in violations(room, path, imported(path))]
    assert not wrong, "\n".join(wrong)


def test_the_check_itself_finds_violations() -> None:
    path = Path("x.py")
    assert violations("models", path, ["allometry.parallel.mesh"])
    assert violations("optim", path, ["allometry.parallel.zero"])
    assert not violations("optim", path, ["allometry.parallel.mesh"])
    assert violations("trainer", path, ["data.stream"])


def test_every_room_is_packaged_and_linked() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for room in MAY_IMPORT:
        assert f'"{room}"' in setup
        assert (ROOT / ".typing" / "allometry" / room).resolve() == ROOT / room


def test_light_rooms_import_without_torch() -> None:
    modules = [
        f"allometry.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}"
        for room in WITHOUT_TORCH
        for path in sorted((ROOT / room).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
