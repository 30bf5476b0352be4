"""Interface of a corpus: documents with a stable name and a digest that decides their split."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from allometry.configs.errors import UserError

_PLACES_KEPT = 5


class Document(NamedTuple):
    """Text with a stable name; ``group`` is the digest that decides its split.

    ``blocks`` are the text in order and can be iterated again: one string, or the blocks of a large
    file. The digest is of the text itself, or of the larger text from which the document was taken,
    so that text of one file is never in two splits.
    """

    id: str
    blocks: Iterable[str]
    group: str

    @classmethod
    def of(cls, id: str, text: str, group: str | None = None) -> Self:
        """Return a document of one string; ``group`` defaults to the digest of the text.

        For example, ``Document.of("a.txt", "some text")``.
        """
        return cls(id, (text,), text_digest(text) if group is None else group)

    @property
    def text(self) -> str:
        """The complete text as one string."""
        return "".join(self.blocks)

    def is_blank(self) -> bool:
        """Return True if the text contains only white space."""
        return all(not block or block.isspace() for block in self.blocks)

    def num_bytes(self) -> int:
        """Return the size of the text in UTF-8."""
        return sum(len(block.encode()) for block in self.blocks)


OrderedMap = Callable[[Callable[[Any], Any], Iterator[Any]], Iterator[Any]]
"""An ordered map that may use several processes."""

OnBadLine = Literal["stop", "skip"]


class BadText(Exception):
    """Line, row or file whose text is missing or damaged.

    ``reason`` is the category in the counts; ``says`` continues a sentence that begins with the
    place of the text.
    """

    def __init__(self, reason: str, says: str) -> None:
        super().__init__(says)
        self.reason = reason


class LeftOut:
    """Counts of skipped documents by reason, with the first few places of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}

    def add(self, reason: str, place: str, count: int = 1) -> None:
        """Add ``count`` skipped documents; ``place`` is the place of the first."""
        self.counts[reason] += count
        places = self.places.setdefault(reason, [])
        if len(places) < _PLACES_KEPT and place not in places:
            places.append(place)

    def update(self, other: LeftOut) -> None:
        """Add the counts and places of ``other``."""
        for reason, count in other.counts.items():
            self.counts[reason] += count
            places = self.places.setdefault(reason, [])
            places += [one for one in other.places.get(reason, ()) if one not in places]
            del places[_PLACES_KEPT:]

    def __str__(self) -> str:
        parts = []
        for reason, count in sorted(self.counts.items()):
            places = self.places[reason]
            more = ", ..." if count > len(places) else ""
            parts.append(f"{reason}: {count:,} ({', '.join(places)}{more})")
        return "; ".join(parts)


class ReadLog:
    """Statistics and errors of reading one source.

    The rules are the same in all formats. Text that is null or blank is not a document, and is
    counted. Text that is missing or damaged stops the reading (``on_bad_line`` "stop") or is
    counted ("skip"), up to ``max_bad_lines`` times.
    """

    def __init__(
        self,
        advance: Callable[[int], None],
        on_bad_line: OnBadLine = "stop",
        max_bad_lines: int = 1000,
    ) -> None:
        self.advance = advance
        """Told how many more bytes of the corpus' files were read."""
        self.left_out = LeftOut()
        self.marks: Counter[str] = Counter()
        """Occurrences in text files of common separators of documents."""
        self.separators = 0
        """Occurrences of the requested separator."""
        self._on_bad_line = on_bad_line
        self._max_bad_lines = max_bad_lines
        self.bad_lines = 0
        """Occurrences of missing or damaged text."""

    def bad(self, place: str, error: BadText, count: int = 1) -> None:
        """Omit and count a bad text, or raise UserError."""
        if self._on_bad_line == "stop":
            raise UserError(
                f"{place} {error}, or leave out what is like it with --on-bad-line skip"
            )
        self.left_out.add(error.reason, place, count)
        self.bad_lines += count
        if self.bad_lines > self._max_bad_lines:
            raise UserError(
                f"{place} {error}; it is one of more than {self._max_bad_lines} bad lines "
                f"({self.left_out}); mend the input or raise --max-bad-lines"
            )


class Corpus(ABC):
    """Documents in a fixed order that can be read repeatedly.

    ``input`` is the name in the manifest; ``files`` are all files that are read; ``left_out`` are
    entries that were found but are not read; ``kinds`` is the number of files of each kind.
    """

    def __init__(self, input: str, files: list[Path], kinds: dict[str, int]) -> None:
        self.input = input
        self.files = files
        self.kinds = kinds
        self.left_out = LeftOut()

    @abstractmethod
    def documents(self, log: ReadLog, ordered_map: OrderedMap) -> Iterator[Document]:
        """Read all documents; report text that cannot be a document to ``log``.

        Blank text is yielded; the caller drops it. Raises UserError for a file that cannot be read.
        """

    @property
    def total_bytes(self) -> int:
        """Size of ``files`` on disk."""
        return sum(_status(path).st_size for path in self.files)

    def fingerprint(self) -> str:
        """SHA-256 of names, sizes and modification times of ``files``."""
        digest = hashlib.sha256()
        for path in self.files:
            status = _status(path)
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def text_digest(text: str) -> str:
    """Return the SHA-256 of the text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def held_out_below(fraction: float) -> int:
    """Return the bound of a held-out group: its digest's first 64 bits are below the bound."""
    return round(fraction * 2**64)


def is_held_out(group: str, below: int) -> bool:
    """Return True if the documents of a group are held out."""
    return int(group[:16], 16) < below


def held_out(text: str, fraction: float) -> bool:
    """Return True if ``prepare`` puts the document in the validation split; for other engines.

    With datatrove: ``LambdaFilter(lambda document: not held_out(document.text, 0.05))``.
    """
    return is_held_out(text_digest(text), held_out_below(fraction))


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise UserError(
            f"input file {path} was there and cannot be read now ({error.strerror}); run again "
            "when nothing else changes the input"
        ) from error
