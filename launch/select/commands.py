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
