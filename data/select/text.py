"""The text of a store's documents, from their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from allometry.data.manifest import manifest_of
from allometry.data.tokenizer import tokenizer_file

Decode = Callable[[Sequence[int]], str]


def decoder(path: Path) -> Decode:
    """What makes text of ids by the tokenizer.json at ``path``; special tokens are left out."""
    from allometry.data.special_tokens import load_tokenizer

    tokenizer = load_tokenizer(path)
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))


def tokenizer_path(prefix: str, given: str | Path | None = None) -> Path | None:
    """The tokenizer.json of a store: the one ``given``, else that of its manifest; or None."""
    if given is not None:
        return tokenizer_file(given)
    recorded = manifest_of(prefix)
    if recorded is None:
        return None
    path = Path(prefix).parent / recorded[0].tokenizer.file
    return path if path.is_file() else None


def decoder_of(prefix: str, given: str | Path | None = None) -> Decode | None:
    """The decoder of a store: by the tokenizer ``given``, else by that of its manifest; or None."""
    path = tokenizer_path(prefix, given)
    return None if path is None else decoder(path)


def line_of(text: str, most: int = 120) -> str:
    """``text`` on one line, cut."""
    words = "".join(c if c.isprintable() else " " for c in text)
    line = " ".join(words.split())
    return line if len(line) <= most else line[: most - 1] + "…"
