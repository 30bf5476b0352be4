"""Text without a token is counted and reported, and bytes are spelled as text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from allometry.data.prepare import PrepareRequest, prepare
from allometry.data.special_tokens import load_encoder
from allometry.data.store import TokenStore
from allometry.launch.runs.commands import Prepare
from allometry.launch.runs.prepare import prepared

END, UNKNOWN = "</s>", "<unk>"
KNOWN = ["the end of a line and again the line"] * 20
BYTES = [f"<0x{number:02X}>" for number in range(256)]


def saved(tokenizer: Tokenizer, folder: Path, change: Callable[[Any], Any] | None = None) -> str:
    values = json.loads(tokenizer.to_str())
    if change is not None:
        change(values)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    return str(folder)


def bpe(alphabet: list[str] | None = None, more: tuple[str, ...] = (), **model: Any) -> Tokenizer:
    byte_level = alphabet is not None
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if byte_level
        else pre_tokenizers.Metaspace()
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[END, *more],
        initial_alphabet=alphabet or [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(KNOWN, trainer)
    return tokenizer


def unigram(**change: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=[UNKNOWN, END], unk_token=UNKNOWN, show_progress=False
    )
    tokenizer.train_from_iterator(KNOWN, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=90, special_tokens=[UNKNOWN, END], show_progress=False
    )
    tokenizer.train_from_iterator(KNOWN, trainer)
    return tokenizer


def knowing_bytes(values: dict[str, Any]) -> None:
    values["model"] |= {"byte_fallback": True}
    values["model"]["vocab"] += [[name, -20.0] for name in BYTES]


def plain_bytes(values: dict[str, Any]) -> None:
    """Make the bytes added tokens too, which are found in text whatever their flags."""
    for token in values["added_tokens"]:
        token["special"] = token["content"] == END


ALL_BYTES = pre_tokenizers.ByteLevel.alphabet()
DROPPED = "text that the tokenizer does not know, dropped"
REPLACED = "text that the tokenizer does not know, became <unk>"
KINDS: dict[str, tuple[Callable[[], Tokenizer], str | None, int, list[str]]] = {
    # Constructor, reason, number of skipped parts of "the ω end ω☃", and these parts.
    "bpe": (bpe, DROPPED, 3, ["'ω'", "'☃'"]),
    "byte level without some bytes": (lambda: bpe(["a"]), DROPPED, 7, ["'ω'", "'☃'"]),
    "bpe with a token": (
        lambda: bpe(unk_token=UNKNOWN, more=(UNKNOWN,)),
        *(REPLACED, 3, ["'ω'", "'☃'"]),
    ),
    "unigram": (unigram, REPLACED, 2, ["'ω'", "'ω☃'"]),
    "wordpiece": (word_piece, REPLACED, 2, ["'ω'", "'ω☃'"]),
    "byte level": (lambda: bpe(ALL_BYTES), None, 0, []),
    "bytes": (lambda: bpe(byte_fallback=True, more=tuple(BYTES)), None, 0, []),
}


@pytest.mark.parametrize("kind", KINDS)
def test_text_without_a_token_is_counted_and_named(kind: str, tmp_path: Path) -> None:
    make, reason, count, parts = KINDS[kind]
    (tmp_path / "a.jsonl").write_text(
        '{"text": "the line"}\n{"text": "the ω end ω☃"}\n{"text": "the ω end ω☃"}\n'
    )
    asked = Prepare(
        inputs=(f"a={tmp_path / 'a.jsonl'}",),
        out=tmp_path / "out",
        tokenizer=Path(saved(make(), tmp_path / "tokenizer")),
        validation_fraction=0.0,
        processes=1,
        json=True,
    )
    report = prepared(asked)
    source = report.facts["sources"]["a"]
    assert source["skipped"] == ({} if reason is None else {reason: 2 * count})
    assert source["skipped_places"] == ({} if reason is None else {reason: parts})
    assert reason is None or (f"{reason}" in report.text and parts[0] in report.text)
    # Counting does not change ids, which equal the library's.
    plain = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    store = TokenStore(tmp_path / "out" / "a.train")
    ids = plain.encode("the ω end ω☃", add_special_tokens=False).ids
    assert store.read(1).tolist() == [*ids, plain.token_to_id(END)]


def byte_tokenizers() -> dict[str, tuple[Tokenizer, Any]]:
    spelled = Tokenizer(models.BPE(byte_fallback=True, unk_token=UNKNOWN))
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[UNKNOWN, END], show_progress=False, min_frequency=2
    )
    spelled.train_from_iterator(["<0x0A> <0x0A>", *BYTES, *KNOWN] * 5, trainer)
    added = bpe(byte_fallback=True, more=tuple(BYTES))
    added.add_tokens([AddedToken("<tool>")])
    return {
        "unigram": (unigram(), knowing_bytes),
        "merged by a bpe": (spelled, None),
        "added tokens": (added, plain_bytes),
    }


@pytest.mark.parametrize("kind", ["unigram", "merged by a bpe", "added tokens"])
def test_a_text_that_spells_a_byte_stays_text(kind: str, tmp_path: Path) -> None:
    tokenizer, change = byte_tokenizers()[kind]
    path = saved(tokenizer, tmp_path, change)
    plain = Tokenizer.from_file(f"{path}/tokenizer.json")
    encoder = load_encoder(path, plain.token_to_id(END))
    newline = plain.token_to_id("<0x0A>")
    text = "the <0x0A> end<0x0A>"
    assert newline in plain.encode(text).ids, "the library itself takes it for a byte"
    ids = encoder.encode(text, add_special_tokens=False).ids
    assert newline not in ids
    names = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    told = names.decode([plain.id_to_token(number) for number in ids])
    assert told.replace("▁", " ").strip() == text
    assert newline in encoder.encode("the\nend", add_special_tokens=False).ids
    for other in ("the < 0x0A end", "of a <0x0> line <0xZZ>", "a line\nagain ω"):
        ours = encoder.encode(other, add_special_tokens=False).ids
        assert ours == plain.encode(other, add_special_tokens=False).ids


def test_names_come_from_each_process_alike(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"the end {chr(0x3B1 + n)} " * 3000}) + "\n" for n in range(24))
    )
    manifests = []
    for processes in (1, 2):
        request = PrepareRequest(
            (f"a={tmp_path / 'a.jsonl'}",),
            str(tmp_path / f"out{processes}"),
            tokenizer=saved(bpe(), tmp_path / "tokenizer"),
            validation_fraction=0.0,
            processes=processes,
        )
        manifests.append(prepare(request, quiet=True))
    assert manifests[0].sources == manifests[1].sources
    assert manifests[0].sources["a"].skipped == {DROPPED: 24 * 3000}
    # From all texts, not only from the first with an unknown part.
    assert manifests[0].sources["a"].skipped_places[DROPPED] == [repr(one) for one in "αβγδε"]
