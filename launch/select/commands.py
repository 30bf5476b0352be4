"""Commands that score documents and look at what a share by scores keeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from allometry.launch.command import REQUIRED, Command, argument, option


@dataclass(frozen=True, kw_only=True)
class Show(Command):
    """Say where scores of STORE come from and what a share of its tokens by them keeps."""

    store: Path = argument("token files, without .bin/.idx")
    scores: Path = argument("their scores (.scores.npy)")
    keep: float | None = option("share of the tokens that is kept")
    side: str | None = option("which scores: top, middle or bottom")
    tokenizer: Path | None = option("tokenizer.json to show text with; default: the store's own")


@dataclass(frozen=True, kw_only=True)
class Import(Command):
    """Write scores of STORE that were made elsewhere: a number for each document, in its order."""

    store: Path = argument("token files, without .bin/.idx")
    values: Path = argument("numbers: .npy (one row), or text with a number a line (nan: none)")
    scorer: str = option("name of what made them", REQUIRED)
    settings: tuple[str, ...] = option("KEY=VALUE to record of it; repeat for more", (), "--with")


@dataclass(frozen=True, kw_only=True)
class Perplexity(Command):
    """Score the documents of STORE by their mean loss under a run of ours."""

    store: Path = argument("token files, without .bin/.idx")
    model: Path = option("folder of the run to score with", REQUIRED)
    step: int | None = option("of its checkpoints; default: the latest")
    keep: float | None = option("also say what this share of the tokens keeps")
    side: str | None = option("of it: top (the largest losses), middle or bottom")
    name: str = option("name of the scores", "perplexity")
    device: str | None = option("cpu or cuda; default: a GPU, if there is one")
    dtype: str = option("to compute in: fp32 or bf16", "fp32")
    tokens_at_once: int = option("tokens that a forward pass takes", 8192, min=1)
