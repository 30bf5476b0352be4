"""BETR: scores by similarity to examples of a target (arXiv 2507.12466)."""

# N documents, E examples

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.configs import json_file
from allometry.configs.errors import UserError
from allometry.data.order import permutation
from allometry.data.select.features import (
    Ids,
    batches,
    drawn,
    embedder,
    hashed_bigrams,
    largest_id,
    read,
    require,
    stacked,
)
from allometry.data.store import TokenStore

_EPOCHS = 20
_EXAMPLES_AT_ONCE = 64


@dataclass(frozen=True)
class Target:
    """Examples of one benchmark or corpus, as token ids of the scored store."""

    name: str
    examples: list[Ids]


@dataclass(frozen=True)
class Betr:
    """Scores of all documents: the classifier's log-odds, NaN for empty documents.

    ``sampled``: documents that were ranked; ``near``: for each of them, True if it is in the class
    of documents near a target; ``weights_sha256``: hash of the classifier's weights.
    """

    scores: NDArray[np.float32]
    sampled: NDArray[np.int64]
    near: NDArray[np.bool_]
    examples: int
    weights_sha256: str


def best_ranks(documents: Any, examples: Any) -> NDArray[np.int64]:
    """Return the places of documents by their best rank over examples; 0 is the best.

    r_ij is the rank of document j by its cosine to example i; a document's rank is the minimum over
    i, with ties by its largest cosine, then by number. ``documents`` (N, F) and ``examples`` (E, F)
    have unit rows, sparse or dense. For example, with one example the places are the ranks by
    cosine.
    """
    count = documents.shape[0]
    best = np.full(count, count, np.int64)
    nearest = np.full(count, -np.inf, np.float32)
    for start in range(0, examples.shape[0], _EXAMPLES_AT_ONCE):
        cosines_EN = examples[start : start + _EXAMPLES_AT_ONCE] @ documents.T
        cosines_EN = cosines_EN.toarray() if hasattr(cosines_EN, "toarray") else cosines_EN
        for cosines_N in np.asarray(cosines_EN, np.float32):
            ranks = np.empty(count, np.int64)
            ranks[np.argsort(-cosines_N, kind="stable")] = np.arange(count)
            np.minimum(best, ranks, out=best)
            np.maximum(nearest, cosines_N, out=nearest)
    places = np.empty(count, np.int64)
    places[np.lexsort((-nearest, best))] = np.arange(count)
    return places


def equal_examples(targets: Sequence[Target], seed: int) -> list[Ids]:
    """Draw the same number of examples from each target: that of the smallest target."""
    least = min(len(target.examples) for target in targets)
    chosen = []
    for target in targets:
        order = permutation(f"target:{seed}:{target.name}", len(target.examples))
        chosen += [target.examples[number] for number in np.sort(order[:least]).tolist()]
    return chosen


def betr(
    store: TokenStore,
    targets: Sequence[Target],
    *,
    sample: int = 1_000_000,
    top: float = 0.1,
    kind: str = "tfidf",
    seed: int = 0,
) -> Betr:
    """Score the documents of ``store`` by their similarity to examples of ``targets``.

    ``sample`` documents are embedded and ranked; the best ``top`` of them are the positive class,
    and the same number of the others, drawn uniformly, the negative class. A linear classifier of
    hashed pairs of token ids (log loss) is trained on the classes and scores all documents. For
    example, ``betr(store, [read_target("mmlu.jsonl", ["question"], encode)]).scores``.

    Raises:
        UserError: scikit-learn is missing, the embedder is unknown, or there are too few documents.
    """
    linear = require("sklearn.linear_model")
    sampled = drawn(store, sample, seed)
    positives = round(top * len(sampled))
    if positives < 2 or positives >= len(sampled):
        raise UserError(
            f"{len(sampled)} documents with a share of {top:g} near the target are too few to "
            "learn from; score a store with more documents, or raise --sample or --top"
        )
    examples = equal_examples(targets, seed)
    most = max(int(ids.max(initial=0)) for ids in examples)
    embed = embedder(kind, [(store, sampled)], 1 + max(most, largest_id(store, sampled)))
    places = best_ranks(stacked(embed.rows, store, sampled), embed.rows(examples))
    near = places < positives
    others = np.flatnonzero(~near)
    others = others[permutation(f"others:{seed}", len(others))[:positives]]
    rows = np.concatenate((np.flatnonzero(near), others))
    classifier = linear.SGDClassifier(
        loss="log_loss", max_iter=_EPOCHS, tol=None, random_state=seed, average=True
    )
    rows.sort()
    classifier.fit(stacked(hashed_bigrams, store, sampled[rows]), near[rows])
    scores = np.full(store.num_documents, np.nan, np.float32)
    for part in batches(store, np.flatnonzero(store.lengths > 0)):
        scores[part] = classifier.decision_function(hashed_bigrams(read(store, part)))
    weights = np.concatenate((classifier.coef_.ravel(), classifier.intercept_)).astype("<f4")
    sha256 = hashlib.sha256(weights.tobytes()).hexdigest()
    return Betr(scores, sampled, near, len(examples), sha256)


def read_target(path: str, keys: Sequence[str], encode: Any) -> Target:
    """Read the examples in ``path``: a store's prefix, or JSON Lines with texts under ``keys``.

    ``encode``: text to ids, for JSON Lines; the texts of several keys are joined to one example,
    one per line.

    Raises:
        UserError: the file cannot be read, lacks a key, or has no examples.
    """
    if Path(f"{path}.idx").is_file():
        store = TokenStore(path)
        return Target(path, read(store, np.flatnonzero(store.lengths > 0)))
    examples: list[Ids] = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"target {path} cannot be read ({error}); give JSON Lines, or a store without .bin/.idx"
        ) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json_file.parse(line)
            text = "\n".join(str(record[key]) for key in keys if record[key] is not None)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"target {path}, line {number} has no example under {', '.join(keys)} "
                f"({type(error).__name__}: {error}); name the fields with --target-key"
            ) from None
        if text.strip():
            examples.append(np.array(encode(text), np.int64))
    if not examples:
        raise UserError(f"target {path} holds no example; give one with text")
    return Target(path, examples)
