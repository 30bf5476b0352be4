"""Encode long texts in pieces, so that memory does not grow with a document's length.

A tokenizer needs about 160 bytes per byte of encoded text. A text is therefore cut into spans of
``SPAN`` characters. Each span is encoded with a margin of its neighbours, in which the position of
the cut is chosen, and the tokens of the margin are removed. If a tokenizer's rules do not look
beyond the margin, the tokens equal those of the unsplit text. Each cut is tested: the text before
the cut must be encoded equally with and without the following text, and the text after the cut
equally for two different beginnings. If no such position exists, as in a long text without spaces,
the tokens around the cut may differ from those of the unsplit text, and the cut is counted.
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
    """A part of a text; ``before`` and ``after``: characters of its neighbours at its ends.

    Each is 0 at the beginning or end of the text, else ``MARGIN``. The window around a cut, twice
    the margin, is the same in both adjacent spans, so that both find the same cut.
    """

    text: str
    before: int
    after: int


def spans(blocks: Iterable[str]) -> Iterator[Span]:
    """Yield the text of ``blocks`` as spans; a text up to SPAN + MARGIN characters is one span."""
    text, before = "", 0
    for block in blocks:
        text += block
        while len(text) > before + SPAN + MARGIN:
            end = before + SPAN + MARGIN
            yield Span(text[:end], before, MARGIN)
            text, before = text[end - 2 * MARGIN :], MARGIN
    yield Span(text, before, 0)


class EncodedSpan(NamedTuple):
    """Token ids, their text, and whether the ids equal those of the unsplit text."""

    ids: list[int]
    text: str
    exact: bool


def encode_span(encode: Callable[[str], list[int]], span: Span) -> EncodedSpan:
    """Encode the span's own part of a text; the ids of successive spans form the text's ids."""
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
    """Return a cut near the middle, and whether the tokens on both sides are independent."""
    other = window[_OTHER_BEGINNING:]
    whole, whole_other = encode(window), encode(other)
    for at in _candidates(window):
        left, left_other = encode(window[:at]), encode(other[: at - _OTHER_BEGINNING])
        right, right_other = whole[len(left) :], whole_other[len(left_other) :]
        if right == right_other and left + right == whole and left_other + right == whole_other:
            return at, True
    return len(window) // 2, False


def _candidates(window: str) -> Iterator[int]:
    """Yield positions to cut, preferred ones first: before white space after a word."""
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
    """Yield parts of at least SPAN characters, cut before white space after a word if possible.

    For training a tokenizer that splits words there.
    """
    begin = 0
    while len(text) - begin > SPAN + MARGIN:
        space = re.compile(r"(?<=\w)\s").search(text, begin + SPAN, begin + 2 * SPAN)
        end = space.start() if space else begin + SPAN
        yield text[begin:end]
        begin = end
    yield text[begin:]
