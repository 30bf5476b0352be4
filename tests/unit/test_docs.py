"""Links of the documentation are valid, and the names in it exist."""

import re
from pathlib import Path

import pytest
import typer

from allometry.configs.loader import _all_keys, ladder_presets, presets
from allometry.configs.renamed import RENAMED
from allometry.configs.run import RunConfig
from allometry.launch.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    page
    for of in ("*.md", "docs/**/*.md", "benchmarks/*.md", "examples/*.md")
    for page in ROOT.glob(of)
]


def names(pattern: str, page: Path) -> list[str]:
    return re.findall(pattern, page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_page(page: Path) -> None:
    wrong = [link for link in names(r"\]\(([^)#:]+)\)", page) if not (page.parent / link).exists()]
    commands = set(typer.main.get_group(app).commands)
    wrong += [c for c in names(r"(?m)(?:`|^)allometry ([a-z]+)\b", page) if c not in commands]
    known_presets = presets() | ladder_presets()
    wrong += [p for p in names(r"preset:([a-z0-9_]+)", page) if p not in known_presets]
    known = {".".join(path) for path in _all_keys(RunConfig, ())} | {row.old for row in RENAMED}
    sections = {key.split(".")[0] for key in known}
    for key in names(r"`([a-z_]+(?:\.[a-z_]+)+)(?:[=:][^`]*)?`", page):
        section, *rest = key.split(".")
        module = (ROOT / section).joinpath(*rest).with_suffix(".py").exists()
        if section in sections and rest[-1] not in ("py", "json", "yaml", "weight"):
            wrong += [] if key in known or module else [key]
    for target in names(r"`make ([a-z-]+)", page):
        wrong += [] if f"\n{target}:" in (ROOT / "Makefile").read_text() else [f"make {target}"]
    assert not wrong, f"{page}: {wrong}"


def test_there_are_pages() -> None:
    assert {"README.md", "architecture.md", "resume.md"} <= {page.name for page in PAGES}


def test_every_page_is_in_the_sites_navigation() -> None:
    """`make site` refuses a page that is missing there."""
    pages = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    listed = names(r"(?m): ((?:decisions/)?[\w-]+\.md)$", ROOT / "mkdocs.yml")
    assert sorted(listed) == sorted(pages)
