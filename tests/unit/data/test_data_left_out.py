"""Messages of `prepare` about skipped input."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from allometry.configs.errors import UserError
from allometry.data.encode import END_OF_DOCUMENT
from allometry.data.prepare import PrepareRequest, prepare
from allometry.data.store import TokenStore
from allometry.launch.runs.commands import Prepare
from allometry.launch.runs.prepare import prepared


@pytest.fixture
def small(tmp_path: Path) -> PrepareRequest:
    return PrepareRequest(
        (str(tmp_path / "a.txt"),),
        str(tmp_path / "out"),
        vocab_size=300,
        validation_fraction=0.0,
        processes=1,
    )


BAD = '{"text": 3}\n{"n": 1}\nno\n{"text": " "}\n{"text": null}\n'


def test_bad_lines_stop_or_are_counted(small: PrepareRequest, tmp_path: Path, capfd: Any) -> None:
    good = json.dumps({"text": "some words and more words"}) + "\n"
    (tmp_path / "b.jsonl").write_text(good + BAD + good)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.jsonl").symlink_to(tmp_path / "b.jsonl")
    (tmp_path / "in" / "c.zip").write_bytes(b"PK\x03\x04")
    bad = replace(small, inputs=(str(tmp_path / "in"),))
    with pytest.raises(UserError, match=r"b\.jsonl, line 2 has no text under 'text' but int"):
        prepare(bad, quiet=True)
    assert [path.name for path in Path(small.out).iterdir()] == [".lock"]
    with pytest.raises(UserError, match=r"line 4 is not JSON .*more than 2 bad lines"):
        prepare(replace(bad, on_bad_line="skip", max_bad_lines=2), quiet=True)
    manifest = prepare(replace(bad, on_bad_line="skip", max_bad_lines=3))
    assert manifest.sources["in"].skipped == {
        "line is not JSON": 1,
        "no text under 'text'": 2,
        "text is blank": 1,
        "text is null": 1,
        "zip archive": 1,
    }
    assert manifest.sources["in"].splits["train"].documents == 2
    said = capfd.readouterr().err
    assert "in: files read: 1 JSON Lines" in said
    assert f"zip archive: 1 ({tmp_path / 'in' / 'c.zip'})" in said
    with pytest.raises(UserError, match="was prepared with on_bad_line=skip, not stop"):
        prepare(bad, quiet=True)


def test_what_separates_documents(small: PrepareRequest, tmp_path: Path, capfd: Any) -> None:
    stories = ["Once there was a cat.\n", "Then there was a dog.\n", "It rained.\n"]
    (tmp_path / "a.txt").write_text(f"{END_OF_DOCUMENT}\n".join(stories))
    assert prepare(small).sources["a"].splits["train"].documents == 1
    assert "give --separator '<|endoftext|>'" in capfd.readouterr().err
    apart = replace(small, out=str(tmp_path / "apart"), separator=END_OF_DOCUMENT)
    assert prepare(apart).sources["a"].splits["train"].documents == 3
    assert "--separator" not in capfd.readouterr().err
    store = TokenStore(tmp_path / "apart" / "a.train")
    tokenizer = Tokenizer.from_file(str(tmp_path / "apart" / "tokenizer.json"))
    found = [tokenizer.decode(store.read(n).tolist()) for n in range(3)]
    assert found == [story.strip() for story in stories]


def test_a_separator_or_key_without_a_use_is_said(
    small: PrepareRequest, tmp_path: Path, capfd: Any
) -> None:
    (tmp_path / "a.txt").write_text("Once there was a cat.\n\nThen there was a dog.\n")
    (tmp_path / "b.jsonl").write_text('{"text": "once there was a dog"}\n')

    def said(**more: Any) -> str:
        out = str(tmp_path / f"out{len(list(tmp_path.iterdir()))}")
        prepare(replace(small, out=out, **more))
        return capfd.readouterr().err

    literal = said(separator=r"\n\n")
    assert "a: --separator='\\\\n\\\\n' stands in none of the text files" in literal
    assert r"in bash, $'\n' is a line end" in literal
    assert "stands in none" not in said(separator="\n\n")
    assert "stands in none" not in said(separator="zzz", max_documents=1)  # only part was read
    lines = (f"b={tmp_path / 'b.jsonl'}",)
    assert "--separator='x' has no use" in said(inputs=lines, separator="x")
    assert "has no use" not in said(inputs=(*small.inputs, *lines), separator="\n\n")
    assert "--text-key=body has no use" in said(text_key="body")


def test_the_table_names_what_was_left_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    records = [{"text": "some words and more words"}, {"text": None}, {"text": "\n"}, {"n": 1}]
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "in" / ".secret").write_text("hidden")
    report = prepared(
        Prepare(
            inputs=(f"web={tmp_path / 'in'}",),
            out=tmp_path / "out",
            vocab_size=300,
            validation_fraction=0.0,
            on_bad_line="skip",
            processes=1,
            json=True,
        )
    )
    rows = [line.split() for line in report.text.splitlines()]
    file = str(tmp_path / "in" / "a.jsonl")
    assert ["source", "left", "out", "count", "the", "first", "of", "them"] in rows
    assert ["web", "text", "is", "null", "1", f"{file}:2"] in rows
    assert ["web", "text", "is", "blank", "1", f"{file}:3"] in rows
    assert [
        "web",
        "no",
        "text",
        "under",
        "'text'",
        "1",
        *f"input file {file}, line 4".split(),
    ] in rows
    assert [row for row in rows if str(tmp_path / "in" / ".secret") in row]
    assert report.facts["sources"]["web"]["skipped"]["text is null"] == 1
