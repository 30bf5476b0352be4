"""Text never becomes a special token, with every kind of tokenizer."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from allometry.configs.errors import UserError
from allometry.data.prepare import PrepareRequest, prepare
from allometry.data.special_tokens import find_end_of_document, load_encoder, load_tokenizer
from allometry.data.store import TokenStore
from allometry.data.tokenizer import check_tokenizer, difference, read_tokenizer_json

END, UNKNOWN, PAD = "</s>", "<unk>", "<pad>"
SPECIAL = [UNKNOWN, END, PAD]
# Special tokens' names occur often in the text, so that trained tokenizers learn them.
CORPUS = ["the end </s> of a <pad> line , <unk> and </s></s> <s> again, ünïcode </s>"] * 20


def unigram() -> tuple[Any, Any, Any]:
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=SPECIAL, unk_token=UNKNOWN, show_progress=False
    )
    return models.Unigram(), pre_tokenizers.Metaspace(), trainer


def wordpiece() -> tuple[Any, Any, Any]:
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False)
    return models.WordPiece(unk_token=UNKNOWN), pre_tokenizers.WhitespaceSplit(), trainer


def word_level() -> tuple[Any, Any, Any]:
    trainer = trainers.WordLevelTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False)
    return models.WordLevel(unk_token=UNKNOWN), pre_tokenizers.WhitespaceSplit(), trainer


def bpe(ignore_merges: bool = False, **more: Any) -> tuple[Any, Any, Any]:
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    model = models.BPE(unk_token=UNKNOWN, ignore_merges=ignore_merges, **more)
    return model, pre_tokenizers.WhitespaceSplit(), trainer


def byte_level() -> tuple[Any, Any, Any]:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), trainer


KINDS: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
    "unigram": unigram,
    "wordpiece": wordpiece,
    "word level": word_level,
    "bpe": bpe,
    "bpe that looks words up": lambda: bpe(ignore_merges=True),
    "bpe with dropout": lambda: bpe(dropout=0.5),
    "byte level": byte_level,
}


def made(kind: str, path: Path, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    model, pre_tokenizer, trainer = KINDS[kind]()
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=True), AddedToken("  ", rstrip=True)])
    tokenizer.add_special_tokens(["<|im_start|>"])
    tokenizer.add_tokens([AddedToken("<last>", single_word=True, lstrip=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    tokenizer.enable_truncation(4)
    values = json.loads(tokenizer.to_str())
    if change is not None:
        change(values)
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def unflagged(values: dict[str, Any]) -> None:
    for token in values["added_tokens"]:
        token["special"], token["normalized"] = False, True


def unlisted(values: dict[str, Any]) -> None:
    """Remove the special tokens from the list; only the model's vocabulary has them."""
    values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] not in SPECIAL]


SPELLED = (
    "a </s> b",
    "</s>",
    "</s></s> <pad><unk> <|im_start|> x",
    "word</s>word  </s> the end</S>",  # the normalizer changes capitals
    "＜/s＞ wide",  # NFKC changes wide letters
    "<tool> </s> <last>",
)


@pytest.mark.parametrize("change", [None, unflagged, unlisted], ids=["flagged", "not", "unlisted"])
@pytest.mark.parametrize("kind", KINDS)
def test_spelled_special_tokens_are_text(kind: str, change: Any, tmp_path: Path) -> None:
    path = made(kind, tmp_path / "tokenizer.json", change)
    if change is unlisted:
        (tmp_path / "special_tokens_map.json").write_text(
            json.dumps({"eos_token": END, "pad_token": {"content": PAD}})
        )
    plain = load_tokenizer(path)
    end = plain.token_to_id(END)
    encoder = load_encoder(path, end)
    forbidden = {plain.token_to_id(name) for name in (END, PAD, "<|im_start|>")}
    for text in SPELLED:
        ids = encoder.encode(text, add_special_tokens=False).ids
        assert ids, text
        assert not forbidden & set(ids), (text, ids)


@pytest.mark.parametrize("change", [None, unflagged, unlisted], ids=["flagged", "not", "unlisted"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "dropout" not in kind])
def test_other_text_has_the_ids_that_it_always_has(kind: str, change: Any, tmp_path: Path) -> None:
    path = made(kind, tmp_path / "tokenizer.json", change)
    plain = load_tokenizer(path)
    encoder = load_encoder(path, plain.token_to_id(END))
    plain.no_truncation()
    rng = random.Random(1)
    words = "the end of a line again ünïcode zzz <tool> <last>"
    pieces = [*words.split(), "   ", "  ", "Ω", "s>"]
    for _ in range(200):
        text = "".join(rng.choices([*pieces, " ", " "], k=rng.randint(1, 12)))
        ours = encoder.encode(text, add_special_tokens=False).ids
        assert ours == plain.encode(text, add_special_tokens=False).ids, text
    assert encoder.encode("<tool>", add_special_tokens=False).ids == [plain.token_to_id("<tool>")]
    assert encoder.encode("x <last>", add_special_tokens=False).ids[-1] == plain.token_to_id(
        "<last>"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_stands_once_and_last(kind: str, tmp_path: Path) -> None:
    made(kind, tmp_path / "tokenizer.json")
    with (tmp_path / "in.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in (*SPELLED, *CORPUS[:1]))
    request = PrepareRequest(
        (f"a={tmp_path / 'in.jsonl'}",),
        str(tmp_path / "out"),
        tokenizer=str(tmp_path),  # a folder is accepted
        validation_fraction=0.0,
        processes=1,
    )
    manifest = prepare(request, quiet=True)
    assert manifest.tokenizer.end_of_document == END
    store, end = TokenStore(tmp_path / "out" / "a.train"), manifest.tokenizer.end_of_document_id
    assert store.num_documents == len(SPELLED) + 1
    for document in range(store.num_documents):
        ids = store.read(document).tolist()
        assert ids[-1] == end
        assert ids.count(end) == 1


def test_negative_control_the_library_itself_makes_ends_of_text(tmp_path: Path) -> None:
    for kind in KINDS.keys() - {"bpe with dropout"}:
        plain = load_tokenizer(made(kind, tmp_path / f"{kind}.json"))
        plain.no_truncation()
        plain.encode_special_tokens = True
        ids = {i for text in SPELLED for i in plain.encode(text, add_special_tokens=False).ids}
        assert plain.token_to_id(END) in ids, kind


def test_an_end_that_stands_for_the_unknown_is_refused(tmp_path: Path) -> None:
    path = made("wordpiece", tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text("the end Ω of a line")
    request = PrepareRequest(
        (str(tmp_path / "a.txt"),),
        str(tmp_path / "out"),
        tokenizer=str(path),
        validation_fraction=0.0,
        end_of_document=UNKNOWN,
        processes=1,
    )
    with pytest.raises(UserError, match=r"does not know, .*choose another with --end-of-document"):
        prepare(request, quiet=True)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_letter_cannot_end_documents(tmp_path: Path) -> None:
    path = made("byte level", tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="--end-of-document='a' is a token that ordinary text nee"):
        find_end_of_document(str(path), load_tokenizer(path), "a")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_files_beside_name_the_end(name: str, tmp_path: Path) -> None:
    path = made("bpe", tmp_path / "tokenizer.json")
    tokenizer, other = load_tokenizer(path), tmp_path / name
    assert find_end_of_document(str(path), tokenizer, None)[0] == END  # the only known name
    other.write_text(json.dumps({"eos_token": {"content": "<|im_start|>", "lstrip": False}}))
    expected = ("<|im_start|>", tokenizer.token_to_id("<|im_start|>"))
    assert find_end_of_document(str(path), tokenizer, None) == expected
    assert find_end_of_document(str(path), tokenizer, PAD)[0] == PAD
    other.write_text(json.dumps({"eos_token": "<gone>"}))
    with pytest.raises(UserError, match=rf"eos_token of .*{name}='<gone>' is not a token of .*--e"):
        find_end_of_document(str(path), tokenizer, None)
    other.write_text("{")
    with pytest.raises(UserError, match=rf"{name} cannot be read .*mend or remove"):
        find_end_of_document(str(path), tokenizer, None)


def test_files_beside_that_differ_are_not_guessed_at(tmp_path: Path) -> None:
    path = made("bpe", tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": PAD}))
    with pytest.raises(UserError, match=r"</s>.* and .*<pad>.* differ; .*--end-of-document"):
        find_end_of_document(str(path), load_tokenizer(path), None)


def test_what_does_not_change_ids_is_no_difference(tmp_path: Path) -> None:
    one = read_tokenizer_json(made("bpe", tmp_path / "tokenizer.json"))

    def changed(**parts: Any) -> dict[str, Any]:
        return {**json.loads(json.dumps(one)), **parts}

    model = one["model"]
    old = {**model, "merges": [" ".join(pair) for pair in model["merges"]]}  # in the older format
    del old["ignore_merges"], old["byte_fallback"]
    tool = [{**t, "lstrip": True} if t["content"] == "<tool>" else t for t in one["added_tokens"]]
    more = {**one["added_tokens"][0], "id": 900, "content": "<|more|>"}
    same = (
        changed(version="1.1", post_processor=None, truncation=None, decoder=None),
        changed(padding=None, model=old),
        changed(model={**model, "dropout": 0.1}),
        changed(added_tokens=[*one["added_tokens"], more]),
    )
    for other in same:
        assert difference(one, other) is None
        assert difference(other, one) is None
    longer = {**model, "vocab": {**model["vocab"], "zzz": 999}}
    other = {
        "normalizer": changed(normalizer=None),
        "pre_tokenizer": changed(pre_tokenizer=None),
        "model": changed(model=longer),
        "added_tokens": changed(added_tokens=tool),
    }
    for part, values in other.items():
        assert difference(one, values) == part
        assert difference(values, one) == part
    assert "cannot be loaded" in str(difference(one, changed(model={"type": "BPE"})))


def test_files_of_one_tokenizer_written_twice_agree(tmp_path: Path) -> None:
    path = made("unigram", tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text("the end of a line " * 20)
    request = PrepareRequest(
        (str(tmp_path / "a.txt"),),
        str(tmp_path / "out"),
        tokenizer=str(path),
        validation_fraction=0.0,
        processes=1,
    )
    manifest = prepare(request, quiet=True)
    values = read_tokenizer_json(path)
    again, other = tmp_path / "again.json", tmp_path / "other.json"
    again.write_text(json.dumps({**values, "post_processor": None}))
    other.write_text(json.dumps({**values, "normalizer": None}))
    prefix = str(tmp_path / "out" / "a.train")
    check_tokenizer(str(again), [prefix])
    with pytest.raises(UserError, match=r"another tokenizer \(its normalizer differs; fingerprint"):
        check_tokenizer(str(other), [prefix])
    assert prepare(replace(request, tokenizer=str(again)), quiet=True) == manifest
    with pytest.raises(UserError, match="was prepared with tokenizer="):
        prepare(replace(request, tokenizer=str(other)), quiet=True)
    (tmp_path / "out" / "tokenizer.json").unlink()  # then only the fingerprint is known
    check_tokenizer(str(path), [prefix])
    with pytest.raises(UserError, match=r"its content differs"):
        check_tokenizer(str(again), [prefix])
