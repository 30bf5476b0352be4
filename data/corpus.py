"""What a corpus is: documents, each with a stable name and what decides its split."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Document(NamedTuple):
    """A text and its stable name; ``group`` is the digest that decides its split.

    The digest is of the text itself, or of the larger text out of which the document was taken,
    so that what stands in one file never lands in two splits.
    """

    id: str
    text: str
    group: str


OrderedMap = Callable[[Callable[[Any], Any], Iterator[Any]], Iterator[Any]]
"""A map that keeps the order and may work in several processes."""


class Corpus(ABC):
    """Documents in a fixed order, to be read as often as needed.

    ``input`` is how the record names it; ``files`` are all that is read.
    """

    def __init__(self, input: str, files: list[Path]) -> None:
        self.input = input
        self.files = files

    @abstractmethod
    def documents(
        self, skipped: Counter[str], advance: Callable[[int], None], ordered_map: OrderedMap
    ) -> Iterator[Document]:
        """Read all documents; count in ``skipped`` what cannot be one, by reason.

        ``advance`` is told how many bytes of ``files`` were read since it was last called. Text
        that is blank is left to the caller. Raises UserError for a file that cannot be read.
        """

    @property
    def total_bytes(self) -> int:
        """Size of ``files`` on disk."""
        return sum(path.stat().st_size for path in self.files)

    def fingerprint(self) -> str:
        """SHA-256 of the names, sizes and times of change of ``files``."""
        digest = hashlib.sha256()
        for path in self.files:
            status = path.stat()
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of the text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
