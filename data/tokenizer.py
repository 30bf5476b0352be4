"""Check that tokens, tokenizer and model fit together."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allometry.configs import json_file
from allometry.configs.errors import UserError
from allometry.data.manifest import MANIFEST, TokenizerRecord, manifest_of, read_manifest
from allometry.data.store import TokenStore

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"
BESIDE = (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP)
"""Files next to a tokenizer.json that list special tokens."""
_log = logging.getLogger(__name__)


def tokenizer_file(path: str | Path) -> Path:
    """Return the tokenizer.json for ``path``, a file or its folder."""
    path = Path(path)
    return path / TOKENIZER if path.is_dir() else path


def read_tokenizer_json(path: str | Path) -> dict[str, Any]:
    """Return the content of a tokenizer.json; UserError if it is missing or invalid."""
    path = tokenizer_file(path)
    if not path.is_file():
        raise UserError(f"tokenizer {path} does not exist; give the path of a tokenizer.json")
    try:
        values = json_file.read(path)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer {path} is not JSON ({error}); give a tokenizer.json") from error
    if not isinstance(values, dict) or "model" not in values:
        raise UserError(
            f"tokenizer {path} has no 'model': it is not a tokenizer.json of the tokenizers "
            "library; save it in that format"
        )
    return values


def fingerprint(tokenizer: dict[str, Any]) -> str:
    """Return the SHA-256 of the canonical JSON, independent of its formatting."""
    text = json.dumps(tokenizer, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Return the first part of two tokenizers that can change a text's ids; None if there is none.

    Plain text is never encoded to special tokens, so a special token that only one tokenizer has is
    not a difference, while a shared special token with two ids is. Versions, post-processors,
    decoders, padding, truncation and the BPE dropout of training are ignored.
    """
    if fingerprint(one) == fingerprint(other):
        return None
    from tokenizers import Tokenizer

    written = []
    for values in (one, other):
        try:  # normalize both to the format of this library version
            text = json.dumps(values | {"version": "1.0"})
            values = json.loads(Tokenizer.from_str(text).to_str())
        except Exception:  # the library raises no narrower type
            return "content, as one of them cannot be loaded,"
        values["model"].pop("dropout", None)
        written.append(values)
    for part in ("normalizer", "pre_tokenizer", "model"):
        if written[0][part] != written[1][part]:
            return part
    ordinary, special = [], []
    for values in written:
        tokens = values["added_tokens"]
        ordinary.append([token for token in tokens if not token["special"]])
        special.append({token["content"]: token["id"] for token in tokens if token["special"]})
    shared = special[0].keys() & special[1].keys()
    names = [{number: content for content, number in ids.items()} for ids in special]
    taken = names[0].keys() & names[1].keys()
    agree = all(special[0][content] == special[1][content] for content in shared)
    agree = agree and all(names[0][number] == names[1][number] for number in taken)
    return None if ordinary[0] == ordinary[1] and agree else "added_tokens"


@dataclass(frozen=True)
class _Made:
    """Tokenizer of token files: the place that names the tokenizer, and its content if known."""

    origin: str
    sha256: str
    values: dict[str, Any] | None

    def difference(self, other: _Made) -> str | None:
        if self.sha256 == other.sha256:
            return None
        if self.values is None or other.values is None:
            return "content"
        return difference(self.values, other.values)


def _given(path: str) -> _Made:
    values = read_tokenizer_json(path)
    return _Made(path, fingerprint(values), values)


def _recorded(folder: Path, record: TokenizerRecord) -> _Made:
    """Return a manifest's tokenizer, with the adjacent tokenizer.json if it is the recorded one."""
    values = None
    if (folder / record.file).is_file():
        values = read_tokenizer_json(folder / record.file)
        values = values if fingerprint(values) == record.sha256 else None
    return _Made(str(folder / MANIFEST), record.sha256, values)


def recorded_as(path: str, folder: Path) -> str:
    """Return the fingerprint of the tokenizer in ``path`` for ``folder``'s manifest.

    The recorded fingerprint if both give the same ids, else the fingerprint of ``path``.
    """
    given, manifest = _given(path), read_manifest(folder)
    if manifest is None:
        return given.sha256
    recorded = _recorded(folder, manifest.tokenizer)
    return given.sha256 if given.difference(recorded) else recorded.sha256


def check_tokenizer(tokenizer_path: str | None, prefixes: Iterable[str]) -> None:
    """Raise UserError unless all token files were made with the same tokenizer, the given one.

    Tokenizers that differ only in parts that do not change ids are the same (``difference``). With
    ``tokenizer_path`` None, the files are only compared with each other. Files without a manifest
    of ``prepare`` cannot be checked, which is logged if a tokenizer was given.
    """
    expected = None if tokenizer_path is None else _given(tokenizer_path)
    same: set[str] = set()
    for prefix in prefixes:
        recorded = manifest_of(prefix)
        if recorded is None:
            if tokenizer_path is not None:
                _log.warning(
                    "no %s beside %s.bin: whether it was made with tokenizer %s is not known",
                    *(MANIFEST, prefix, tokenizer_path),
                )
            continue
        record = recorded[0].tokenizer
        if record.sha256 in same:
            continue
        made = _recorded(Path(prefix).parent, record)
        different = None if expected is None else expected.difference(made)
        if expected is not None and different is not None:
            raise UserError(
                f"token files {prefix} were made with another tokenizer (its {different} differs; "
                f"fingerprint {made.sha256[:12]} in {made.origin}) than {expected.origin} "
                f"(fingerprint {expected.sha256[:12]}); set data.tokenizer to the tokenizer.json "
                "beside the token files, or prepare them again with --tokenizer"
            )
        expected = expected or made
        same.add(record.sha256)


def check_vocabulary(model_vocab_size: int, stores: Iterable[TokenStore]) -> None:
    """Raise UserError if token ids of a store may exceed the model's embedding."""
    for store in stores:
        if store.vocab_bound > model_vocab_size:
            source = {
                "manifest": "its tokenizer has",
                "scan": "its largest token id asks for",
                "sample": "the largest token id in a sample of it asks for",
            }[store.vocab_bound_origin]
            raise UserError(
                f"model.vocab_size={model_vocab_size} is too small for token files "
                f"{store.prefix}: {source} {store.vocab_bound} rows; set model.vocab_size to "
                f"{store.vocab_bound} or more"
            )
