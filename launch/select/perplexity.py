"""``allometry select perplexity``: a store's documents by their loss under one of our own runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from allometry.configs.errors import UserError
from allometry.data.select.scores import write_scores
from allometry.data.store import TokenStore
from allometry.launch.command import Report
from allometry.launch.select.commands import Perplexity, Show
from allometry.launch.select.show import shown

if TYPE_CHECKING:
    from allometry.models.build import ComputeDtype

TYPES = ("fp32", "bf16")


def scored(asked: Perplexity) -> Report:
    """Score the documents, write the scores, and look at what a share keeps.

    Raises UserError: there is no such store or checkpoint, or they have different tokenizers.
    """
    if asked.dtype not in TYPES:
        raise UserError(f"--dtype={asked.dtype} is not known; use {' or '.join(TYPES)}")
    if (asked.keep is None) != (asked.side is None):
        raise UserError("--keep and --side belong together; give both, or neither")
    import torch

    from allometry.studies.perplexity import check_store, document_losses, has_read, open_scorer

    store = TokenStore(asked.store)
    device = torch.device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    scorer = open_scorer(asked.model, asked.step, device, cast("ComputeDtype", asked.dtype))
    check_store(scorer, asked.model, store)
    values, seconds = document_losses(scorer, store, asked.tokens_at_once)
    trained = has_read(scorer, store)
    settings = {**scorer.settings(), "dtype": asked.dtype, "trained_on_it": trained}
    out = write_scores(
        store, asked.name, values, settings, seconds=seconds, versions={"torch": torch.__version__}
    )
    look = Show(
        store=asked.store,
        scores=out.path,
        keep=asked.keep,
        side=asked.side,
        tokenizer=_tokenizer(asked.model),
    )
    report = shown(look)
    rate = seconds / (store.num_tokens / 1e6)
    lines = [
        report.text,
        f"{out.path}: mean loss of a document in nats per token, {rate:.3g} s for each million "
        f"tokens on {device.type}",
    ]
    warnings = []
    if trained:
        warnings.append(
            f"{asked.model} was trained on {asked.store}, and a model likes what it has learnt by "
            "heart: score each half of the documents with a run on the other"
        )
    lines += [f"warning: {one}" for one in warnings]
    facts = {"scores": str(out.path), "seconds_per_million_tokens": rate, "warnings": warnings}
    return Report({**report.facts, **facts}, "\n".join(lines))


def _tokenizer(run: Path) -> Path | None:
    """The tokenizer that a run's folder keeps, for samples of a store without one."""
    path = run / "tokenizer.json"
    return path if path.is_file() else None
