import bz2
import gzip
import json
import lzma
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from allometry.configs.errors import UserError
from allometry.data.builtin import _docstrings
from allometry.data.corpora import named_input, open_corpus
from allometry.data.corpus import BadText, Document, LeftOut, OnBadLine, ReadLog, text_digest

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
        ("A.JSONL.GZ", gzip.compress),
        ("a.ndjson.bz2", bz2.compress),
        ("a.jsonl.xz", lzma.compress),
        ("part-00000", bytes),
        ("a.jsonlines", bytes),
        ("a.txt", bytes),
        ("a.json", lambda data: b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n")),
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
    assert skipped == {"text is null": 1}
    with pytest.raises(UserError, match=r"no 'text' \(it has: body, n\)"):
        read(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"b\.parquet cannot be read \(it is not parquet"):
        read(tmp_path / "b.parquet")


def test_folders_patterns_and_undecodable_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.md.gz").write_bytes(gzip.compress(b"a"))
    (tmp_path / "sub" / "c.txt").write_bytes(b"\xef\xbb\xbfc")
    documents, skipped = read(tmp_path)
    assert [document.text for document in documents] == ["a", "b", "c"]
    assert skipped == {"hidden (name begins with a dot)": 1}
    assert texts(f"{tmp_path}/**/*.txt") == ["b", "c"]
    assert texts(f"{tmp_path}/s*") == ["c"]  # a folder is searched, whatever its name
    assert texts(f"{tmp_path}/**") == ["a", "b", "c"]
    with pytest.raises(UserError, match="has no files"):
        open_corpus(f"{tmp_path}/*.parquet", "text")
    with pytest.raises(UserError, match="does not exist"):
        open_corpus(f"{tmp_path}/nothing", "text")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "a"', "line 2 is not JSON"),
        (b'{"text": "\xe9"}', "line 2 is not UTF-8 .*0xe9"),
        (b"[", "write one JSON object on each line"),
        (b'"text"', "line 2 is no JSON object"),
        (b'{"body": "a", "n": 1}', r"line 2 has no 'text' \(it has: body, n\)"),
        (b'{"text": 3}', "line 2 has no text under 'text' but int"),
        (b'{"text": "\\ud800"}', "line 2 has text that is not Unicode"),
        (b'{"text": ' + b"[" * 100_000, "line 2 is nested too deeply"),
        (b'{"meta": {"body": "a"}}', r"line 2 has no 'text' \(it has: meta.body\)"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, says: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match=says) as error:
        read(tmp_path / "a.jsonl")
    assert str(tmp_path / "a.jsonl") in str(error.value)
    assert "--on-bad-line skip" in str(error.value)
    documents, skipped = read(tmp_path / "a.jsonl", on_bad_line="skip")
    assert [document.text for document in documents] == ["good"]
    assert list(skipped.values()) == [1]


PACKS = {"gz": gzip.compress, "zst": zstandard.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("ending", PACKS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_damaged_compressed_files(tmp_path: Path, ending: str, name: str) -> None:
    path = tmp_path / f"{name}.{ending}"
    rng = random.Random(0)
    words = (str(rng.random()) for _ in range(60_000))
    lines = [json.dumps({"text": word}) + "\n" if "json" in name else word for word in words]
    data = PACKS[ending]("".join(lines).encode())
    for damaged in (data[:-20], data[: len(data) // 2] + b"x" * 50 + data[len(data) // 2 + 50 :]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"cannot be read|is not|of a kind not read"):
            read(path)
    path.write_bytes(data[:-20])
    documents, skipped = read(path, on_bad_line="skip")
    assert skipped == {"file is damaged": 1}
    assert (len(documents) > 10_000) == (name == "a.jsonl")  # lines before the damage are read
    path.write_bytes(b"x" * 50)
    with pytest.raises(UserError, match=rf"not the \.{ending} file that its name says"):
        read(path)


def table(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_parquet_columns_of_every_kind(tmp_path: Path) -> None:
    meta = pa.array([{"text": "a", "n": 1}, None, {"text": None, "n": 2}, {"text": "d", "n": 3}])
    path = table(tmp_path / "nested.parquet", meta=meta, id=range(4))
    documents, skipped = read(path, "meta.text")
    assert [(d.id.rpartition(":")[2], d.text) for d in documents] == [("1", "a"), ("4", "d")]
    assert skipped == {"text is null": 2}
    with pytest.raises(UserError, match=r"no 'text' \(it has: meta.text, meta.n, id\)"):
        read(path)
    with pytest.raises(UserError, match=r"no text under 'meta' but struct"):
        read(path, "meta")
    with pytest.raises(UserError, match=r"no text under 'meta\.n' but int64"):
        read(path, "meta.n")
    assert texts(table(tmp_path / "dot.parquet", **{"meta.text": ["x"]}), "meta.text") == ["x"]
    words = pa.array(["a", None, "a"]).dictionary_encode()
    assert texts(table(tmp_path / "dictionary.parquet", text=words)) == ["a", "a"]
    assert texts(table(tmp_path / "large.parquet", text=pa.array(["é"], pa.large_string()))) == [
        "é"
    ]
    assert texts(table(tmp_path / "bytes.parquet", text=[b"\xc3\xa9"])) == ["é"]
    _, skipped = read(table(tmp_path / "null.parquet", text=pa.nulls(3)))
    assert skipped == {"text is null": 3}
    with pytest.raises(UserError, match=r"no text under 'text' but list"):
        read(table(tmp_path / "list.parquet", text=[["a"]]))
    documents, skipped = read(path, on_bad_line="skip")
    assert (documents, skipped) == ([], {"no text under 'text'": 4})


def test_one_rule_in_every_format(tmp_path: Path) -> None:
    """Null is skipped and counted; invalid UTF-8 raises, or is skipped and counted."""
    not_utf8 = pa.Array.from_buffers(
        pa.string(), 2, pa.array([b"good", b"\xe9"], pa.binary()).buffers()
    )
    table(tmp_path / "a.parquet", text=not_utf8)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\xe9"}\n')
    (tmp_path / "a.txt").write_bytes(b"good \xe9")
    for name in ("a.parquet", "a.jsonl", "a.txt"):
        with pytest.raises(UserError, match=rf"{name}.* is not UTF-8|{name}.* that is not UTF-8"):
            read(tmp_path / name)
        assert read(tmp_path / name, on_bad_line="skip")[1] == {"text is not UTF-8": 1}
    table(tmp_path / "b.parquet", text=["good", None])
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "good"}\n{"text": null}\n')
    for name in ("b.parquet", "b.jsonl"):
        assert read(tmp_path / name)[1] == {"text is null": 1}


def test_nested_keys_of_json(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"meta": {"text": "a"}},
        {"meta.text": "b", "meta": {"text": "not this"}},
        {"meta": None},
        {"meta": {"text": None}},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    documents, skipped = read(tmp_path / "a.jsonl", "meta.text")
    assert [document.text for document in documents] == ["a", "b"]
    assert skipped == {"text is null": 2}
    with pytest.raises(UserError, match=r"line 1 has no 'meta\.body' \(it has: meta.text\)"):
        read(tmp_path / "a.jsonl", "meta.body")


def test_bad_lines_have_a_limit() -> None:
    log = ReadLog(lambda n: None, "skip", max_bad_lines=2)
    bad = BadText("line is not JSON", "is not JSON")
    log.bad("a:1", bad)
    log.bad("a:2", bad)
    with pytest.raises(UserError, match=r"a:3 is not JSON; .* more than 2 bad lines .*JSON: 3"):
        log.bad("a:3", bad)


def test_undecodable_text_is_found_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("allometry.data.corpora._BLOCK_BYTES", 1000)
    for damage, says in (
        (b"\xe9 ", "invalid continuation byte near byte 70000"),
        (b"\0", "NUL near byte 70000"),
        (b"\xc3", "unexpected end of data near byte"),
    ):
        (tmp_path / "a.txt").write_bytes(b"a" * 70_000 + damage)
        with pytest.raises(UserError, match=says):
            read(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("é" * 70_001)
    documents, _ = read(tmp_path / "a.txt")
    assert documents[0].text == "é" * 70_001
    assert documents[0].group == text_digest("é" * 70_001)
    assert documents[0].num_bytes() == 140_002
    assert not documents[0].is_blank()
    (tmp_path / "a.txt").write_bytes(b"\xe9")
    with pytest.raises(UserError, match="was read once and cannot be again"):
        list(documents[0].blocks)


def test_a_separator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allometry.data.corpora._BLOCK_BYTES", 7)
    (tmp_path / "a.txt").write_bytes(b"one\n<|endoftext|>\n two\r\n<|endoftext|>\n")
    corpus = open_corpus(str(tmp_path / "a.txt"), "text", "<|endoftext|>")
    log = ReadLog(lambda n: None)
    documents = list(corpus.documents(log, map))
    assert [document.text for document in documents] == ["one", " two", ""]
    assert [document.group for document in documents[:2]] == [
        text_digest("one"),
        text_digest(" two"),
    ]
    assert not log.marks
    monkeypatch.undo()
    whole = open_corpus(str(tmp_path / "a.txt"), "text")
    list(whole.documents(log, map))
    assert log.marks["<|endoftext|>"] == 2


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
    """Return a small standard library."""
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
        ("lang=en/a*.txt", ("a", "lang=en/a*.txt")),
        ("lang=en/dump/b.txt", ("b", "lang=en/dump/b.txt")),
        ("web=lang=en/*.txt", ("web", "lang=en/*.txt")),
        ("lang=de/a.txt", ("lang", "de/a.txt")),
        ("lang=*/a.txt", ("a", "lang=*/a.txt")),
        ("la*=e?", ("la-e", "la*=e?")),
        ("web=*.txt", ("web", "*.txt")),
    ],
)
def test_names_of_sources(
    value: str, expected: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lang=en").mkdir()
    monkeypatch.chdir(tmp_path)
    assert named_input(value) == expected


def test_inputs_without_a_name() -> None:
    with pytest.raises(UserError, match="write name="):
        named_input("/x/*.*")
    with pytest.raises(UserError, match="names no path"):
        named_input("web=")
    with pytest.raises(UserError, match="an input is empty; give a file"):
        named_input(" ")
