"""Do the tokens fit the tokenizer and the model?"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from allometry.configs.errors import UserError
from allometry.data.manifest import MANIFEST, manifest_of
from allometry.data.store import TokenStore

_log = logging.getLogger(__name__)


def read_tokenizer_json(path: str | Path) -> dict[str, Any]:
    """The content of a tokenizer.json; UserError when it is missing or is none."""
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"tokenizer {path} does not exist; give the path of a tokenizer.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"tokenizer {path} is not JSON ({error}); give a tokenizer.json") from error
    if not isinstance(values, dict) or "model" not in values:
        raise UserError(
            f"tokenizer {path} has no 'model': it is not a tokenizer.json of the tokenizers "
            "library; save it in that format"
        )
    return values


def fingerprint(tokenizer: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON: equal for equal content, however it was written."""
    text = json.dumps(tokenizer, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def check_tokenizer(tokenizer_path: str | None, prefixes: Iterable[str]) -> None:
    """Raise UserError unless the token files were made with one tokenizer, the one given.

    ``tokenizer_path`` None checks only that the files agree with each other. Files without a
    manifest of ours cannot be checked, which is logged when a tokenizer was given.
    """
    expected = None
    if tokenizer_path is not None:
        expected = (tokenizer_path, fingerprint(read_tokenizer_json(tokenizer_path)))
    for prefix in prefixes:
        recorded = manifest_of(prefix)
        if recorded is None:
            if tokenizer_path is not None:
                _log.warning(
                    "no %s beside %s.bin: whether it was made with tokenizer %s is not known",
                    *(MANIFEST, prefix, tokenizer_path),
                )
            continue
        sha256 = recorded[0].tokenizer.sha256
        origin = f"{Path(prefix).parent / MANIFEST}"
        if expected is None:
            expected = (origin, sha256)
        elif sha256 != expected[1]:
            raise UserError(
                f"token files {prefix} were made with another tokenizer (fingerprint {sha256[:12]} "
                f"in {origin}) than {expected[0]} (fingerprint {expected[1][:12]}); set "
                "data.tokenizer to the tokenizer.json beside the token files, or prepare them "
                "again with --tokenizer"
            )


def check_vocabulary(model_vocab_size: int, stores: Iterable[TokenStore]) -> None:
    """Raise UserError if a store's token ids may reach beyond the model's embedding."""
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
