"""Long documents encoded in pieces have the tokens of the complete text."""

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from allometry.data import pieces as room
from allometry.data.encode import train_tokenizer
from allometry.data.pieces import encode_span, find_cut, spans, stretches
from allometry.data.prepare import PrepareRequest, prepare
from allometry.data.store import TokenStore
from allometry.data.writer import TokenWriter

LETTERS = "abcdefg"


def prose(characters: int, seed: int = 0) -> str:
    """Return words, numbers, punctuation, indented lines, and words of a script without spaces."""
    rng = random.Random(seed)
    parts: list[str] = []
    size = 0
    while size < characters:
        word = "".join(rng.choices(LETTERS, k=rng.randint(1, 7)))
        kinds = [word, word.title(), str(rng.randint(0, 99999)), "我们" * rng.randint(1, 3), "é€"]
        ends = [" ", " ", " ", ", ", ".\n\n", "\n    ", "  ", "\r\n", "'s ", "。", "\n\n\n"]
        parts.append(rng.choice(kinds) + rng.choice(ends))
        size += len(parts[-1])
    return "".join(parts)


def byte_bpe() -> Tokenizer:
    return train_tokenizer([prose(20000)], 400)


def digits_by_three() -> Tokenizer:
    """Split like Llama 3: punctuation with the following line ends, digits in threes."""
    pattern = (
        r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [prose(20000)], trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet)
    )
    return tokenizer


def no_split() -> Tokenizer:
    """Tokenizer like Llama 2: a leading space, spaces as letters, merges over the full text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"])
    words = [word + " " for word in prose(20000).split()]
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(
        [prose(20000)],
        trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"]),
    )
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        [prose(20000)], trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"])
    )
    return tokenizer


def encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    def encode(text: str) -> list[int]:
        return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    return encode


@pytest.fixture
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "SPAN", 6000)
    monkeypatch.setattr(room, "MARGIN", 1024)
    monkeypatch.setattr(room, "_OTHER_BEGINNING", 256)


@pytest.mark.parametrize("made", [byte_bpe, digits_by_three, no_split, unigram, word_piece])
@pytest.mark.usefixtures("short_spans")
def test_pieces_have_the_tokens_of_the_whole(made: Callable[[], Tokenizer]) -> None:
    encode = encoder(made())
    text = prose(60_000, seed=1)
    parts = [encode_span(encode, span) for span in spans([text[:7], text[7:50_000], text[50_000:]])]
    assert len(parts) > 8
    assert all(part.exact for part in parts)
    assert [number for part in parts for number in part.ids] == encode(text)
    assert "".join(part.text for part in parts) == text


@pytest.mark.usefixtures("short_spans")
def test_cutting_anywhere_would_not_do() -> None:
    """The control: cutting in the middle of the window gives other tokens."""
    encode = encoder(byte_bpe())
    text = prose(90_000, seed=1)
    plain = [text[at : at + 6000] for at in range(0, len(text), 6000)]
    assert [number for part in plain for number in encode(part)] != encode(text)


@pytest.mark.usefixtures("short_spans")
def test_text_without_a_boundary_is_cut_and_counted() -> None:
    tokenizer = digits_by_three()
    encode = encoder(tokenizer)
    text = "".join(random.Random(2).choices("0123456789", k=40_000))
    parts = [encode_span(encode, span) for span in spans([text])]
    assert sum(not part.exact for part in parts) == len(parts) - 1 > 4
    tokenizer.decoder = decoders.ByteLevel()
    assert tokenizer.decode([number for part in parts for number in part.ids]) == text
    assert "".join(part.text for part in parts) == text


@pytest.mark.usefixtures("short_spans")
def test_spans_cover_the_text_once_and_are_bounded() -> None:
    text = "".join(chr(0x4E00 + n % 20000) for n in range(50_000))
    for step in (1 << 20, 7001, 100):
        blocks = [text[at : at + step] for at in range(0, len(text), step)]
        found = list(spans(blocks))
        own = [span.text[span.before : len(span.text) - span.after] for span in found]
        assert "".join(own) == text
        assert max(len(span.text) for span in found) <= 6000 + 2 * 1024
        for left, right in pairwise(found):
            assert left.text[-2048:] == right.text[:2048]
    assert list(spans([])) == [("", 0, 0)]


def test_a_short_document_is_encoded_as_it_is() -> None:
    calls: list[str] = []

    def encode(text: str) -> list[int]:
        calls.append(text)
        return [1, 2]

    (span,) = spans(["a b"])
    assert encode_span(encode, span) == ([1, 2], "a b", True)
    assert calls == ["a b"]


def test_find_cut_prefers_the_end_of_a_line() -> None:
    encode = encoder(byte_bpe())
    window = ("word " * 300 + "word\n" + "word " * 520)[: 2 * room.MARGIN]
    at, exact = find_cut(encode, window)
    assert exact
    assert window[at] == "\n"


def test_stretches_are_the_text() -> None:
    text = prose(room.SPAN * 2 + 100)
    parts = list(stretches(text))
    assert "".join(parts) == text
    assert len(parts) == 2 or len(parts) == 3
    assert all(part[0].isspace() for part in parts[1:])
    assert "".join(stretches("x" * (room.SPAN * 2))) == "x" * (room.SPAN * 2)


@pytest.mark.usefixtures("short_spans")
def test_a_long_file_is_never_encoded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens and bytes equal those of the same text in one JSON line, and
    of the text itself."""
    monkeypatch.setattr("allometry.data.corpora._BLOCK_BYTES", 10_001)
    text = prose(60_000, seed=3)
    (tmp_path / "long.txt").write_text("\ufeff" + text, encoding="utf-8", newline="")
    (tmp_path / "line.jsonl").write_text(json.dumps({"text": text}) + "\n")
    longest = 0

    def encode_span_seen(encode: Callable[[str], list[int]], span: room.Span) -> room.EncodedSpan:
        def seen(part: str) -> list[int]:
            nonlocal longest
            longest = max(longest, len(part))
            return encode(part)

        return encode_span(seen, span)

    monkeypatch.setattr("allometry.data.encode.encode_span", encode_span_seen)
    inputs = (str(tmp_path / "long.txt"), str(tmp_path / "line.jsonl"))
    request = PrepareRequest(
        inputs, str(tmp_path / "out"), vocab_size=400, validation_fraction=0.0, processes=1
    )
    manifest = prepare(request, quiet=True)
    assert longest <= room.SPAN + 2 * room.MARGIN
    whole = encoder(Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")))(text)
    for name in ("long", "line"):
        store = TokenStore(tmp_path / "out" / f"{name}.train")
        assert store.num_documents == 1
        assert store.read(0).tolist() == [*whole, 0]
        assert manifest.sources[name].splits["train"].bytes == len(text.encode())
        assert manifest.sources[name].inexact_cuts == 0


def test_a_document_of_more_tokens_than_a_sequence_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("allometry.data.writer.LONGEST_SEQUENCE", 5)
    writer = TokenWriter(tmp_path, "s", "uint16")
    for numbers, last in (((1, 2, 3), False), ((4, 5, 6, 0), True), ((7, 8, 9, 9, 0), True)):
        writer.add(np.array(numbers, "uint16"), 1, last)
    record = writer.finish()
    assert record is not None
    assert (record.documents, record.tokens, record.largest_id) == (2, 12, 9)
    store = TokenStore(tmp_path / "s")
    assert [store.read(n).tolist() for n in range(2)] == [[1, 2, 3, 4, 5, 6, 0], [7, 8, 9, 9, 0]]
