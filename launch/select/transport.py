"""Optimal transport to a target, without training: ``allometry mix ot``, ``select ot``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.data.order import permutation
from allometry.data.select.betr import read_target
from allometry.data.select.features import (
    Ids,
    Sample,
    batches,
    drawn,
    embedder,
    largest_id,
    read,
    require,
    stacked,
)
from allometry.data.select.transport import (
    Floats,
    Screen,
    distance,
    documents_dual,
    screen,
    squared_distances,
)
from allometry.data.store import TokenStore
from allometry.data.stream import open_stream
from allometry.data.tokenizer import check_tokenizer
from allometry.launch.command import Report
from allometry.launch.select.commands import MixOt, Ot
from allometry.launch.select.near import Encode, write_shown
from allometry.launch.select.show import check_share
from allometry.launch.text import number, table


def screened(asked: MixOt) -> Report:
    """Compare the sources of a run by their distance to a target.

    Raises UserError: the data or the target cannot be used, or a package is missing.
    """
    _check_packages(asked.embedder)
    config = asked.load()
    stream = open_stream(config.data, config.run.seed)
    stores = dict(zip(stream.sources, stream.stores, strict=False))  # training before held-out
    if len(stores) < 2:
        raise UserError(
            f"{asked.config} has one source, which leaves no shares to compare; give "
            "data.sources at least two"
        )
    examples = _examples(asked, config, next(iter(stores.values())))
    shares_S = np.array(list(stream.mixture.shares().values()))
    begun = time.perf_counter()
    found = [
        _screen(asked, list(stores.values()), examples, shares_S, asked.seed + turn)
        for turn in range(asked.seeds)
    ]
    seconds = (time.perf_counter() - begun) / asked.seeds
    sources = {
        name: {
            "share": float(shares_S[s]),
            "distance": _spread([one.alone[s] for one in found]),
            "slope": _spread([one.slopes[s] for one in found]),
            "least": _spread([one.shares[s] for one in found]),
        }
        for s, name in enumerate(stores)
    }
    facts = {
        "target": asked.target,
        "examples": min(asked.samples, len(examples)),
        "samples": asked.samples,
        "seeds": asked.seeds,
        "embedder": asked.embedder,
        "sources": sources,
        "mixture": _spread([one.mixture for one in found]),
        "least": _spread([one.least for one in found]),
        "bound": _spread([one.bound for one in found]),
        "seconds": seconds,
    }
    return Report(facts, _text(facts))


def _screen(
    asked: MixOt,
    stores: Sequence[TokenStore],
    examples: Sequence[Ids],
    shares_S: Floats,
    seed: int,
) -> Screen:
    """Draw documents and examples by one seed, and compare them."""
    samples = [(store, drawn(store, asked.samples, seed)) for store in stores]
    rows = _Rows(asked.embedder, samples, _some(examples, asked.samples, seed))
    return screen([rows.costs(*sample) for sample in samples], shares_S)


def scored(asked: Ot) -> Report:
    """Score documents by their dual value of the transport from a base to a target (GOT-D).

    Raises UserError: the stores or the target cannot be used, or a package is missing.
    """
    _check_packages(asked.embedder)
    side = None if asked.keep is None else "bottom"
    check_share(asked.keep, side)
    store, base = TokenStore(asked.store), TokenStore(asked.base)
    examples = _some(
        read_target(
            asked.target, asked.target_keys or ("text",), Encode(store, asked.tokenizer)
        ).examples,
        asked.samples,
        asked.seed,
    )
    begun = time.perf_counter()
    filled = np.flatnonzero(store.lengths > 0)
    sample = base, drawn(base, asked.samples, asked.seed)
    rows = _Rows(asked.embedder, [sample], examples, largest_id(store, filled))
    costs_NM = rows.costs(*sample)
    before, target_M = distance(costs_NM, np.full(len(costs_NM), 1.0 / len(costs_NM)))
    scores = np.full(store.num_documents, np.nan, np.float32)
    for part in batches(store, filled):
        scores[part] = documents_dual(rows.costs(store, part), target_M)
    seconds = time.perf_counter() - begun
    settings = {
        "base": str(asked.base),
        "target": asked.target,
        "examples": len(examples),
        "samples": len(sample[1]),
        "distance": before,
        "embedder": asked.embedder,
        "seed": asked.seed,
    }
    what = (
        f"derivative of the distance {number(before)} of {asked.base} to {asked.target} by the "
        "share of a document"
    )
    versions = {"POT": str(require("ot", "POT").__version__)}
    return write_shown(asked, store, scores, settings, seconds, what, side, versions)


class _Rows:
    """Costs of documents to the examples of a target, by one embedder."""

    def __init__(
        self, kind: str, samples: Sequence[Sample], examples: Sequence[Ids], largest: int = 0
    ) -> None:
        ids = [largest, *(int(one.max(initial=0)) for one in examples)]
        ids += [largest_id(*sample) for sample in samples]
        self._embed = embedder(kind, samples, 1 + max(ids))
        self._target = self._embed.rows(examples)

    def costs(self, store: TokenStore, documents: Any) -> Floats:
        """Return the costs (documents, examples)."""
        return squared_distances(stacked(self._embed.rows, store, documents), self._target)


def _check_packages(kind: str) -> None:
    require("ot", "POT")
    if kind == "tfidf":
        require("sklearn")


def _check_tokenizers(store: TokenStore, *others: str) -> None:
    """Raise UserError if other stores (files of examples are none) have another tokenizer."""
    stores = [other for other in others if Path(f"{other}.idx").is_file()]
    check_tokenizer(None, [store.prefix, *stores])


def _examples(asked: MixOt, config: RunConfig, store: TokenStore) -> list[Ids]:
    """Return the examples of a target: held-out documents of a source, or those of a file."""
    held_out = {source.name: source.validation for source in config.data.sources}
    if asked.target not in held_out:
        _check_tokenizers(store, asked.target)
        encode = Encode(store, asked.tokenizer)
        return read_target(asked.target, asked.target_keys or ("text",), encode).examples
    path = held_out[asked.target]
    if path is None:
        raise UserError(
            f"--target={asked.target} is a source without held-out documents; give its validation, "
            "or name a file of examples"
        )
    target = TokenStore(path)  # open_stream has checked its tokenizer
    return read(target, np.flatnonzero(target.lengths > 0))


def _some(examples: Sequence[Ids], count: int, seed: int) -> list[Ids]:
    order = permutation(f"target:{seed}", len(examples))
    return [examples[at] for at in np.sort(order[:count]).tolist()]


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean and, of several values, the sample standard deviation."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "deviation": deviation}


def _text(facts: dict[str, Any]) -> str:
    def said(one: dict[str, float | None], digits: int = 4) -> str:
        deviation = one["deviation"]
        text = number(one["mean"], digits)
        return text if deviation is None else f"{text} ± {number(deviation, 2)}"

    rows = [["source", "share", "distance", "slope", "share of the least distance"]]
    for name, one in facts["sources"].items():
        share = f"{one['share']:.3f}"
        rows.append([name, share, said(one["distance"]), said(one["slope"]), said(one["least"], 3)])
    lines = [
        table(rows),
        f"mixture: {said(facts['mixture'])}; least: {said(facts['least'])}, of all mixtures at "
        f"least {said(facts['bound'])} (squared distance of embeddings, {facts['seeds']} draws of "
        f"{facts['samples']:,} documents and {facts['examples']:,} examples, "
        f"{facts['seconds']:.3g} s each)",
    ]
    return "\n".join(lines)
