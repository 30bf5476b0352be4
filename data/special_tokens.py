"""Special tokens of a tokenizer, its end-of-document token, and text that spells such a token.

A special token is an added token that is flagged as special or written like one (``<|...|>``,
``</s>``, ``[SEP]``), a token that ``tokenizer_config.json`` or ``special_tokens_map.json`` next to
the tokenizer names, the model's unknown token, and the end-of-document token.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from allometry.configs import json_file
from allometry.configs.errors import UserError
from allometry.data.tokenizer import BESIDE, read_tokenizer_json, tokenizer_file

END_OF_DOCUMENT = "<|endoftext|>"
KNOWN_ENDS = (
    END_OF_DOCUMENT,
    "<|end_of_text|>",
    "<|eod|>",
    "<|eos|>",
    "<eos>",
    "<eod>",
    "</s>",
    "<|end▁of▁sentence|>",
    "<｜end▁of▁sentence｜>",
)
_WRITTEN_LIKE_ONE = re.compile(  # U+FF5C is the bar of DeepSeek's tokens
    r"<[|\uff5c].*[|\uff5c]>|</?s>|<(unk|pad|mask|bos|eos|eod|sep|cls|endoftext)>"
    r"|\[(UNK|PAD|MASK|BOS|EOS|SEP|CLS)\]",
    re.DOTALL,
)
_NAMED = (
    "additional_special_tokens",
    "extra_special_tokens",
    *(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")),
)
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_BYTES = {f"<0x{number:02X}>" for number in range(256)}
_APART = {  # pre-tokenizer that splits the spelling of a byte's token
    "type": "Split",
    "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"},
    "behavior": "MergedWithPrevious",
    "invert": False,
}


def find_end_of_document(path: str, tokenizer: Tokenizer, wanted: str | None) -> tuple[str, int]:
    """Return the end-of-document token and its id.

    It is ``wanted``, or the ``eos_token`` in the files next to ``path``, or the only well-known
    name among the special tokens. For example, a tokenizer with ``<|endoftext|>`` at id 0 and no
    other known name returns ("<|endoftext|>", 0).

    Raises:
        UserError: no token or several tokens qualify, or ordinary text needs the token.
    """
    end, why = wanted, "--end-of-document"
    if end is None:
        end, why = _named_end(path)
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    among = ", ".join(sorted(special)) or "its tokens"
    if end is None:
        known = [name for name in KNOWN_ENDS if name in special]
        if len(known) != 1:
            raise UserError(
                f"tokenizer {path} has {'several' if known else 'no'} special tokens known to end "
                f"a document ({', '.join(known) or among}); name one with --end-of-document"
            )
        end, why = known[0], "its added token"
    number = tokenizer.token_to_id(end)
    if number is None:
        raise UserError(
            f"{why}={end!r} is not a token of {path}; choose one of {among} with --end-of-document"
        )
    if _needed(_canonical(path)["model"], end):
        raise UserError(
            f"{why}={end!r} is a token that ordinary text needs, so that it cannot mark the end of "
            f"documents; choose another of {among} with --end-of-document"
        )
    return end, int(number)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer in ``path`` (a tokenizer.json or its folder), unchanged."""
    return _loaded(path, json.dumps(read_tokenizer_json(path)))


def load_encoder(path: str | Path, end: int) -> Tokenizer:
    """Return the tokenizer in ``path`` for plain text, which never becomes a special token.

    The text is not padded, truncated, subject to dropout or surrounded by added tokens. ``end``: id
    of the end-of-document token. Special tokens keep their ids under random names, which no text
    can spell: neither the added tokens nor the model's vocabulary then contain their spelling, so
    that such text is encoded from smaller parts. Byte tokens (``<0x0A>``) keep their names, and
    text that spells one is split. All other text keeps its ids.
    """
    return _loaded(path, json.dumps(_of_plain_text(path, end)), plain=True)


def load_watcher(path: str | Path, end: int) -> tuple[Tokenizer, int, str | None] | None:
    """Load the detector of text for which the tokenizer in ``path`` has no token.

    Returns a tokenizer of plain text, the id that it gives to unknown text, and the token of that
    id. If the token is not None, the ids are those of ``load_encoder``. If the token is None, the
    tokenizer in ``path`` drops unknown text, and only the unknown id of the detector is meaningful.
    Returns None if all text has tokens, or if unknown text is an error.
    """
    values = _of_plain_text(path, end)
    model, plain = values["model"], _canonical(path)["model"]
    if model["type"] == "Unigram":
        number = model["unk_id"]
        if number is None or (model["byte_fallback"] and {p for p, _ in model["vocab"]} >= _BYTES):
            return None
        return load_encoder(path, end), int(number), str(plain["vocab"][number][0])
    if model["unk_token"] is not None:
        number = model["vocab"].get(model["unk_token"])
        return None if number is None else (load_encoder(path, end), number, plain["unk_token"])
    if _knows_all_bytes(values):
        return None
    name, bound = uuid.uuid4().hex, vocabulary_bound(load_tokenizer(path))
    model |= {"unk_token": name, "fuse_unk": False, "vocab": {**model["vocab"], name: bound}}
    return _loaded(path, json.dumps(values), plain=True), bound, None


def _knows_all_bytes(values: Mapping[str, Any]) -> bool:
    """Return True if a BPE has a token for each byte and encodes unknown text as bytes."""
    model = values["model"]
    vocabulary: set[str] = set(model["vocab"])
    if '"ByteLevel"' in json.dumps([values["normalizer"], values["pre_tokenizer"]]):
        return vocabulary >= set(pre_tokenizers.ByteLevel.alphabet())
    return bool(model["byte_fallback"]) and vocabulary >= _BYTES


def _of_plain_text(path: str | Path, end: int) -> dict[str, Any]:
    """Return the tokenizer of ``load_encoder`` as JSON."""
    values = _canonical(path)
    names = _special(path, values) | {str(load_tokenizer(path).id_to_token(end))}
    hidden = {name: f"{uuid.uuid4().hex}{uuid.uuid4().hex}" for name in names}
    values |= {"post_processor": None, "padding": None, "truncation": None}
    _hide(values["model"], hidden)
    values["added_tokens"] = [
        token
        if token["content"] not in hidden
        else token
        | {"content": hidden[token["content"]], "special": True, "normalized": False}
        | {"lstrip": False, "rstrip": False, "single_word": False}
        for token in values["added_tokens"]
    ]
    if values["model"].get("byte_fallback"):
        _keep_bytes_apart(values)
    return values


def vocabulary_bound(tokenizer: Tokenizer) -> int:
    """Return the largest id plus one, above the number of tokens if ids have gaps."""
    return int(max(tokenizer.get_vocab(with_added_tokens=True).values())) + 1


def _loaded(path: str | Path, text: str, *, plain: bool = False) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises no narrower type
        raise UserError(f"tokenizer {path} cannot be loaded ({error}); save it again") from error
    tokenizer.encode_special_tokens = plain
    return tokenizer


def _canonical(path: str | Path) -> dict[str, Any]:
    """Return a tokenizer.json as the installed library would write it."""
    values: dict[str, Any] = json.loads(load_tokenizer(path).to_str())
    return values


def _special(path: str | Path, values: Mapping[str, Any]) -> set[str]:
    """Return the special tokens of a tokenizer, without its end-of-document token."""
    model = values["model"]
    names = {
        token["content"]
        for token in values["added_tokens"]
        if token["special"] or _WRITTEN_LIKE_ONE.fullmatch(token["content"])
    }
    for settings in _beside(path).values():
        names |= {name for key in _NAMED for name in _contents(settings.get(key))}
        decoder = settings.get("added_tokens_decoder")
        for token in decoder.values() if isinstance(decoder, dict) else ():
            names |= set(_contents(token)) if token.get("special") else set()
    if model.get("unk_token") is not None:
        names.add(model["unk_token"])
    if model["type"] == "Unigram" and model["unk_id"] is not None:
        names.add(model["vocab"][model["unk_id"]][0])
    return {name for name in names if name and not _needed(model, name)}


def _needed(model: Mapping[str, Any], token: str) -> bool:
    """Return True if the token is a character or byte from which a BPE builds all other tokens."""
    if model["type"] != "BPE" or token not in model["vocab"] or token == model["unk_token"]:
        return False
    return len(token) == 1 or bool(model["byte_fallback"] and _BYTE.fullmatch(token))


def _hide(model: dict[str, Any], hidden: Mapping[str, str]) -> None:
    """Rename tokens of the model's vocabulary; ids and scores are unchanged."""
    if model["type"] == "Unigram":
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
        return
    model["vocab"] = {hidden.get(token, token): number for token, number in model["vocab"].items()}
    if model["unk_token"] is not None:
        model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    if model["type"] == "BPE":
        model["dropout"] = None
        skip = len(model["continuing_subword_prefix"] or "")
        model["merges"] = [
            (one, other)
            for one, other in model["merges"]
            if not {one, other, one + other[skip:]} & hidden.keys()
        ]


def _keep_bytes_apart(values: dict[str, Any]) -> None:
    """Prevent text from spelling byte tokens, which the model finds by their names."""
    model = values["model"]
    values["added_tokens"] = [
        token for token in values["added_tokens"] if not _BYTE.fullmatch(token["content"])
    ]
    merged = ("".join(pair) for pair in model.get("merges", ()))
    found = (
        model["type"] == "Unigram" or model["ignore_merges"] or any(map(_BYTE.fullmatch, merged))
    )
    if found:
        before = values["pre_tokenizer"]
        steps = [_APART] if before is None else [before, _APART]
        values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}


def _named_end(path: str) -> tuple[str | None, str]:
    """Return the ``eos_token`` in the files next to a tokenizer and its origin, or (None, "")."""
    named = {
        f"eos_token of {tokenizer_file(path).parent / file}": name
        for file, settings in _beside(path).items()
        for name in _contents(settings.get("eos_token"))
    }
    if len(set(named.values())) > 1:
        raise UserError(
            " and ".join(f"{where} ({name})" for where, name in named.items())
            + " differ; say which token ends documents with --end-of-document"
        )
    return next(((name, where) for where, name in named.items()), (None, ""))


def _beside(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read the files next to a tokenizer.json, by their names."""
    found = {}
    for name in BESIDE:
        file = tokenizer_file(path).parent / name
        if not file.is_file():
            continue
        try:
            values = json_file.read(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({error}); mend or remove it") from None
        if not isinstance(values, dict):
            raise UserError(f"{file} holds no JSON object; mend or remove it")
        found[name] = values
    return found


def _contents(value: Any) -> Iterable[str]:
    """Return the tokens in a value of such a file: text, objects with ``content``, or lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict) and isinstance(value.get("content"), str):
        yield value["content"]
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _contents(inner)
