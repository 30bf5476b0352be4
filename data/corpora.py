"""Sources of documents: text files, JSON Lines, parquet, and corpora included in Python."""

from __future__ import annotations

import codecs
import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from hashlib import sha256
from itertools import repeat
from pathlib import Path

from allometry.configs.errors import UserError
from allometry.data.builtin import open_builtin
from allometry.data.corpus import (
    BadText,
    Corpus,
    Document,
    LeftOut,
    OrderedMap,
    ReadLog,
    text_digest,
)
from allometry.data.kinds import (
    DAMAGE,
    JSON_LINES,
    PARQUET,
    TEXT,
    SourceFile,
    UnusableError,
    kind_of,
    opened,
)
from allometry.data.records import (
    NULL,
    Key,
    json_record,
    parquet_rows,
    parquet_texts,
    split_key,
    text_key,
    text_of,
)
from allometry.data.special_tokens import KNOWN_ENDS

MARKS = (*KNOWN_ENDS, "<doc ")
"""Document separators that are common in text files from other tools."""
_SAY_EVERY_LINES = 1000
_BLOCK_BYTES = 1 << 20


def open_corpus(
    name: str, text: str, separator: str | None = None, split: str | None = None
) -> Corpus:
    """Open the corpus ``name``: ``builtin:...``, a file, a folder, or a glob pattern.

    Folders are searched recursively in path order, and links are followed; entries that are not
    read are listed in ``left_out``. ``text`` names the field (JSON Lines) or column (parquet) of
    the text, where ``meta.text`` is a nested field, and ``split`` the field that decides a
    document's split. ``separator`` separates the documents of a text file. For example,
    ``open_corpus("crawl/**/*.jsonl.gz", "text")`` reads all compressed JSON Lines under crawl/.

    Raises:
        UserError: the input does not exist, contains no readable file, or has files without fields
            although ``split`` names a field.
    """
    if name.startswith("builtin:"):
        if split is not None:
            raise _no_fields(name, split)
        return open_builtin(name)
    path, found = Path(name), _Found(text)
    try:
        if not os.path.lexists(path) and glob.has_magic(name):
            parts = path.parts
            at = parts.index("**") if "**" in parts else len(parts)
            for match in sorted(glob.glob(str(Path(*parts[:at])))):
                found.look_at(Path(match), parts[at:])
        elif stat.S_ISDIR(path.stat().st_mode):
            found.look_at(path)
        else:
            found.take(path)
    except FileNotFoundError as error:
        raise UserError(
            f"input {name} is a link to {os.readlink(path)}, which does not exist; mend the link"
            if path.is_symlink()
            else f"input {name} does not exist; give a file, a folder, a pattern of files or "
            "builtin:python-code or builtin:python-prose"
        ) from error
    except OSError as error:
        raise UserError(f"input {name} cannot be read ({error.strerror})") from error
    except UnusableError as error:
        raise UserError(f"input {name} is of a kind not read: {error}; {error.advice}") from error
    if not found.files:
        left_out = (
            f" that can be read (left out: {found.left_out})" if found.left_out.counts else ""
        )
        raise UserError(f"input {name} has no files{left_out}; give a path that holds text")
    if split is not None:
        for file in found.files:
            if file.kind == TEXT:
                raise _no_fields(str(file.path), split)
    keys = record_keys(text, split)
    return FileCorpus(str(path.absolute()), found.files, found.left_out, keys, separator)


def record_keys(text: str, split: str | None) -> tuple[Key, Key | None]:
    """Return the keys of a ``FileCorpus`` for the names of the two fields."""
    return text_key(text), None if split is None else split_key(split)


def _no_fields(where: str, split: str) -> UserError:
    return UserError(
        f"--split-key={split} names a field, but {where} has none; give JSON Lines or parquet, or "
        "prepare it without --split-key"
    )


class _Found:
    """Files to read under a folder, and the entries that are skipped."""

    def __init__(self, text_key: str) -> None:
        self.files: list[SourceFile] = []
        self.left_out = LeftOut()
        self._text_key = text_key
        self._seen: dict[tuple[int, int], Path] = {}

    def look_at(self, start: Path, pattern: tuple[str, ...] = ()) -> None:
        """Take a file, or all files in a folder; a file reached over several links is taken once.

        ``pattern``: the remaining parts of the path pattern, where ``**`` matches any number of
        folders.
        """
        waiting = [start]
        while waiting:
            path = waiting.pop()
            try:
                status = path.stat()
                is_folder = stat.S_ISDIR(status.st_mode)
                if not is_folder and not _matches(path.relative_to(start).parts, pattern):
                    continue
                before = self._seen.setdefault((status.st_dev, status.st_ino), path)
                if before is not path:
                    if before != path:
                        self.left_out.add("the same again by another path", str(path))
                elif is_folder:
                    inside = sorted(path.iterdir(), reverse=True)
                    waiting += [entry for entry in inside if not entry.name.startswith(".")]
                    for entry in reversed(inside):
                        if entry.name.startswith("."):
                            self.left_out.add("hidden (name begins with a dot)", str(entry))
                else:
                    self.take(path)
            except UnusableError as error:
                self.left_out.add(error.reason, str(path))
            except FileNotFoundError:
                self.left_out.add("link to nothing", str(path))
            except OSError as error:
                self.left_out.add(f"unreadable ({error.strerror})", str(path))

    def take(self, path: Path) -> None:
        """Add one file. Raises UnusableError if the file cannot be read as text."""
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnusableError(
                "not a regular file", "give a file, as inputs are read more than once"
            )
        self.files.append(kind_of(path.absolute(), self._text_key))


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Return True if a path, or a folder that contains it, matches."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_matches(parts[n:], pattern[1:]) for n in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


_Text = str | BadText | None


class FileCorpus(Corpus):
    """User files: a text file is one document; in other kinds, each line or row is one document.

    With a ``separator``, a text file is split there, and each part is a document without the line
    ends at its beginning and end. ``keys``: the field of the text, and the field that decides a
    document's split (None: the text decides).
    """

    def __init__(
        self,
        input: str,
        files: list[SourceFile],
        left_out: LeftOut,
        keys: tuple[Key, Key | None],
        separator: str | None = None,
    ) -> None:
        kinds = Counter(file.kind for file in files)
        super().__init__(input, [file.path for file in files], dict(sorted(kinds.items())))
        self.left_out = left_out
        self.text_key, self.split_key = keys
        self.separator = separator
        self.sources = files
        """Files with their kinds, in order."""

    def documents(self, log: ReadLog, ordered_map: OrderedMap) -> Iterator[Document]:
        """See ``Corpus.documents``."""
        for file in self.sources:
            read = _Reading(file.path, log.advance)
            try:
                if file.kind == PARQUET:
                    yield from self._rows(file.path, log)
                elif file.kind == JSON_LINES:
                    yield from self._lines(file, read, log)
                else:
                    yield from self._texts(file, read, log)
            except BadText as error:
                log.bad(f"input file {file.path}", error)
            except DAMAGE as error:
                says = f"cannot be read ({error}); repair it or take it out"
                log.bad(f"input file {file.path}", BadText("file is damaged", says))
            read.finish()

    def _texts(self, file: SourceFile, read: _Reading, log: ReadLog) -> Iterator[Document]:
        """Yield the documents of a text file after a first pass that validates the text.

        The first pass also computes the digest that determines the split.
        """
        digest, first, count = sha256(), "", 0
        for block in _blocks(file, lambda place: None):
            digest.update(block.encode())
            first, count = first or block, count + 1
            for mark in MARKS if self.separator is None else ():
                log.marks[mark] += block.count(mark)
        again: Iterable[str] = (first,) if count <= 1 else _Again(file, read)
        if self.separator is None:
            yield Document(str(file.path), again, digest.hexdigest())
            return
        for number, text in enumerate(_between(again, self.separator), start=1):
            log.separators += number > 1
            yield Document.of(f"{file.path}:{number}", text.strip("\r\n"))

    def _lines(self, file: SourceFile, read: _Reading, log: ReadLog) -> Iterator[Document]:
        with opened(file) as (lines, raw):
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield from self._record(f"{file.path}", "line", number, line, log)
                if number % _SAY_EVERY_LINES == 0:
                    read.at(raw.tell())

    def _rows(self, path: Path, log: ReadLog) -> Iterator[Document]:
        texts = parquet_texts(path, self.text_key)
        decide = (
            repeat((0, None)) if self.split_key is None else parquet_texts(path, self.split_key)
        )
        for (number, text), (first, group) in zip(texts, decide, strict=False):
            missing = text if number == 0 else group if first == 0 else None
            if isinstance(missing, BadText):
                log.bad(f"input file {path}", missing, parquet_rows(path))
                return
            yield from self._record(f"{path}", "row", number, (text, group), log)

    def _record(
        self, path: str, unit: str, number: int, value: bytes | tuple[_Text, _Text], log: ReadLog
    ) -> Iterator[Document]:
        """Yield the document of one line or row; null text is counted, and bad text is reported."""
        try:
            text, group = self._fields(value) if isinstance(value, bytes) else value
            if isinstance(text, BadText):
                raise text
            if isinstance(group, BadText):
                raise group
            if text is None:
                log.left_out.add(NULL, f"{path}:{number}")
                return
            if self.split_key is not None and not group:
                raise BadText(
                    f"nothing under {self.split_key.name!r}",
                    f"has nothing under {self.split_key.name!r}, so that its split is not known; "
                    "fill it in (a document without a parent: with its own text or id)",
                )
            yield Document(f"{path}:{number}", (text,), text_digest(group or text))
        except BadText as error:
            log.bad(f"input file {path}, {unit} {number}", error)

    def _fields(self, line: bytes) -> tuple[str | None, str | None]:
        record = json_record(line)
        text = text_of(record, self.text_key)
        return text, None if self.split_key is None else text_of(record, self.split_key)


class _Reading:
    """Progress of reading a file, in bytes on disk."""

    def __init__(self, path: Path, advance: Callable[[int], None]) -> None:
        self._size = path.stat().st_size
        self._advance = advance
        self._told = 0

    def at(self, raw_bytes: int) -> None:
        self._advance(raw_bytes - self._told)
        self._told = raw_bytes

    def finish(self) -> None:
        self.at(self._size)


def _blocks(file: SourceFile, at: Callable[[int], None]) -> Iterator[str]:
    """Yield the text of a file; BadText at bytes that are not UTF-8 text, NUL included."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    before = 0
    with opened(file) as (stream, raw):
        try:
            while data := stream.read(_BLOCK_BYTES):
                if b"\0" in data:
                    raise _not_utf8("NUL", before + data.index(b"\0"))
                yield decoder.decode(data)
                before += len(data)
                at(raw.tell())
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise _not_utf8(error.reason, before + error.start) from error


def _not_utf8(what: str, place: int) -> BadText:
    return BadText(
        "text is not UTF-8",
        f"is not UTF-8 text ({what} near byte {place}); convert it with iconv -t UTF-8 -f ENCODING",
    )


class _Again:
    """Blocks of a file that was read before, read again on each iteration to save memory."""

    def __init__(self, file: SourceFile, read: _Reading) -> None:
        self._file = file
        self._read = read

    def __iter__(self) -> Iterator[str]:
        try:
            yield from _blocks(self._file, self._read.at)
        except (*DAMAGE, BadText) as error:
            raise UserError(
                f"input file {self._file.path} was read once and cannot be again ({error}); run "
                "again when nothing else changes it"
            ) from error


def _between(blocks: Iterable[str], separator: str) -> Iterator[str]:
    rest = ""
    for block in blocks:
        *done, rest = (rest + block).split(separator)
        yield from done
    yield rest


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def named_input(value: str) -> tuple[str, str]:
    """Split ``name=input``; without a name, derive one from the input.

    If the first folder of the path is itself called ``lang=en``, or matches a pattern like
    ``lang=*``, the value is a path without a name. For example, ``named_input("web=crawl/")``
    returns ("web", "crawl/") and ``named_input("notes.txt")`` returns ("notes", "notes.txt").
    """
    if not value.strip():
        raise UserError(
            "an input is empty; give a file, a folder, a pattern of files or builtin:..."
        )
    name, equals, rest = value.partition("=")
    folder = Path(value).parts[0] if Path(value).parts else value
    if equals and _NAME.fullmatch(name) and not (os.path.lexists(folder) or glob.glob(folder)):
        if not rest:
            raise UserError(f"input {value!r} names no path; write name=path")
        return name, rest
    if value.startswith("builtin:"):
        return value.removeprefix("builtin:"), value
    stem = Path(value).name.split(".")[0]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")
    if not name:
        raise UserError(f"input {value!r} gives no name for its source; write name={value}")
    return name, value
