"""Count habits of wording per 10,000 words of docstrings and comments.

    python benchmarks/prose.py FOLDER... [--json FILE]

Each folder's Python files are parsed: docstrings of modules, classes and functions, string
statements after an attribute, and comments. A habit is a regular expression (``HABITS``); its count
is an indication of the style, not a measure of its quality. For example, ``python
benchmarks/prose.py trainer parallel`` prints a row for each folder and one for both together.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

HABITS = {
    "clauses for nouns": r"\b(?:what|which) (?:it|a|an|the|is|are|was|they|each|every|of)\b",
    "hold": r"\bhold(?:s|ing)?\b|\bheld\b(?!-out)",
    "nothing, none": r"\b(?:nothing|none)\b",
    "whole": r"\bwhole\b",
    "those that": r"\bthose (?:that|of|which|who)\b|\bthat of\b",
    "figurative verbs": r"\b(?:hear[sd]?|settle[sd]?|lie|lies|lay|stands?|stood|dear|besides?|told"
    r"|tells?|says?|said|speaks?|ask(?:s|ed)?|strikes?|struck|meets?|met|mend(?:s|ed)?)\b",
    "e.g., for example": r"\be\.g\.|\bfor example\b",
}
"""Regular expression of each habit; "none" is counted in lower case only, as None is a value."""
CASED = {"nothing, none"}
DIRECTIVES = re.compile(r"#\s*(?:type:|noqa|pyright|ruff|fmt)")
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def texts(path: Path) -> Iterator[str]:
    """Yield docstrings, attribute docstrings and comments of a file."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DEFINITIONS):
            for statement in node.body:
                value = statement.value if isinstance(statement, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not DIRECTIVES.match(token.string):
            yield token.string.lstrip("# ")


def count(folder: Path) -> Counter[str]:
    """Return the number of words, under "words", and of each habit in a folder."""
    found: Counter[str] = Counter(words=0)
    for path in sorted(folder.rglob("*.py")):
        for text in texts(path):
            found["words"] += len(re.findall(r"[A-Za-z][\w'-]*", text))
            for habit, pattern in HABITS.items():
                flags = 0 if habit in CASED else re.IGNORECASE
                found[habit] += len(re.findall(pattern, text, flags))
    return found


def row(name: str, found: Counter[str]) -> str:
    """Return a row of the table: words, then each habit per 10,000 words."""
    rates = (f"{1e4 * found[habit] / max(found['words'], 1):.1f}" for habit in HABITS)
    return f"| {name} | {found['words']:,} | {' | '.join(rates)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, help="file for the counts")
    given = parser.parse_args()
    counts = {str(folder): count(folder) for folder in given.folders}
    together: Counter[str] = Counter()
    for found in counts.values():
        together.update(found)  # a sum of counters would drop zeros
    counts["all"] = together
    print(f"| folder | words | {' | '.join(HABITS)} |\n|{'---|' * (len(HABITS) + 2)}")
    for name, found in counts.items():
        print(row(name, found))
    if given.json is not None:
        given.json.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
