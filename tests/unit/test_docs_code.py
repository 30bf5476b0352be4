"""Files and functions named by the guides exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ("tour.md", "extending.md", "file_formats.md")
NAMED = re.compile(r"`([a-z_]+(?:/[A-Za-z_]+)+\.py)(?:: ([A-Za-z_.]+(?:, [A-Za-z_.]+)*))?`")
NEW = re.compile(r"new\s+file `[^`]+`")
LINKED = re.compile(r"\[`([a-z_/]+\.py)`\]\([^)]*\)(?:: ((?:`[A-Za-z_.]+`(?:, )?)+))?")


@cache
def defined(path: Path) -> frozenset[str]:
    """Return the names defined in a file; methods and fields as `Class.name` and `name`."""
    found = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            names = []
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names = [node.target.id]
            found.update(name for one in names for name in (one, f"{prefix}{one}"))
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{node.name}.")

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return frozenset(found)


def missing(text: str) -> list[str]:
    """Return the names in a page that do not exist."""
    wrong = []
    text = NEW.sub("", text)
    named = [(file, names.split(", ") if names else []) for file, names in NAMED.findall(text)]
    linked = [(file, re.findall(r"`([^`]+)`", names)) for file, names in LINKED.findall(text)]
    for file, names in named + linked:
        path = ROOT / file
        if not (ROOT / path.relative_to(ROOT).parts[0]).exists():
            continue  # a file of another package
        if not path.exists():
            wrong.append(file)
            continue
        wrong += [f"{file}: {name}" for name in names if name not in defined(path)]
    return wrong


@pytest.mark.parametrize("page", GUIDES)
def test_what_a_guide_names_exists(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert NAMED.search(text)
    assert not missing(text)


def test_the_check_itself_finds_what_is_missing() -> None:
    text = "`trainer/step.py: TrainStep.__call__` and `trainer/gone.py: x`, `optim/muon.py: noun`"
    assert missing(text) == ["trainer/gone.py", "optim/muon.py: noun"]
    linked = "[`optim/muon.py`](../optim/muon.py): `muon`, `noun`"
    assert missing(linked) == ["optim/muon.py: noun"]
