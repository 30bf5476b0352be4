"""Detection of file kinds; files named by the user are never skipped silently."""

import gzip
import io
import os
import re
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from allometry.configs.errors import UserError
from allometry.data.corpora import open_corpus
from allometry.data.corpus import Corpus, ReadLog


def texts(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus.documents(ReadLog(lambda n: None), map)]


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return file.getvalue()


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "text")
    return file.getvalue()


UNUSABLE = {
    "a.zip": (archive(), "zip archive"),
    "a.txt": (archive(), "zip archive"),
    "a.tar": (tar(), "tar archive"),
    "a.tgz": (gzip.compress(tar()), "tar archive"),
    "a.tar.gz": (gzip.compress(tar()), "tar archive"),
    "a.txt.gz": (gzip.compress(gzip.compress(b"a")), "compressed twice"),
    "a.gz": (gzip.compress(b"PAR1" + bytes(9)), "binary file"),
    "a.parquet": (b"words", "not the parquet file"),
    "a.csv": (b"text,n\na,1\n", "CSV table"),
    "a.tsv": (b"text\tn\na\t1\n", "TSV table"),
    "a.json": (b'[{"text": "a"}]', "JSON array"),
    "a.jsonl": (b'\xef\xbb\xbf {\n "text": "a"\n}', "JSON object over several lines"),
    "array.txt": (b'[\n {"text": "a"}\n]', "JSON array"),
    "wide.txt": ("text".encode("utf-16"), "UTF-16 text"),
    "wide.jsonl": ('{"text": "a"}'.encode("utf-16"), "UTF-16 text"),
    "nul.txt": (b"a\0b", "binary file"),
    "photo.jpg": (b"\xff\xd8\xff\xe0\x10JFIF\x01\x02", "binary file"),
    "a.txt.br": (b"\x8b\x02\x80text\x03", "binary file"),
    "a.txt.lz": (b"LZIP\x01\x0c", "lzip file"),
    "a.Z": (b"\x1f\x9d\x90\x74", "file packed with compress"),
    "a.arrow": (b"ARROW1\0\0", "Arrow file"),
    "a.warc": (b"WARC/1.0\r\n", "WARC file"),
    "a.pdf": (b"%PDF-1.7\n", "PDF file"),
    "lfs.jsonl": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    "empty.txt": (b"", "empty file"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_is_no_text_is_refused_or_counted(tmp_path: Path, name: str) -> None:
    content, what = UNUSABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"input .*{name} is of a kind not read: {what}.*; \w+"):
        open_corpus(str(tmp_path / name), "text")
    (tmp_path / "good.md").write_text("good")
    for given in (tmp_path, f"{tmp_path}/*"):
        corpus = open_corpus(str(given), "text")
        assert texts(corpus) == ["good"]
        ((reason, places),) = corpus.left_out.places.items()
        assert what in reason
        assert places == [str(tmp_path / name)]
        assert corpus.kinds == {"text": 1}
        assert corpus.files == [tmp_path / "good.md"]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'{"text": "a"}', "JSON Lines"),
        (b'{"a": 1}\n{"a": 2}\n', "JSON Lines"),
        (b'\n{"text": "' + b"long " * 50_000 + b'"}', "JSON Lines"),
        (b'{"a": 1}', "text"),
        (b'{"a": 1}\nwords', "text"),
        (b"{\n}\n", "text"),
        (b"{" * 100_000, "text"),
        (b"[Music]\n", "text"),
        (b"ORCHIDS and BZh5 and Rar! are words", "text"),
        ("é".encode("latin-1"), "text"),
        ("“é”\x1b[0m\ttab\f".encode("cp1252"), "text"),
        ("a \x01 in UTF-8 é".encode(), "text"),
        (b"x" * 65_535 + "é\x01".encode(), "text"),  # the first block ends within a letter
        (b"\r\n", "text"),
    ],
)
def test_kinds_by_content(tmp_path: Path, content: bytes, kind: str) -> None:
    (tmp_path / "part-0").write_bytes(content)
    assert open_corpus(str(tmp_path / "part-0"), "text").kinds == {kind: 1}


def test_a_table_is_read_as_the_document_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parents[3] / "docs" / "file_formats.md"
    (code,) = re.findall(r'^python -c "(.*csv.*)"$', page.read_text(encoding="utf-8"), re.M)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.csv").write_text('n,text\n1,"a, ""b""\nc"\n2,d\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"CSV table; write its text as .*file_formats\.md has the"):
        open_corpus("in.csv", "text")
    exec(code, {})
    assert texts(open_corpus("in.parquet", "text")) == ['a, "b"\nc', "d"]


def test_files_of_settings_in_a_folder_stop_it_or_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "config.json").write_text('{"name": "web", "rows": 1}')
    corpus = open_corpus(str(tmp_path), "text")
    with pytest.raises(
        UserError,
        match=r"config\.json, line 1 has no 'text' \(it has: name, rows\); .*--on-bad-line skip",
    ):
        list(corpus.documents(ReadLog(lambda n: None), map))
    log = ReadLog(lambda n: None, "skip")
    assert [document.text for document in corpus.documents(log, map)] == ["a"]
    assert log.left_out.places["no text under 'text'"] == [
        f"input file {tmp_path / 'config.json'}, line 1"
    ]


def test_links(tmp_path: Path) -> None:
    """Links are followed, cyclic ones too; each file is read once; broken links are reported."""
    real = tmp_path / "real"
    other = tmp_path / "other"
    for folder in (real, other):
        folder.mkdir()
    (other / "b.txt").write_text("b")
    (real / "a.txt").write_text("a")
    (real / "again.txt").symlink_to("a.txt")
    (real / "linked").symlink_to(other)
    (real / "linked-again").symlink_to(other)
    (other / "round").symlink_to(real)
    (real / "gone.txt").symlink_to("nothing")
    (real / "self").symlink_to("self")
    corpus = open_corpus(str(real), "text")
    assert [path.relative_to(real).as_posix() for path in corpus.files] == ["a.txt", "linked/b.txt"]
    assert corpus.left_out.counts == {
        "the same again by another path": 3,
        "link to nothing": 1,
        "unreadable (Too many levels of symbolic links)": 1,
    }
    assert corpus.left_out.places["link to nothing"] == [str(real / "gone.txt")]
    assert len(open_corpus(f"{real}/**/*.txt", "text").files) == 2
    assert texts(open_corpus(str(real / "again.txt"), "text")) == ["a"]
    with pytest.raises(UserError, match=r"gone\.txt is a link to nothing, which does not exist"):
        open_corpus(str(real / "gone.txt"), "text")
    with pytest.raises(UserError, match=r"self cannot be read \(Too many levels"):
        open_corpus(str(real / "self"), "text")


def test_hidden_files(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    for name in (".git/config", ".hidden.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    corpus = open_corpus(str(tmp_path), "text")
    assert texts(corpus) == ["a.txt"]
    assert str(corpus.left_out) == (
        f"hidden (name begins with a dot): 2 ({tmp_path}/.git, {tmp_path}/.hidden.txt)"
    )
    assert texts(open_corpus(str(tmp_path / ".hidden.txt"), "text")) == [".hidden.txt"]
    assert texts(open_corpus(str(tmp_path / ".git"), "text")) == [".git/config"]
    assert texts(open_corpus(f"{tmp_path}/.h*", "text")) == [".hidden.txt"]


def test_unreadable_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File modes do not apply to root, so the test simulates the refusal."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "closed.txt").write_text("b")
    open_file, list_folder = Path.open, Path.iterdir

    def refuse(path: Path, mode: str = "r"):
        if path.name == "closed.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, mode)

    def refuse_folder(path: Path):
        if path.name == "folder":
            raise PermissionError(13, "Permission denied", str(path))
        return list_folder(path)

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "iterdir", refuse_folder)
    corpus = open_corpus(str(tmp_path), "text")
    assert corpus.left_out.places == {
        "unreadable (Permission denied)": [str(tmp_path / "closed.txt"), str(tmp_path / "folder")]
    }
    with pytest.raises(UserError, match=r"closed\.txt .*unreadable \(Permission denied\)"):
        open_corpus(str(tmp_path / "closed.txt"), "text")
    with pytest.raises(UserError, match=r"has no files .*left out: unreadable"):
        open_corpus(str(tmp_path / "folder"), "text")


@pytest.mark.skipif(os.geteuid() == 0, reason="modes do not bind root")
def test_modes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        open_corpus(str(tmp_path / "a.txt"), "text")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    (tmp_path / "a.txt").write_text("a")
    assert open_corpus(str(tmp_path), "text").left_out.counts == {"not a regular file": 1}
    with pytest.raises(UserError, match="pipe is of a kind not read: not a regular file"):
        open_corpus(str(tmp_path / "pipe"), "text")
    with pytest.raises(UserError, match=r"cannot be read .*File name too long"):
        open_corpus("x" * 5000, "text")
    with pytest.raises(UserError, match="has no files; give"):
        open_corpus(f"{tmp_path}/*.parquet", "text")


def test_only_first_places_are_kept(tmp_path: Path) -> None:
    for n in range(12):
        (tmp_path / f"{n:02}.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "a.txt").write_text("a")
    left_out = open_corpus(str(tmp_path), "text").left_out
    assert left_out.counts["binary file"] == 12
    assert len(left_out.places["binary file"]) == 5
    assert str(left_out).startswith("binary file: 12 (")
    assert str(left_out).endswith("04.png, ...)")
