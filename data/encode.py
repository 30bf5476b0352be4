"""Encode text to tokens: a given or trained tokenizer, applied by several processes."""

from __future__ import annotations

import heapq
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, Literal, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from allometry.configs.errors import UserError
from allometry.data.corpus import Document, is_held_out, text_digest
from allometry.data.pieces import SPAN, Span, encode_span, spans, stretches
from allometry.data.processes import end_with_parent
from allometry.data.special_tokens import END_OF_DOCUMENT, load_encoder, load_watcher

_CHUNK_CHARACTERS = SPAN
_IN_FLIGHT = 4
_TEXTS_NAMED, _PARTS_NAMED, _CHARACTERS_NAMED = 16, 5, 20  # per chunk, per text, per part

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (Radford et al. 2019) that encodes any text; id 0 ends documents.

    The result depends on the texts alone. A small input may give fewer than ``vocab_size`` ids. For
    example, ``train_tokenizer(texts, 8192).save("tokenizer.json")``.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise UserError(
            f"vocab_size={vocab_size} is too small for a byte-level tokenizer; set it above "
            f"{len(alphabet)}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    parts = (part for text in texts for part in stretches(text))
    tokenizer.train_from_iterator(parts, trainer)
    return tokenizer


class TextSample:
    """Sample of documents of up to ``budget`` characters in all: those of smallest digest.

    The sample does not depend on the order of ``offer``. A document longer than the budget is cut
    to the budget.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.offered = 0
        self._kept: list[tuple[int, str]] = []
        self._size = 0
        self._smallest_refused = 1 << 64

    def offer(self, document: Document) -> None:
        """Consider one document for the sample."""
        text = _beginning(document.blocks, self.budget)
        self.offered += len(text)
        # Docstrings of a file have one group, so the text's own hash breaks ties.
        digest = int(text_digest(document.group + text)[:16], 16)
        if digest >= self._smallest_refused:
            return
        heapq.heappush(self._kept, (-digest, text))
        self._size += len(text)
        while self._size > self.budget:
            refused, text = heapq.heappop(self._kept)
            self._smallest_refused = -refused
            self._size -= len(text)

    def texts(self) -> list[str]:
        """Return the sample in order of digests."""
        return [text for _, text in sorted(self._kept, reverse=True)]


def _beginning(blocks: Iterable[str], characters: int) -> str:
    kept: list[str] = []
    for block in blocks:
        kept.append(block[:characters])
        characters -= len(kept[-1])
        if characters == 0:
            break
    return "".join(kept)


@dataclass(frozen=True)
class Encoding:
    """Settings of the encoding for a worker process.

    A document is held out if the first 64 bits of its group's digest are below
    ``validation_below``.
    """

    tokenizer: str
    tokenizer_sha256: str
    end_of_document: int
    dtype: Literal["uint16", "int32"]
    validation_below: int


class Piece(NamedTuple):
    """A document, or a span of a long one; ``group`` is the document's."""

    group: str
    span: Span


class EncodedPiece(NamedTuple):
    """Tokens of a piece in the dtype of the files; ``text_bytes`` is the UTF-8 size of their text.

    ``last``: the document ends here, with the end-of-document token. ``exact``: the tokens are the
    same as in an encoding of the complete document. ``unknown``: the parts of the text without a
    token.
    """

    tokens: NDArray[Any]
    text_bytes: int
    held_out: bool
    last: bool
    exact: bool
    unknown: Unknown | None = None


class Unknown(NamedTuple):
    """Number of unknown parts in a text, some examples, and the token that replaces them.

    With ``token`` None, the tokenizer drops unknown text.
    """

    times: int
    parts: tuple[str, ...]
    token: str | None


def chunks(documents: Iterable[Document]) -> Iterator[list[Piece]]:
    """Group documents, and cut long ones, into chunks for worker processes."""
    chunk: list[Piece] = []
    size = 0
    for document in documents:
        for span in spans(document.blocks):
            chunk.append(Piece(document.group, span))
            size += len(span.text)
            if size >= _CHUNK_CHARACTERS:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


class Encoder:
    """Encoder from text to ids without the id ``end``; ``path`` names a tokenizer.

    For example, ``Encoder("tokens/tokenizer.json", 0)("def f():")`` returns a list of ids.
    """

    def __init__(self, path: str, end: int) -> None:
        self._tokenizer = load_encoder(path, end)
        self._watcher = load_watcher(path, end)
        self._end = end

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text; UserError if encoding fails."""
        try:
            ids = _ids(self._tokenizer, text)
        except Exception as error:  # the library raises no narrower type
            raise UserError(
                f"the tokenizer cannot encode a document that begins {text[:40]!r} ({error}); give "
                "one that has a token for what is unknown, or knows all bytes"
            ) from error
        if self._end in ids:
            raise UserError(
                f"a document that begins {text[:40]!r} holds what the tokenizer does not know, and "
                "its token for that is the one that ends documents; choose another with "
                "--end-of-document"
            )
        return ids

    def unknown(self, text: str, ids: list[int], *, named: bool) -> Unknown | None:
        """Count the parts of a text without a token; None if there is no such part.

        ``ids`` are the ids of the text. Examples of the parts are collected only if ``named``,
        which takes longer.
        """
        if self._watcher is None:
            return None
        watcher, number, token = self._watcher
        count = (_ids(watcher, text) if token is None else ids).count(number)
        if not count or not named:
            return Unknown(count, (), token) if count else None
        found = watcher.encode(text, add_special_tokens=False)
        places = (at for at, one in zip(found.offsets, found.ids, strict=True) if one == number)
        parts = dict.fromkeys(text[slice(*at)][:_CHARACTERS_NAMED] for at in places)
        return Unknown(count, tuple(islice(parts, _PARTS_NAMED)), token)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    # A batch of one is faster than `encode`, which tracks offsets, and runs on one thread;
    # parallelism comes from the processes.
    ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


@lru_cache(maxsize=1)
def _loaded(path: str, sha256: str, end: int) -> Encoder:
    """Load a tokenizer once per process; ``sha256`` distinguishes successive contents of a path."""
    return Encoder(path, end)


def encode_chunk(encoding: Encoding, chunk: list[Piece]) -> list[EncodedPiece]:
    """Encode one chunk; independent of processes and of other chunks."""
    end = encoding.end_of_document
    encode = _loaded(encoding.tokenizer, encoding.tokenizer_sha256, end)
    outcomes: list[EncodedPiece] = []
    to_be_named = _TEXTS_NAMED
    for group, span in chunk:
        ids, text, exact = encode_span(encode, span)
        unknown = encode.unknown(text, ids, named=to_be_named > 0)
        to_be_named -= unknown is not None
        last = span.after == 0
        if last:
            ids.append(end)
        tokens = np.array(ids, encoding.dtype)
        held_out = is_held_out(group, encoding.validation_below)
        text_bytes = len(text.encode())
        outcomes.append(EncodedPiece(tokens, text_bytes, held_out, last, exact, unknown))
    return outcomes


def _live_and_die_with_parent() -> None:
    """Ignore Ctrl-C, and end with the parent, so that the pool does not wait forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


class Workers:
    """Ordered map over ``processes`` processes; with ``processes`` 1, in this process.

    Processes are spawned, not forked: forking a process with threads of the tokenizer can deadlock.
    For example, ``with Workers(8) as workers: results = workers.map(function, items)``.
    """

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(processes, context, _live_and_die_with_parent)

    def map(self, function: Callable[[Item], Outcome], items: Iterator[Item]) -> Iterator[Outcome]:
        """Yield outcomes in the order of ``items``; few items are submitted ahead."""
        if self._pool is None:
            yield from map(function, items)
            return
        waiting: deque[Future[Outcome]] = deque()
        try:
            for item in items:
                waiting.append(self._pool.submit(function, item))
                if len(waiting) >= _IN_FLIGHT * self._processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process died, most likely for want of memory; run again with less than "
                f"processes={self._processes}"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
