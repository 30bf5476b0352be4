"""Scores of a store's documents by their loss under a run: ``allometry select perplexity``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from allometry.configs.errors import UserError
from allometry.data.select.scores import write_scores
from allometry.data.store import TokenStore
from allometry.launch.command import Report
from allometry.launch.select.commands import Perplexity, Show
from allometry.launch.select.show import check_share, shown

if TYPE_CHECKING:
    from allometry.models.build import ComputeDtype

TYPES = ("fp32", "bf16")


def scored(asked: Perplexity) -> Report:
    """Score the documents, write the scores, and show the documents that a share keeps.

    Raises UserError: the store or a checkpoint is missing, or their tokenizers differ.
    """
    _check(asked)
    import torch

    from allometry.studies.perplexity import (
        check_store,
        document_losses,
        documents_read,
        losses_of_strangers,
        open_scorer,
    )

    store = TokenStore(asked.store)
    device = torch.device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = cast("ComputeDtype", asked.dtype)
    scorers = [open_scorer(run, asked.step, device, dtype) for run in asked.models]
    for run, scorer in zip(asked.models, scorers, strict=True):
        check_store(scorer, run, store)
    own = 0
    if len(scorers) == 1:
        values, seconds = document_losses(scorers[0], store, asked.tokens_at_once)
        own = int(documents_read(scorers[0], store).sum())
    else:
        values, seconds = losses_of_strangers(scorers, store, asked.tokens_at_once)
    runs = [one.settings() for one in scorers]
    settings = {"runs": runs, "dtype": asked.dtype, "scored_by_their_own_run": own}
    out = write_scores(
        store, asked.name, values, settings, seconds=seconds, versions={"torch": torch.__version__}
    )
    look = Show(
        store=asked.store,
        scores=out.path,
        keep=asked.keep,
        side=asked.side,
        tokenizer=_tokenizer(asked.models[0]),
    )
    report = shown(look)
    rate = seconds / (store.num_tokens / 1e6)
    lines = [
        report.text,
        f"{out.path}: mean loss of a document in nats per token, {rate:.3g} s for each million "
        f"tokens on {device.type}",
    ]
    warnings = []
    if own:
        warnings.append(
            f"{asked.models[0]} was trained on {own:,} of these documents, and a model likes what "
            "it has learnt by heart: give two runs, each trained on another half of them "
            "(allometry select random)"
        )
    lines += [f"warning: {one}" for one in warnings]
    facts = {"scores": str(out.path), "seconds_per_million_tokens": rate, "warnings": warnings}
    return Report({**report.facts, **facts}, "\n".join(lines))


def _check(asked: Perplexity) -> None:
    if asked.dtype not in TYPES:
        raise UserError(f"--dtype={asked.dtype} is not known; use {' or '.join(TYPES)}")
    check_share(asked.keep, asked.side)
    if not asked.models:
        raise UserError("--model names no run; give the folder of one, or of several")


def _tokenizer(run: Path) -> Path | None:
    """Return the tokenizer in a run's folder, for samples of a store without a tokenizer."""
    path = run / "tokenizer.json"
    return path if path.is_file() else None
