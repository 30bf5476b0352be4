"""Text of a store's documents, decoded from their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from allometry.data.manifest import manifest_of
from allometry.data.tokenizer import tokenizer_file

Decode = Callable[[Sequence[int]], str]


def decoder(path: Path) -> Decode:
    """Return a function from ids to text by the tokenizer.json at ``path``.

    Special tokens are left out of the text.
    """
    from allometry.data.special_tokens import load_tokenizer

    tokenizer = load_tokenizer(path)
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))


def tokenizer_path(prefix: str, given: str | Path | None = None) -> Path | None:
    """Return the tokenizer.json of a store: ``given``, else from its manifest, else None."""
    if given is not None:
        return tokenizer_file(given)
    recorded = manifest_of(prefix)
    if recorded is None:
        return None
    path = Path(prefix).parent / recorded[0].tokenizer.file
    return path if path.is_file() else None


def decoder_of(prefix: str, given: str | Path | None = None) -> Decode | None:
    """Return the decoder of a store: by ``given``, else by its manifest's tokenizer, else None."""
    path = tokenizer_path(prefix, given)
    return None if path is None else decoder(path)


def line_of(text: str, most: int = 120) -> str:
    """Return ``text`` on one line, cut to ``most`` characters.

    For example, ``line_of("a\\nb")`` is "a b".
    """
    words = "".join(c if c.isprintable() else " " for c in text)
    line = " ".join(words.split())
    return line if len(line) <= most else line[: most - 1] + "…"
