"""Two corpora included in every Python: its standard library's code and documentation."""

from __future__ import annotations

import ast
import os
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from allometry.configs.errors import UserError
from allometry.data.corpus import Corpus, Document, LeftOut, OrderedMap, ReadLog, text_digest

_OTHERS = {"site-packages", "dist-packages", "__pycache__"}
_TESTS = {"test", "tests", "idle_test"}
_TOPICS = "pydoc_data/topics.py"


def open_builtin(name: str) -> Corpus:
    """Return the corpus ``builtin:python-code`` or ``builtin:python-prose``."""
    kinds = {"builtin:python-code": CodeCorpus, "builtin:python-prose": ProseCorpus}
    if name not in kinds:
        raise UserError(f"input {name} is not built in; choose one of {', '.join(kinds)}")
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _OTHERS)
        files += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    if not files:
        raise UserError(
            f"input {name} needs the sources of Python's standard library, but {root} has none; "
            "give a corpus of your own"
        )
    return kinds[name](f"{name} (Python {python_version()})", root, files)


def python_version() -> str:
    """Return the version of the running Python, whose standard library the corpora contain."""
    return ".".join(str(part) for part in sys.version_info[:3])


class CodeCorpus(Corpus):
    """The source files of the standard library with its tests, without installed packages.

    pydoc's topics are excluded; ``ProseCorpus`` contains them.
    """

    def __init__(self, input: str, root: Path, files: list[Path]) -> None:
        super().__init__(input, files, {"Python": len(files)})
        self.root = root

    def documents(self, log: ReadLog, ordered_map: OrderedMap) -> Iterator[Document]:
        """See ``Corpus.documents``."""
        for path in self.files:
            text = _source(path)
            log.advance(path.stat().st_size)
            name = path.relative_to(self.root).as_posix()
            if text is None:
                log.left_out.add("file is not text in its declared encoding", name)
            elif name != _TOPICS:
                yield Document.of(name, text)


class ProseCorpus(Corpus):
    """Docstrings of the standard library without duplicates, and the topics of pydoc.

    The library's tests are excluded: two thirds of the sources to parse, with few words. A
    docstring belongs to the split of its file, so that no held-out docstring is in a training
    document of ``CodeCorpus`` (unless another file repeats it).
    """

    def __init__(self, input: str, root: Path, files: list[Path]) -> None:
        files = [path for path in files if not _TESTS & set(path.relative_to(root).parts)]
        super().__init__(input, files, {"Python": len(files)})
        self.root = root
        self._read: tuple[list[Document], LeftOut] | None = None

    def documents(self, log: ReadLog, ordered_map: OrderedMap) -> Iterator[Document]:
        """See ``Corpus.documents``; cached, as parsing takes seconds and documents are few."""
        if self._read is None:
            by_text: dict[str, Document] = {}
            left_out = LeftOut()
            extract = partial(_docstrings, self.root)
            outcomes = ordered_map(extract, iter(self.files))
            for path, outcome in zip(self.files, outcomes, strict=True):
                log.advance(path.stat().st_size)
                if isinstance(outcome, str):
                    left_out.add(outcome, path.relative_to(self.root).as_posix())
                    continue
                for document in outcome:
                    if document.text in by_text:
                        left_out.add("docstring stands elsewhere too", document.id)
                    by_text.setdefault(document.text, document)
            for document in _topics():
                by_text.setdefault(document.text, document)
            self._read = list(by_text.values()), left_out
        else:
            log.advance(self.total_bytes)
        log.left_out.update(self._read[1])
        yield from self._read[0]


def _source(path: Path) -> str | None:
    """Return the file's text by its declared encoding (PEP 263); None if decoding fails."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return None


def _docstrings(root: Path, path: Path) -> list[Document] | str:
    """Return the docstrings of a file in order, or the reason for their absence."""
    text = _source(path)
    if text is None:
        return "file is not text in its declared encoding"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings are about the library's own code
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return "file does not parse"
    name, group = path.relative_to(root).as_posix(), text_digest(text)
    documents: list[Document] = []
    # Statements only: expressions contain no docstrings and are most of a tree.
    waiting: list[tuple[ast.AST, str]] = [(tree, name)]
    while waiting:
        node, where = waiting.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not isinstance(node, ast.Module):
                where = f"{where}:{node.name}"
            docstring = ast.get_docstring(node)
            if docstring:
                documents.append(Document.of(where, docstring, group))
        for block in ("cases", "finalbody", "orelse", "handlers", "body"):
            inner = getattr(node, block, None)
            if isinstance(inner, list):
                waiting.extend((child, where) for child in reversed(inner))
    return documents


def _topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # Python was installed without its documentation
        raise UserError(
            "builtin:python-prose needs pydoc_data.topics, which this Python lacks; install the "
            "whole standard library or give a corpus of your own"
        ) from error
    for name, text in sorted(topics.items()):
        yield Document.of(f"{_TOPICS}:{name}", text)
