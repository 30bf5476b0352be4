"""Scores of documents by distances of embeddings: ``allometry select betr``, ``prototypes``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.data.manifest import manifest_of
from allometry.data.select.betr import betr, read_target
from allometry.data.select.features import require
from allometry.data.select.prototypes import prototypes
from allometry.data.select.scores import write_scores
from allometry.data.select.text import tokenizer_path
from allometry.data.store import TokenStore
from allometry.launch.command import Report
from allometry.launch.select.commands import Betr, Ot, Prototypes, Show
from allometry.launch.select.show import check_share, shown


def near_targets(asked: Betr) -> Report:
    """Score by similarity to targets. Raises UserError: targets or documents cannot be used."""
    require("sklearn")
    side = None if asked.keep is None else "top"
    check_share(asked.keep, side)
    if not asked.targets:
        raise UserError("--target names nothing; give JSON Lines of examples, or a store")
    if not 0.0 < asked.top < 1.0:
        raise UserError(f"--top={asked.top:g} must be a share, above 0 and below 1")
    store = TokenStore(asked.store)
    encode = Encode(store, asked.tokenizer)
    keys = asked.target_keys or ("text",)
    targets = [read_target(path, keys, encode) for path in asked.targets]
    begun = time.perf_counter()
    found = betr(
        store, targets, sample=asked.sample, top=asked.top, kind=asked.embedder, seed=asked.seed
    )
    seconds = time.perf_counter() - begun
    settings = {
        "targets": list(asked.targets),
        "examples": found.examples,
        "sample": len(found.sampled),
        "top": asked.top,
        "embedder": asked.embedder,
        "seed": asked.seed,
        "classifier_sha256": found.weights_sha256,
    }
    what = f"log-odds of being near one of {found.examples:,} examples"
    return write_shown(asked, store, found.scores, settings, seconds, what, side, _versions())


def near_centres(asked: Prototypes) -> Report:
    """Score by distance to cluster centres. Raises UserError: there are too few documents."""
    require("sklearn")
    check_share(asked.keep, asked.side)
    store = TokenStore(asked.store)
    begun = time.perf_counter()
    found = prototypes(
        store,
        asked.k,
        sample=asked.sample,
        kind=asked.embedder,
        duplicates_from=None if asked.duplicates > 1.0 else asked.duplicates,
        seed=asked.seed,
    )
    seconds = time.perf_counter() - begun
    settings = {
        "k": asked.k,
        "sample": asked.sample,
        "embedder": asked.embedder,
        "duplicates_from": asked.duplicates,
        "duplicates": found.duplicates,
        "seed": asked.seed,
    }
    what = (
        f"distance to the nearest of {asked.k:,} centres; {found.duplicates:,} near duplicates "
        "have no score"
    )
    return write_shown(asked, store, found.scores, settings, seconds, what, asked.side, _versions())


class Encode:
    """Encoder of text with a store's tokenizer, which is loaded at the first call."""

    def __init__(self, store: TokenStore, given: Path | None) -> None:
        self._store, self._given = store, given
        self._encoder: Any = None

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text. Raises UserError: the store's tokenizer is not known."""
        if self._encoder is None:
            from allometry.data.encode import Encoder

            path = tokenizer_path(self._store.prefix, self._given)
            recorded = manifest_of(self._store.prefix)
            if path is None or recorded is None:
                raise UserError(
                    f"examples in JSON Lines need the tokenizer of {self._store.prefix}, beside "
                    "which there is no manifest.json; give a store of examples"
                )
            self._encoder = Encoder(str(path), recorded[0].tokenizer.end_of_document_id)
        ids: list[int] = self._encoder(text)
        return ids


def _versions() -> dict[str, str]:
    return {"scikit-learn": str(require("sklearn").__version__)}


def write_shown(
    asked: Betr | Prototypes | Ot,
    store: TokenStore,
    scores: NDArray[np.float32],
    settings: Mapping[str, Any],
    seconds: float,
    what: str,
    side: str | None,
    versions: Mapping[str, str],
) -> Report:
    """Write scores and show the documents that a share keeps."""
    out = write_scores(store, asked.name, scores, settings, seconds=seconds, versions=versions)
    report = shown(Show(store=asked.store, scores=out.path, keep=asked.keep, side=side))
    rate = seconds / (store.num_tokens / 1e6)
    text = f"{report.text}\n{out.path}: {what}, {rate:.3g} s for each million tokens"
    facts = {"scores": str(out.path), "seconds_per_million_tokens": rate}
    return Report({**report.facts, **facts}, text)
