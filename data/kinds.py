"""Detect the kind of an input file from its content and its extension."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import zstandard

TEXT, JSON_LINES, PARQUET = "text", "JSON Lines", "parquet"
_JSON_ENDINGS = {".jsonl", ".json", ".ndjson", ".jsonlines", ".jl"}
_TABLE_ENDINGS = {".csv", ".tsv"}
_HEAD_BYTES = 1 << 16
_ZSTD_CHUNK_BYTES = 1 << 18

DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError)
"""Exceptions raised by reading a damaged file."""


class SourceFile(NamedTuple):
    """A file and its kind; ``compression`` is its compression's extension, or empty."""

    path: Path
    kind: str
    compression: str


class UnusableError(Exception):
    """A file that is not usable as text: ``reason`` names its kind, ``advice`` the remedy."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(reason)
        self.reason, self.advice = reason, advice


# Ending: pattern of the first bytes (pzstd writes a skippable frame first), decompressor.
_COMPRESSIONS: dict[str, tuple[bytes, Any]] = {
    ".gz": (rb"\x1f\x8b", lambda raw: gzip.GzipFile(fileobj=raw, mode="rb")),
    ".zst": (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", lambda raw: _zstd(raw)),
    ".bz2": (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", bz2.BZ2File),
    ".xz": (rb"\xfd7zXZ\0", lzma.LZMAFile),
}
_UNPACK = "unpack it and give what is in it"
_CONVERT = "write its text as JSON Lines or parquet"
_HOW = "docs/file_formats.md has the command"
_CONTROL = bytes({*range(32)} - {*b"\b\t\n\v\f\r\x1b"})
"""Bytes that do not occur in text in any single-byte encoding."""
_UTF8 = "convert it with iconv -t UTF-8 -f ENCODING"
# Offset, bytes at that offset, kind of file, advice.
_MAGIC = (
    (0, b"PK\x03\x04", "zip archive", _UNPACK),
    (257, b"ustar", "tar archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "rar archive", _UNPACK),
    (0, b"\x04\x22\x4d\x18", "lz4 file", _UNPACK),
    (0, b"LZIP\x01", "lzip file", _UNPACK),
    (0, b"\x1f\x9d", "file packed with compress", _UNPACK),
    (0, b"\xff\x06\0\0sNaPpY", "snappy file", _UNPACK),
    (0, b"ARROW1\0", "Arrow file", "write it as parquet"),
    (0, b"Obj\x01", "Avro file", "write it as parquet"),
    (0, b"WARC/1.", "WARC file", _CONVERT),
    (0, b"%PDF-", "PDF file", _CONVERT),
    (0, b"SQLite format 3", "SQLite file", _CONVERT),
    (
        0,
        b"version https://git-lfs",
        "git-lfs pointer, not the file itself",
        "fetch it: git lfs pull",
    ),
    (0, b"\xff\xfe", "UTF-16 text", _UTF8),
    (0, b"\xfe\xff", "UTF-16 text", _UTF8),
)


def kind_of(path: Path, text_key: str) -> SourceFile:
    """Detect a file's kind. Raises UnusableError if the file contains no readable text.

    For example, a.jsonl.gz is ``SourceFile(path, JSON_LINES, ".gz")``.
    """
    try:
        with path.open("rb") as raw:
            head = raw.read(_HEAD_BYTES)
    except OSError as error:
        raise UnusableError(f"unreadable ({error.strerror})", "make it readable") from error
    if not head:
        raise UnusableError("empty file", "give one that holds text")
    compression = _compression(head)
    ending = path.suffix.lower()
    if ending in _COMPRESSIONS:
        if ending != compression:
            raise UnusableError(
                f"not the {ending} file that its name says", "give it its own ending"
            )
        ending = Path(path.stem).suffix.lower()
    if compression:
        try:
            with opened(SourceFile(path, "", compression)) as (stream, _):
                head = stream.read(_HEAD_BYTES)
        except DAMAGE:  # in the first block; reading reports the damage
            return SourceFile(path, JSON_LINES if ending in _JSON_ENDINGS else TEXT, compression)
        if _compression(head):
            raise UnusableError("compressed twice", _UNPACK)
    if head.startswith(b"PAR1") and not compression:
        return SourceFile(path, PARQUET, "")
    return SourceFile(path, _kind_of_content(head, ending, text_key), compression)


def _compression(head: bytes) -> str:
    return next((end for end, (magic, _) in _COMPRESSIONS.items() if re.match(magic, head)), "")


def _kind_of_content(head: bytes, ending: str, text_key: str) -> str:
    for offset, magic, what, advice in _MAGIC:
        if head[offset:].startswith(magic):
            raise UnusableError(what, advice)
    if ending == ".parquet":
        raise UnusableError("not the parquet file that its name says", "repair it or take it out")
    if ending in _TABLE_ENDINGS:
        raise UnusableError(f"{ending[1:].upper()} table", f"{_CONVERT} ({_HOW})")
    if re.match(rb"(\xef\xbb\xbf)?\s*\[" if ending in _JSON_ENDINGS else rb'\s*\[\s*\{\s*"', head):
        raise UnusableError(
            "JSON array", "write one JSON object on each line, as `jq -c '.[]'` does"
        )
    if ending in _JSON_ENDINGS:
        if re.match(rb"(\xef\xbb\xbf)?\s*\{[ \t\r]*\n", head):
            raise UnusableError(
                "JSON object over several lines",
                "write one JSON object on each line, as `jq -c .` does",
            )
        return JSON_LINES
    if b"\0" in head or (not _is_utf8(head) and head.translate(None, _CONTROL) != head):
        raise UnusableError("binary file", "give text, JSON Lines or parquet")
    return JSON_LINES if _holds_json_lines(head, text_key) else TEXT


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last letter may be cut
    except UnicodeDecodeError:
        return False
    return True


def _holds_json_lines(head: bytes, text_key: str) -> bool:
    """Return True if a file without a JSON Lines extension contains JSON Lines.

    True if two lines are objects, or the only line is an object with the text key.
    """
    lines = [line for line in head.removeprefix(b"\xef\xbb\xbf").splitlines() if line.strip()]
    if not lines or not lines[0].lstrip().startswith(b"{"):
        return False
    if len(head) == _HEAD_BYTES and len(lines) > 1:
        lines.pop()  # the last line may be cut
    if len(lines) > 1:
        return all(_is_object(line) for line in lines[:2])
    name = json.dumps(text_key.rpartition(".")[2]).encode()
    return re.search(re.escape(name) + rb"\s*:", lines[0]) is not None


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


@contextmanager
def opened(file: SourceFile) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a file; return its content, and the raw file, whose position gives the progress."""
    with file.path.open("rb") as raw:
        if file.compression:
            unpack = _COMPRESSIONS[file.compression][1]
            with cast(IO[bytes], unpack(raw)) as stream:
                yield stream, raw
        else:
            yield raw, raw


def _zstd(raw: IO[bytes]) -> IO[bytes]:
    return io.BufferedReader(_ZstdReader(raw))


class _ZstdReader(io.RawIOBase):
    """Reader of zstd frames; unlike the library's reader, it refuses truncated files."""

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
