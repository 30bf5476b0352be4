"""Where documents come from: text files, JSON Lines, parquet and what Python brings along."""

from __future__ import annotations

import glob
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from allometry.configs.errors import UserError
from allometry.data.builtin import open_builtin
from allometry.data.corpus import Corpus, Document, OrderedMap, text_digest

JSON_ENDINGS = (".jsonl", ".json", ".ndjson")
_SAY_EVERY_LINES = 1000
_ZSTD_CHUNK_BYTES = 1 << 18


def open_corpus(name: str, text_key: str) -> Corpus:
    """The corpus that ``name`` names: ``builtin:...``, a file, a folder or a pattern of files.

    Folders are searched through, in the order of the paths; names that begin with a dot are not
    looked at. ``text_key`` is the key (JSON Lines) or column (parquet) of the text. Raises
    UserError when there is nothing of that name.
    """
    if name.startswith("builtin:"):
        return open_builtin(name)
    path = Path(name)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        hidden = re.compile(r"(^|/)\.")
        files = [file for file in inside if not hidden.search(str(file.relative_to(path)))]
    elif glob.has_magic(name):
        matches = sorted(glob.glob(name, recursive=True))
        files = [Path(match) for match in matches if Path(match).is_file()]
    else:
        raise UserError(
            f"input {name} does not exist; give a file, a folder, a pattern of files or "
            "builtin:python-code or builtin:python-prose"
        )
    if not files:
        raise UserError(f"input {name} has no files; give a path that holds text")
    return FileCorpus(str(path.absolute()), [file.absolute() for file in files], text_key)


class FileCorpus(Corpus):
    """Files of the user's: each text file is a document, as is each line or row of the others."""

    def __init__(self, input: str, files: list[Path], text_key: str) -> None:
        super().__init__(input, files)
        self.text_key = text_key

    def documents(
        self, skipped: Counter[str], advance: Callable[[int], None], ordered_map: OrderedMap
    ) -> Iterator[Document]:
        """See ``Corpus.documents``."""
        for path in self.files:
            read = _Reading(path, advance)
            try:
                for where, text in self._texts(path, read, skipped):
                    yield Document(f"{path}{where}", text, text_digest(text))
            except (EOFError, zlib.error, zstandard.ZstdError, OSError) as error:
                raise UserError(
                    f"input file {path} cannot be read ({error}); repair it or take it out"
                ) from error
            read.finish()

    def _texts(
        self, path: Path, read: _Reading, skipped: Counter[str]
    ) -> Iterator[tuple[str, str]]:
        compressed = path.suffix in (".gz", ".zst")
        ending = Path(path.stem).suffix if compressed else path.suffix
        if path.suffix == ".parquet":
            yield from _parquet_texts(path, self.text_key, skipped)
        elif ending in JSON_ENDINGS or (compressed and ending == ""):
            with path.open("rb") as raw:
                lines = _decompress(raw, path.suffix)
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        where = f"input file {path}, line {number}"
                        yield f":{number}", _json_text(line, self.text_key, where)
                    if number % _SAY_EVERY_LINES == 0:
                        read.at(raw.tell())
        else:
            with path.open("rb") as raw:
                data = _decompress(raw, path.suffix).read()
            try:
                yield "", data.decode("utf-8-sig")
            except UnicodeDecodeError:
                skipped["file is not UTF-8 text"] += 1


class _Reading:
    """How far a file was read, told in bytes on disk."""

    def __init__(self, path: Path, advance: Callable[[int], None]) -> None:
        self._size = path.stat().st_size
        self._advance = advance
        self._told = 0

    def at(self, raw_bytes: int) -> None:
        self._advance(raw_bytes - self._told)
        self._told = raw_bytes

    def finish(self) -> None:
        self.at(self._size)


def _decompress(raw: IO[bytes], suffix: str) -> IO[bytes]:
    if suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw, mode="rb"))
    if suffix == ".zst":
        return cast(IO[bytes], io.BufferedReader(_ZstdReader(raw)))
    return raw


class _ZstdReader(io.RawIOBase):
    """Frames of zstd; unlike the library's own reader it refuses a file that was cut short."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._ready = b""
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame.eof else b""
            data = data or self._raw.read(_ZSTD_CHUNK_BYTES)
            if not data:
                if self._inside:
                    raise EOFError("the compressed data end too early")
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = self._frame.decompress(data)
            self._inside = not self._frame.eof
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _json_text(line: bytes, key: str, where: str) -> str:
    try:
        values = json.loads(line)
    except ValueError as error:
        pretty = line.strip() in (b"[", b"{")
        hint = "write one JSON object on each line" if pretty else "repair or remove it"
        raise UserError(f"{where} is not JSON ({error}); {hint}") from error
    if not isinstance(values, dict):
        raise UserError(f"{where} is no JSON object; write one object on each line")
    if key not in values:
        keys = ", ".join(sorted(values)) or "none"
        raise UserError(f"{where} has no key {key!r} (its keys: {keys}); set the text key")
    text = values[key]
    if not isinstance(text, str):
        raise UserError(f"{where} has no text under {key!r} but {type(text).__name__}; repair it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} has text that is not Unicode ({error}); repair it") from error
    return text


def _parquet_texts(path: Path, key: str, skipped: Counter[str]) -> Iterator[tuple[str, str]]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if key not in names:
            raise UserError(
                f"input file {path} has no column {key!r} (its columns: {', '.join(names)}); "
                "set the text key"
            )
        batches = (batch.column(0).to_pylist() for batch in file.iter_batches(columns=[key]))
        for number, value in enumerate(chain.from_iterable(batches), start=1):
            if value is None:
                skipped["row without text"] += 1
            elif isinstance(value, str):
                yield f":{number}", value
            else:
                raise UserError(
                    f"input file {path}, row {number} has no text in column {key!r} but "
                    f"{type(value).__name__}; set the text key"
                )
    except pyarrow.ArrowException as error:
        raise UserError(
            f"input file {path} is not parquet that can be read ({error}); repair it or take it out"
        ) from error


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def named_input(value: str) -> tuple[str, str]:
    """Split ``name=input``; without a name, one is made from the input."""
    name, equals, rest = value.partition("=")
    if equals and _NAME.fullmatch(name) and not Path(value).exists():
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
