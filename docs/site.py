"""Hooks of the documentation's site (mkdocs.yml)."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (
    *("configs", "scaling", "laws", "data", "models", "parallel", "optim", "trainer"),
    *("interop", "studies"),
)
_PICTURE = re.compile(r"!\[[^\]]*\]\(([^)]*\.svg)\)")
_SCHEME = re.compile(r'<style class="scheme">.*?</style>')
_LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+[^)#\s]*)(?:#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each folder: the docstrings of its public modules."""
    for folder in FOLDERS:
        files.append(File.generated(config, f"api/{folder}.md", content=api(folder)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Write links to files outside of docs/ as text, and SVG pictures into the page."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def as_text(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if target.is_relative_to(ROOT / "docs"):
            return link[0]
        assert target.exists(), f"{page.file.src_uri}: {link[2]} does not exist"
        name = str(target.relative_to(ROOT))
        return link[1] if name in link[1] else f"{link[1]} (`{name}`)"

    markdown = _PICTURE.sub(lambda found: inline(folder / found[1]), markdown)
    return _LINK.sub(as_text, markdown)


def inline(path: Path) -> str:
    """Return a picture as part of a page, whose text colour it takes."""
    return f"<div>{_SCHEME.sub('', path.read_text(encoding='utf-8'))}</div>"


def api(folder: str) -> str:
    """The API page of a folder: an entry for each module with public names."""
    parts = [f"# allometry.{folder}"]
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name != "__init__.py" and has_public_names(path):
            parts.append(f"::: allometry.{name}")
    return "\n\n".join(parts) + "\n"


def has_public_names(path: Path) -> bool:
    """Whether a module defines a class or function without a leading underscore."""
    return re.search(r"(?m)^(?:def|class) [A-Za-z]", path.read_text(encoding="utf-8")) is not None
