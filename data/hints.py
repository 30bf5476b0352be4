"""Hints of ``prepare`` about options that may be mistakes: separators and keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from allometry.data.corpus import Corpus, ReadLog
from allometry.data.kinds import JSON_LINES, PARQUET, TEXT

_LONG_DOCUMENT_BYTES = 1 << 20  # separated documents are shorter on average


def unused(corpora: Iterable[Corpus], text_key: str, separator: str | None) -> Iterator[str]:
    """Yield a sentence for each option that applies to none of the inputs."""
    kinds = {kind for corpus in corpora for kind in corpus.kinds}
    if separator is not None and TEXT not in kinds:
        yield f"--separator={separator!r} has no use: none of the inputs is a text file"
    if text_key != "text" and not kinds & {JSON_LINES, PARQUET}:
        yield f"--text-key={text_key} has no use: none of the inputs is JSON Lines or parquet"


def hints(
    kinds: Mapping[str, int], log: ReadLog, text_bytes: int, separator: str | None
) -> Iterator[str]:
    """Yield a sentence for each possible mistake in reading a source's documents.

    ``kinds``: number of files of each kind.
    """
    for mark, count in log.marks.items():
        if count > 1 and text_bytes < count * _LONG_DOCUMENT_BYTES:
            yield (
                f"{mark} stands {count:,} times in text files, each of which is one document; if "
                f"it separates documents, give --separator '{mark}'"
            )
    if separator is not None and TEXT in kinds and not log.separators:
        said = f"--separator={separator!r} stands in none of the text files, each of which is one "
        escaped = "; a backslash is one: in bash, $'\\n' is a line end" if "\\" in separator else ""
        yield f"{said}document{escaped}"
