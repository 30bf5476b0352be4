"""Commands that score documents and show the documents that a selection by score keeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from allometry.launch.command import REQUIRED, Command, argument, option


@dataclass(frozen=True, kw_only=True)
class Show(Command):
    """Show the origin of scores of STORE and the documents that a share by these scores keeps."""

    store: Path = argument("token files, without .bin/.idx")
    scores: Path = argument("their scores (.scores.npy)")
    keep: float | None = option("share of the tokens that is kept")
    side: str | None = option("which scores: top, middle or bottom")
    tokenizer: Path | None = option("tokenizer.json to show text with; default: the store's own")


@dataclass(frozen=True, kw_only=True)
class Import(Command):
    """Write scores of STORE from another program: a number for each document, in order."""

    store: Path = argument("token files, without .bin/.idx")
    values: Path = argument("numbers: .npy (one row), or text with a number a line (nan: none)")
    scorer: str = option("name of what made them", REQUIRED)
    settings: tuple[str, ...] = option("KEY=VALUE to record of it; repeat for more", (), "--with")


@dataclass(frozen=True, kw_only=True)
class Perplexity(Command):
    """Score the documents of STORE by their mean loss under a run.

    With several runs each document is scored by the runs that have not read it.
    """

    store: Path = argument("token files, without .bin/.idx")
    models: tuple[Path, ...] = option("folder of a run; repeat for more", (), "--model")
    step: int | None = option("of their checkpoints; default: the latest")
    keep: float | None = option("also say what this share of the tokens keeps")
    side: str | None = option("of it: top (the largest losses), middle or bottom")
    name: str = option("name of the scores", "perplexity")
    device: str | None = option("cpu or cuda; default: a GPU, if there is one")
    dtype: str = option("to compute in: fp32 or bf16", "fp32")
    tokens_at_once: int = option("tokens that a forward pass takes", 8192, min=1)


@dataclass(frozen=True, kw_only=True)
class Random(Command):
    """Score the documents of STORE at random, for a control selection or for two random halves."""

    store: Path = argument("token files, without .bin/.idx")
    seed: int = option("of the numbers", 0, min=0)
    name: str = option("name of the scores", "random")


@dataclass(frozen=True, kw_only=True)
class Betr(Command):
    """Score the documents of STORE by similarity to examples of a target (2507.12466).

    Never use test sets as targets. Requires the extra: pip install 'allometry[select]'.
    """

    store: Path = argument("token files, without .bin/.idx")
    targets: tuple[str, ...] = option(
        "JSON Lines of examples, or a store without .bin/.idx; repeat for more",
        (),
        "--target",
        paths=True,
    )
    target_keys: tuple[str, ...] = option(
        "fields of an example, which are one text; repeat for more; default: text",
        (),
        "--target-key",
    )
    sample: int = option("documents that are ranked", 1_000_000, min=2)
    top: float = option("share of these that count as near", 0.1)
    embedder: str = option("tfidf, or static:FOLDER (.safetensors and tokenizer.json)", "tfidf")
    keep: float | None = option("also say what this share of the tokens keeps, at --side top")
    tokenizer: Path | None = option("tokenizer.json of STORE; default: the one beside it")
    seed: int = option("of the sample", 0, min=0)
    name: str = option("name of the scores", "betr")


@dataclass(frozen=True, kw_only=True)
class Prototypes(Command):
    """Score the documents of STORE by their distance to the nearest of K cluster centres.

    Near duplicates get no score, so that no share keeps them (arXiv 2206.14486, 2308.12284).
    Requires the extra: pip install 'allometry[select]'.
    """

    store: Path = argument("token files, without .bin/.idx")
    k: int = option("clusters", 1000, min=1)
    sample: int = option("documents that centres are made of", 1_000_000, min=2)
    embedder: str = option("tfidf, or static:FOLDER (.safetensors and tokenizer.json)", "tfidf")
    duplicates: float = option("cosine from which documents are duplicates; above 1: none", 0.95)
    keep: float | None = option("also say what this share of the tokens keeps")
    side: str | None = option("of it: top (far from centres, hard), middle or bottom (easy)")
    seed: int = option("of the sample and the clusters", 0, min=0)
    name: str = option("name of the scores", "prototypes")
