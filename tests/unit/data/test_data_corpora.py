import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from allometry.configs.errors import UserError
from allometry.data.builtin import _docstrings
from allometry.data.corpora import named_input, open_corpus
from allometry.data.corpus import Document, LeftOut, OnBadLine, ReadLog, text_digest

TEXTS = ["one\ntwo", "Größe ≠ 大", "", "three"]
LINES = "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(TEXTS))


def read(
    path: Path | str, key: str = "text", on_bad_line: OnBadLine = "stop"
) -> tuple[list[Document], Counter[str]]:
    corpus = open_corpus(str(path), key)
    told: list[int] = []
    log = ReadLog(told.append, on_bad_line)
    documents = list(corpus.documents(log, map))
    assert sum(told) == corpus.total_bytes
    assert len({document.id for document in documents}) == len(documents)
    skipped = LeftOut()
    skipped.update(corpus.left_out)
    skipped.update(log.left_out)
    return documents, skipped.counts


def texts(path: Path | str, key: str = "text") -> list[str]:
    return [document.text for document in read(path, key)[0]]


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.jsonl", bytes),
        ("a.json", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("a.gz", gzip.compress),
        ("a.jsonl.zst", zstandard.compress),
        ("a.zst", lambda data: zstandard.compress(data[:40]) + zstandard.compress(data[40:])),
    ],
)
def test_json_lines(tmp_path: Path, name: str, pack) -> None:
    (tmp_path / name).write_bytes(pack(LINES.encode() + b"\n"))
    documents, skipped = read(tmp_path / name)
    assert [document.text for document in documents] == TEXTS
    assert documents[1].id == f"{tmp_path / name}:2"
    assert documents[1].group == text_digest(TEXTS[1])
    assert not skipped


def test_large_compressed_files(tmp_path: Path) -> None:
    many = [f"document {n} " * 50 for n in range(5000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in many).encode()
    for name, pack in (("a.jsonl.zst", zstandard.compress), ("a.jsonl.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(lines))
        assert texts(tmp_path / name) == many


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": [*TEXTS, None], "n": range(5)}), tmp_path / "a.parquet")
    documents, skipped = read(tmp_path / "a.parquet", "body")
    assert [document.text for document in documents] == TEXTS
    assert skipped == {"row without text": 1}
    with pytest.raises(UserError, match=r"no column 'text' \(its columns: body, n\)"):
        read(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"b\.parquet is not parquet"):
        read(tmp_path / "b.parquet")


def test_folders_patterns_and_undecodable_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.md.gz").write_bytes(gzip.compress(b"a"))
    (tmp_path / "sub" / "c.txt").write_bytes(b"\xef\xbb\xbfc")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    documents, skipped = read(tmp_path)
    assert [document.text for document in documents] == ["a", "b", "c"]
    assert skipped == {"file is not UTF-8 text": 1}
    assert texts(f"{tmp_path}/**/*.txt") == ["b", "c"]
    with pytest.raises(UserError, match="has no files"):
        open_corpus(f"{tmp_path}/*.parquet", "text")
    with pytest.raises(UserError, match="does not exist"):
        open_corpus(f"{tmp_path}/nothing", "text")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "a"', "line 2 is not JSON"),
        (b"\xff\xfe", "line 2 is not JSON"),
        (b"[", "write one JSON object on each line"),
        (b'"text"', "line 2 is no JSON object"),
        (b'{"body": "a", "n": 1}', r"line 2 has no key 'text' \(its keys: body, n\)"),
        (b'{"text": 3}', "line 2 has no text under 'text' but int"),
        (b'{"text": "\\ud800"}', "line 2 has text that is not Unicode"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, says: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match=says) as error:
        read(tmp_path / "a.jsonl")
    assert str(tmp_path / "a.jsonl") in str(error.value)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"x" * 50])
def test_damaged_compressed_files(tmp_path: Path, pack, damage) -> None:
    ending = "gz" if pack is gzip.compress else "zst"
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(damage(pack(LINES.encode() * 50)))
    with pytest.raises(UserError, match="cannot be read"):
        read(path)


def test_docstrings_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        '"""Module."""\n'
        "class A:\n    'Class.'\n    def f(self):\n        '''Method\n           indented.'''\n"
        "if True:\n    async def g():\n        '''Inner.'''\n        x = 'no docstring'\n"
        "try:\n    pass\nexcept ValueError:\n    def h(): 'Handler.'\n"
        "def silent(): pass\n"
    )
    found = _docstrings(tmp_path, tmp_path / "m.py")
    assert [(d.id, d.text) for d in found] == [
        ("m.py", "Module."),
        ("m.py:A", "Class."),
        ("m.py:A:f", "Method\nindented."),
        ("m.py:g", "Inner."),
        ("m.py:h", "Handler."),
    ]
    assert {d.group for d in found} == {text_digest((tmp_path / "m.py").read_text())}
    (tmp_path / "m.py").write_text("def (")
    assert _docstrings(tmp_path, tmp_path / "m.py") == "file does not parse"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library."""
    files = {
        "b.py": '"""Same words."""\n',
        "a.py": '"""Same words."""\ndef f():\n    """Other words."""\n',
        "bad.py": "# coding: ascii\nx = 'é'\n",
        "test/test_a.py": '"""Words of a test."""\n',
        "site-packages/other.py": "installed = 1\n",
        "pydoc_data/topics.py": "topics = {}\n",
        "data.txt": "no source",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    return tmp_path


def test_builtin_code(library: Path) -> None:
    documents, skipped = read("builtin:python-code")
    assert [document.id for document in documents] == ["a.py", "b.py", "test/test_a.py"]
    assert skipped == {"file is not text in its declared encoding": 1}


def test_builtin_prose(library: Path) -> None:
    documents, skipped = read("builtin:python-prose")
    prose = [(d.id, d.text) for d in documents if not d.id.startswith("pydoc_data")]
    assert prose == [("a.py", "Same words."), ("a.py:f", "Other words.")]
    assert documents[0].group == text_digest((library / "a.py").read_text())
    assert sum(d.id.startswith("pydoc_data/topics.py:") for d in documents) > 50
    assert skipped["docstring stands elsewhere too"] == 1
    corpus = open_corpus("builtin:python-prose", "text")
    twice = [list(corpus.documents(ReadLog(lambda n: None), map)) for _ in range(2)]
    assert twice[0] == twice[1] == documents


def test_unknown_builtin() -> None:
    with pytest.raises(UserError, match="builtin:rust is not built in; choose one of builtin:py"):
        open_corpus("builtin:rust", "text")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("code=builtin:python-code", ("code", "builtin:python-code")),
        ("builtin:python-code", ("python-code", "builtin:python-code")),
        ("/x/my corpus.jsonl.gz", ("my-corpus", "/x/my corpus.jsonl.gz")),
        ("/x/a=b/c.txt", ("c", "/x/a=b/c.txt")),
        ("web=/x/a=b", ("web", "/x/a=b")),
    ],
)
def test_names_of_sources(value: str, expected: tuple[str, str]) -> None:
    assert named_input(value) == expected


def test_inputs_without_a_name() -> None:
    with pytest.raises(UserError, match="write name="):
        named_input("/x/*.*")
    with pytest.raises(UserError, match="names no path"):
        named_input("web=")
