"""Commands that score documents and show the documents that a selection by score keeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from allometry.launch.command import REQUIRED, Command, ConfigCommand, argument, option


@dataclass(frozen=True, kw_only=True)
class Show(Command):
    """Show the origin of scores of STORE and the documents that a share by these scores keeps."""

    store: Path = argument("path of the token files, without .bin/.idx")
    scores: Path = argument("path of the document scores (.scores.npy)")
    keep: float | None = option("fraction of the tokens to keep")
    side: str | None = option("scores to keep: top, middle or bottom")
    tokenizer: Path | None = option("tokenizer.json to decode the text; default: the store's own")


@dataclass(frozen=True, kw_only=True)
class Import(Command):
    """Write scores of STORE from another program: a number for each document, in order."""

    store: Path = argument("path of the token files, without .bin/.idx")
    values: Path = argument(
        "scores: .npy (one row), or text with one number per line (nan: no score)"
    )
    scorer: str = option("name of the program or model that computed the scores", REQUIRED)
    settings: tuple[str, ...] = option(
        "KEY=VALUE to record about the scorer; repeat for more", (), "--with"
    )


@dataclass(frozen=True, kw_only=True)
class Perplexity(Command):
    """Score the documents of STORE by their mean loss under a run.

    With several runs each document is scored by the runs that have not read it.
    """

    store: Path = argument("path of the token files, without .bin/.idx")
    models: tuple[Path, ...] = option("run folder; repeat for more", (), "--model")
    step: int | None = option("step of the runs' checkpoints; default: the latest")
    keep: float | None = option(
        "fraction of the tokens for which to report the kept documents as well"
    )
    side: str | None = option("with --keep: top (the largest losses), middle or bottom")
    name: str = option("name of the scores", "perplexity")
    device: str | None = option("cpu or cuda; default: a GPU if available")
    dtype: str = option("type of the computation: fp32 or bf16", "fp32")
    tokens_at_once: int = option("number of tokens in a forward pass", 8192, min=1)


@dataclass(frozen=True, kw_only=True)
class Random(Command):
    """Score the documents of STORE at random, for a control selection or for two random halves."""

    store: Path = argument("path of the token files, without .bin/.idx")
    seed: int = option("seed of the random scores", 0, min=0)
    name: str = option("name of the scores", "random")


@dataclass(frozen=True, kw_only=True)
class Betr(Command):
    """Score the documents of STORE by similarity to examples of a target (2507.12466).

    Never use test sets as targets. Requires the extra: pip install 'allometry[select]'.
    """

    store: Path = argument("path of the token files, without .bin/.idx")
    targets: tuple[str, ...] = option(
        "JSON Lines of examples, or a store without .bin/.idx; repeat for more",
        (),
        "--target",
        paths=True,
    )
    target_keys: tuple[str, ...] = option(
        "field of an example; the fields are joined into one text; repeat for more; default: text",
        (),
        "--target-key",
    )
    sample: int = option("number of documents to rank", 1_000_000, min=2)
    top: float = option("fraction of the ranked documents that count as near", 0.1)
    embedder: str = option(
        "embedding: tfidf, or static:FOLDER (.safetensors and tokenizer.json)", "tfidf"
    )
    keep: float | None = option(
        "fraction of the tokens for which to report the kept documents, with side top"
    )
    tokenizer: Path | None = option("tokenizer.json of STORE; default: the one next to it")
    seed: int = option("seed of the sample", 0, min=0)
    name: str = option("name of the scores", "betr")


@dataclass(frozen=True, kw_only=True)
class Prototypes(Command):
    """Score the documents of STORE by their distance to the nearest of K cluster centres.

    Near duplicates get no score, so that no share keeps them (arXiv 2206.14486, 2308.12284).
    Requires the extra: pip install 'allometry[select]'.
    """

    store: Path = argument("path of the token files, without .bin/.idx")
    k: int = option("number of clusters", 1000, min=1)
    sample: int = option("number of documents from which centres are computed", 1_000_000, min=2)
    embedder: str = option(
        "embedding: tfidf, or static:FOLDER (.safetensors and tokenizer.json)", "tfidf"
    )
    duplicates: float = option("minimum cosine similarity of duplicates; above 1: none", 0.95)
    keep: float | None = option(
        "fraction of the tokens for which to report the kept documents as well"
    )
    side: str | None = option("with --keep: top (far from centres, hard), middle or bottom (easy)")
    seed: int = option("seed of the sample and the clusters", 0, min=0)
    name: str = option("name of the scores", "prototypes")


@dataclass(frozen=True, kw_only=True)
class Ot(Command):
    """Score the documents of STORE by optimal transport from a base to a target (2405.02774).

    The lowest scores reduce the distance of the base (the data already read) most. Never use test
    sets as targets. Requires the extra: pip install 'allometry[select]'.
    """

    store: Path = argument("path of the token files, without .bin/.idx")
    base: Path = option("token files of the data already read, without .bin/.idx", REQUIRED)
    target: str = option(
        "JSON Lines of examples, or a store without .bin/.idx", REQUIRED, paths=True
    )
    target_keys: tuple[str, ...] = option(
        "field of an example; the fields are joined into one text; repeat for more; default: text",
        (),
        "--target-key",
    )
    samples: int = option("number of documents of the base, and largest of examples", 2000, min=2)
    embedder: str = option(
        "embedding: tfidf, or static:FOLDER (.safetensors and tokenizer.json)", "tfidf"
    )
    keep: float | None = option(
        "fraction of the tokens for which to report the kept documents, with side bottom"
    )
    tokenizer: Path | None = option("tokenizer.json of STORE; default: the one next to it")
    seed: int = option("seed of the samples", 0, min=0)
    name: str = option("name of the scores", "ot")


@dataclass(frozen=True, kw_only=True)
class MixOt(ConfigCommand):
    """Compare the sources of CONFIG by their optimal transport distance to a target.

    This is a screen without training: the distance of each source, the change of the mixture's
    distance by each share, and the shares of the least distance. Requires the extra: pip install
    'allometry[select]'.
    """

    target: str = option(
        "name of a source, for its held-out documents; or JSON Lines, or a store without .bin/.idx",
        REQUIRED,
        paths=True,
    )
    target_keys: tuple[str, ...] = option(
        "field of an example; the fields are joined into one text; repeat for more; default: text",
        (),
        "--target-key",
    )
    samples: int = option(
        "largest number of documents of each source, and of examples", 2000, min=2
    )
    seeds: int = option("number of draws of the samples, for standard deviations", 3, min=1)
    embedder: str = option(
        "embedding: tfidf, or static:FOLDER (.safetensors and tokenizer.json)", "tfidf"
    )
    tokenizer: Path | None = option("tokenizer.json of examples; default: the one of the sources")
    seed: int = option("seed of the first draw", 0, min=0)
