"""Encoding of long texts in pieces, so that memory does not grow with the document.

A tokenizer needs about 160 bytes of memory for each byte of text. A text is therefore cut into
spans of ``SPAN`` characters. Each span is encoded with a margin of text from its neighbours; the
place of the cut is chosen inside the margin, and the margin's tokens are removed. If a tokenizer's
rules look no further than the margin, the tokens equal the tokens of the complete text. Each cut is
tested: the text before the cut must have the same tokens with and without the text after it, and
the text after the cut the same tokens for two different beginnings. If no cut passes, as in a long
text without spaces, the tokens around the cut may differ from the tokens of the complete text, and
the cut is counted as inexact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

SPAN = 1 << 18
MARGIN = 2048
_OTHER_BEGINNING = MARGIN // 4
_TRIED = 16


class Span(NamedTuple):
    """Part of a text; its first ``before`` and last ``after`` characters belong to its neighbours.

    ``before`` and ``after`` are 0 at the beginning and the end of the text, else ``MARGIN``. The
    two spans at a cut share a window of twice the margin around the cut, so both choose the same
    place.
    """

    text: str
    before: int
    after: int


def spans(blocks: Iterable[str]) -> Iterator[Span]:
    """Cut the text of ``blocks`` into spans.

    A text of at most SPAN + MARGIN characters is one span.
    """
    text, before = "", 0
    for block in blocks:
        text += block
        while len(text) > before + SPAN + MARGIN:
            end = before + SPAN + MARGIN
            yield Span(text[:end], before, MARGIN)
            text, before = text[end - 2 * MARGIN :], MARGIN
    yield Span(text, before, 0)


class EncodedSpan(NamedTuple):
    """Token ids, their text, and True if the ids equal the ids of the complete text."""

    ids: list[int]
    text: str
    exact: bool


def encode_span(encode: Callable[[str], list[int]], span: Span) -> EncodedSpan:
    """Encode a span without its margins; concatenated, the spans' ids are the ids of the text.

    For example, ``encode_span(encode, Span("a short text", 0, 0)).exact`` is True.
    """
    text, begin, end, exact = span.text, 0, len(span.text), True
    if span.after:
        end += find_cut(encode, text[-2 * MARGIN :])[0] - 2 * MARGIN
    if not span.before:
        return EncodedSpan(encode(text[:end]), text[:end], True)
    begin, exact = find_cut(encode, text[: 2 * MARGIN])
    before, ids = encode(text[:begin]), encode(text[:end])
    if ids[: len(before)] == before:
        ids = ids[len(before) :]
    else:
        ids, exact = encode(text[begin:end]), False
    return EncodedSpan(ids, text[begin:end], exact)


def find_cut(encode: Callable[[str], list[int]], window: str) -> tuple[int, bool]:
    """Return a place near the middle to cut, and True if the tokens on both sides are unchanged."""
    other = window[_OTHER_BEGINNING:]
    whole, whole_other = encode(window), encode(other)
    for at in _candidates(window):
        left, left_other = encode(window[:at]), encode(other[: at - _OTHER_BEGINNING])
        right, right_other = whole[len(left) :], whole_other[len(left_other) :]
        if right == right_other and left + right == whole and left_other + right == whole_other:
            return at, True
    return len(window) // 2, False


def _candidates(window: str) -> Iterator[int]:
    """Yield places to cut: before white space after a word, at other ends of words, elsewhere."""
    middle = len(window) // 2
    places = range(len(window) // 4, len(window) - len(window) // 16)
    order = sorted(places, key=lambda at: abs(at - middle))
    words = [at for at in order if window[at - 1].isalnum()]
    tried: set[int] = set()
    for likely in (
        (at for at in words if window[at] == "\n"),
        (at for at in words if window[at].isspace()),
        (at for at in words if not window[at].isalnum()),
        order,
    ):
        for at in islice(likely, _TRIED):
            if at not in tried:
                tried.add(at)
                yield at


def stretches(text: str) -> Iterator[str]:
    """Cut a text into parts of SPAN characters or more, if possible at the end of a word.

    The cut is before white space, for the training of a tokenizer that splits words there.
    """
    begin = 0
    while len(text) - begin > SPAN + MARGIN:
        space = re.compile(r"(?<=\w)\s").search(text, begin + SPAN, begin + 2 * SPAN)
        end = space.start() if space else begin + SPAN
        yield text[begin:end]
        begin = end
    yield text[begin:]
